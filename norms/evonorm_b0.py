"""EvoNorm-B0, norm and activation in one. Liu et al., arXiv 2004.02967; timm's layer.

    y = gamma * x / max(sqrt(var_batch + eps), v * x + sqrt(var_image + eps)) + beta

with biased variances per channel, over `batch_size` images and over each image alone; v, gamma and
beta per channel; eps is timm's 1e-3. At test time the moving average of the unbiased batch variance
takes the batch's place. Where no activation follows, at the end of a residual branch, timm's layer
leaves only gamma * x + beta.
"""

from functools import partial

import torch
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn

from norms import moments as m
from norms.evonorm_s0 import check_acts
from norms.scheme import Scheme, conv, frozen_affine


class EvoNormB0(EvoNorm2dB0):
    """timm's layer over groups of `batch_size` images (None: all), one after another.

    Shapes: (N, C, H, W) -> (N, C, H, W). Raises `ValueError` where a group holds one value per
    channel, or where `batch_size` does not divide N in training.
    """

    def __init__(self, num_features: int, batch_size: int | None = None, **options):
        super().__init__(num_features, **options)
        self.batch_size = batch_size

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        if not self.training:
            return super().forward(m.promote(x)).to(x.dtype)
        m.check_variance(x, self.batch_size)
        size = self.batch_size or x.shape[0]
        m.check_groups(x, size)
        parts = [super(EvoNormB0, self).forward(part) for part in m.promote(x).split(size)]
        return torch.cat(parts).to(x.dtype)

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        return self if self.apply_act else frozen_affine(self.weight, self.bias)


def scheme(batch_size: int | None = None, eps: float = 1e-3, momentum: float = 0.1) -> Scheme:
    """Plain convolutions and timm's `EvoNorm2dB0`."""
    norm = partial(EvoNormB0, batch_size=batch_size, eps=eps, momentum=momentum)
    return Scheme(
        name="evonorm_b0",
        conv=partial(conv, nn.Conv2d),
        norm=partial(norm, apply_act=False),
        norm_act=norm,
        check=partial(check_acts, name="evonorm_b0"),
    )
