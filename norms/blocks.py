"""What schemes need of residual blocks, in our networks and in those of others."""

from typing import Any

from torch import nn

from .convert import copy_attributes, reuse_parameters

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
