"""EvoNorm-S0, norm and activation in one. Liu et al., arXiv 2004.02967; timm's layer.

    y = gamma * x * sigmoid(v * x) / sqrt(var + eps) + beta

with the biased variance over one image, all positions and C / G neighbouring channels; v, gamma and
beta per channel. Where no activation follows, at the end of a residual branch, timm's layer leaves
only gamma * x + beta, as in timm's own EvoNorm networks. Groups in narrow layers as in
`norms/gn.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import EvoNorm2dS0
from torch import Tensor, nn

from .gn import check_groups, fit_groups
from .layer import Leaf
from .moments import check_input, promote
from .scheme import CONV, Scheme, conv, frozen_batch_norm


def without_images(layer: Any, x: Tensor) -> Tensor:
    """Nothing, of no images, which timm's variances would warn of."""
    zeros = torch.zeros_like(layer.bias)
    return F.batch_norm(x, zeros, zeros, layer.weight, layer.bias)


class EvoNormS0(Leaf, EvoNorm2dS0):
    """timm's layer, in float32 for half precision; (N, C, H, W) -> (N, C, H, W)."""

    maps = "H, W"

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_channels, self.maps)
        if x.shape[0] == 0:
            return without_images(self, x)
        return super().forward(promote(x)).to(x.dtype)

    @property
    def num_groups(self) -> int:  # as an `nn.GroupNorm` has it
        return self.groups

    @property
    def num_channels(self) -> int:
        return len(self.weight)

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        if self.apply_act:
            return self
        return frozen_batch_norm(self, None, torch.full_like(self.bias, 1 - self.eps))


def check_acts(model: nn.Module, name: str) -> None:
    """Raise `ValueError` if no norm of a converted network has its activation: then none norms."""
    layers: list[Any] = [x for x in model.modules() if hasattr(x, "apply_act")]
    if not any(x.apply_act for x in layers):
        raise ValueError(
            f"norm={name}: is norm and activation in one, and {type(model).__name__} keeps them "
            f"apart; expected a network of timm with norm-activation layers, such as regnetx_002"
        )


def _check(model: nn.Module, fit: Callable[[nn.Module], None]) -> None:
    check_acts(model, "evonorm_s0")
    fit(model)


def layer(channels: int, groups: int, min_channels: int, **options) -> EvoNormS0:
    return EvoNormS0(channels, fit_groups(channels, groups, min_channels), **options)


def scheme(
    batch_size: int | None = None, groups: int = 32, min_channels: int = 2, eps: float = 1e-5
) -> Scheme:
    """Plain convolutions and timm's `EvoNorm2dS0`."""
    norm = partial(layer, groups=groups, min_channels=min_channels, eps=eps)
    return Scheme(
        name="evonorm_s0",
        conv=partial(conv, CONV),
        norm=partial(norm, apply_act=False),
        norm_act=norm,
        batch_independent=True,
        finish=partial(_check, fit=check_groups(groups, min_channels)),
    )
