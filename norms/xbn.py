"""XBN blocks: batch norm with a batch-free norm in each residual block. Huang et al., arXiv
2203.10778.

The running statistics of stacked batch norms are estimated on inputs that are off themselves, more
so with every layer. A norm without batch statistics in every block stops that: here group norm
(`norms/gn.py`) in place of the stem's batch norm (`norms/bn.py`) and of one in each block. Of a
block's norms 1, …, n, `position` P1 replaces the first, P3 the last, and P2 the first of two or the
second of three, behind the 3x3 convolution.
"""

from functools import partial
from typing import Literal

from torch import nn

from .blocks import no_blocks, residual_norms, swap_norm
from .bn import GhostBatchNorm2d
from .gn import check_groups, group_norm
from .scheme import CONV, Scheme, conv

INDEX = {"P1": lambda n: 0, "P2": lambda n: (n - 1) // 2, "P3": lambda n: n - 1}


def replace_batch_norms(
    model: nn.Module, position: str, groups: int, min_channels: int, eps: float
) -> None:
    """Put group norm into the stem and at the `position` of every block."""
    blocks = residual_norms(model, GhostBatchNorm2d)
    if not blocks:
        raise no_blocks("xbn", model)
    places = [norms[INDEX[position](len(norms))] for norms in blocks]
    inside = {parent for norms in blocks for parent, _ in norms}
    outside = (
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, GhostBatchNorm2d) and parent not in inside
    )
    places += [place for place in [next(outside, None)] if place]  # the stem's
    new = [
        group_norm(getattr(parent, name).num_features, groups, min_channels, eps)
        for parent, name in places
    ]
    check_groups(groups, min_channels)(nn.ModuleList(new))
    for place, norm in zip(places, new, strict=True):
        swap_norm(place, norm.to(next(model.parameters())))


def scheme(
    batch_size: int | None = None,
    position: Literal["P1", "P2", "P3"] = "P2",
    groups: int = 32,
    min_channels: int = 2,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> Scheme:
    """Plain convolutions and batch norm, of which `finish` replaces one in every block."""
    if position not in INDEX:
        raise ValueError(f"norm.position={position}: expected {', '.join(INDEX)}")
    check_groups(groups, min_channels)
    return Scheme(
        name="xbn",
        conv=partial(conv, CONV),
        norm=partial(GhostBatchNorm2d, batch_size=batch_size, eps=eps, momentum=momentum),
        channels_last=True,
        finish=partial(
            replace_batch_norms,
            position=position,
            groups=groups,
            min_channels=min_channels,
            eps=eps,
        ),
    )
