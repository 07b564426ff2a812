"""The inference network of any model: `fold(module)`.

Weight standardization, PWS and centring are constants once training is over: they are baked into
plain convolutions. BN, BRN, MABN and estimated BN are one scale and shift per channel: they go into
the convolution in front of them, or become PyTorch's batch norm where that convolution has another
user or something stands between (as in networks that normalize before they convolve). BCN's channel
norm, GN, LN, IN, FRN and the EvoNorms depend on the image and stay.
"""

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from .convert import _activate, replace_module
from .layer import BatchStatisticsNorm
from .scheme import CONV, frozen_batch_norm
from .standardized import StandardizedConv

PLAIN = tuple(CONV.values())


class _Tracer(fx.Tracer):
    """Follows a network down to convolutions and norms."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(m, PLAIN) or _is_norm(m) or not any(m.children())
        return whole or bool(m._forward_hooks) or super().is_leaf_module(m, qualified_name)


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or hasattr(layer, "fold")


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing that somebody added to the layer would be lost with it."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    return all(hook is _activate for hook in hooks) and not is_parametrized(layer)


def _convolutions_before(network: nn.Module) -> dict[nn.Module, nn.Module]:
    """{norm: convolution} where a norm is all that uses a convolution's output."""
    if _is_norm(network) or isinstance(network, PLAIN):
        return {}
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a network's own code raises on symbols
        warnings.warn(
            f"fold: {type(network).__name__} cannot be traced ({type(error).__name__}); its norms "
            f"become batch norms and are not merged into convolutions",
            stacklevel=3,
        )
        return {}
    calls = {
        node: network.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    uses = Counter(calls.values())
    pairs = {}
    for node, norm in calls.items():
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before not in calls or len(before.users) > 1:
            continue
        conv = calls[before]
        if isinstance(conv, PLAIN) and _is_plain(conv) and uses[conv] == uses[norm] == 1:
            pairs[norm] = conv
    return pairs


def _plain_conv(layer: Any) -> nn.Module:
    """The convolution with the weights that it uses."""
    plain = CONV[layer.weight.dim() - 2](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )
    state = {"weight": layer.standardized(), "bias": layer.bias}
    plain.to(layer.weight).load_state_dict({k: v for k, v in state.items() if v is not None})
    return plain.eval()


def _plain_norm(layer: Any) -> list[nn.Module]:
    """The norm in PyTorch's layers, and the activation that a norm-activation layer has."""
    if hasattr(layer, "fold"):
        plain = layer.fold()
        if plain is layer:
            return [layer]
    elif layer.running_var is not None:
        plain = frozen_batch_norm(layer, layer.running_mean, layer.running_var)
    else:
        return [layer]  # it has no running statistics
    parts = list(plain) if isinstance(plain, nn.Sequential) else [plain]
    return parts + [getattr(layer, name) for name in ("drop", "act") if hasattr(layer, name)]


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps tensors of its last pass (weight norm does)."""
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for value in vars(layer).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


@torch.no_grad()
def fold(module: nn.Module) -> nn.Module:
    """A copy of `module` for inference, in evaluation mode, with everything foldable folded away.

    Same inputs, same outputs within float tolerance; parameters need no gradient, names of modules
    stay, and what is one module under two names stays one. A network that `torch.fx` cannot trace
    keeps its norms, as PyTorch's batch norms, and a warning says so; layers to which somebody has
    added hooks or parametrizations stay as they are.
    """
    network = _copy(module).eval()
    dims = {x.weight.dim() - 2 for x in network.modules() if isinstance(x, _ConvNd)}
    for module in network.modules():
        if isinstance(module, BatchStatisticsNorm | nn.SyncBatchNorm) and len(dims) == 1:
            module.dim = getattr(module, "dim", None) or min(dims)
    before = _convolutions_before(network)
    root = nn.ModuleDict({"net": network})  # so that `module` itself can be a layer to replace
    layers = list(root.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {
        layer: _plain_conv(layer)
        for layer in network.modules()
        if isinstance(layer, StandardizedConv) and _is_plain(layer)
    }
    whole = tuple(f"{name}." for name, x in layers if _is_norm(x) and _is_plain(x))
    for name, layer in layers:
        if not (_is_norm(layer) and _is_plain(layer)) or layer in new or name.startswith(whole):
            continue
        parts = _plain_norm(layer)
        if parts == [layer]:
            continue
        norm: Any = parts[0]
        if layer in before and isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            conv: Any = before[layer]
            new[conv] = fuse_conv_bn_eval(new.get(conv, conv), norm)
            parts = parts[1:]
        parts = [p for p in parts if not isinstance(p, nn.Identity)] or [nn.Identity()]
        new[layer] = nn.Sequential(*parts) if len(parts) > 1 else parts[0]
    for name, layer in layers:
        if layer in new:
            replace_module(root, name, new[layer])
    return root["net"].eval().requires_grad_(False)
