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

from . import moments as m
from .backward import check_vmap
from .evonorm_s0 import check_acts, without_images
from .layer import Leaf, settle
from .scheme import CONV, Scheme, conv, frozen_batch_norm


class EvoNormB0(Leaf, EvoNorm2dB0):
    """timm's layer over groups of `batch_size` images (None: all), one after another.

    Shapes: (N, C, H, W) -> (N, C, H, W). Raises `ValueError` where a group holds one value per
    channel, or where `batch_size` does not divide N in training.
    """

    maps = "H, W"
    running_var: Tensor

    def __init__(self, num_features: int, batch_size: int | None = None, **options):
        super().__init__(num_features, **options)
        self.batch_size = batch_size

    def forward(self, x: Tensor) -> Tensor:
        m.check_input(x, len(self.weight), self.maps)
        if x.shape[0] == 0:
            return without_images(self, x)
        if not self.training:
            return super().forward(m.promote(x)).to(x.dtype)
        check_vmap("EvoNormB0", x, self.running_var)
        m.check_variance(x, self.batch_size)
        before = [buffer.clone() for buffer in self.buffers()]
        groups = m.promote(x).chunk(m.count_groups(x, self.batch_size))
        try:
            parts = [super(EvoNormB0, self).forward(group) for group in groups]
        finally:  # gradient checkpointing ends a repeated pass by an error
            settle(self, before)
        return torch.cat(parts).to(x.dtype)

    def reset_parameters(self) -> None:
        """As timm's, and the running variance too."""
        super().reset_parameters()
        nn.init.ones_(self.running_var)

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        if self.apply_act:
            return self
        return frozen_batch_norm(self, None, torch.full_like(self.bias, 1 - self.eps))


def scheme(batch_size: int | None = None, eps: float = 1e-3, momentum: float = 0.1) -> Scheme:
    """Plain convolutions and timm's `EvoNorm2dB0`."""
    norm = partial(EvoNormB0, batch_size=batch_size, eps=eps, momentum=momentum)
    return Scheme(
        name="evonorm_b0",
        conv=partial(conv, CONV),
        norm=partial(norm, apply_act=False),
        norm_act=norm,
        finish=partial(check_acts, name="evonorm_b0"),
    )
