"""Statistics that all the layers share.

A batch norm's mean and variance over a group of images, and a channel norm's over a group of
channels, both follow in closed form from the moments of each single map, and every layer here is
`x * scale + shift` with one number per image and channel. So an activation is read once for its
moments and once to be normalized; everything between is a few small tensors of shape (N, C).
"""

import torch
from torch import Tensor


def check_4d(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected (N, C, H, W), got a tensor of {x.dim()} dimensions")


def check_groups(x: Tensor, batch_size: int) -> None:
    if x.shape[0] % batch_size:
        raise ValueError(
            f"{x.shape[0]} images cannot be split into groups of batch size {batch_size}; in "
            f"training, pass multiples of it"
        )


def promote(x: Tensor) -> Tensor:
    """Half precision to float32: statistics are never accumulated in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every map: (N, C, H, W) -> (N, C), (N, C)."""
    var, mean = torch.var_mean(promote(x), dim=(2, 3), correction=0)
    return mean, var


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, with (N, C) or (1, C) scale and shift, in the type of x."""
    return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


def split(x: Tensor, batch_size: int | None) -> Tensor:
    """(N, C) -> (N / batch_size, batch_size, C): the groups that share statistics, in order."""
    size = batch_size or x.shape[0]
    check_groups(x, size)
    return x.view(x.shape[0] // size, size, -1)


def pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a union of equally large sets, from those of each set."""
    between, pooled = torch.var_mean(mean, dim=dim, correction=0)
    return pooled, var.mean(dim) + between


def moving_average(start: Tensor, values: Tensor, rate: float) -> Tensor:
    """`start` and what it becomes after each of G updates s <- (1 - rate) s + rate v.

    (C,), (G, C) -> (G + 1, C), as one product with a triangular matrix instead of G steps;
    in float64, so that the ghost protocol's result is that of the steps one by one.
    """
    if len(values) == 1:
        return torch.stack([start, torch.lerp(start, values[0].to(start.dtype), rate)])
    steps = torch.arange(values.shape[0] + 1, device=values.device)
    age = (steps[:, None] - steps[None, :]).clamp_min(0).double()
    weights = torch.tril((1 - rate) ** age)
    weights[:, 1:] *= rate
    return (weights @ torch.cat([start[None], values]).double()).to(start.dtype)


def check_variance(x: Tensor, batch_size: int | None) -> None:
    """A single value per channel has no variance; say so before dividing by it."""
    size = (batch_size or x.shape[0]) * x.shape[2] * x.shape[3]
    if size < 2:
        raise ValueError(
            f"batch={batch_size or x.shape[0]}: one value per channel, on maps of "
            f"{x.shape[2]}x{x.shape[3]}, has no variance; expected a larger batch or larger images"
        )


def batches_per_step(batch_size: int | None, sgd_batch_size: int | None) -> int | None:
    """Batches that share statistics in an optimizer step on one device, None where unknown."""
    return sgd_batch_size // batch_size if batch_size and sgd_batch_size else None
