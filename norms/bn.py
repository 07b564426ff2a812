"""Batch normalization. Ioffe and Szegedy, arXiv 1502.03167.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

with mean and biased variance over `batch_size` images and all positions, per channel. At test time
the moving averages r <- (1 - momentum) r + momentum * statistic, of the mean and the unbiased
variance, take their place. `GhostBatchNorm2d` is the same layer when more images pass at once than
share statistics (Hoffer et al., arXiv 1705.08741): each group of `batch_size` images, in order, is
normalized by its own statistics and updates the moving averages, as if the groups had come one by
one. Forward, x is read for the statistics and again while y is written; backward, x and dL/dy are
read for their sums and again while dL/dx is written; only x and a few numbers per group are kept.
"""

from functools import partial

import torch
from torch import Tensor, nn

from norms import moments as m
from norms import numbers as num
from norms.numbers import Array
from norms.scheme import Scheme, conv, frozen_batch_norm


class GhostBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over groups of `batch_size` images of a batch (None: all of them).

    Shapes: (N, C, H, W) -> (N, C, H, W); in training N must be a multiple of `batch_size`.
    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`.
    Raises `ValueError` for another N, or where a group holds one value per channel.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(num_features, eps, momentum)
        self.batch_size = batch_size

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        if not self.training:
            return super().forward(x)
        m.check_variance(x, self.batch_size)
        if self.batch_size in (None, x.shape[0]):
            return super().forward(x)
        numbers = self.statistics(*m.moments(x.detach()), x.shape[2] * x.shape[3])
        return m.Normalize.apply(x, self.weight, self.bias, *numbers, None, None, True)

    @num.quiet
    def statistics(self, mean: Array, var: Array, area: int) -> tuple[Tensor, Tensor]:
        """From the moments of every map, (N, C), to mean and 1 / sqrt(var + eps) of every group,
        (G, C), by which this moves the running statistics, one group after another; `area` is
        H * W. In evaluation those of the running statistics, (1, C)."""
        if not self.training:
            return self.running_mean[None].clone(), torch.rsqrt(self.running_var + self.eps)[None]
        state = (self.running_mean, self.running_var)
        xp, mean, var, *running = num.arrays(mean, var, *state)
        count = (self.batch_size or len(mean)) * area
        mean, var = m.pooled(mean, var, self.batch_size)
        for average, values in zip(running, (mean, var * (count / (count - 1))), strict=True):
            average[...] = num.moved_average(average, values, self.momentum)
        self.num_batches_tracked += len(mean)
        return num.tensor(mean), num.tensor(1 / xp.sqrt(var + self.eps))

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        return frozen_batch_norm(
            self.weight, self.bias, self.running_mean, self.running_var, self.eps
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_size={self.batch_size}"


def scheme(batch_size: int | None = None, eps: float = 1e-5, momentum: float = 0.1) -> Scheme:
    """Plain convolutions and batch norm. `momentum` is PyTorch's: the weight of the new value."""
    return Scheme(
        name="bn",
        conv=partial(conv, nn.Conv2d),
        norm=partial(GhostBatchNorm2d, batch_size=batch_size, eps=eps, momentum=momentum),
        channels_last=True,
    )
