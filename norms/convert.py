"""Put a scheme into any network: `convert(module, scheme)`; what it would do: `conversion(...)`.

Which norms: batch norms of maps of one to three dimensions, synchronized ones included (in one
dimension only behind a convolution, since behind a linear layer there are no maps). timm's
norm-and-activation layers keep their activation, or take the scheme's own (FRN, EvoNorm).

Which convolutions: where a scheme has its own, those with a norm right behind them, in the order in
which a network registers its layers (only `Identity` is passed over), and, ahead of the last norm,
those without a bias, which is how most networks mark a convolution whose output a norm shifts
(attention is the exception: its projections without bias are swapped too). Depthwise ones are no
exception. A convolution with a bias and no norm behind it, a transposed one, one of a library's own
class and whatever comes after the last norm (a classifier, squeeze-and-excitation) stays.

What stays of the host: names, hooks, training mode, type and device, what is tied or frozen, the
eps of a batch norm where it becomes another norm of batches, and every parameter that the new layer
has in the same shape, as the same object, so that an optimizer made before goes on. A batch norm's
parameters and statistics go to what means the same: a batch norm, the one inside BCN, BRN's moving
values; to nothing of MABN's. A norm that computes something else (a subclass with a forward pass of
its own) is refused. Where the scheme normalizes only at the ends (PWS), the first and the last norm
become its boundary norms, all others `Identity`, and every convolution gets a bias; the host's
block order stays.
"""

import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .bcn import BatchChannelNorm2d
from .brn import BatchRenorm2d
from .layer import BatchStatisticsNorm
from .scheme import Scheme
from .standardized import StandardizedConv

DIMENSIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def swap_modules(root: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put the `new` layers wherever a module of `root` refers to the old ones: among its children,
    and in lists, tuples and dictionaries of its own."""

    def swap(value: Any) -> Any:
        return new.get(value, value) if isinstance(value, nn.Module) else value

    for module in list(root.modules()):
        for name, value in vars(module).items():
            if isinstance(value, dict):
                value.update({k: swap(v) for k, v in value.items() if swap(v) is not v})
            elif isinstance(value, list):
                value[:] = map(swap, value)
            elif type(value) is tuple and any(swap(v) is not v for v in value):
                vars(module)[name] = tuple(map(swap, value))


@dataclass
class Conversion:
    """What `convert` does to a network: a layer for each name that is swapped, and why each norm or
    convolution that is not is left. `print` it to read it."""

    host: nn.Module
    scheme: Scheme
    swapped: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = dict(self.host.named_modules(remove_duplicate=False))  # as they are before

    def __str__(self) -> str:
        kinds = Counter(
            f"{type(self.layers[name]).__name__} -> {type(new).__name__}"
            for name, new in self.swapped.items()
        )
        swapped = [f"  {count} x {kind}" for kind, count in kinds.items()]
        left = [
            f"  {name or 'the module'} ({type(self.layers[name]).__name__}): {why}"
            for name, why in self.left.items()
        ]
        head = f"{type(self.host).__name__} to {self.scheme.name}: swapped"
        return "\n".join([head, *swapped, *(["left", *left] if left else [])])

    def apply(self) -> nn.Module:
        """Swap the layers in place and return the network; after a `ValueError` of the scheme's
        own check it is as it was."""
        root = nn.ModuleDict({"host": self.host})  # so that the host itself can be a layer to swap
        new = {self.layers[name]: layer for name, layer in self.swapped.items()}
        swap_modules(root, new)
        try:
            if self.scheme.finish:
                self.scheme.finish(root["host"])
        except ValueError:
            swap_modules(root, {layer: old for old, layer in new.items()})
            raise
        for name in self.swapped:  # `finish` may have put others there
            move_hooks(root.get_submodule(f"host.{name}".rstrip(".")), self.layers[name])
        return root["host"]


def _activate(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.act(module.drop(output))


def reuse_parameters(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the parameters of `old` that it has in the same shape, the objects themselves,
    except those that the scheme fixes (BRN's gain)."""
    for name, own in new._parameters.items():
        given = old._parameters.get(name)
        if own is not None and given is not None and given.shape == own.shape and own.requires_grad:
            new._parameters[name] = given


def move_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let what refers to `old`'s hooks, which `new` has by now, find them there."""
    for name in HOOKS:
        hooks, own = getattr(old, name, None), getattr(new, name, None)
        if isinstance(hooks, dict) and isinstance(own, dict):
            order = dict(own)
            hooks.clear()
            hooks.update(order)
            setattr(new, name, hooks)  # a handle removes its hook from this very dictionary
            for hook in hooks.values():
                if getattr(hook, "with_module", False):
                    hook.module = weakref.ref(new)


def copy_attributes(new: nn.Module, old: nn.Module) -> None:
    """Device, type, mode, hooks; whether everything is frozen."""
    for name in HOOKS:
        value = getattr(old, name, None)
        if isinstance(value, dict):
            getattr(new, name).update(value)
        elif value is not None:
            setattr(new, name, value)
    parameters = list(old.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        new.requires_grad_(False)
    new.train(old.training)


def _reference(layer: nn.Module) -> Tensor | None:
    values = (*layer.parameters(), *layer.buffers())
    return next((t for t in values if t.is_floating_point()), None)


@torch.no_grad()
def _new_norm(old: Any, scheme: Scheme, at_boundary: bool, dim: int) -> nn.Module:
    make = scheme.boundary_norm if scheme.boundary_norm and at_boundary else scheme.norm
    act = getattr(old, "act", nn.Identity())  # timm's BatchNormAct2d has its activation inside
    if scheme.norm_act and not isinstance(act, nn.Identity):
        make, act = scheme.norm_act, nn.Identity()
    new: Any = make(old.num_features)
    reference = _reference(old)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    if old.weight is None:
        if not isinstance(new, BatchStatisticsNorm | BatchChannelNorm2d | nn.GroupNorm):
            new.requires_grad_(False)  # its gain is a part of the method
        else:
            for layer in new.modules():
                for name in layer._parameters:
                    layer._parameters[name] = None
                if isinstance(layer, nn.GroupNorm):
                    layer.affine = False
    inside = new.bn if isinstance(new, BatchChannelNorm2d) else new
    reuse_parameters(inside, old)
    if isinstance(inside, BatchStatisticsNorm | nn.SyncBatchNorm):
        inside.dim = dim
        _copy_statistics(inside, old)
    copy_attributes(new, old)
    if hasattr(old, "act"):
        new.add_module("drop", getattr(old, "drop", nn.Identity()))
        new.add_module("act", act)
        new.register_forward_hook(_activate, prepend=True)  # the host's hooks see what it did
    return new


def _copy_statistics(new: Any, old: Any) -> None:
    """A batch norm's running statistics where they mean the same, and its eps."""
    new.eps = old.eps
    same = "num_batches_tracked" in new._buffers
    if old.running_mean is None:
        if same:
            new.running_mean = new.running_var = new.num_batches_tracked = None
            new.track_running_stats = False
        return
    if isinstance(new, BatchRenorm2d):
        new.moving_mean.copy_(old.running_mean)
        new.moving_std.copy_((old.running_var + new.eps).sqrt())
    elif "running_mean" in new._buffers:
        new.running_mean.copy_(old.running_mean)
        new.running_var.copy_(old.running_var)
    if same and "num_batches_tracked" in old._buffers:
        new.num_batches_tracked.copy_(old.num_batches_tracked)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether it may compute something else than PyTorch's layer or ours of its kind."""
    known = ("torch.nn.modules.", f"{__package__}.", "timm.layers.norm_act")
    names = ("forward", "_conv_forward")
    given = [getattr(type(layer), name) for name in names if hasattr(layer, name)]
    return any(name in vars(layer) for name in names) or not all(
        getattr(function, "__module__", "").startswith(known) for function in given
    )


def _why_plain(conv: Any) -> str:
    """Why a convolution cannot be swapped; empty where it can be."""
    if isinstance(conv, _ConvTransposeNd):
        return "transposed, whose filters no scheme standardizes"
    if isinstance(conv, StandardizedConv):
        return "has been converted already"
    if is_parametrized(conv) or "weight" not in conv._parameters:
        return "its weight is computed (parametrized, pruned or normalized): remove that first"
    if has_own_forward(conv):
        return "has a forward pass of its own"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode}"
    return ""


@torch.no_grad()
def _new_conv(old: Any, scheme: Scheme) -> nn.Module | None:
    """The scheme's convolution with what the host's has; None where that would be the same."""
    dim = old.weight.dim() - 2
    with torch.device("meta"):
        kind: Any = scheme.conv(
            max(2, old.in_channels), max(2, old.out_channels), old.kernel_size, dim=dim
        )
    if not isinstance(kind, StandardizedConv) and (kind.bias is None or old.bias is not None):
        return None
    new: Any = scheme.conv(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        groups=old.groups,
        dim=dim,
    ).to(old.weight.device, old.weight.dtype)
    if old.bias is not None and new.bias is None:
        new.bias = old.bias
    reuse_parameters(new, old)
    copy_attributes(new, old)
    return new


def _dimensions(norm: Any, before: Any) -> int:
    """Of the maps that a batch norm is for; `before`: the layer with weights ahead of it."""
    for cls, dim in DIMENSIONS.items():
        if isinstance(norm, cls) and not isinstance(norm, BatchStatisticsNorm):
            return dim
    return (
        before.weight.dim() - 2 if isinstance(before, _ConvNd) else getattr(norm, "dim", None) or 2
    )


def conversion(module: nn.Module, scheme: Scheme) -> Conversion:
    """What `convert` would swap and leave. Raises `ValueError`, in one line, as `convert` does."""
    host = type(module).__name__
    plan = Conversion(module, scheme)
    for layer in module.modules():
        wrapper = WRAPPERS.intersection(cls.__name__ for cls in type(layer).mro())
        if wrapper:
            raise ValueError(
                f"{host}: {wrapper.pop()} has made its lists of parameters and buffers; expected "
                f"the network as it is before it is wrapped"
            )
    leaves = [
        (name, x)
        for name, x in plan.layers.items()
        if isinstance(x, _BatchNorm | _ConvNd | BatchChannelNorm2d)  # which may have children
        or not (isinstance(x, nn.Identity) or any(x.children()))
    ]
    # such as the activation of timm's norm-act layers; a convolution may hold its own norm
    whole = [n for n, x in leaves if isinstance(x, _BatchNorm | BatchChannelNorm2d)]
    whole += [f"{n}.parametrizations" for n, x in leaves if isinstance(x, _ConvNd)]
    inside = tuple(f"{name}." for name in whole if name)
    leaves = [(name, x) for name, x in leaves if not name.startswith(inside)]

    # The norms, and the layer with weights ahead of each.
    norms: dict[str, Any] = {}
    ahead: dict[str, Any] = {}
    weighted: Any = None
    for name, layer in leaves:
        if any(map(is_lazy, [*layer._parameters.values(), *layer._buffers.values()])):
            raise ValueError(
                f"{name} of {host}: {type(layer).__name__} does not know its channels yet; "
                f"expected a network that has seen one batch"
            )
        if isinstance(layer, _BatchNorm):
            flat = isinstance(layer, nn.BatchNorm1d) and not (
                isinstance(weighted, _ConvNd)
                and weighted.weight.dim() == 3
                and weighted.out_channels == layer.num_features
            )
            if flat:
                plan.left[name] = "no maps: it follows no 1-d convolution of as many channels"
            elif is_parametrized(layer) or "weight" not in layer._parameters:
                raise ValueError(
                    f"{name} of {host}: the gain of this {type(layer).__name__} is computed "
                    f"(parametrized or pruned), which no other norm can take; remove that first"
                )
            elif has_own_forward(layer):
                raise ValueError(
                    f"{name} of {host}: this {type(layer).__name__} has a forward pass of its own, "
                    f"which no other norm can take; put one of PyTorch's in its place first"
                )
            else:
                norms[name], ahead[name] = layer, weighted
        elif isinstance(layer, BatchChannelNorm2d):
            plan.left[name] = "has been converted already"
        elif isinstance(layer, _ConvNd) or any(True for _ in layer.parameters(recurse=False)):
            weighted = layer
            if "Norm" in type(layer).__name__:
                plan.left[name] = "is no batch norm"
        elif "BatchNorm" in type(layer).__name__:
            plan.left[name] = "frozen: it has no statistics of batches"
    if not norms:
        there = Counter(
            type(layer).__name__ for _, layer in leaves if "Norm" in type(layer).__name__
        )
        found = ", ".join(f"{count} {kind}" for kind, count in there.items()) or "no norm at all"
        raise ValueError(
            f"{host} has no batch norm of maps, so there is nothing to swap; it has {found}"
        )

    # The convolutions.
    names = [name for name, _ in leaves]
    last = names.index(list(norms)[-1])
    convolutions: dict[nn.Module, str] = {}  # those that are the scheme's business: why they stay
    new: dict[nn.Module, nn.Module] = {}  # one for one, so that what is shared stays shared
    following = [x for _, x in leaves[1:]] + [None]
    for i, ((name, layer), after) in enumerate(zip(leaves, following, strict=True)):
        if not isinstance(layer, _ConvNd) or layer in convolutions:
            continue
        if not ((layer.bias is None and i < last) or isinstance(after, _BatchNorm)):
            plan.left[name] = "no norm follows it"
            continue
        convolutions[layer] = why = _why_plain(layer)
        try:
            swap = None if why else _new_conv(layer, scheme)
        except ValueError as error:
            raise ValueError(
                f"{name} of {host}: {error}; expected another norm or network"
            ) from error
        if swap is not None:
            new[layer] = swap
        elif why:
            plan.left[name] = why
    _check_premise(plan, scheme, norms, ahead, new, convolutions)
    first, *_, end = [*norms, *norms]
    for name, layer in norms.items():
        if layer not in new:
            dim = _dimensions(layer, ahead[name])
            new[layer] = _new_norm(layer, scheme, name in (first, end), dim)
            if dim != 2 and getattr(new[layer], "maps", "*") != "*":
                raise ValueError(
                    f"{name} of {host}: norm={scheme.name} is of two-dimensional maps, and these "
                    f"have {dim}; expected another norm"
                )
    plan.swapped = {name: new[layer] for name, layer in leaves if layer in new}
    return plan


def _check_premise(
    plan: Conversion,
    scheme: Scheme,
    norms: dict[str, nn.Module],
    ahead: dict[str, Any],
    new: dict[nn.Module, nn.Module],
    convolutions: dict[nn.Module, str],
) -> None:
    """Where the scheme has convolutions of its own: refuse the host whose norms stand behind others
    if the method needs them, else warn of it."""
    with torch.device("meta"):
        own = isinstance(scheme.conv(2, 2, 3), StandardizedConv)
    if not own or plan.host in norms.values():  # of a layer alone, nobody knows what is ahead
        return
    host, count = type(plan.host).__name__, len(norms)
    stay = [conv for conv in ahead.values() if isinstance(conv, _ConvNd) and conv not in new]
    if stay:
        name = next(name for name, layer in plan.layers.items() if layer is stay[0])
        why = convolutions.get(stay[0]) or "it has a bias and no norm right behind it"
        what = f"{len(stay)} of {count} norms of {host} stand behind a convolution that stays"
        what += f" ({name}: {why})"
    elif not new:
        what = f"none of the {count} norms of {host} stands behind a convolution"
    else:
        return
    if scheme.needs_conv or not new:
        raise ValueError(
            f"norm={scheme.name}: {what}, where the method is another; expected norm=bn, gn or "
            f"another that keeps the convolutions"
        )
    warnings.warn(f"norm={scheme.name}: {what}", stacklevel=4)


def convert(module: nn.Module, scheme: Scheme) -> nn.Module:
    """Swap the convolutions and batch norms of `module`, in place, for those of `scheme`.

    Returns the module, the scheme's layer itself if it is one to swap. Raises `ValueError`, and
    leaves the module as it was, if there is nothing to swap, if the scheme's options fit none of
    its layers, or if the method would not be the method there. `conversion` lists what it does.
    """
    return conversion(module, scheme).apply()
