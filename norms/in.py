"""Instance normalization. Ulyanov et al., arXiv 1607.08022, as a baseline of arXiv 1803.08494.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

with mean and biased variance over the positions of one channel of one image, in training and
evaluation alike; gamma and beta per channel. It is group norm with a channel to a group.
"""

from functools import partial

from torch import Tensor, nn

from . import moments as m
from .layer import Leaf
from .scheme import CONV, Scheme, conv


class InstanceNorm2d(Leaf, nn.GroupNorm):
    """(N, C, H, W) -> (N, C, H, W); `ValueError` on maps of 1x1, which have no variance."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, num_features, eps)

    def forward(self, x: Tensor) -> Tensor:
        m.check_input(x, self.num_channels)
        if x.shape[2] * x.shape[3] < 2:
            raise ValueError(
                "norm=in: one value per channel, on maps of 1x1, has no variance; expected larger "
                "images, or another norm"
            )
        return super().forward(x)


def scheme(batch_size: int | None = None, eps: float = 1e-5) -> Scheme:
    """Plain convolutions and instance norm."""
    return Scheme(
        name="in",
        conv=partial(conv, CONV),
        norm=partial(InstanceNorm2d, eps=eps),
        zero_init=True,
        batch_free=True,
    )
