"""Weight standardization with group norm. Qiao et al., arXiv 1903.10520, eqs. 7-8.

    W' = (W - mean(W)) / (std(W) + eps)          y = conv(x, W')

per output filter, over its n = C_in * k * k weights, without a gain; group norm follows. The
authors' code behind the GN+WS numbers takes the unbiased deviation (n - 1) and adds eps = 1e-5
outside the root; their BCN code (arXiv 1911.09738) adds it to the variance, inside; timm's
`StdConv2d` takes the biased variance and eps = 1e-6 inside (1e-8 in its BiT networks). All are
here; every convolution is standardized, the stem and the shortcuts included, the classifier is not.
"""

from functools import partial

import torch
from torch import Tensor, nn

from norms.gn import check_groups, group_norm
from norms.scheme import Scheme, conv


class WSConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weights are standardized, the same in training and evaluation.

    `unbiased`: divide by n - 1; `eps_inside`: sqrt(var + eps) instead of std + eps.
    Raises `ValueError` where a filter has a single weight.
    """

    def __init__(
        self,
        *args,
        eps: float = 1e-5,
        unbiased: bool = True,
        eps_inside: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                f"WSConv2d: a filter of 1 weight cannot be standardized (in_channels="
                f"{self.in_channels}, groups={self.groups}, kernel_size={self.kernel_size})"
            )
        self.eps, self.unbiased, self.eps_inside = eps, unbiased, eps_inside

    def standardized(self) -> Tensor:
        """The weights that the convolution uses."""
        dims, n = (1, 2, 3), int(self.unbiased)
        if self.eps_inside:
            var, mean = torch.var_mean(self.weight, dims, correction=n, keepdim=True)
            return (self.weight - mean) * torch.rsqrt(var + self.eps)
        std, mean = torch.std_mean(self.weight, dims, correction=n, keepdim=True)
        return (self.weight - mean) / (std + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


def scheme(
    batch_size: int | None = None,
    groups: int = 32,
    min_channels: int = 2,
    eps: float = 1e-5,
    ws_eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = False,
) -> Scheme:
    """Standardized convolutions and group norm (groups in narrow layers as in `norms/gn.py`)."""
    weights = partial(WSConv2d, eps=ws_eps, unbiased=unbiased, eps_inside=eps_inside)
    return Scheme(
        name="ws_gn",
        conv=partial(conv, weights),
        norm=partial(group_norm, groups=groups, min_channels=min_channels, eps=eps),
        batch_free=True,
        check=check_groups(groups, min_channels),
    )
