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

Passes over activations as in batch norm: forward x is read for chi, and again while y is written;
backward x and dL/dy are read for the sums, and again while dL/dx is written.
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from norms import moments as m
from norms.scheme import Scheme, conv, frozen_batch_norm


class _Center(torch.autograd.Function):
    """Each filter less its mean: a projection, and so is its own gradient."""

    @staticmethod
    def forward(ctx, weight):
        return weight - weight.mean((1, 2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, dy):
        return dy - dy.mean((1, 2, 3), keepdim=True)


class CenteredConv2d(nn.Conv2d):
    """`nn.Conv2d` whose filters have zero mean (weight centralization)."""

    def standardized(self) -> Tensor:
        """The weights that the convolution uses."""
        return _Center.apply(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


def _window_mean(window: Tensor, new: Tensor, own: Tensor) -> Tensor:
    """For each of G new (G, C) values the mean of the last m, itself included; `window` holds the
    m values before, oldest first, and is moved on. Where `own`, just the value itself."""
    size = window.shape[0]
    values = torch.cat([window[1:], new])
    window.copy_(values[-size:])
    means = window.mean(0) if len(new) == 1 else values.unfold(0, size, 1).mean(-1)
    return torch.where(own[:, None], new, means)


def _release(layer: "MABN2d", square: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From chi of each of G batches: chi_bar, chi_run before it, whether r is free, own values."""
    step = layer.num_batches_tracked + torch.arange(1, len(square) + 1, device=square.device)
    own = step < max(layer.window_square.shape[0] + 1, layer.warmup)
    chi = _window_mean(layer.window_square, square, own)
    if len(square) == 1:
        running = layer.running_square[None].clone()
        m.move_average(layer.running_square, chi, 1 - layer.momentum)
    else:
        running = m.moving_average(layer.running_square, chi, 1 - layer.momentum)
        layer.running_square.copy_(running[-1])
        running = running[:-1]
    return chi, running, (step > max(1000, layer.warmup))[:, None], own


def _imagenet(layer: "MABN2d", square: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in the other version."""
    groups, inside = len(square), layer.batches_in_step
    steps = layer.num_steps_tracked.clone()
    own = (layer.num_batches_tracked - inside < layer.window_square.shape[0]).expand(groups)
    chi = _window_mean(layer.window_square, square, own)
    running = layer.running_square.clone()
    layer.step_square.add_(chi.sum(0))
    inside.add_(groups)
    ends = inside >= (layer.batches_per_step or groups)
    mean = layer.step_square / inside
    moved = torch.where(steps == 0, mean, torch.lerp(mean, running, layer.momentum))
    layer.running_square.copy_(torch.where(ends, moved, running))
    layer.step_square.copy_(torch.where(ends, 0.0, layer.step_square))
    inside.copy_(torch.where(ends, 0, inside))
    layer.num_steps_tracked.add_(ends)
    return chi, running[None], steps + 1 >= layer.warmup, own


class _MABN(torch.autograd.Function):
    """y and its gradients for all groups of a batch at once; x: (N, C, H, W), the rest (G, C).

    `window` holds psi of the batches before and is moved on by the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gain, inverse, own, window):
        ctx.save_for_backward(x, weight, gain, inverse, own)
        ctx.window = window
        scale = m.spread(weight * gain, len(x))
        return m.affine(x, scale, bias.expand_as(scale))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, gain, inverse, own = ctx.saved_tensors
        groups, n = len(gain), x.numel() // gain.numel()
        rows = 1 if groups == 1 else len(x)
        total, product = m.sums(dy, x, gain.new_zeros(rows, len(weight)))
        product = m.gather(product, groups)
        scale = weight * gain
        psi = _window_mean(ctx.window, scale * product / n, own)
        b = inverse.square() * psi
        dx = m.combine(dy, m.spread(scale, len(x)), x, m.spread(b.neg_(), len(x)))
        return dx, (gain * product).sum(0), total.sum(0), None, None, None, None


class MABN2d(nn.Module):
    """MABN over groups of `batch_size` images (None: all of a batch, which then is the window).

    Shapes: (N, C, H, W) -> (N, C, H, W); in training N must be a multiple of `batch_size`, else
    `ValueError`. The window holds max(1, ceil(moving_average_batch_size / batch_size)) batches;
    `momentum` is the weight of the old running value; `warmup` counts batches ("release") or
    optimizer steps ("imagenet"), which have `batches_per_step` batches (None: a forward pass is a
    step).
    """

    running_square: Tensor
    window_square: Tensor
    window_product: Tensor
    step_square: Tensor
    batches_in_step: Tensor
    num_steps_tracked: Tensor
    num_batches_tracked: Tensor

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
    ):
        super().__init__()
        if version not in ("release", "imagenet"):
            raise ValueError(f"norm.version={version}: expected release or imagenet")
        self.num_features, self.batch_size = num_features, batch_size
        self.momentum, self.warmup, self.eps = momentum, warmup, eps
        self.version, self.batches_per_step = version, batches_per_step
        window = max(1, -(-moving_average_batch_size // batch_size)) if batch_size else 1
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_square", torch.ones(num_features))
        self.register_buffer("window_square", torch.zeros(window, num_features))
        self.register_buffer("window_product", torch.zeros(window, num_features))
        if version == "imagenet":
            self.register_buffer("step_square", torch.zeros(num_features))
            self.register_buffer("batches_in_step", torch.tensor(0))
            self.register_buffer("num_steps_tracked", torch.tensor(0))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        if self.training:
            return _MABN.apply(x, self.weight, self.bias, *self.update(x), self.window_product)
        mean = torch.zeros_like(self.running_square)
        state = (mean, self.running_square, self.weight, self.bias)
        return F.batch_norm(x, *state, training=False, eps=self.eps)

    @torch.no_grad()
    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move the forward state on; returns r / sqrt(chi_bar + eps), 1 / sqrt(chi_bar + eps) and
        which batches use their own values."""
        square = m.split(m.mean_square(x), self.batch_size).mean(1)  # (G, C)
        count = _imagenet if self.version == "imagenet" else _release
        chi, running, free, own = count(self, square)
        self.num_batches_tracked += len(square)
        r = torch.sqrt((chi + self.eps) / (running + self.eps)).clamp(1 / 5, 5)
        inverse = torch.rsqrt(chi + self.eps)
        return torch.where(free, r, 1.0) * inverse, inverse, own

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        return frozen_batch_norm(self.weight, self.bias, None, self.running_square, self.eps)

    def extra_repr(self) -> str:
        window = self.window_square.shape[0]
        return (
            f"{self.num_features}, batch_size={self.batch_size}, window={window}, "
            f"version={self.version}"
        )


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
        conv=partial(conv, CenteredConv2d),
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
