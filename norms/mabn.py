"""Moving average batch normalization (MABN). Yan et al., arXiv 2001.06838, and their code.

Convolutions are centred, W - mean(W) per filter, so the mean need not be removed and the statistic
is chi = mean(x^2) over a batch of B images, per channel. With bars for means over the last
m = max(1, ceil(32 / B)) batches, the current one included:

    z = x / sqrt(chi_bar + eps)          r = clip(sqrt(chi_bar + eps) / sqrt(chi_run + eps), 1/5, 5)
    y = gamma * r * z + beta             chi_run <- momentum * chi_run + (1 - momentum) * chi_bar
    g = gamma * r * dL/dy                psi = mean(g * z)
    dL/dx = (g - z * psi_bar) / sqrt(chi_bar + eps)

r is a constant for the gradient and uses chi_run from before its update.

The authors published two versions, which differ in what counts as a step:

                                   release (the default)            imagenet (their training code)
    chi and psi of the batch       for the first                    until an optimizer step begins
    itself instead of their means  max(m, warmup - 1) batches       with a full window
    r is 1                         for max(1000, warmup) batches    for warmup - 1 optimizer steps
    chi_run moves                  with every batch                 once per optimizer step, by the
                                                                    mean of its chi_bar
    chi_run starts at              1                                the first step's mean
    chi_run of a step's batches    the one before each batch        the one before the step

At test time y = gamma * x / sqrt(chi_run + eps) + beta. All counts are of batches of B images or of
optimizer steps, whatever passes through the network at once. The window crosses a weight update in
both: part of it was made by older weights.

This backward pass is not the derivative of the forward one, so it is a function of its own here,
and has no derivative.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import moments as m
from .backward import check_float16, move_state, state_before, vmap_error
from .layer import SquareNorm
from .scheme import Scheme, conv
from .standardized import StandardizedConv


class WeightCentralization(StandardizedConv):
    """A convolution whose filters have zero mean; takes what PyTorch's convolution takes."""

    def standardized(self) -> Tensor:
        dims = tuple(range(1, self.weight.dim()))
        return self.weight - self.weight.mean(dims, keepdim=True)


class CenteredConv1d(WeightCentralization, nn.Conv1d):
    """(N, C, L) -> (N, C, L)."""


class CenteredConv2d(WeightCentralization, nn.Conv2d):
    """(N, C, H, W) -> (N, C, H, W)."""


class CenteredConv3d(WeightCentralization, nn.Conv3d):
    """(N, C, D, H, W) -> (N, C, D, H, W)."""


CENTERED_CONV = {1: CenteredConv1d, 2: CenteredConv2d, 3: CenteredConv3d}


def window_means(window: Tensor, new: Tensor, use_batch: Tensor) -> tuple[Tensor, Tensor]:
    """For each of G new (G, C) values the mean of the last m, itself included, or, where
    `use_batch`, just the value itself; and the m last values. `window`: the m values before, oldest
    first."""
    size = len(window)
    values = torch.cat([window[1:], new.to(window.dtype)])
    means = values.unfold(0, size, 1).mean(-1) if len(new) > 1 else values.mean(0, keepdim=True)
    return torch.where(use_batch, new, means), values[-size:]


