"""Filter response normalization. Singh and Krishnan, arXiv 1911.09737; timm's layer.

    nu2 = mean(x^2)  per image and channel, over the positions
    y = gamma * x / sqrt(nu2 + eps) + beta          z = max(y, tau)

with a learned threshold tau per channel (TLU, from 0) in place of the ReLU. Where no activation
follows, at the end of a residual branch, there is none. timm's eps of 1e-5 is a constant; the
paper learns it for maps of 1x1.
"""

from functools import partial

from timm.layers import FilterResponseNormTlu2d
from torch import Tensor

from .layer import Leaf
from .moments import check_input, promote
from .scheme import CONV, Scheme, conv


class FilterResponseNorm2d(Leaf, FilterResponseNormTlu2d):
    """timm's layer, which squares in the type of x: never in half precision here."""

    maps = "H, W"

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, len(self.weight), self.maps)
        return super().forward(promote(x)).to(x.dtype)


def scheme(batch_size: int | None = None, eps: float = 1e-5) -> Scheme:
    """Plain convolutions and timm's `FilterResponseNormTlu2d`."""
    return Scheme(
        name="frn",
        conv=partial(conv, CONV),
        norm=partial(FilterResponseNorm2d, apply_act=False, eps=eps),
        norm_act=partial(FilterResponseNorm2d, eps=eps),
        batch_independent=True,
    )
