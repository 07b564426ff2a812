"""Online normalization. Chiley et al., arXiv 1905.05894, and their code.

Images pass one after another, t = 1, 2, …, across all batches. With mu_t and s2_t the mean and
biased variance of a map of image t, per channel:

    z_t = (x_t - m) / sqrt(v + eps)                      by the statistics before this image
    v <- a v + (1 - a) s2_t + a (1 - a) (mu_t - m)^2     m <- m + (1 - a) (mu_t - m)
    y_t = gamma * z_t + beta

and backward in the same order, with a decay b, where g_t is the gradient of z_t:

    h_t = g_t - (1 - b) w z_t              w <- w + mean(h_t * z_t)
    dx_t = h_t / sqrt(v + eps) - (1 - b) u                u <- u + mean(dx_t)

What the errors of such statistics may add up to is bounded by a `compensation` behind it: layer
scaling, y / sqrt(mean(y^2) + eps) over all of an image (the authors' residual networks), or a clamp
to [-5, 5]. At test time the last m and v normalize.

All of it is linear in x and dL/dy, image by image: what crosses images are numbers per map. This
backward pass is not the derivative of the forward one.
"""

import sys
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import moments as m
from .backward import check_float16, move_state, state_before, vmap_error
from .layer import BatchStatisticsNorm
from .scheme import CONV, Scheme, conv

COMPENSATIONS = ("layer_scaling", "clamp", "none")
BOUND = 5.0  # of the clamp


class _Online(torch.autograd.Function):
    """y of all images, and its gradient. x: (N, C, *); weight, bias: (C,); before, inverse, mean,
    var: (N, C), m and 1 / sqrt(v + eps) before each image, and the moments of its map."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, inverse: Tensor, mean: Tensor,
        var: Tensor, u: Tensor, w: Tensor, decay: float, frozen: bool,
    ) -> Tensor:  # fmt: skip
        scale = weight * inverse
        return m.scale_and_shift(x, scale, bias - before * scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, *numbers, u, w, ctx.decay, ctx.frozen = inputs
        ctx.save_for_backward(x, weight, *numbers)
        ctx.state, ctx.before = (u, w), None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, before, inverse, mean, var = ctx.saved_tensors
        gradients, moved = gradients_of(
            dy, x, weight, before, inverse, mean, var, ctx.decay,
            *state_before(ctx, "OnlineNorm2d", dy),
        )  # fmt: skip
        gradients = move_state(ctx, "OnlineNorm2d", gradients, moved, (dy, x, weight))
        return *gradients, *(None for _ in range(8))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise vmap_error("OnlineNorm2d")


def gradients_of(
    dy: Tensor, x: Tensor, weight: Tensor, before: Tensor, inverse: Tensor, mean: Tensor,
    var: Tensor, decay: float, u: Tensor, w: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of x, weight and bias, and u and w after all images."""
    total, product = m.sum_maps(m.promote(dy)), m.sum_maps(m.promote(dy) * x)
    area = x.numel() // mean.numel()
    # Means over the map of z, z^2, g and g * z, all (N, C).
    z = (mean - before) * inverse
    z2 = var * inverse.square() + z.square()
    dz = (product - before * total) * inverse  # sum of dy * z
    g, gz = weight * total / area, weight * dz / area
    us, ws = [], []
    for t in range(len(x)):
        us.append(u)
        ws.append(w)
        u = u + (g[t] - (1 - decay) * w * z[t]) * inverse[t] - (1 - decay) * u
        w = w + gz[t] - (1 - decay) * w * z2[t]
    b = -(1 - decay) * torch.stack(ws) * inverse.square()  # of x
    c = -(1 - decay) * torch.stack(us) - b * before
    a, b, c = (m.over_maps(v, x) for v in (weight * inverse, b, c))
    return [(dy * a + x * b + c).to(x.dtype), dz.sum(0), total.sum(0)], [u, w]


