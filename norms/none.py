"""No normalization at all: y = conv(x, W) + beta. The lower bound of every table.

He initialization (arXiv 1502.01852) keeps the variance through a plain stack; along a residual
trunk it doubles with every block.
"""

from functools import partial

from .scheme import CONV, Scheme, biased_conv, identity


def scheme(batch_size: int | None = None) -> Scheme:
    """Plain convolutions with bias, and nothing behind them."""
    return Scheme(
        name="none",
        conv=partial(biased_conv, CONV),
        norm=identity,
        batch_independent=True,
        channels_last=True,
    )
