"""Batch-channel normalization. Qiao et al., arXiv 1911.09738, eqs. 12-15 and their code.

    z = BN(x)                                    affine per channel, moving averages as usual
    y = gamma_g * (z - mean_ng) / sqrt(var_ng + eps) + beta_g

The second line is a group norm of z (mean and biased variance per image n and channel group g)
whose affine has one pair per *group*. The convolutions are weight-standardized with the unbiased
variance and eps inside the root. Both norms' statistics follow from the moments of each map, and
both norms' gradients from each map's sums of dL/dy and x dL/dy, so the passes over activations are
those of one batch norm: forward x is read for the moments and again while y is written; backward x
and dL/dy are read for the sums and again while dL/dx is written.

`EstimatedBatchNorm2d` is the first line for micro-batches: it normalizes by moving estimates,

    mu <- (1 - r) mu + r mean(x)     var <- (1 - r) var + r mean((x - mu_old)^2)
    z = w * (x - mu) / sqrt(var + eps) + b

in training and evaluation alike, without gradients through the estimates. The authors' code never
sets the rate r (it stays at 0, where nothing is estimated). Ours is 0.01 per batch, and `auto`
estimates up to batch size 4: both chosen on held-out images of CIFAR-10, see results/estbn. Groups
in narrow layers as in `norms/gn.py`.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from norms import cpu_kernels
from norms import moments as m
from norms import numbers as num
from norms.bn import GhostBatchNorm2d
from norms.gn import check_groups, fit_groups
from norms.numbers import Array
from norms.scheme import Scheme, conv, frozen_batch_norm
from norms.ws_gn import WSConv2d


class EstimatedBatchNorm2d(nn.Module):
    """Batch norm by moving estimates, which the current batch has already moved.

    (N, C, H, W) -> (N, C, H, W); groups of `batch_size` images (None: all) move the estimates one
    after another. In evaluation they stay as they are.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        rate: float = 0.01,
        batch_size: int | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.num_features, self.batch_size = num_features, batch_size
        self.rate, self.eps = rate, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        if not self.training:
            state = (self.running_mean, self.running_var, self.weight, self.bias)
            return F.batch_norm(x, *state, training=False, eps=self.eps)
        mean, inverse = self.statistics(*m.moments(x.detach()), x.shape[2] * x.shape[3])
        return m.Normalize.apply(x, self.weight, self.bias, mean, inverse, None, None, False)

    @num.quiet
    def statistics(self, mean: Array, var: Array, area: int) -> tuple[Tensor, Tensor]:
        """From the moments of every map, (N, C), to mean and 1 / sqrt(var + eps) as each group
        meets them, (G, C): the estimates that every group in turn has moved. In evaluation the last
        estimates, (1, C)."""
        if not self.training:
            return self.running_mean[None].clone(), torch.rsqrt(self.running_var + self.eps)[None]
        running = (self.running_mean, self.running_var)
        xp, mean, var, running_mean, running_var = num.arrays(mean, var, *running)
        mean, var = m.pooled(mean, var, self.batch_size)
        before, means = num.moving_average(running_mean, mean, self.rate)
        around_old = var + (mean - before) ** 2
        _, variances = num.moving_average(running_var, around_old, self.rate)
        running_mean[...] = means[-1]
        running_var[...] = variances[-1]
        return num.tensor(means), num.tensor(1 / xp.sqrt(variances + self.eps))

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        return frozen_batch_norm(
            self.weight, self.bias, self.running_mean, self.running_var, self.eps
        )


class _BatchChannelNorm(torch.autograd.Function):
    """Both norms of x: (N, C, H, W).

    bn_weight, bn_bias: (C,); weight, bias: (K,), of the K channel groups; scale, shift: (N, C), of
    y = scale * x + shift; and what `BatchChannelNorm2d.numbers` keeps for the backward pass.
    `through`: whether the gradient passes through the batch norm's statistics.
    """

    @staticmethod
    def forward(ctx, x, bn_weight, bn_bias, weight, bias, scale, shift, through, *kept):
        ctx.save_for_backward(x, bn_weight, bn_bias, weight, *kept)
        ctx.through = through
        return m.affine(x, scale, shift)

    @staticmethod
    @once_differentiable
    @num.quiet
    def backward(ctx, dy):
        x, *saved = ctx.saved_tensors
        _, _, weight, mean, _, center, *_ = saved
        area = x.shape[2] * x.shape[3]
        sums = m.sums(dy, x, mean)
        if kernels := _kernels(x, len(center), len(weight)):
            a, b, c, *gradients = kernels.bcn_backward(*sums, saved, area, ctx.through)
        else:
            _, *numbers = num.arrays(*sums, *saved)
            a, b, c, *gradients = _gradients(*numbers, area=area, through=ctx.through)
        return m.combine(dy, a, x, b, c), *map(num.tensor, gradients), *(None,) * 9


