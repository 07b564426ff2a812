"""What the layers share: from the moments of each map to a scale and a shift.

Batch norm's mean and variance over a group of images, and a channel norm's over a group of
channels, both follow from the moments of each single map. So a layer takes the moments of its
input, computes with these (N, C) numbers, and returns x * scale + shift; autograd derives the
backward pass, for which only x and such numbers are kept.

Shapes: (N, C, *) for activations, (N, C) for maps, (G, C) for groups of images that share
statistics, in order.
"""

import math
from typing import Any

import torch
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


def _positions(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every map: (N, C, *) -> (N, C), (N, C)."""
    x = promote(x)
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    if torch.compiler.is_compiling():
        # Sums around a pixel vectorize better than Inductor's Welford steps, and are as exact
        # where the pixel is one of the map; the centre, since zero padding makes corners outliers.
        centre: tuple[Any, ...] = (..., *(size // 2 for size in x.shape[2:]))
        pixel = x[centre].detach()
        x = x - over_maps(pixel, x)
        mean = x.mean(_positions(x))
        return realized(pixel + mean, x.square().mean(_positions(x)) - mean.square())
    var, mean = torch.var_mean(x, _positions(x), correction=0)  # keeps nothing but x
    return mean, var


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over every map: (N, C, *) -> (N, C)."""
    square = promote(x).square()
    return square.mean(_positions(x)) if x.dim() > 2 else square


def pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a union of equally large sets, from those of each set."""
    between, pooled = torch.var_mean(mean, dim, correction=0)
    return pooled, var.mean(dim) + between


def pool_images(mean: Tensor, var: Tensor, batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Moments of every group of images from those of every map: (N, C) -> (G, C), twice."""
    shape = (count_groups(mean, batch_size), -1, mean.shape[1])
    return pool(mean.reshape(shape), var.reshape(shape), 1)


def expand_groups(values: Tensor, images: int) -> Tensor:
    """(G, C) values of groups -> (N, C) of their images, or (1, C) where there is one group."""
    groups, channels = values.shape
    if groups == 1:
        return values
    return values[:, None].expand(-1, images // groups, -1).reshape(images, channels)


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


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, with (N, C) or (1, C) numbers, in the type of x."""
    scale, shift = realized(scale, shift)
    y = torch.addcmul(over_maps(shift, x), x, over_maps(scale, x))
    # A `to` without anything to do, as a function's result, loses its gradient where torch 2.11
    # compiles it.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def moving_average(
    start: Tensor, values: Tensor, rate: float | None, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Before and after each of G updates s <- (1 - rate) s + rate v, which begin at `start`.

    (C,), (G, C) -> (G, C) twice, as one product with a triangular matrix instead of G steps; in
    float64, so that groups in one pass give what they give one by one. A rate of None is 1 / k at
    the k-th update, which makes it the mean of all values; `count` updates went before.
    """
    if len(values) == 1 and rate is not None:
        return start.clone()[None], ((1 - rate) * start + rate * values[0])[None]
    steps = torch.arange(len(values) + 1, device=values.device)
    if rate is None:
        total = torch.cat([start[None] * count, values]).double().cumsum(0)
        moved = total / (count + steps).clamp(min=1)[:, None]
        moved = torch.cat([start[None], moved[1:]])
    else:
        age = (steps[:, None] - steps).clamp(min=0).double()
        weights = ((1 - rate) ** age).tril()
        weights = torch.cat([weights[:, :1], weights[:, 1:] * rate], 1)
        moved = weights @ torch.cat([start[None].to(values.dtype), values]).double()
    moved = moved.to(values.dtype)
    return moved[:-1], moved[1:]


def batches_per_step(batch_size: int | None, sgd_batch_size: int | None) -> int | None:
    """Batches that share statistics in an optimizer step on one device, None where unknown."""
    return sgd_batch_size // batch_size if batch_size and sgd_batch_size else None
