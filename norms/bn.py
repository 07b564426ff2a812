"""Batch normalization. Ioffe and Szegedy, arXiv 1502.03167.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

with mean and biased variance over `batch_size` images and all positions, per channel. At test time
the moving averages r <- (1 - momentum) r + momentum * statistic, of the mean and the unbiased
variance, take their place. `GhostBatchNorm2d` is the same layer when more images pass at once than
share statistics (Hoffer et al., arXiv 1705.08741): each group of `batch_size` images, in order, is
normalized by its own statistics and updates the moving averages, as if the groups had come one by
one.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import moments as m
from .backward import check_vmap
from .layer import BatchStatisticsNorm
from .scheme import CONV, Scheme, conv


class GhostBatchNorm2d(BatchStatisticsNorm):
    """`nn.BatchNorm2d` over groups of `batch_size` images of a batch (None: all of them).

    Shapes: (N, C, *) -> (N, C, *); in training N must be a multiple of `batch_size`. Parameters,
    buffers and evaluation are those of `nn.BatchNorm2d`.
    Raises `ValueError` for another N, or where a group holds one value per channel.
    """

    state = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    lr_divisor: dict[str, float]  # of the learning rate of a parameter
    no_weight_decay: tuple[str, ...]

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(num_features, batch_size, eps, momentum, affine, device, dtype)

    def normalize(self, x: Tensor) -> Tensor:
        m.check_variance(x, self.batch_size)
        if m.count_groups(x, self.batch_size) == 1:
            return self.one_group(x)
        mean, inverse = self.statistics(*m.moments(x), x[0, 0].numel())
        return self.apply_statistics(x, mean, inverse)

    def one_group(self, x: Tensor) -> Tensor:
        """Of the batch as a whole: PyTorch's own function, on a copy of the state."""
        mean, var = self.running_mean, self.running_var
        affine = (self.weight, self.bias)
        if mean is None or not self.training:
            return F.batch_norm(x, None, None, *affine, True, 0.0, self.eps)
        check_vmap(type(self).__name__, x, mean)
        mean, var = mean.clone(), var.clone()
        count = self.num_batches_tracked + 1
        rate = 1 / float(count) if self.momentum is None else self.momentum
        y = F.batch_norm(x, mean, var, *affine, True, rate, self.eps)
        self.commit(running_mean=mean, running_var=var, num_batches_tracked=count)
        return y

    def statistics(self, mean: Tensor, var: Tensor, area: int) -> tuple[Tensor, Tensor]:
        """From the moments of every map, (N, C), to mean and 1 / sqrt(var + eps) of every group,
        (G, C), by which this moves the running statistics; `area` is the number of positions. In
        evaluation those of the running statistics, (1, C)."""
        if not (self.training or self.running_mean is None):
            return self.running_mean[None].clone(), torch.rsqrt(self.running_var + self.eps)[None]
        count = (self.batch_size or len(mean)) * area
        mean, var = m.pool_images(mean, var, self.batch_size)
        self.track(mean.detach(), var.detach() * (count / max(1, count - 1)))
        return mean, torch.rsqrt(var + self.eps)

    def track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics by those of every group, (G, C), with unbiased variances."""
        if self.running_mean is None or not self.training:
            return
        count = self.num_batches_tracked
        average = m.moving_average(len(mean), self.momentum, count)
        self.commit(
            running_mean=average(self.running_mean, mean)[1][-1],
            running_var=average(self.running_var, var)[1][-1],
            num_batches_tracked=count + len(mean),
        )


def scaled(channels: int, init_scale: float, lr_divisor: float, **options: Any) -> GhostBatchNorm2d:
    """Batch norm whose gain starts at `init_scale` and learns slower by `lr_divisor`, then without
    weight decay (arXiv 2110.13989)."""
    layer = GhostBatchNorm2d(channels, **options)
    layer.init_scale = init_scale
    layer.reset_parameters()
    if lr_divisor != 1:
        layer.lr_divisor, layer.no_weight_decay = {"weight": lr_divisor}, ("weight", "bias")
    return layer


def scheme(
    batch_size: int | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    init_scale: float = 1.0,
    lr_divisor: float = 1.0,
) -> Scheme:
    """Plain convolutions and batch norm. `momentum` is PyTorch's: the weight of the new value."""
    if lr_divisor <= 0:
        raise ValueError(f"norm.lr_divisor={lr_divisor}: expected a number above 0")
    norm = partial(scaled, init_scale=init_scale, lr_divisor=lr_divisor)
    return Scheme(
        name="bn",
        conv=partial(conv, CONV),
        norm=partial(norm, batch_size=batch_size, eps=eps, momentum=momentum),
        channels_last=True,
    )
