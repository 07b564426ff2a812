"""Instance normalization. Ulyanov et al., arXiv 1607.08022, as a baseline of arXiv 1803.08494.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

with mean and biased variance over the positions of one channel of one image, in training and
evaluation alike; gamma and beta per channel. It is group norm with a channel to a group.
"""

from functools import partial

from .gn import InstanceNorm2d
from .scheme import CONV, Scheme, conv


def scheme(batch_size: int | None = None, eps: float = 1e-5) -> Scheme:
    """Plain convolutions and instance norm."""
    return Scheme(
        name="in",
        conv=partial(conv, CONV),
        norm=partial(InstanceNorm2d, eps=eps),
        zero_init=True,
        batch_independent=True,
    )
