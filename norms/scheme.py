"""What a network asks of a normalization method, and the initialization that they share."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scheme:
    """A normalization method as a whole: which layers, where they stand, how they start.

    A network is written against these few words and never asks for a method by name.
    """

    name: str
    conv: Callable[..., nn.Module]
    """Takes what `nn.Conv2d` takes except `bias`, on which it decides itself; `dim=1` or 3 for
    other numbers of dimensions, and `inner=True` for the second and later convolutions of a
    residual branch."""
    norm: Callable[[int], nn.Module]
    """The layer after a convolution with that many output channels."""
    norm_act: Callable[[int], nn.Module] | None = None
    """The norm with its own activation, in place of norm and ReLU, where a method has one."""
    boundary_norm: Callable[[int], nn.Module] | None = None
    """The norm after the stem and after the last stage, where a method normalizes only there."""
    block: str = "post"
    """The order in a residual block that the method's paper uses: see `models/resnet.py`."""
    zero_init: bool = False
    """Whether the paper starts the last norm of every residual branch at zero."""
    batch_independent: bool = False
    """Whether no statistic ever crosses images: then the batch size changes nothing."""
    needs_conv: bool = False
    """Whether a norm is the method's only behind the method's own convolution."""
    loss_scaling: bool = True
    """Whether gradients may carry a changing factor, as a float16 loss scaler puts on them."""
    channels_last: bool = False
    """Whether a network gains from channels-last memory: convolutions do, and so do norms that take
    their statistics per channel; group norm loses as much."""
    initialize: Callable[[nn.Module, Tensor], None] | None = None
    """A data-dependent start: called once with training images, before the first step."""
    after_step: Callable[[nn.Module], None] | None = None
    """Called with the network after every optimizer step."""
    second_pass: Callable[[nn.Module], AbstractContextManager[None]] | None = None
    """If given, after every optimizer step the same images pass forward again, without gradients,
    within this context."""
    finish: Callable[[nn.Module], None] | None = None
    """Sees the finished network, to link or replace layers; raises `ValueError`, before it changes
    anything, if the options make no sense for it."""


CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def he_init(conv: Any, mode: Literal["fan_in", "fan_out"] = "fan_out") -> Any:
    """He et al. (arXiv 1502.01852), eq. 10: weights of variance 2/fan; the bias starts at zero."""
    nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


Classes = Mapping[int, Callable[..., nn.Module]] | Callable[..., nn.Module]


def of_dimensions(classes: Classes, dim: int) -> Callable[..., nn.Module]:
    """The convolution of `dim` dimensions among `classes`, which may be a single one."""
    return classes[dim] if isinstance(classes, Mapping) else classes


def conv(
    classes: Classes,
    *args: Any,
    dim: int = 2,
    inner: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A convolution of `dim` dimensions that a norm follows: no bias, since the norm's shift is
    one."""
    return he_init(of_dimensions(classes, dim)(*args, bias=False, **kwargs))


def biased_conv(
    classes: Classes,
    *args: Any,
    dim: int = 2,
    inner: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A convolution that no norm follows."""
    return he_init(of_dimensions(classes, dim)(*args, bias=True, **kwargs))


def frozen_batch_norm(layer: Any, mean: Tensor | None, var: Any) -> nn.Module:
    """The layer's gain * (x - mean) / sqrt(var + eps) + shift, as PyTorch's own layer in evaluation
    mode."""
    known = (dim for dim, kind in BATCH_NORM.items() if isinstance(layer, kind))
    dim = getattr(layer, "dim", None) or next(known, 2)
    new: Any = BATCH_NORM[dim](len(var), layer.eps).to(var).eval()
    with torch.no_grad():
        for name, value in (("running_mean", mean), ("running_var", var)):
            if value is not None:
                getattr(new, name).copy_(value)
        if layer.weight is not None:
            new.weight.copy_(layer.weight)
            new.bias.copy_(layer.bias)
    return new


def identity(channels: int) -> nn.Identity:
    """In place of a norm."""
    return nn.Identity()
