"""Normalizer-free residual networks. Brock et al., arXiv 2101.08692 and 2102.06171.

    W' = gain * gamma * (W - mean) / sqrt(N (var + eps))        y = conv(x, W') + bias

per filter of N weights, with the biased variance, a learned gain from 1, and gamma = sqrt(2 / (1 -
1 / pi)), the factor by which a ReLU's output has to grow to have variance 1. Blocks are

    h + alpha * skip * f(relu(h) / beta)                 or shortcut(relu(h) / beta) in place of h

with a learned number `skip` from 0 (SkipInit) and beta^2 the variance that h has at the start: 1
behind the stem, alpha^2 more behind every block, and 1 + alpha^2 behind one whose shortcut
convolves. alpha = 0.2. `recipe.clip=agc` is the papers' adaptive gradient clipping.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .blocks import BranchScale, NoNorm, no_blocks, residual_norms, swap_norm
from .scheme import Scheme, biased_conv
from .standardized import StandardizedConv, check_filters

GAMMA = (2 / (1 - 1 / torch.pi)) ** 0.5


class ScaledWeightStandardization(StandardizedConv):
    """A convolution with the weights above; `gain` has one value per filter, shape (C_out,).

    Takes what PyTorch's convolution takes. Raises `ValueError` where a filter has a single weight.
    """

    no_weight_decay = ("gain", "bias")

    def __init__(self, *args, eps: float = 1e-6, device: Any = None, dtype: Any = None, **kwargs):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        check_filters(self)
        self.eps = eps
        self.gain = nn.Parameter(self.weight.new_ones(len(self.weight)))

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if "gain" in self._parameters:  # PyTorch's constructor calls this ahead of ours
            nn.init.ones_(self.gain)

    def standardized(self) -> Tensor:
        scale = GAMMA * self.gain * self.weight[0].numel() ** -0.5
        scale = scale.view(-1, *(1 for _ in self.weight.shape[1:]))
        return scale * F.group_norm(self.weight, 1, eps=self.eps)


class ScaledWSConv1d(ScaledWeightStandardization, nn.Conv1d):
    """(N, C, L) -> (N, C, L)."""


class ScaledWSConv2d(ScaledWeightStandardization, nn.Conv2d):
    """(N, C, H, W) -> (N, C, H, W)."""


class ScaledWSConv3d(ScaledWeightStandardization, nn.Conv3d):
    """(N, C, D, H, W) -> (N, C, D, H, W)."""


SCALED_WS_CONV = {1: ScaledWSConv1d, 2: ScaledWSConv2d, 3: ScaledWSConv3d}


def scale_blocks(model: nn.Module, alpha: float) -> None:
    """Set 1 / beta of every block and put alpha * skip at the end of its branch."""
    blocks: list[Any] = residual_norms(model, NoNorm)
    if not blocks:
        raise no_blocks("nf", model)
    if not all(hasattr(norms[0][0], "input_scale") for norms in blocks):
        raise ValueError(
            f"norm=nf: is an order of blocks too, which {type(model).__name__} does not have; "
            f"expected a network of this project, or timm's nf_ networks as they are"
        )
    variance = 1.0
    for norms in blocks:
        block = norms[0][0]
        block.input_scale = variance**-0.5
        parts = block.downsample.modules() if block.downsample is not None else ()
        convolves = any(isinstance(part, _ConvNd) for part in parts)
        variance = (1.0 if convolves else variance) + alpha**2
        skip = BranchScale(0.0, alpha)
        skip.no_weight_decay = ("gain",)
        swap_norm(norms[-1], skip)


def scheme(batch_size: int | None = None, alpha: float = 0.2, ws_eps: float = 1e-6) -> Scheme:
    """Scaled standardized convolutions with bias, no norms, and blocks of their own order."""
    convolutions = {dim: partial(cls, eps=ws_eps) for dim, cls in SCALED_WS_CONV.items()}
    return Scheme(
        name="nf",
        needs_conv=True,
        conv=partial(biased_conv, convolutions),
        norm=NoNorm,
        block="nf",
        batch_independent=True,
        channels_last=True,
        finish=partial(scale_blocks, alpha=alpha),
    )
