"""Weight standardization with group norm. Qiao et al., arXiv 1903.10520, eqs. 7-8.

    W' = (W - mean(W)) / (std(W) + eps)          y = conv(x, W')

per output filter, over its n = C_in * k * k weights, without a gain; group norm follows. The
authors' code behind the GN+WS numbers takes the unbiased deviation (n - 1) and adds eps = 1e-5
outside the root; their BCN code (arXiv 1911.09738) adds it to the variance, inside; timm's
`StdConv2d` takes the biased variance and eps = 1e-6 inside (1e-8 in its BiT networks). All are
here; every convolution is standardized, the stem and the shortcuts included, the classifier is not.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gn import grouping
from .scheme import Scheme, conv
from .standardized import StandardizedConv, check_filters


def standardize(weight: Tensor, eps: float, unbiased: bool, eps_inside: bool) -> Tensor:
    """(W - mean) / (std + eps), or over sqrt(var + eps), of every filter; `unbiased`: by n - 1."""
    shape = weight.shape[1:]
    count = shape.numel() - int(unbiased)
    if eps_inside:  # a group norm of filters, with the variance by n
        ratio = count / shape.numel()
        return F.group_norm(weight, 1, eps=eps * ratio) * ratio**0.5
    weight = weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)
    norm = torch.linalg.vector_norm(weight.flatten(1), dim=1).view(-1, *(1 for _ in shape))
    return weight / (norm / count**0.5 + eps)


class WeightStandardization(StandardizedConv):
    """A convolution whose filters are standardized, the same in training and evaluation.

    Takes what PyTorch's convolution takes. `unbiased`: divide by n - 1; `eps_inside`: sqrt(var +
    eps) instead of std + eps. Raises `ValueError` where a filter has a single weight.
    """

    def __init__(
        self,
        *args,
        eps: float = 1e-5,
        unbiased: bool = True,
        eps_inside: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs,
    ):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        check_filters(self)
        self.eps, self.unbiased, self.eps_inside = eps, unbiased, eps_inside

    def standardized(self) -> Tensor:
        return standardize(self.weight, self.eps, self.unbiased, self.eps_inside)


class WSConv1d(WeightStandardization, nn.Conv1d):
    """(N, C, L) -> (N, C, L)."""


class WSConv2d(WeightStandardization, nn.Conv2d):
    """(N, C, H, W) -> (N, C, H, W)."""


class WSConv3d(WeightStandardization, nn.Conv3d):
    """(N, C, D, H, W) -> (N, C, D, H, W)."""


WS_CONV = {1: WSConv1d, 2: WSConv2d, 3: WSConv3d}


def ws_conv(**options) -> partial:
    """The standardized convolution of a scheme."""
    return partial(conv, {dim: partial(cls, **options) for dim, cls in WS_CONV.items()})


def scheme(
    batch_size: int | None = None,
    groups: int = 32,
    min_channels: int = 2,
    channels_per_group: int | None = None,
    eps: float = 1e-5,
    ws_eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = False,
) -> Scheme:
    """Standardized convolutions and group norm (groups in narrow layers as in `norms/gn.py`)."""
    norm, check = grouping(groups, min_channels, channels_per_group, eps)
    return Scheme(
        name="ws_gn",
        conv=ws_conv(eps=ws_eps, unbiased=unbiased, eps_inside=eps_inside),
        norm=norm,
        batch_free=True,
        check=check,
    )
