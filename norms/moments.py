"""What the layers share: from the moments of each map to a scale and a shift.

Batch norm's mean and variance over a group of images, and a channel norm's over a group of
channels, both follow from the moments of each single map. So a layer takes the moments of its
input, computes with these (N, C) numbers, and returns x * scale + shift; autograd derives the
backward pass, for which only x and such numbers are kept.

Shapes: (N, C, *) for activations, (N, C) for maps, (G, C) for groups of images that share
statistics, in order.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def promote(x: Tensor) -> Tensor:
    """Half precision to float32: statistics are never accumulated in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_input(x: Tensor, channels: int, maps: str = "*") -> None:
    """Raise `ValueError` for what is not (N, channels, *), or (N, channels, H, W) by `maps`."""
    if x.dim() < 2 or x.shape[1] != channels or (maps == "H, W" and x.dim() != 4):
        shape = tuple(x.shape)
        raise ValueError(f"expected (N, {channels}, {maps}), got a tensor of shape {shape}")


def count_groups(x: Tensor, batch_size: int | None) -> int:
    """Groups of `batch_size` images (None: all of them) that share statistics. Raises `ValueError`
    where they do not come out even."""
    if batch_size is None:
        return 1
    if x.shape[0] % batch_size:
        raise ValueError(
            f"{x.shape[0]} images cannot be split into groups of batch size {batch_size}; in "
            f"training, pass multiples of it"
        )
    return x.shape[0] // batch_size


def check_variance(x: Tensor, batch_size: int | None) -> None:
    """A single value per channel has no variance; say so before dividing by it."""
    if x.shape[0] and (batch_size or x.shape[0]) * math.prod(x.shape[2:]) < 2:
        maps = "x".join(map(str, x.shape[2:])) or "1"
        raise ValueError(
            f"batch={batch_size or x.shape[0]}: one value per channel, on maps of {maps}, has no "
            f"variance; expected a larger batch or larger images"
        )


def sum_maps(x: Tensor) -> Tensor:
    """(N, C, *) -> (N, C)."""
    return x.sum(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every map: (N, C, *) -> (N, C), (N, C)."""
    x, size = promote(x), math.prod(x.shape[2:])
    mean = sum_maps(x) / size
    # The squares are summed around a constant near the mean, so that nothing cancels; with it comes
    # the shift to the mean, and so every derivative. `torch.var_mean` would take seven times as
    # long on a CPU. Compiled, a pixel of the map spares a pass over x: its middle one, since zero
    # padding makes corners outliers.
    compiling = torch.compiler.is_compiling()
    pixel: tuple[Any, ...] = (..., *(n // 2 for n in x.shape[2:]))
    center = (x[pixel] if compiling else mean).detach()
    square = F.mse_loss(x, over_maps(center, x).expand_as(x), reduction="none")  # keeps x alone
    return realized(mean, sum_maps(square) / size - (mean - center).square())


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over every map: (N, C, *) -> (N, C)."""
    return sum_maps(promote(x).square()) / math.prod(x.shape[2:])


def pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a union of equally large sets, from those of each set."""
    pooled = mean.mean(dim, keepdim=True)
    return pooled.squeeze(dim), (var + (mean - pooled).square()).mean(dim)


def pool_images(mean: Tensor, var: Tensor, batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Moments of every group of images from those of every map: (N, C) -> (G, C), twice."""
    shape = (count_groups(mean, batch_size), -1, mean.shape[1])
    return pool(mean.reshape(shape), var.reshape(shape), 1)


def sum_groups(values: Tensor, groups: int) -> Tensor:
    """Sums over the images of each group: (N, C) -> (G, C)."""
    return values.reshape(groups, -1, values.shape[1]).sum(1)


def realized(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers as rows of one tensor, and so their gradients: there Inductor ends one loop
    and starts the next, where it would compute them anew for every position."""
    if torch.compiler.is_compiling():
        a, b = torch.stack(torch.broadcast_tensors(a, b)).unbind()
    return a, b


def over_maps(values: Tensor, x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, ...), to be combined with x."""
    return values.view(*values.shape, *(1 for _ in x.shape[2:]))


def over_images(values: Tensor, x: Tensor) -> Tensor:
    """(G, C) values of groups of images -> (N, C, 1, ...), to be combined with x."""
    groups, images = values.shape[0], x.shape[0] // values.shape[0]
    if groups > 1 and images > 1:
        values = values[:, None].expand(-1, images, -1).flatten(0, 1)
    return over_maps(values, x)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift in the type of x, with (G, C) numbers of G groups of images, up to N."""
    scale, shift = realized(scale, shift)
    y = torch.addcmul(over_images(shift, x), x, over_images(scale, x))
    # A `to` without anything to do, as a function's result, loses its gradient where torch 2.11
    # compiles it.
    return y if y.dtype == x.dtype else y.to(x.dtype)


Average = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def moving_average(groups: int, rate: float | None, count: Tensor) -> Average:
    """A function of `start`, (C,), and `values` of G groups, (G, C): the moving average before and
    after each of the G updates s <- (1 - rate) s + rate v, (G, C) twice.

    One product with a triangular matrix instead of G steps, in float64, so that groups in one pass
    give what they give one by one. A rate of None is 1 / k at the k-th update, which makes it the
    mean of all values; `count` updates went before. Of one group, what is before is `start` itself.
    """
    if groups == 1 and rate is not None:
        return lambda start, v: (start[None], torch.lerp(start[None].to(v.dtype), v, rate))
    steps = torch.arange(groups + 1, device=count.device)
    if rate is None:
        divisor = (count + steps).clamp(min=1)[:, None]

        def mean(start: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            sums = torch.cat([start[None] * count, values]).double().cumsum(0)
            moved = torch.cat([start[None], (sums / divisor)[1:].to(values.dtype)])
            return moved[:-1], moved[1:]

        return mean

    # Of the start, in the first column, and of the values in what every update makes.
    weights = ((1 - rate) ** (steps[:, None] - steps).clamp(min=0).double()).tril()
    weights[:, 1:] *= rate

    def average(start: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        moved = weights @ torch.cat([start[None].to(values.dtype), values]).double()
        moved = moved.to(values.dtype)
        return moved[:-1], moved[1:]

    return average


def batches_per_step(batch_size: int | None, sgd_batch_size: int | None) -> int | None:
    """Batches that share statistics in an optimizer step on one device, None where unknown."""
    return sgd_batch_size // batch_size if batch_size and sgd_batch_size else None
