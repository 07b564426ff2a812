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

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from norms.convert import _activate
from norms.scheme import frozen_batch_norm, replace_child


class _Tracer(fx.Tracer):
    """Follows a network down to convolutions and norms."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(m, nn.Conv2d) or _is_norm(m)
        whole = whole or not any(m.children()) or bool(m._forward_hooks)
        return whole or super().is_leaf_module(m, qualified_name)


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm2d) or hasattr(layer, "fold")


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing that somebody added to the layer would be lost with it."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    return all(hook is _activate for hook in hooks) and not is_parametrized(layer)


def _convolutions_before(network: nn.Module) -> dict[str, str]:
    """{norm: convolution} where a norm is all that uses a convolution's output."""
    if _is_norm(network) or isinstance(network, nn.Conv2d):
        return {}
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a network's own code raises on symbols
        warnings.warn(
            f"norms.fold: {type(network).__name__} cannot be traced ({type(error).__name__}); its "
            f"norms become batch norms and are not merged into convolutions",
            stacklevel=3,
        )
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    names = [str(node.target) for node in calls]
    places = Counter(layer for _, layer in network.named_modules(remove_duplicate=False))
    pairs = {}
    for node in calls:
        before = node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            pair = str(node.target), str(before.target)
            conv = network.get_submodule(pair[1])
            is_conv = isinstance(conv, nn.Conv2d) and _is_plain(conv) and places[conv] == 1
            if is_conv and all(names.count(name) == 1 for name in pair):
                pairs[pair[0]] = pair[1]
    return pairs


def _plain_conv(layer: Any) -> nn.Conv2d:
    """The convolution with the weights that it uses."""
    plain = nn.Conv2d(
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
        weight, bias = layer.weight, layer.bias
        if weight is None:  # affine=False
            weight, bias = layer.running_var.new_ones(layer.num_features), layer.running_var * 0
        plain = frozen_batch_norm(weight, bias, layer.running_mean, layer.running_var, layer.eps)
    else:
        return [layer]  # it has no running statistics
    parts = list(plain) if isinstance(plain, nn.Sequential) else [plain]
    return parts + [getattr(layer, name) for name in ("drop", "act") if hasattr(layer, name)]


def fold(module: nn.Module) -> nn.Module:
    """A copy of `module` for inference, in evaluation mode, with everything foldable folded away.

    Same inputs, same outputs within float tolerance; parameters need no gradient, names of modules
    stay. A network that `torch.fx` cannot trace keeps its norms, as PyTorch's batch norms, and a
    warning says so; layers to which somebody has added hooks or parametrizations stay as they are.
    """
    network = copy.deepcopy(module).eval()
    before = {f"net.{k}": f"net.{v}" for k, v in _convolutions_before(network).items()}
    root = nn.ModuleDict({"net": network})  # so that `module` itself can be a layer to replace
    for name, layer in list(root.named_modules()):
        if hasattr(layer, "standardized") and _is_plain(layer):
            replace_child(root, name, _plain_conv(layer))
    norms = [(name, x) for name, x in root.named_modules() if _is_norm(x) and _is_plain(x)]
    inside = tuple(f"{name}." for name, _ in norms)
    for name, layer in [(name, x) for name, x in norms if not name.startswith(inside)]:
        parts = _plain_norm(layer)
        if parts == [layer]:
            continue
        first: Any = parts[0]
        if name in before and isinstance(first, nn.BatchNorm2d):
            conv: Any = root.get_submodule(before[name])
            replace_child(root, before[name], fuse_conv_bn_eval(conv, first))
            parts = parts[1:]
        parts = [p for p in parts if not isinstance(p, nn.Identity)] or [nn.Identity()]
        replace_child(root, name, nn.Sequential(*parts) if len(parts) > 1 else parts[0])
    return root["net"].eval().requires_grad_(False)
