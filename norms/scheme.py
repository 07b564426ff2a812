"""What a network asks of a normalization method, and the initialization that they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
    end_norm: Callable[[int], nn.Module] | None = None
    """The norm after the stem and after the last stage, where a method normalizes only there."""
    block: str = "post"
    """The order in a residual block that the method's paper uses: `post` or `pws`."""
    zero_init: bool = False
    """Whether the paper starts the last norm of every residual branch at zero."""
    batch_free: bool = False
    """Whether no statistic ever crosses images: then the batch size changes nothing."""
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
