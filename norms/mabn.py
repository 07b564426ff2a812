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

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from norms import cpu_kernels
from norms import moments as m
from norms import numbers as num
from norms.numbers import Array
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


def _window_mean(window: Array, new: Array, own: Array) -> Array:
    """For each of G new (G, C) values the mean of the last m, itself included; `window` holds the
    m values before, oldest first, and is moved on. Where `own`, just the value itself."""
    xp, size = num.namespace(new), len(window)
    values = xp.concat([window[1:], new])
    window[...] = values[-size:]
    return xp.where(own, new, num.window_means(values, size))


def _release(layer: "MABN2d", square: Array, state: Sequence[Array]) -> tuple[Array, ...]:
    """From chi of each of G batches: chi_bar, chi_run before it, whether r is free and whether a
    batch uses its own values; and the layer's state moved on."""
    running, window, tracked = state
    step = tracked + num.namespace(square).arange(1, len(square) + 1, device=square.device)[:, None]
    own = step < max(len(window) + 1, layer.warmup)
    chi = _window_mean(window, square, own)
    before, after = num.moving_average(running, chi, 1 - layer.momentum)
    before = before + 0  # not the buffer itself
    running[...] = after[-1]
    return chi, before, step > max(1000, layer.warmup), own


def _imagenet(layer: "MABN2d", square: Array, state: Sequence[Array]) -> tuple[Array, ...]:
    """The same in the other version."""
    running, window, tracked, total, inside, steps = state
    where = num.namespace(square).where
    own = (tracked - inside < len(window)).reshape(1, 1)
    chi = _window_mean(window, square, own)
    before, free = running[None] + 0, steps + 1 >= layer.warmup
    total += chi.sum(0)
    inside += len(square)
    ends = inside >= (layer.batches_per_step or len(square))
    mean = total / inside
    moved = where(steps == 0, mean, num.lerp(mean, running, layer.momentum))
    running[...] = where(ends, moved, running)
    total[...] = where(ends, 0.0, total)
    inside[...] = where(ends, 0, inside)
    steps += ends
    return chi, before, free, own


class _MABN(torch.autograd.Function):
    """y and its gradients for all groups of a batch at once.

    x: (N, C, H, W); weight, bias: (C,); gain, inverse: (G, C); own: (G, 1) or (1, 1). `window`,
    (m, C), holds psi of the batches before and is moved on by the backward pass.
    """

    @staticmethod
    @num.quiet
    def forward(ctx, x, weight, bias, gain, inverse, own, window):
        ctx.save_for_backward(x, weight, gain, inverse, own)
        ctx.window = window
        _, weight, bias, gain = num.arrays(weight, bias, gain)
        scale = num.spread(weight * gain, len(x))
        return m.affine(x, scale, bias[None])

    @staticmethod
    @once_differentiable
    @num.quiet
    def backward(ctx, dy):
        x, *saved = ctx.saved_tensors
        groups, images = len(saved[1]), len(x)
        if kernels := m.number_kernels(x, groups):
            a, b, *gradients = kernels.mabn_backward(dy, x, *saved, ctx.window)
        else:
            sums = m.sums(dy, x, rows=1 if groups == 1 else images)
            _, *numbers = num.arrays(*sums, *saved, ctx.window)
            a, b, *gradients = _gradients(*numbers, n=x.numel() // saved[1].numel())
        dx = m.combine(dy, num.spread(a, images), x, num.spread(b, images))
        return dx, *map(num.tensor, gradients), None, None, None, None


class _Compiled(torch.autograd.Function):
    """The same, and `MABN2d.update` before it, where norms/cpu_kernels.c has them."""

    @staticmethod
    def forward(ctx, x, weight, bias, window, *state_and_options):
        y, *kept = cpu_kernels.mabn_forward(x, weight, bias, *state_and_options)
        ctx.save_for_backward(x, weight, *kept)
        ctx.window = window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *saved = ctx.saved_tensors
        return *cpu_kernels.mabn_backward(dy, x, *saved, window=ctx.window), *(None,) * 8


def _gradients(
    total: Array, product: Array, weight: Array, gain: Array, inverse: Array, own: Array,
    window: Array, *, n: int,
) -> tuple[Array, ...]:  # fmt: skip
    """From the sums of dL/dy and x dL/dy over n values: a and b, (G, C), of dL/dx = a dL/dy + b x,
    and the gradients of weight and bias."""
    product, a = num.gather(product, len(gain)), weight * gain
    b = -(inverse**2) * _window_mean(window, a * product / n, own)
    return a, b, (gain * product).sum(0), total.sum(0)


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
            inputs, tracked = (x, self.weight, self.bias), self.num_batches_tracked
            kept = (self.window_product, self.running_square, self.window_square, tracked)
            if self.version == "release" and cpu_kernels.take(*inputs, *kept):
                groups = m.count_groups(x, self.batch_size)
                y = _Compiled.apply(*inputs, *kept, groups, self.warmup, self.momentum, self.eps)
                tracked += groups
                return y
            return _MABN.apply(*inputs, *self.update(x.detach()), self.window_product)
        mean = torch.zeros_like(self.running_square)
        state = (mean, self.running_square, self.weight, self.bias)
        return F.batch_norm(x, *state, training=False, eps=self.eps)

    @num.quiet
    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move the forward state on; returns r / sqrt(chi_bar + eps), 1 / sqrt(chi_bar + eps) and
        which batches use their own values."""
        state = [self.running_square, self.window_square, self.num_batches_tracked]
        groups = m.count_groups(x, self.batch_size)
        if self.version == "release" and (kernels := m.number_kernels(x, groups)):
            numbers = kernels.mabn_forward(x, *state, self.warmup, self.momentum, self.eps)
            self.num_batches_tracked += 1
            return numbers
        if self.version == "imagenet":
            state += [self.step_square, self.batches_in_step, self.num_steps_tracked]
        xp, square, *state = num.arrays(m.mean_square(x), *state)
        square = m.split(square, self.batch_size)
        square = square.sum(1) / square.shape[1]  # (G, C)
        count = _imagenet if self.version == "imagenet" else _release
        chi, running, free, own = count(self, square, state)
        tracked = state[2]
        tracked += len(square)
        root = xp.sqrt(chi + self.eps)
        r = (root / xp.sqrt(running + self.eps)).clip(1 / 5, 5)
        inverse = 1 / root
        gain = xp.where(free, r, 1.0) * inverse
        return num.tensor(gain), num.tensor(inverse), num.tensor(own)

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
