"""Convolutions that compute with a function of their weights: `StandardizedConv`."""

import sys
from typing import Any

from torch import Tensor

from .layer import Leaf


class StandardizedConv(Leaf):
    """Mixed into `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`: they convolve with `standardized()`.

    `weight` stays the parameter that is trained, so state dicts and optimizers are those of the
    plain convolution; what the convolution multiplies by is `standardized()`.
    """

    weight: Tensor
    bias: Tensor | None

    def standardized(self) -> Tensor:
        """The weights that the convolution uses, in the shape of `weight`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)  # type: ignore[operator]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and sys._getframe(1).f_code.co_name == "fuse_conv_bn_eval":
            raise ValueError(
                f"{type(self).__name__}: a norm cannot be fused into weights that are standardized "
                f"afterwards; expected smallbatch.fold(network), which bakes them in first"
            )
        super().__setattr__(name, value)


def check_filters(conv: Any) -> None:
    """Raise `ValueError` where a filter has a single weight, which has no variance."""
    if conv.weight[0].numel() < 2:
        raise ValueError(
            f"{type(conv).__name__}: a filter of 1 weight cannot be standardized (in_channels="
            f"{conv.in_channels}, groups={conv.groups}, kernel_size={conv.kernel_size})"
        )
