"""Put a scheme into any network: `convert(module, scheme)`.

Which convolutions: those with a norm right behind them, in the order in which a network registers
its layers (activations, pooling and dropout between them are passed over only if they are
`Identity`), and those without a bias, which is how networks mark a convolution whose output a norm
shifts. Depthwise ones are no exception. A convolution with a bias and no norm behind it (a
classifier, squeeze-and-excitation) stays.

Which norms: batch norms of maps; timm's norm-and-activation layers keep their activation, or take
the scheme's own (FRN, EvoNorm). Names stay; weights, and with the same layer the running statistics
too, are taken over: under `bn`, `sync_bn`, `gn`, `ln`, `in` and `ws_*` every parameter keeps its
name and shape, so the host's state dict fits. Where the scheme normalizes only at the ends (PWS),
the first and the last norm become its end norms and all others `Identity`, and every convolution
gets a bias; the host's block order stays. `convert(...).load_state_dict(state, strict=False)` lists
what a state dict lacks or has too much.
"""

from typing import Any

import torch
from torch import Tensor, nn

from norms.scheme import Scheme, replace_child


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


def _new_norm(old: Any, scheme: Scheme, at_end: bool) -> nn.Module:
    make = scheme.end_norm if scheme.end_norm and at_end else scheme.norm
    act = getattr(old, "act", nn.Identity())  # timm's BatchNormAct2d has its activation inside
    if scheme.norm_act and not isinstance(act, nn.Identity):
        make, act = scheme.norm_act, nn.Identity()
    new = make(old.num_features)
    if old.affine:
        _take_over(new, old)
    if hasattr(old, "act"):
        new.add_module("drop", getattr(old, "drop", nn.Identity()))
        new.add_module("act", act)
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
            replace_child(host, name, _new_conv(layer, scheme))
        elif isinstance(layer, nn.BatchNorm2d):
            at_end = name in (norms[0], norms[-1])
            replace_child(host, name, _new_norm(layer, scheme, at_end))
    module = host["host"]
    if scheme.check:
        scheme.check(module)
    return module
