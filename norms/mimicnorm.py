"""MimicNorm: centred weights and one batch norm. Fei et al., arXiv 2010.09278, and their code.

    W <- W - mean(W)               per filter of more than 50 weights, after every optimizer step
    y = conv(x, W) + bias
    h + scale_l * f(h)             scale_l, learned, starts at 1.2^n / l
    logits = BN(fc(h))             without gain and shift

in block l = 1, 2, … of the network with n convolutions in its branch. The momentum of the optimizer
is left as it is. No other norm.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .blocks import BranchScale, NoNorm, residual_norms, swap_norm
from .bn import GhostBatchNorm2d
from .scheme import CONV, Scheme, he_init

SMALLEST = 50  # weights of a filter that is not centred: a depthwise one, or of RGB images


@torch.no_grad()
def center(model: nn.Module, images: Tensor | None = None) -> None:
    """Take the mean off every filter with more than 50 weights."""
    for layer in model.modules():
        if isinstance(layer, _ConvNd) and layer.weight[0].numel() > SMALLEST:
            dims = tuple(range(1, layer.weight.dim()))
            layer.weight.sub_(layer.weight.mean(dims, keepdim=True))


def normalize_logits(layer: Any, inputs: Any, logits: Tensor) -> Tensor:
    return layer.norm(logits)


def finish(model: nn.Module, batch_size: int | None) -> None:
    """Scale the branches of all blocks, and normalize what the last linear layer returns."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(
            f"norm=mimicnorm: normalizes logits, and {type(model).__name__} has no linear layer; "
            f"expected a whole network for classification"
        )
    for i, norms in enumerate(residual_norms(model, NoNorm), 1):
        swap_norm(norms[-1], BranchScale(1.2 ** len(norms) / i))
    head = linear[-1]
    norm = GhostBatchNorm2d(head.out_features, batch_size, affine=False)
    norm.dim = 1  # of vectors, where it is folded
    head.add_module("norm", norm.to(head.weight))
    head.register_forward_hook(normalize_logits)


def conv(*args: Any, dim: int = 2, inner: bool = False, **kwargs: Any) -> nn.Module:
    """A plain convolution with bias and He's start, in the mode of the authors."""
    return he_init(CONV[dim](*args, bias=True, **kwargs), "fan_in")


def scheme(batch_size: int | None = None) -> Scheme:
    """Plain convolutions with bias, whose weights are centred after every step."""
    if batch_size == 1:
        raise ValueError(
            "batch=1: norm=mimicnorm normalizes each logit over the batch, and one has no "
            "variance; expected 2 or more"
        )
    return Scheme(
        name="mimicnorm",
        conv=conv,
        norm=NoNorm,
        channels_last=True,
        initialize=center,
        after_step=center,
        finish=partial(finish, batch_size=batch_size),
    )
