"""Put a scheme into any network: `convert(module, scheme)`.

Which convolutions: those with a norm right behind them, in the order in which a network registers
its layers (activations, pooling and dropout between them are passed over only if they are
`Identity`), and, ahead of the last norm, those without a bias, which is how most networks mark a
convolution whose output a norm shifts (attention is the exception: its projections without bias
are swapped too). Depthwise ones are no exception. A convolution with a bias and no norm behind it
and whatever comes after the last norm (a classifier, squeeze-and-excitation) stays.

Which norms: batch norms of maps; timm's norm-and-activation layers keep their activation, or take
the scheme's own (FRN, EvoNorm). Names stay, and so do the host's weights, whatever the scheme would
start from, and which of them are frozen; with the same layer the running statistics and the host's
eps too. Under `bn`, `sync_bn`, `gn`, `ln`, `in` and `ws_*` every parameter keeps its name and
shape, so the host's state dict fits. Where the scheme normalizes only at the ends (PWS), the first
and the last norm become its end norms and all others `Identity`, and every convolution gets a bias;
the host's block order stays. `convert(...).load_state_dict(state, strict=False)` lists what a state
dict lacks or has too much.
"""

from typing import Any

import torch
from torch import Tensor, nn

from norms.scheme import Scheme, replace_child


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Every parameter that both have in the same shape, and what is frozen; device, type and mode;
    the state of a layer of the same kind, and of no other: a batch norm's count of batches would
    end MABN's warm-up before it began. A gain that the scheme fixes (BRN's) stays what it is."""
    reference = next((t for t in old.state_dict().values() if t.is_floating_point()), None)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    state: dict[str, Tensor] = dict(old.named_parameters())
    buffers = dict(old.named_buffers())
    if buffers.keys() == dict(new.named_buffers()).keys():
        state |= buffers
    with torch.no_grad():
        for name, own in [*new.named_parameters(), *new.named_buffers()]:
            value = state.get(name)
            fixed = isinstance(own, nn.Parameter) and not own.requires_grad
            if value is not None and value.shape == own.shape and not fixed:
                own.copy_(value)
                own.requires_grad_(value.requires_grad)
    parameters = list(old.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        new.requires_grad_(False)
    new.train(old.training)


def _activate(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.act(module.drop(output))


def _new_norm(old: Any, scheme: Scheme, at_end: bool) -> nn.Module:
    make = scheme.end_norm if scheme.end_norm and at_end else scheme.norm
    act = getattr(old, "act", nn.Identity())  # timm's BatchNormAct2d has its activation inside
    if scheme.norm_act and not isinstance(act, nn.Identity):
        make, act = scheme.norm_act, nn.Identity()
    new = make(old.num_features)
    _take_over(new, old)
    if isinstance(new, nn.BatchNorm2d | nn.SyncBatchNorm):
        new.eps = old.eps
    if hasattr(old, "act"):
        new.add_module("drop", getattr(old, "drop", nn.Identity()))
        new.add_module("act", act)
        new.register_forward_hook(_activate)
    return new


def _new_conv(old: nn.Conv2d, scheme: Scheme) -> nn.Module:
    if old.padding_mode != "zeros" or type(old).forward is not nn.Conv2d.forward:
        raise ValueError(
            f"only plain zero-padded convolutions can be swapped, not {type(old).__name__} with "
            f"padding_mode={old.padding_mode}"
        )
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
        for name, x in host.named_modules(remove_duplicate=False)
        if isinstance(x, nn.BatchNorm2d | nn.Conv2d)  # which may have children
        or not (isinstance(x, nn.Identity) or any(x.children()))
    ]
    norms = [name for name, x in leaves if isinstance(x, nn.BatchNorm2d)]
    inside = tuple(f"{name}." for name in norms)  # the activation of timm's norm-act layers
    leaves = [(name, x) for name, x in leaves if not name.startswith(inside)]
    if not norms:
        raise ValueError(f"{type(module).__name__} has no batch norm, so there is nothing to swap")
    ahead = [name for name, _ in leaves].index(norms[-1])  # layers before the last norm

    new: dict[nn.Module, nn.Module] = {}  # one for one, so that what is shared stays shared
    following = [x for _, x in leaves[1:]] + [None]
    for i, ((name, layer), after) in enumerate(zip(leaves, following, strict=True)):
        if layer in new:
            continue
        if isinstance(layer, nn.BatchNorm2d):
            new[layer] = _new_norm(layer, scheme, name in (norms[0], norms[-1]))
        elif isinstance(layer, nn.Conv2d) and (
            (layer.bias is None and i < ahead) or isinstance(after, nn.BatchNorm2d)
        ):
            try:
                new[layer] = _new_conv(layer, scheme)
            except ValueError as error:
                where = f"{name.removeprefix('host.')} of {type(module).__name__}"
                raise ValueError(f"{where}: {error}; expected another norm or network") from error
    for name, layer in leaves:  # only now, so that an error leaves the network as it was
        if layer in new:
            replace_child(host, name, new[layer])
    module = host["host"]
    if scheme.check:
        scheme.check(module)
    return module