class _Compiled(torch.autograd.Function):
    """The same, and `BatchChannelNorm2d.numbers` before it, where norms/cpu_kernels.c has them."""

    @staticmethod
    def forward(ctx, x, bn_weight, bn_bias, weight, through, *rest):
        y, *kept = cpu_kernels.bcn_forward(x, bn_weight, bn_bias, weight, *rest)
        ctx.save_for_backward(x, bn_weight, bn_bias, weight, *kept)
        ctx.through = through
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dbn_weight, dbn_bias, *of_groups = cpu_kernels.bcn_backward(
            dy, *ctx.saved_tensors, through=ctx.through
        )
        return dx, dbn_weight, dbn_bias, of_groups[0], None, of_groups[1], *(None,) * 7


def _kernels(x: Tensor, groups: int, channel_groups: int) -> Any:
    """`norms.number_kernels` where they are for x, else None."""
    kernels = m.number_kernels(x, groups)
    return kernels if kernels and kernels.fits(len(x), x.shape[1] // channel_groups) else None


def _estimated(bn: GhostBatchNorm2d | EstimatedBatchNorm2d, groups: int) -> tuple[bool, float]:
    """For a kernel that moves its state on: whether it estimates, and its rate. Counts the groups
    where that is state."""
    if isinstance(bn, EstimatedBatchNorm2d):
        return True, bn.rate
    bn.num_batches_tracked += groups
    return False, bn.momentum


def _gradients(
    total: Array, product: Array, bn_weight: Array, bn_bias: Array, weight: Array, mean: Array,
    var: Array, center: Array, inverse: Array, z_mean: Array, z_inverse: Array, *, area: int,
    through: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """From the sums of dL/dy and (x - mean) dL/dy over every map: a, b and c, (N, C), of dL/dx =
    a dL/dy + b x + c, and the gradients of the four parameters."""
    (images, channels), groups = total.shape, len(center)
    shape = (-1, len(weight), channels // len(weight))  # (N, K, C / K)
    total, product, scale, shift, mean, var, center, inverse = (
        v.reshape(shape) for v in (total, product, bn_weight, bn_bias, mean, var, center, inverse)
    )
    z_mean, z_inverse = z_mean[:, :, None], z_inverse[:, :, None]
    center, inverse = num.spread(center, images), num.spread(inverse, images)
    away, scale = mean - center, scale * inverse

    # y = weight * u + bias with u = (x - mean) * p + q
    p, q = scale * z_inverse, (away * scale + shift - z_mean) * z_inverse
    dbias, dweight = total.sum(2), (p * product + q * total).sum(2)
    # dz = a * dy + b * (x - mean) + c
    a = weight[:, None] * z_inverse
    of_all = a / -(shape[2] * area)
    first, second = of_all * dbias[:, :, None], of_all * dweight[:, :, None]
    b, c = second * p, first + second * q
    # the sums of dz and of dz * (x - center)
    dz = a * total + area * c
    dzx = a * product + away * dz + area * b * var
    if through:
        n = images // groups * area
        of_dz = num.spread(num.gather(dz, groups) / -n, images)
        of_dzx = num.spread(num.gather(dzx, groups) / -n, images) * inverse**2
        b, c = b + of_dzx, c + of_dz + of_dzx * away
    b = b * scale
    c = c * scale - b * mean
    parameters = ((inverse * dzx).sum(0), dz.sum(0), dweight.sum(0), dbias.sum(0))
    return *(v.reshape(images, -1) for v in (a * scale, b, c)), *(v.reshape(-1) for v in parameters)


class BatchChannelNorm2d(nn.Module):
    """Batch norm, then group norm with an affine per group; (N, C, H, W) -> (N, C, H, W).

    `bn` holds the batch norm (per-channel affine, moving statistics) over groups of `batch_size`
    images (None: all of them); with a `rate` it is an `EstimatedBatchNorm2d`. `weight` and `bias`,
    of shape (num_groups,), are the channel norm's. Raises `ValueError` if `num_groups` does not
    divide `num_features`.
    """

    bn: GhostBatchNorm2d | EstimatedBatchNorm2d

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        rate: float | None = None,
    ):
        super().__init__()
        if num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_features={num_features}")
        self.num_channels, self.num_groups, self.eps = num_features, num_groups, eps
        if rate is None:
            self.bn = GhostBatchNorm2d(num_features, batch_size, eps, momentum)
        else:
            self.bn = EstimatedBatchNorm2d(num_features, rate, batch_size, eps)
        self.weight = nn.Parameter(torch.ones(num_groups))
        self.bias = nn.Parameter(torch.zeros(num_groups))

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        through = self.bn.training and isinstance(self.bn, GhostBatchNorm2d)
        if through:
            m.check_variance(x, self.bn.batch_size)
        parameters = (self.bn.weight, self.bn.bias, self.weight, self.bias)
        running = (self.bn.running_mean, self.bn.running_var)
        if self.bn.training and cpu_kernels.take(x, *parameters, *running):
            groups = m.count_groups(x, self.bn.batch_size)
            options = (groups, *_estimated(self.bn, groups), self.bn.eps, self.eps)
            return _Compiled.apply(x, *parameters[:3], through, self.bias, *running, *options)
        with torch.no_grad():
            scale, shift, *kept = self.numbers(x, *parameters)
        return _BatchChannelNorm.apply(x, *parameters, scale, shift, through, *kept)

    @num.quiet
    def numbers(
        self, x: Tensor, bn_weight: Tensor, bn_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> list[Tensor]:
        """scale and shift of y = scale * x + shift, (N, C); and, for the backward pass, mean and
        variance of every map, (N, C), center and inverse deviation of the batch norm, (G, C), and
        of the channel norm, (N, K). Moves the batch norm's state on."""
        bn, moments, images = self.bn, m.moments(x), len(x)
        parameters = (bn_weight, bn_bias, weight, bias)
        groups = m.count_groups(x, bn.batch_size) if bn.training else 0
        if groups and (kernels := _kernels(x, groups, self.num_groups)):
            state = (bn.running_mean, bn.running_var, *_estimated(bn, groups), bn.eps, self.eps)
            return kernels.bcn_forward(x, *moments, *parameters, *state)
        statistics = bn.statistics(*moments, x.shape[2] * x.shape[3])
        xp, mean, var, center, inverse, scale, shift, gain, bias = num.arrays(
            *moments, *statistics, *parameters
        )
        shape = (-1, self.num_groups, self.num_channels // self.num_groups)  # (N, K, C / K)
        scale = num.spread(scale * inverse, images).reshape(shape)
        away = (mean - num.spread(center, images)).reshape(shape)
        z = away * scale + shift.reshape(shape)  # the mean of every map's z
        z_mean, z_var = num.pool(z, var.reshape(shape) * scale**2, 2)
        z_inverse = 1 / xp.sqrt(z_var + self.eps)  # (N, K)
        gain = (gain * z_inverse)[:, :, None]  # y = gain * (z - z_mean) + bias
        scale = scale * gain
        shift = (z - z_mean[:, :, None]) * gain + bias[:, None] - mean.reshape(shape) * scale
        factors = (v.reshape(images, -1) for v in (scale, shift))
        return [num.tensor(v) for v in (*factors, mean, var, center, inverse, z_mean, z_inverse)]

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        channel_norm = nn.GroupNorm(self.num_groups, self.num_channels, self.eps).to(self.weight)
        size = self.num_channels // self.num_groups
        with torch.no_grad():
            channel_norm.weight.copy_(self.weight.repeat_interleave(size))
            channel_norm.bias.copy_(self.bias.repeat_interleave(size))
        return nn.Sequential(self.bn.fold(), channel_norm)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, num_groups={self.num_groups}"


MICRO_BATCH = 4  # the largest batch size whose own statistics `auto` does not trust: results/estbn


def _layer(channels: int, groups: int, min_channels: int, **options) -> BatchChannelNorm2d:
    return BatchChannelNorm2d(channels, fit_groups(channels, groups, min_channels), **options)


def scheme(
    batch_size: int | None = None,
    groups: int = 32,
    min_channels: int = 2,
    eps: float = 1e-5,
    momentum: float = 0.1,
    statistics: Literal["auto", "batch", "estimated"] = "auto",
    rate: float = 0.01,
) -> Scheme:
    """Standardized convolutions and BCN; `statistics`: of the batch, or estimated at `rate`."""
    if statistics not in ("auto", "batch", "estimated"):
        raise ValueError(f"norm.statistics={statistics}: expected auto, batch or estimated")
    micro = batch_size is not None and batch_size <= MICRO_BATCH
    estimated = statistics == "estimated" or (statistics == "auto" and micro)

    used = rate if estimated else None
    options: dict[str, Any] = dict(batch_size=batch_size, eps=eps, momentum=momentum, rate=used)
    return Scheme(
        name="bcn",
        conv=partial(conv, partial(WSConv2d, eps_inside=True)),
        norm=partial(_layer, groups=groups, min_channels=min_channels, **options),
        zero_init=True,
        channels_last=True,
        check=check_groups(groups, min_channels),
    )
