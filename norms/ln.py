"""Layer normalization of convolutional maps. Ba et al., arXiv 1607.06450, as in arXiv 1803.08494.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

with mean and biased variance over one image, all channels and all positions; gamma and beta per
channel. It is group norm with one group, the baseline LN of the group-norm paper.
"""

from functools import partial

from torch import nn

from .scheme import CONV, Scheme, conv


def scheme(batch_size: int | None = None, eps: float = 1e-5) -> Scheme:
    """Plain convolutions and group norm with a single group."""
    return Scheme(
        name="ln",
        conv=partial(conv, CONV),
        norm=partial(nn.GroupNorm, 1, eps=eps),
        zero_init=True,
        batch_independent=True,
    )
