"""What a network asks of a normalization method, and the initialization that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

ConvT = TypeVar("ConvT", bound=nn.Conv2d)


@dataclass(frozen=True)
class Scheme:
    """A normalization method as a whole: which layers, where they stand, how they start.

    A network is written against these few words and never asks for a method by name.
    """

    name: str
    conv: Callable[..., nn.Module]
    """Takes what `nn.Conv2d` takes except `bias`, on which it decides itself, and `inner=True` for
    the second and later convolutions of a residual branch."""
    norm: Callable[[int], nn.Module]
    """The layer after a convolution with that many output channels."""
    norm_act: Callable[[int], nn.Module] | None = None
    """The norm with its own activation, in place of norm and ReLU, where a method has one."""
    end_norm: Callable[[int], nn.Module] | None = None
    """The norm after the stem and after the last stage, where a method normalizes only there."""
    block: str = "post"
    """The order in a residual block that the method's paper uses: `post`, `pws` or `pws_tf`."""
    zero_init: bool = False
    """Whether the paper starts the last norm of every residual branch at zero."""
    batch_free: bool = False
    """Whether no statistic ever crosses images: then the batch size changes nothing."""
    loss_scaling: bool = True
    """Whether gradients may carry a changing factor, as a float16 loss scaler puts on them."""
    channels_last: bool = False
    """Whether a network gains from channels-last memory: convolutions do, and so do norms that take
    their statistics per channel; group norm loses as much."""
    initialize: Callable[[nn.Module, Tensor], None] | None = None
    """A data-dependent start: called once with training images, before the first step."""
    check: Callable[[nn.Module], None] | None = None
    """Raises `ValueError` if the options make no sense for the finished network."""


def he_init(conv: ConvT, mode: Literal["fan_in", "fan_out"] = "fan_out") -> ConvT:
    """He et al. (arXiv 1502.01852), eq. 10: weights of variance 2/fan; the bias starts at zero."""
    nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def conv(
    cls: Callable[..., nn.Conv2d], *args: Any, inner: bool = False, **kwargs: Any
) -> nn.Conv2d:
    """A convolution that a norm follows: no bias, since the norm's shift is one."""
    return he_init(cls(*args, bias=False, **kwargs))


def frozen_batch_norm(
    weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> nn.BatchNorm2d:
    """weight * (x - mean) / sqrt(var + eps) + bias, as PyTorch's own layer in evaluation mode."""
    layer = nn.BatchNorm2d(len(weight), eps, device=weight.device, dtype=weight.dtype).eval()
    state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)
    return layer


def frozen_affine(weight: Tensor, bias: Tensor) -> nn.BatchNorm2d:
    """weight * x + bias, likewise; its eps must not be 0."""
    eps = 1e-5
    return frozen_batch_norm(weight, bias, None, torch.full_like(bias, 1 - eps), eps)


def biased_conv(
    cls: Callable[..., nn.Conv2d], *args: Any, inner: bool = False, **kwargs: Any
) -> nn.Conv2d:
    """A convolution that no norm follows."""
    return he_init(cls(*args, bias=True, **kwargs))


def identity(channels: int) -> nn.Identity:
    """In place of a norm."""
    return nn.Identity()


def replace_child(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)
