"""Put a scheme into any network: `convert(module, scheme)`.

Which convolutions: those with a norm right behind them, in the order in which a network registers
its layers (activations, pooling and dropout between them are passed over only if they are
`Identity`), and those without a bias, which is how networks mark a convolution whose output a norm
shifts. A convolution with a bias and no norm behind it (a classifier, squeeze-and-excitation)
stays.

Which norms: batch norms, timm's norm-and-activation layers included. Names stay; weights, and with
the same layer the running statistics too, are taken over. Where the scheme normalizes only at the
ends (PWS), the first and the last norm become its end norms and all others `Identity`; the host's
block order stays.
"""

from typing import Any

import torch
from torch import Tensor, nn

from norms.scheme import Scheme


def _replace_child(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Every parameter and buffer that both have in the same shape; also device, type and mode."""
    state = old.state_dict()
    own = new.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    new.load_state_dict(fits, strict=False)
    reference = next(old.parameters(), None)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    new.train(old.training)


def _activate(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.act(module.drop(output))


def _new_norm(old: Any, new: nn.Module) -> nn.Module:
    if old.affine:
        _take_over(new, old)
    if hasattr(old, "act"):  # timm's BatchNormAct2d: the activation is part of the norm
        new.add_module("drop", getattr(old, "drop", nn.Identity()))
        new.add_module("act", old.act)
        new.register_forward_hook(_activate)
    return new


def _new_conv(old: nn.Conv2d, scheme: Scheme) -> nn.Module:
    if old.padding_mode != "zeros" or type(old).forward is not nn.Conv2d.forward:
        raise ValueError(f"{old}: only plain zero-padded convolutions can be swapped")
    new = scheme.conv(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        groups=old.groups,
    )
    if old.bias is not None and getattr(new, "bias", None) is None:  # keep the host's parameters
        new.bias = nn.Parameter(torch.zeros_like(old.bias))
    _take_over(new, old)
    return new


def convert(module: nn.Module, scheme: Scheme) -> nn.Module:
    """Swap the convolutions and batch norms of `module`, in place, for those of `scheme`.

    Returns the module. Raises `ValueError` if there is nothing to swap, or if the scheme's options
    fit none of its layers.
    """
    host = nn.ModuleDict({"host": module})  # so that `module` itself can be a layer to swap
    leaves = [
        (name, x)
        for name, x in host.named_modules()
        if isinstance(x, nn.BatchNorm2d) or not (isinstance(x, nn.Identity) or any(x.children()))
    ]
    norms = [name for name, x in leaves if isinstance(x, nn.BatchNorm2d)]
    inside = tuple(f"{name}." for name in norms)  # the activation of timm's norm-act layers
    leaves = [(name, x) for name, x in leaves if not name.startswith(inside)]
    if not norms:
        raise ValueError(f"{type(module).__name__} has no batch norm, so there is nothing to swap")

    following = [x for _, x in leaves[1:]] + [None]
    for (name, layer), after in zip(leaves, following, strict=True):
        if isinstance(layer, nn.Conv2d) and (
            layer.bias is None or isinstance(after, nn.BatchNorm2d)
        ):
            _replace_child(host, name, _new_conv(layer, scheme))
        elif isinstance(layer, nn.BatchNorm2d):
            at_end = name in (norms[0], norms[-1])
            make = scheme.end_norm if scheme.end_norm and at_end else scheme.norm
            _replace_child(host, name, _new_norm(layer, make(layer.num_features)))
    module = host["host"]
    if scheme.check:
        scheme.check(module)
    return module
