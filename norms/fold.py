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
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from .convert import _activate, has_own_forward
from .layer import BatchStatisticsNorm, Leaf
from .scheme import CONV, frozen_batch_norm
from .standardized import StandardizedConv

PLAIN = tuple(CONV.values())


class _Symbol(fx.Proxy):
    """A tensor to whoever asks for its class, as networks do that take lists as well."""

    __class__: Any = Tensor
    _is_param = _is_buffer = False


class _Tracer(fx.Tracer):
    """Follows a network down to convolutions and norms."""

    has_branches = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def to_bool(self, obj: Any) -> bool:
        self.has_branches = True  # also where a network goes on after the error
        return super().to_bool(obj)

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(m, PLAIN) or _is_norm(m) or bool(m._forward_hooks)
        simple = not any(isinstance(value, nn.Module) for value in _attributes(m))
        return whole or simple or super().is_leaf_module(m, qualified_name)


def _attributes(module: nn.Module) -> Iterator[Any]:
    """What a module keeps, children included, alone or in lists and the like."""
    for value in vars(module).values():
        yield value
        if isinstance(value, dict | list | tuple | set):
            yield from value.values() if isinstance(value, dict) else value


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or (isinstance(layer, Leaf) and hasattr(layer, "fold"))


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing that somebody added to the layer would be lost with it."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    added = any(hook is not _activate for hook in hooks) or is_parametrized(layer)
    return not (added or _own_forward(layer))


def _own_forward(layer: nn.Module) -> bool:
    """Whether a fold might change more than a factor and a shift; timm's `Conv2dSame` only pads."""
    pads = getattr(type(layer).forward, "__module__", "") == "timm.layers.conv2d_same"
    return has_own_forward(layer) and not pads


def _convolutions_before(network: nn.Module) -> tuple[dict[nn.Module, nn.Module], set[nn.Module]]:
    """{norm: convolution} where a norm is all that uses a convolution's output, and the layers
    whose parameters are read by others."""
    if _is_norm(network) or isinstance(network, PLAIN):
        return {}, set()
    traced = _copy(network, share=True)  # in which tracing may leave symbols
    try:
        tracer = _Tracer()
        graph = tracer.trace(traced)
        if tracer.has_branches:
            raise fx.proxy.TraceError("what is called depends on the input")
    except Exception as error:  # whatever a network's own code raises on symbols
        warnings.warn(
            f"fold: {type(network).__name__} cannot be traced ({type(error).__name__}); its norms "
            f"become batch norms and are not merged into convolutions",
            stacklevel=3,
        )
        return {}, set()
    calls = {
        node: network.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    uses = Counter(part for layer in calls.values() for part in layer.modules())
    kept = {v.node for x in traced.modules() for v in _attributes(x) if isinstance(v, fx.Proxy)}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    read = {parameters.get(str(node.target)) for node in graph.nodes if node.op == "get_attr"}
    read_elsewhere = {
        x for x in network.modules() if (read - {None}).intersection(x._parameters.values())
    }
    pairs, left = {}, {}
    for node, norm in calls.items():
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before not in calls or len(before.users) > 1:
            continue
        conv = calls[before]
        pair = isinstance(conv, PLAIN) and _is_norm(norm)
        if not pair or uses[conv] != 1 or uses[norm] != 1:
            continue
        if {conv, norm} & read_elsewhere:
            left[str(node.target)] = "parameters that others read"
        elif before in kept:
            left[str(node.target)] = "an output of the convolution that is kept"
        elif _own_forward(conv) or _own_forward(norm):
            left[str(node.target)] = "a forward pass of its own, or its convolution's"
        elif _is_plain(conv):
            pairs[norm] = conv
    if left:
        some = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        warnings.warn(f"fold: not merged into convolutions: {len(left)} ({some})", stacklevel=3)
    return pairs, read_elsewhere


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


def _copy(
    module: nn.Module,
    share: bool = False,
    new: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
) -> nn.Module:
    """A deep copy, also of a network that keeps tensors of its last pass (weight norm does), with
    the same parameters and buffers if they are to be shared, and `new` layers wherever a layer is
    referred to."""
    memo: dict[int, Any] = {id(old): layer for old, layer in new.items()}
    if share:
        memo |= {id(t): t for t in (*module.parameters(), *module.buffers())}
    for layer in module.modules():
        for value in vars(layer).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


@torch.no_grad()
def fold(module: nn.Module) -> nn.Module:
    """A copy of `module` for inference, in evaluation mode, with everything foldable folded away.

    Same inputs, same outputs within float tolerance; parameters need no gradient, names of modules
    stay, and what is one module under two names stays one. What cannot be shown to compute the same
    stays: layers with hooks, parametrizations or a forward pass of their own, convolutions whose
    weights or outputs others use. A network that `torch.fx` cannot trace keeps its norms, as
    PyTorch's batch norms. A warning says so.
    """
    network = _copy(module).eval()
    dims = {x.weight.dim() - 2 for x in network.modules() if isinstance(x, _ConvNd)}
    for module in network.modules():
        if isinstance(module, BatchStatisticsNorm | nn.SyncBatchNorm) and len(dims) == 1:
            module.dim = getattr(module, "dim", None) or min(dims)
    before, read_elsewhere = _convolutions_before(network)
    new: dict[nn.Module, nn.Module] = {
        layer: _plain_conv(layer)
        for layer in network.modules()
        if isinstance(layer, StandardizedConv) and _is_plain(layer) and layer not in read_elsewhere
    }
    for layer in network.modules():
        if not (_is_norm(layer) and _is_plain(layer)):
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
    return _copy(network, True, new).eval().requires_grad_(False)
