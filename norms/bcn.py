"""Batch-channel normalization. Qiao et al., arXiv 1911.09738, eqs. 12-15 and their code.

    z = BN(x)                                    affine per channel, moving averages as usual
    y = gamma_g * (z - mean_ng) / sqrt(var_ng + eps) + beta_g

The second line is a group norm of z (mean and biased variance per image n and channel group g)
whose affine has one pair per *group*. The convolutions are weight-standardized with the unbiased
variance and eps inside the root.

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

from . import moments as m
from .bn import GhostBatchNorm2d
from .gn import check_groups, fit_groups
from .layer import BatchStatisticsNorm, Leaf
from .scheme import Scheme
from .ws_gn import ws_conv


class EstimatedBatchNorm2d(BatchStatisticsNorm):
    """Batch norm by moving estimates, which the current batch has already moved.

    (N, C, *) -> (N, C, *); groups of `batch_size` images (None: all) move the estimates one after
    another. In evaluation they stay as they are. `rate` is kept as `momentum`.
    """

    state = {"running_mean": 0.0, "running_var": 1.0, "num_batches_estimated": 0}
    running_mean: Tensor
    running_var: Tensor
    num_batches_estimated: Tensor

    def __init__(
        self,
        num_features: int,
        rate: float | None = 0.01,
        batch_size: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(num_features, batch_size, eps, rate, affine, device, dtype)

    def normalize(self, x: Tensor) -> Tensor:
        mean, inverse = self.statistics(*m.moments(x.detach()), x[0, 0].numel())
        return self.apply_statistics(x, mean, inverse)

    def statistics(self, mean: Tensor, var: Tensor, area: int) -> tuple[Tensor, Tensor]:
        """From the moments of every map, (N, C), to mean and 1 / sqrt(var + eps) as each group
        meets them, (G, C): the estimates that every group in turn has moved. In evaluation the last
        estimates, (1, C)."""
        if not self.training:
            return self.running_mean[None].clone(), torch.rsqrt(self.running_var + self.eps)[None]
        return self.once(
            self.estimate, *m.pool_images(mean.detach(), var.detach(), self.batch_size)
        )

    @torch.no_grad()
    def estimate(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the moments of every group; moves the estimates."""
        count = self.num_batches_estimated
        average = m.moving_average(len(mean), self.momentum, count)
        before, means = average(self.running_mean, mean)
        _, variances = average(self.running_var, var + (mean - before).square())
        self.commit(
            running_mean=means[-1],
            running_var=variances[-1],
            num_batches_estimated=count + len(mean),
        )
        return means, torch.rsqrt(variances + self.eps)


class BatchChannelNorm2d(Leaf):
    """Batch norm, then group norm with an affine per group; (N, C, *) -> (N, C, *).

    `bn` holds the batch norm (per-channel affine, moving statistics) over groups of `batch_size`
    images (None: all of them); with a `rate` it is an `EstimatedBatchNorm2d`. `weight` and `bias`,
    of shape (num_groups,), are the channel norm's. Raises `ValueError` if `num_groups` does not
    divide `num_features`.
    """

    bn: Any  # of this file or of `bn.py`, or what a tool has put there
    weight: Any  # or None, as `bias`
    bias: Any

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        rate: float | None = None,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_features={num_features}")
        self.num_channels, self.num_groups, self.eps = num_features, num_groups, eps
        last: tuple[Any, ...] = (affine, device, dtype)
        if rate is None:
            self.bn = GhostBatchNorm2d(num_features, batch_size, eps, momentum, *last)
        else:
            self.bn = EstimatedBatchNorm2d(num_features, rate, batch_size, eps, *last)
        for name in ("weight", "bias"):
            values = torch.empty(num_groups, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(values) if affine else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gains and shifts of the channel norm to 1 and 0; `bn` has its own."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        m.check_input(x, self.num_channels)
        if isinstance(self.bn, nn.SyncBatchNorm):
            raise ValueError(
                "BatchChannelNorm2d: nn.SyncBatchNorm has no groups of images that share "
                "statistics; convert with norm=sync_bn instead, or leave these layers as they are"
            )
        own = isinstance(self.bn, GhostBatchNorm2d | EstimatedBatchNorm2d)
        if x.shape[0] == 0 or not own:  # put there by a tool
            return self.channel_norm(self.bn(x))
        if self.bn.training and isinstance(self.bn, GhostBatchNorm2d):
            m.check_variance(x, self.bn.batch_size)
        mean, var = m.moments(x)
        center, inverse = self.bn.statistics(mean, var, x[0, 0].numel())
        weight, bias = self.bn.gain_and_shift()

        # Numbers as (groups of images, images, groups of channels, channels). z = p * x + q is the
        # batch norm's output, and has these moments in every map.
        groups, channels = len(center), (self.num_groups, -1)
        p = (weight * inverse).view(groups, 1, *channels)
        center, bias = center.view(p.shape), bias.view(channels)
        mean, var = (v.view(groups, -1, *p.shape[2:]) for v in (mean, var))
        z_mean, z_var = m.pool((mean - center) * p + bias, var * p.square(), 3)
        scale = torch.rsqrt(z_var + self.eps)  # of the channel norm
        if self.weight is not None:
            scale = scale * self.weight
        shift = -z_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        scale, shift = scale[..., None], shift[..., None]
        scale, shift = p * scale, (bias - p * center) * scale + shift
        return m.scale_and_shift(x, scale.view(x.shape[:2]), shift.view(x.shape[:2]))

    def channel_norm(self, z: Tensor) -> Tensor:
        """The second line alone, by PyTorch's group norm."""
        size = self.num_channels // self.num_groups
        weight, bias = (
            None if v is None else v.repeat_interleave(size) for v in (self.weight, self.bias)
        )
        return F.group_norm(z, self.num_groups, weight, bias, self.eps)

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        channel_norm = nn.GroupNorm(self.num_groups, self.num_channels, self.eps)
        first = self.bn.fold() if hasattr(self.bn, "fold") else self.bn
        if self.weight is not None:
            channel_norm.to(self.weight)
            size = self.num_channels // self.num_groups
            with torch.no_grad():
                channel_norm.weight.copy_(self.weight.repeat_interleave(size))
                channel_norm.bias.copy_(self.bias.repeat_interleave(size))
        return nn.Sequential(first, channel_norm)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}"


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
        conv=ws_conv(eps_inside=True),
        norm=partial(_layer, groups=groups, min_channels=min_channels, **options),
        zero_init=True,
        channels_last=True,
        finish=check_groups(groups, min_channels),
    )