class LayerScaling(nn.Module):
    """y / sqrt(mean(y^2) + eps) over all values of an image; (N, C, *) -> (N, C, *)."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, y: Tensor) -> Tensor:
        scale = torch.rsqrt(m.promote(y).square().flatten(1).mean(1) + self.eps)
        # Not by `over_maps`, which torch.jit.script cannot read.
        return y * scale.view([-1] + [1] * (y.dim() - 1)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class OnlineNorm2d(BatchStatisticsNorm):
    """Online normalization of a stream of images; how many of them pass at once changes nothing.

    Shapes: (N, C, *) -> (N, C, *). `alpha_forward` and `alpha_backward` are a and b, weights of the
    old values; 1 - a is kept as `momentum`. `compensation`: "layer_scaling", "clamp" or "none".
    """

    state = {
        "running_mean": 0.0,
        "running_var": 1.0,
        "gradient_mean": 0.0,  # u
        "gradient_product": 0.0,  # w
        "num_images_normalized": 0,
    }
    running_mean: Tensor
    running_var: Tensor
    gradient_mean: Tensor
    gradient_product: Tensor
    num_images_normalized: Tensor

    def __init__(
        self,
        num_features: int,
        alpha_forward: float = 0.999,
        alpha_backward: float = 0.99,
        eps: float = 1e-5,
        compensation: Literal["layer_scaling", "clamp", "none"] = "layer_scaling",
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        if compensation not in COMPENSATIONS:
            raise ValueError(
                f"norm.compensation={compensation}: expected {', '.join(COMPENSATIONS)}"
            )
        super().__init__(num_features, None, eps, 1 - alpha_forward, affine, device, dtype)
        self.alpha_backward, self.compensation = alpha_backward, compensation
        self.behind = "" if compensation == "none" else compensation.replace("_", " ")

    def forward(self, x: Tensor) -> Tensor:
        return self.compensate(super().forward(x))

    def normalize(self, x: Tensor) -> Tensor:
        check_float16("OnlineNorm2d", x)
        numbers = self.once(self.update, *m.moments(x.detach()))
        return _Online.apply(
            x, *self.gain_and_shift(), *numbers, self.gradient_mean, self.gradient_product,
            self.alpha_backward, self.momentum == 0,
        )  # fmt: skip

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From the moments of every map to m and 1 / sqrt(v + eps) before each image, all (N, C),
        with the moments; moves m and v."""
        count, rate = self.num_images_normalized, self.momentum
        average = m.moving_average(len(mean), rate, count)
        before, after = average(self.running_mean, mean)
        old: Any = 1 - (rate or 0)
        if rate is None:
            old = 1 - 1 / (count + torch.arange(1, len(mean) + 1, device=mean.device)[:, None])
        values = var + old * (mean - before).square()
        v_before, v_after = average(self.running_var, values)
        before, inverse = before.clone(), torch.rsqrt(v_before + self.eps)
        self.commit(
            running_mean=after[-1],
            running_var=v_after[-1],
            num_images_normalized=count + len(mean),
        )
        return before, inverse, mean, var

    def __getattr__(self, name: str) -> Any:
        if (
            name == "running_var"
            and self.behind
            and not torch.compiler.is_compiling()
            and sys._getframe(1).f_code.co_name == "fuse_conv_bn_eval"
        ):
            raise ValueError(
                f"OnlineNorm2d: a convolution cannot take its {self.behind}; expected "
                f"smallbatch.fold(network), which keeps it behind"
            )
        return super().__getattr__(name)

    def compensate(self, y: Tensor) -> Tensor:
        if self.compensation == "layer_scaling":
            return LayerScaling.forward(self, y)  # type: ignore[arg-type]  # which has its eps
        return F.hardtanh(y, -BOUND, BOUND) if self.compensation == "clamp" else y

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        behind = {"layer_scaling": LayerScaling(self.eps), "clamp": nn.Hardtanh(-BOUND, BOUND)}
        if self.compensation == "none":
            return super().fold()
        return nn.Sequential(super().fold(), behind[self.compensation])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compensation={self.compensation}"


def scheme(
    batch_size: int | None = None,
    alpha_forward: float = 0.999,
    alpha_backward: float = 0.99,
    eps: float = 1e-5,
    compensation: Literal["layer_scaling", "clamp", "none"] = "layer_scaling",
) -> Scheme:
    """Plain convolutions and online norm, which batches only reach as one stream of images."""
    return Scheme(
        name="online",
        conv=partial(conv, CONV),
        norm=partial(
            OnlineNorm2d,
            alpha_forward=alpha_forward,
            alpha_backward=alpha_backward,
            eps=eps,
            compensation=compensation,
        ),
        loss_scaling=False,
        channels_last=True,
    )
