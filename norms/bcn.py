"""Batch-channel normalization. Qiao et al., arXiv 1911.09738, eqs. 12-15 and their code.

    z = BN(x)                                    affine per channel, moving averages as usual
    y = gamma_g * (z - mean_ng) / sqrt(var_ng + eps) + beta_g

The second line is a group norm of z (mean and biased variance per image n and channel group g)
whose affine has one pair per *group*. The convolutions are weight-standardized with the unbiased
variance and eps inside the root. Both norms' statistics follow from the moments of each map, so x
is read once for both.

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
from torch import Tensor, nn

from norms import moments as m
from norms.bn import GhostBatchNorm2d
from norms.gn import check_groups, fit_groups
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
        return m.affine(x, *self.scale_shift(*m.moments(x.detach())))

    def scale_shift(self, mean: Tensor, var: Tensor, area: int = 0) -> tuple[Tensor, Tensor]:
        """From the moments of every map, (N, C), to the layer's scale and shift, (N or 1, C).

        In training this moves the estimates, once per group.
        """
        if self.training:
            mean, var = self.update(mean, var)
        else:
            mean, var = self.running_mean[None], self.running_var[None]
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - mean * scale

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        return frozen_batch_norm(
            self.weight, self.bias, self.running_mean, self.running_var, self.eps
        )

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Move the estimates by every group in turn; return those that each image meets, (N, C)."""
        mean, var = (m.split(s, self.batch_size) for s in (mean, var))
        size = mean.shape[1]
        mean, var = m.pool(mean, var, dim=1)
        means = m.moving_average(self.running_mean, mean, self.rate)
        around_old = var + (mean - means[:-1]) ** 2
        variances = m.moving_average(self.running_var, around_old, self.rate)
        self.running_mean.copy_(means[-1])
        self.running_var.copy_(variances[-1])
        return means[1:].repeat_interleave(size, 0), variances[1:].repeat_interleave(size, 0)


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
        if self.training and isinstance(self.bn, GhostBatchNorm2d):
            m.check_variance(x, self.bn.batch_size)
        mean, var = m.moments(x)
        area = x.shape[2] * x.shape[3]
        scale, shift = self.bn.scale_shift(mean, var, area)  # z = x * scale + shift
        channels = self.num_channels // self.num_groups
        mean, var = m.pool(  # of z, per image and channel group: (N, num_groups)
            (mean * scale + shift).unflatten(1, (-1, channels)),
            (var * scale**2).unflatten(1, (-1, channels)),
            dim=2,
        )
        gain = self.weight * torch.rsqrt(var + self.eps)  # y = z * gain + (bias - mean * gain)
        offset = (self.bias - mean * gain).repeat_interleave(channels, 1)
        gain = gain.repeat_interleave(channels, 1)
        return m.affine(x, scale * gain, shift * gain + offset)

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
        check=check_groups(groups, min_channels),
    )
