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

import torch
from torch import Tensor, nn

from norms import moments as m
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
        return m.affine(x, *self.scale_shift(*m.moments(x), x.shape[2] * x.shape[3]))

    def scale_shift(self, mean: Tensor, var: Tensor, area: int) -> tuple[Tensor, Tensor]:
        """From the moments of every map, (N, C), to the layer's scale and shift, (N, C).

        In training this updates the moving averages, once per group; `area` is H * W.
        """
        if self.training:
            n = mean.shape[0]
            mean, var = m.pool(m.split(mean, self.batch_size), m.split(var, self.batch_size), dim=1)
            groups = mean.shape[0]
            count = n // groups * area
            self.update(mean.detach(), var.detach() * (count / (count - 1)))
            mean, var = (s.repeat_interleave(n // groups, 0) for s in (mean, var))
        else:
            mean, var = self.running_mean[None], self.running_var[None]
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics by the (groups, C) statistics, one group after another."""
        for running, values in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(m.moving_average(running, values, self.momentum)[-1])
        self.num_batches_tracked += mean.shape[0]

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
