"""Arithmetic on a layer's few numbers per channel: statistics, their averages, factors.

A step of MABN has some forty operations of it, of BCN seventy. PyTorch takes longer to start them
on a CPU than to pass over the activations where maps are small; NumPy starts its own in a fifth of
the time. So the layers write such arithmetic once, for both, in the names that `torch` and `numpy`
share (the Python array API standard): `arrays` gives the namespace and, on a CPU, NumPy arrays in
the memory of the tensors. MABN and BCN have it in C as well, `norms/cpu_kernels.c`, and for GPUs in
`norms/number_kernels.py`.

Shapes: (N, C) for images, (G, C) for groups of images that share statistics, in order.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

Array = Any  # a NumPy array or a Tensor
F = TypeVar("F", bound=Callable[..., Any])

TYPES = {torch.float32, torch.float64, torch.int64, torch.bool}


def plain(t: Tensor) -> bool:
    """Whether it is none of the classes of tensors that have no memory of their own."""
    return type(t) is Tensor or type(t) is torch.nn.Parameter


def quiet(function: F) -> F:
    """Overflow and invalid values give infinity and NaN without a warning, as PyTorch has it."""

    @wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        with np.errstate(all="ignore"):
            return function(*args)

    return cast(F, call)


def recorded() -> bool:
    """Whether a compiler or a tracer follows what is computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def eager(t: Tensor) -> bool:
    """Whether t may be given to what nobody could differentiate or fuse."""
    differentiated = t.requires_grad and torch.is_grad_enabled()
    return not (differentiated or recorded())


def arrays(*values: Array | None) -> tuple[Any, ...]:
    """A namespace and the values in it: numpy, and arrays in the memory of tensors, on a CPU; torch
    and tensors on other devices, in half precision and where something is to be differentiated or
    compiled."""
    if recorded():
        return torch, *values
    differentiated, converted = torch.is_grad_enabled(), []
    for v in values:
        if v is None or type(v) is np.ndarray:
            converted.append(v)
        elif not (v.is_cpu and v.dtype in TYPES and plain(v)):
            return torch, *map(tensor, values)
        elif not v.requires_grad:
            converted.append(v.numpy())
        elif not differentiated:
            converted.append(v.detach().numpy())
        else:
            return torch, *map(tensor, values)
    return np, *converted


def namespace(values: Array) -> Any:
    return torch if isinstance(values, Tensor) else np


def tensor(values: Array) -> Any:
    return torch.from_numpy(values) if type(values) is np.ndarray else values


def spread(values: Array, images: int) -> Array:
    """(G, ...) values of groups -> (N, ...) of their images, or (1, ...) if there is one group."""
    groups, *shape = values.shape
    if groups == 1:
        return values
    if isinstance(values, np.ndarray):
        return values.repeat(images // groups, 0)
    return values[:, None].expand(-1, images // groups, *shape).reshape(images, *shape)


def gather(values: Array, groups: int) -> Array:
    """Sums over each group: (N, ...) or, of one group, (1, ...) -> (G, ...)."""
    if len(values) == groups:
        return values
    return values.reshape(groups, -1, *values.shape[1:]).sum(1)


def pool(mean: Array, var: Array, dim: int) -> tuple[Array, Array]:
    """Mean and biased variance of a union of equally large sets, from those of each set."""
    count = mean.shape[dim]
    if count == 1:
        return mean.squeeze(dim), var.squeeze(dim)
    if isinstance(mean, Tensor):
        between, pooled = torch.var_mean(mean, dim=dim, correction=0)
        return pooled, var.mean(dim) + between
    pooled = np.add.reduce(mean, dim, keepdims=True) / count
    within = var + (mean - pooled) ** 2
    return pooled.squeeze(dim), np.add.reduce(within, dim) / count


def window_means(values: Array, size: int) -> Array:
    """(size - 1 + G, C) -> (G, C): the means of each `size` rows in succession."""
    if len(values) == size:
        return values.sum(0)[None] / size
    if isinstance(values, Tensor):
        return values.unfold(0, size, 1).mean(-1)
    return np.lib.stride_tricks.sliding_window_view(values, size, 0).mean(-1)


def lerp(start: Array, end: Array, weight: float) -> Array:
    if isinstance(start, Tensor):
        dtype = torch.promote_types(start.dtype, end.dtype)
        return torch.lerp(start.to(dtype), end.to(dtype), weight)
    return start + weight * (end - start)


def double(values: Array) -> Array:
    return values.double() if isinstance(values, Tensor) else values.astype(np.float64)


def as_type(values: Array, like: Array) -> Array:
    return values.to(like.dtype) if isinstance(values, Tensor) else values.astype(like.dtype)


def moving_average(start: Array, values: Array, rate: float) -> tuple[Array, Array]:
    """Before and after each of G updates s <- (1 - rate) s + rate v, which begin at `start`.

    (C,), (G, C) -> (G, C) twice, as one product with a triangular matrix instead of G steps;
    in float64, so that the ghost protocol's result is that of the steps one by one.
    """
    if len(values) == 1:
        return start[None], lerp(start, values[0], rate)[None]
    xp = namespace(values)
    steps = xp.arange(len(values) + 1, device=values.device)
    age = double(xp.clip(steps[:, None] - steps[None, :], 0, len(values)))
    weights = xp.tril((1 - rate) ** age)
    weights[:, 1:] *= rate
    moved = as_type(weights @ double(xp.concat([as_type(start[None], values), values])), values)
    return moved[:-1], moved[1:]


def moved_average(start: Array, values: Array, rate: float) -> Array:
    """The last of them alone, (C,)."""
    if len(values) == 1:
        return lerp(start, values[0], rate)
    xp = namespace(values)
    age = double(xp.arange(len(values) - 1, -1, -1, device=values.device))
    moved = start * (1 - rate) ** len(values) + rate * ((1 - rate) ** age @ double(values))
    return as_type(moved, values)
