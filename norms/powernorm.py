"""PowerNorm. Shen et al., arXiv 2003.07845, in the form of their code.

The t-th batch of B images, per channel, with q = mean(x^2) over images and positions:

    z = x / sqrt(q + eps) for t <= warmup, x / sqrt(phi + eps) afterwards, by phi from before
    y = gamma * z + beta
    phi <- phi (t - 1) / t + q / t, for t < warmup alone, and then phi <- a phi + (1 - a) q

and backward, with g = gamma * dL/dy:

    h = g - (1 - b) Gamma z        Gamma <- Gamma + mean(h * z)        dL/dx = h / sqrt(q + eps)

by q of the batch, also after the warm-up. At test time y = gamma * x / sqrt(phi + eps) + beta. The
mean is not removed. This backward pass is not the derivative of the forward one. The method is one
of language models; what it is in front of maps is ours, see docs/methods/powernorm.md.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import moments as m
from .backward import check_float16, move_state, state_before, vmap_error
from .layer import SquareNorm
from .scheme import CONV, Scheme, conv


class _PowerNorm(torch.autograd.Function):
    """y = weight * scale * x + bias, and its gradient, for all groups of a batch at once.

    x: (N, C, *); weight, bias: (C,); scale, inverse, square: (G, C), the factor from x to z,
    1 / sqrt(q + eps) and q. `gamma`, (C,), is Gamma.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, inverse: Tensor, square: Tensor,
        gamma: Tensor, decay: float, frozen: bool,
    ) -> Tensor:  # fmt: skip
        return m.scale_and_shift(x, weight * scale, bias[None])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, *numbers, gamma, ctx.decay, ctx.frozen = inputs
        ctx.save_for_backward(x, weight, *numbers)
        ctx.state, ctx.before = (gamma,), None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (gamma,) = state_before(ctx, "PowerNorm2d", dy)
        x, weight, scale, inverse, square = ctx.saved_tensors
        gradients, moved = gradients_of(dy, x, weight, scale, inverse, square, gamma, ctx.decay)
        gradients = move_state(ctx, "PowerNorm2d", gradients, [moved], (dy, x, weight))
        return *gradients, *(None for _ in range(6))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise vmap_error("PowerNorm2d")


def gradients_of(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, inverse: Tensor, square: Tensor,
    gamma: Tensor, decay: float,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """The gradients of x, weight and bias, and Gamma after all groups."""
    total, product = m.sum_maps(m.promote(dy)), m.sum_maps(m.promote(dy) * x)
    total, product = m.sum_groups(total, len(scale)), m.sum_groups(product, len(scale)) * scale
    gz = weight * product * (total.numel() / x.numel())  # mean of g * z
    z2 = square * scale.square()  # mean of z^2
    gammas = []
    for t in range(len(scale)):
        gammas.append(gamma)
        gamma = gamma + gz[t] - (1 - decay) * gamma * z2[t]
    b = -(1 - decay) * torch.stack(gammas) * scale * inverse  # of x
    a, b = (m.over_images(v, x) for v in m.realized(weight * inverse, b))
    return [(dy * a + x * b).to(x.dtype), product.sum(0), total.sum(0)], gamma


class PowerNorm2d(SquareNorm):
    """PowerNorm over groups of `batch_size` images (None: all of a batch).

    Shapes: (N, C, *) -> (N, C, *); in training N must be a multiple of `batch_size`. `warmup`
    counts batches of `batch_size` images; `alpha_forward` and `alpha_backward` are a and b, weights
    of the old values; 1 - a is kept as `momentum`.
    """

    state = {"running_square": 1.0, "gradient_product": 0.0, "num_batches_averaged": 0}
    gradient_product: Tensor  # Gamma
    num_batches_averaged: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        alpha_forward: float = 0.9,
        alpha_backward: float = 0.9,
        warmup: int = 1000,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(num_features, batch_size, eps, 1 - alpha_forward, affine, device, dtype)
        self.alpha_backward, self.warmup = alpha_backward, warmup

    def normalize(self, x: Tensor) -> Tensor:
        check_float16("PowerNorm2d", x)
        groups = m.count_groups(x, self.batch_size)
        square = m.sum_groups(m.mean_square(x.detach()), groups) * (groups / x.shape[0])
        numbers = self.once(self.update, square)
        weight, bias = self.gain_and_shift()
        return _PowerNorm.apply(
            x, weight, bias, *numbers, self.gradient_product, self.alpha_backward,
            self.momentum == 0,
        )  # fmt: skip

    @torch.no_grad()
    def update(self, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From q of every group to the factor of its x, 1 / sqrt(q + eps) and q, (G, C); moves
        phi."""
        count, phi, before = self.num_batches_averaged, self.running_square, []
        step = count + torch.arange(1, len(square) + 1, device=square.device)[:, None]
        if self.momentum is None:  # the mean of all batches, as PyTorch's tools ask for it
            rates = 1 / step.to(square.dtype)
        else:
            a = 1 - self.momentum
            rates = torch.where(step < self.warmup, 1 - a * (step - 1) / step, 1 - a)
        for q, rate in zip(square, rates.to(square.dtype), strict=True):
            before.append(phi)
            phi = (1 - rate) * phi + rate * q
        by_phi = torch.rsqrt(torch.stack(before) + self.eps)
        inverse = torch.rsqrt(square + self.eps)
        self.commit(running_square=phi, num_batches_averaged=count + len(square))
        return torch.where(step <= self.warmup, inverse, by_phi), inverse, square


def scheme(
    batch_size: int | None = None,
    alpha_forward: float = 0.9,
    alpha_backward: float = 0.9,
    warmup: int = 1000,
    eps: float = 1e-5,
) -> Scheme:
    """Plain convolutions and PowerNorm, whose Gamma would mix different loss scales."""
    return Scheme(
        name="powernorm",
        conv=partial(conv, CONV),
        norm=partial(
            PowerNorm2d,
            batch_size=batch_size,
            alpha_forward=alpha_forward,
            alpha_backward=alpha_backward,
            warmup=warmup,
            eps=eps,
        ),
        loss_scaling=False,
        channels_last=True,
    )
