"""What schemes need of residual blocks, in our networks and in those of others."""

from typing import Any

import torch
from torch import Tensor, nn

from .convert import copy_attributes, reuse_parameters
from .layer import Leaf

Place = tuple[nn.Module, str]  # a module and the name of its child


def residual_norms(model: nn.Module, kind: type[nn.Module]) -> list[list[Place]]:
    """The norms of every residual block, in order. A block is a module, other than a sequence, with
    two or more children of `kind`."""
    blocks = [
        [(module, name) for name, child in module.named_children() if isinstance(child, kind)]
        for module in model.modules()
        if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    ]
    return [norms for norms in blocks if len(norms) > 1]


def no_blocks(name: str, model: nn.Module) -> ValueError:
    return ValueError(
        f"norm={name}: {type(model).__name__} has no residual block, a module with two norms or "
        f"more of its own; expected another network or norm"
    )


def swap_norm(place: Place, new: Any) -> None:
    """Put `new` into a place, with the parameters, hooks and activation of the norm there."""
    parent, name = place
    old: Any = getattr(parent, name)
    if getattr(old, "weight", None) is None and getattr(new, "affine", False):
        new.weight, new.bias, new.affine = None, None, False
    reuse_parameters(new, old)
    copy_attributes(new, old)
    for child, module in old.named_children():
        new.add_module(child, module)
    setattr(parent, name, new)


class NoNorm(Leaf, nn.Identity):
    """In place of a norm, where it shows where a block's branch ends; (N, C, *) -> (N, C, *)."""

    def __init__(self, channels: int = 0):
        super().__init__()

    def fold(self) -> nn.Module:
        """See `norms/fold.py`."""
        return nn.Identity()


class BranchScale(Leaf):
    """x * gain * factor at the end of a residual branch, with a learned number `gain`.

    (N, C, *) -> (N, C, *)."""

    no_weight_decay: tuple[str, ...] = ()

    def __init__(self, start: float, factor: float = 1.0):
        super().__init__()
        self.start, self.factor = start, factor
        self.gain = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain * self.factor).to(x.dtype)

    def extra_repr(self) -> str:
        return f"start={self.start:.4g}, factor={self.factor}"