class _MABN(torch.autograd.Function):
    """y = weight * gain * x + bias, and MABN's gradient, for all groups of a batch at once.

    x: (N, C, *); weight, bias: (C,); gain, inverse: (G, C); use_batch: (G, 1). `window`,
    (m, C), holds psi of the batches before, which the first backward pass moves on unless `frozen`.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, inverse: Tensor, use_batch: Tensor,
        window: Tensor, frozen: bool,
    ) -> Tensor:  # fmt: skip
        return m.scale_and_shift(x, weight * gain, bias[None])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, gain, inverse, use_batch, *ctx.state, ctx.frozen = inputs
        ctx.save_for_backward(x, weight, gain, inverse, use_batch)
        ctx.before = None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, gain, inverse, use_batch = ctx.saved_tensors
        (window,) = state_before(ctx, "MABN2d", dy)
        gradients, psi = gradients_of(dy, x, weight, gain, inverse, use_batch, window)
        gradients = move_state(ctx, "MABN2d", gradients, [psi], (dy, x, weight))
        return *gradients, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise vmap_error("MABN2d")


def gradients_of(
    dy: Tensor, x: Tensor, weight: Tensor, gain: Tensor, inverse: Tensor, use_batch: Tensor,
    window: Tensor,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """The gradients of x, weight and bias, and the window moved on."""
    total, product = m.sum_maps(m.promote(dy)), m.sum_maps(m.promote(dy) * x)
    total, product = m.sum_groups(total, len(gain)), m.sum_groups(product, len(gain))
    a = weight * gain
    psi_bar, moved = window_means(window, a * product * (total.numel() / x.numel()), use_batch)
    b = -(inverse**2) * psi_bar
    a, b = (m.over_images(v, x) for v in m.realized(a, b))
    dx = (dy * a + x * b).to(x.dtype)
    return [dx, (gain * product).sum(0), total.sum(0)], moved


class MABN2d(SquareNorm):
    """MABN over groups of `batch_size` images (None: all of a batch, which then is the window).

    Shapes: (N, C, *) -> (N, C, *); in training N must be a multiple of `batch_size`, else
    `ValueError`. The window holds max(1, ceil(moving_average_batch_size / batch_size)) batches.
    `momentum` is the weight of the old running value, as in the paper; the attribute of that name
    is the weight of the new one, as in PyTorch's layers. `warmup` counts batches ("release") or
    optimizer steps ("imagenet"), which have `batches_per_step` batches (None: a forward pass is a
    step). Under a gradient scaler whose factor changes, the window would mix gradients of different
    scales: inputs of float16 are refused in training.
    """

    window_square: Tensor
    window_product: Tensor
    num_batches_averaged: Tensor
    step_square: Tensor
    batches_in_step: Tensor
    num_steps: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        moving_average_batch_size: int = 32,
        momentum: float = 0.98,
        warmup: int = 100,
        eps: float = 1e-5,
        version: Literal["release", "imagenet"] = "release",
        batches_per_step: int | None = None,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        if version not in ("release", "imagenet"):
            raise ValueError(f"norm.version={version}: expected release or imagenet")
        if not 0 <= momentum < 1:
            raise ValueError(f"norm.momentum={momentum}: expected a number from 0, below 1")
        self.state = {"running_square": 1.0, "window_square": 0.0, "window_product": 0.0}
        if version == "imagenet":
            self.state |= {"step_square": 0.0, "batches_in_step": 0, "num_steps": 0}
        self.state |= {"num_batches_averaged": 0}
        size = max(1, -(-moving_average_batch_size // batch_size)) if batch_size else 1
        shapes = dict.fromkeys(("window_square", "window_product"), (size, num_features))
        super().__init__(
            num_features, batch_size, eps, 1 - momentum, affine, device, dtype, **shapes
        )
        self.warmup, self.version, self.batches_per_step = warmup, version, batches_per_step

    def normalize(self, x: Tensor) -> Tensor:
        check_float16("MABN2d", x)
        groups = m.count_groups(x, self.batch_size)
        square = m.sum_groups(m.mean_square(x.detach()), groups) * (groups / x.shape[0])
        gain, inverse, use_batch = self.once(self.update, square)
        weight, bias = self.gain_and_shift()
        return _MABN.apply(
            x, weight, bias, gain, inverse, use_batch, self.window_product, self.momentum == 0
        )

    @torch.no_grad()
    def update(self, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From chi of every group to r / sqrt(chi_bar + eps) and 1 / sqrt(chi_bar + eps), (G, C),
        and which groups use their own values, (G, 1); and the move of the forward state."""
        version = self.imagenet if self.version == "imagenet" else self.release
        chi, running, renorm, use_batch, moved = version(square, self.num_batches_averaged)
        root = torch.sqrt(chi + self.eps)
        r = (root / torch.sqrt(running + self.eps)).clamp(1 / 5, 5)
        gain = torch.where(renorm, r, 1.0) / root
        self.commit(**moved, num_batches_averaged=self.num_batches_averaged + len(square))
        return gain, 1 / root, use_batch

    def release(self, square: Tensor, count: Tensor) -> tuple[Any, ...]:
        """chi_bar, chi_run before each group, whether renorm (r) is active, whether the group uses
        its own values, and the state as it moves."""
        step = count + torch.arange(1, len(square) + 1, device=square.device)[:, None]
        use_batch = step < max(len(self.window_square) + 1, self.warmup)
        chi, window = window_means(self.window_square, square, use_batch)
        before, after = m.moving_average(len(chi), self.momentum, count)(self.running_square, chi)
        moved = dict(running_square=after[-1], window_square=window)
        return chi, before, step > max(1000, self.warmup), use_batch, moved

    def imagenet(self, square: Tensor, count: Tensor) -> tuple[Any, ...]:
        """The same in the other version."""
        steps, running = self.num_steps, self.running_square
        use_batch = (count - self.batches_in_step < len(self.window_square)).expand(len(square), 1)
        chi, window = window_means(self.window_square, square, use_batch)
        total, inside = self.step_square + chi.sum(0), self.batches_in_step + len(square)
        ends = inside >= (self.batches_per_step or len(square))
        mean = total / inside
        _, moved = m.moving_average(1, self.momentum, steps)(running, mean[None])
        moved = torch.where(steps == 0, mean, moved[0])
        renorm = (steps + 1 >= self.warmup).expand_as(use_batch)
        state = dict(
            running_square=torch.where(ends, moved, running),
            window_square=window,
            step_square=torch.where(ends, 0.0, total),
            batches_in_step=torch.where(ends, 0, inside),
            num_steps=steps + ends,
        )
        return chi, running[None], renorm, use_batch, state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A window of another batch size has another length: each of its new rows is its mean, so
        # that the averages go on from where they were.
        for name in ("window_square", "window_product"):
            window = getattr(self, name)
            given = state_dict.get(prefix + name, window)
            if given.shape[1:] == window.shape[1:] and len(given) != len(window):
                state_dict[prefix + name] = given.mean(0, keepdim=True).expand(len(window), -1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={len(self.window_square)}, version={self.version}"


def scheme(
    batch_size: int | None = None,
    sgd_batch_size: int | None = None,
    moving_average_batch_size: int = 32,
    momentum: float = 0.98,
    warmup: int = 100,
    eps: float = 1e-5,
    version: Literal["release", "imagenet"] = "release",
) -> Scheme:
    """Centred convolutions and MABN, whose window would mix gradients of different loss scales."""
    return Scheme(
        name="mabn",
        needs_conv=True,
        conv=partial(conv, CENTERED_CONV),
        norm=partial(
            MABN2d,
            batch_size=batch_size,
            moving_average_batch_size=moving_average_batch_size,
            momentum=momentum,
            warmup=warmup,
            eps=eps,
            version=version,
            batches_per_step=m.batches_per_step(batch_size, sgd_batch_size),
        ),
        loss_scaling=False,
        channels_last=True,
    )
