"""Group normalization. Wu and He, arXiv 1803.08494, eqs. 1-7.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

with mean and biased variance over one image, all positions and C / G neighbouring channels;
gamma and beta per channel. The paper's G is 32; its networks are never narrower than 64 channels.

Groups in narrow layers (a rule of ours, the papers give none): the largest number of groups that
is at most G, divides C and leaves at least `min_channels` (2) channels in each, and 1 if there is
none: with one channel to a group it would be instance norm, 4 points worse (the paper's table 3);
of 2, 4 and 8 channels, 2 did best on CIFAR-10 (results/cifar10).
So 16, 32 and 64 channels get 8, 16 and 32 groups. A G that no layer of a network can have is an
error. Or the channels per group are given (the paper's other choice, 16): then every layer gets as
many groups as leave at least so many channels in each.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from . import moments as m
from .layer import Leaf
from .scheme import CONV, Scheme, conv


def fit_groups(channels: int, groups: int, min_channels: int = 2) -> int:
    """The number of groups for a layer, by the rule above."""
    fits = range(min(groups, channels // min_channels), 1, -1)
    return next((g for g in fits if channels % g == 0), 1)


def whole(key: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"norm.{key}={value}: expected a whole number from 1")


def check_groups(groups: int, min_channels: int) -> Callable[[nn.Module], None]:
    """A check of the finished network: some layer has exactly the number of groups asked for."""
    whole("groups", groups)
    whole("min_channels", min_channels)
    return partial(_check_groups, groups=groups, min_channels=min_channels)


def _check_groups(model: nn.Module, groups: int, min_channels: int) -> None:
    layers: list[Any] = [x for x in model.modules() if hasattr(x, "num_groups")]
    if layers and all(x.num_groups != groups for x in layers):
        widths = sorted({x.num_channels for x in layers})
        fits = {g for c in widths for g in range(1, c // min_channels + 1) if c % g == 0}
        raise ValueError(
            f"norm.groups={groups}: fits no layer (channels {', '.join(map(str, widths))}; at "
            f"least norm.min_channels={min_channels} to a group); allowed: "
            f"{', '.join(map(str, sorted(fits)))}"
        )


def _check_channels(model: nn.Module, channels_per_group: int) -> None:
    widths = [x.num_channels for x in model.modules() if isinstance(x, nn.GroupNorm)]
    if widths and max(widths) < channels_per_group:
        raise ValueError(
            f"norm.channels_per_group={channels_per_group}: no layer has so many channels; "
            f"expected at most {max(widths)}"
        )


def group_norm(channels: int, groups: int, min_channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(fit_groups(channels, groups, min_channels), channels, eps)


def grouping(
    groups: int, min_channels: int, channels_per_group: int | None, eps: float
) -> tuple[Callable[[int], nn.GroupNorm], Callable[[nn.Module], None]]:
    """The layer for a number of channels, by `groups` or, if given, `channels_per_group`; and the
    check of the finished network."""
    check = check_groups(groups, min_channels)
    if channels_per_group is not None:
        whole("channels_per_group", channels_per_group)
        check = partial(_check_channels, channels_per_group=channels_per_group)
        groups, min_channels = 2**31, channels_per_group
    return partial(group_norm, groups=groups, min_channels=min_channels, eps=eps), check


class InstanceNorm2d(Leaf, nn.GroupNorm):  # not in `in.py`, whose name TorchScript cannot load
    """The norm of `norms/in.py`; (N, C, *) -> (N, C, *), `ValueError` on maps of one position."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, num_features, eps)

    def forward(self, x: Tensor) -> Tensor:
        m.check_input(x, self.num_channels)
        if math.prod(x.shape[2:]) < 2:
            raise ValueError(
                "norm=in: one value per channel and image has no variance; expected larger images, "
                "or another norm"
            )
        return super().forward(x)


def scheme(
    batch_size: int | None = None,
    groups: int = 32,
    min_channels: int = 2,
    channels_per_group: int | None = None,
    eps: float = 1e-5,
) -> Scheme:
    """Plain convolutions and group norm, by `groups` or, if given, `channels_per_group`."""
    norm, check = grouping(groups, min_channels, channels_per_group, eps)
    return Scheme(
        name="gn",
        conv=partial(conv, CONV),
        norm=norm,
        zero_init=True,
        batch_independent=True,
        finish=check,
    )
