"""Weight standardization with batch norm. Qiao et al., arXiv 1903.10520.

The convolutions of `norms/ws_gn.py`, with the batch norm of `norms/bn.py` behind them: the paper's
BN+WS rows. Standardized weights do not mend a small batch, since the statistics stay the batch's.
"""

from functools import partial

from .bn import GhostBatchNorm2d
from .scheme import Scheme
from .ws_gn import ws_conv


def scheme(
    batch_size: int | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    ws_eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = False,
) -> Scheme:
    """Standardized convolutions and batch norm."""
    return Scheme(
        name="ws_bn",
        conv=ws_conv(eps=ws_eps, unbiased=unbiased, eps_inside=eps_inside),
        norm=partial(GhostBatchNorm2d, batch_size=batch_size, eps=eps, momentum=momentum),
        channels_last=True,
    )
