"""Statistics that all the layers share.

A batch norm's mean and variance over a group of images, and a channel norm's over a group of
channels, both follow in closed form from the moments of each single map. Every layer here is
x * scale + shift with one number per image and channel, and its gradient is a * dy + b * x + c with
numbers that follow from each map's sums of dy and dy * x. So forward an activation is read for its
moments, and again while y is written; backward x and dy are read for their sums, and again while dx
is written: the passes of batch norm. Everything between is a few small tensors of shape (N, C), and
these and x are all that is kept for the backward pass.

`moments`, `mean_square`, `affine`, `sums` and `combine` are the functions that touch activations.
On a GPU each is a kernel of `norms/kernels.py`, in just those passes. On a CPU they call those of
PyTorch's kernels that are vectorized, as if every map were a channel or a group (`torch.var_mean`,
and batch norm of contiguous images, add up one value after another there), which costs two things
more than those passes: the kernel for the moments writes the normalized maps as well, which are
thrown away, and dx is written in two steps. Everywhere else they are plain operations, which a
compiler fuses.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def to_type(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the type of x. A `y.to` that has nothing to do loses the gradient of the function
    whose result it is where torch 2.11 compiles it."""
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _eager() -> bool:
    """Whether a kernel may be called, which nobody could differentiate or fuse."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _kernels(x: Tensor) -> Any:
    """`norms.kernels` where they are for x, else None."""
    return _triton() if x.is_cuda and _eager() else None


@cache
def _triton() -> Any:
    try:
        from norms import kernels
    except ImportError:  # PyTorch for some systems comes without Triton
        return None
    return kernels


def _vectorized(x: Tensor, *others: Tensor, layout: Any = torch.contiguous_format) -> bool:
    """Whether to view maps as channels for a CPU kernel."""
    if not _eager() or x.device.type != "cpu":
        return False
    return all(t.is_contiguous(memory_format=layout) for t in (x, *others))


def _as_channels(x: Tensor, rows: int) -> Tensor:
    """A view of contiguous images in which each row of (rows, C) numbers, one for all images or one
    for each, is a channel's."""
    return x.view(x.shape[0] // rows, -1, *x.shape[2:])


def _over_maps(values: Tensor) -> Tensor:
    return values[:, :, None, None]


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every map, not differentiable: (N, C, H, W) -> (N, C), (N, C)."""
    if kernels := _kernels(x):
        mean, var = kernels.moments(x)
        return pool(mean, var, dim=1)
    if _vectorized(x):
        n, c, h, w = x.shape
        one = x.new_ones(c, dtype=torch.promote_types(x.dtype, torch.float32))
        # Without an eps the reciprocal deviation is exact, and infinite where there is no variance.
        _, mean, reciprocal = torch.native_group_norm(x, one, one, n, c, h * w, c, 0.0)
        return mean, reciprocal.pow_(-2)
    x = promote(x)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        return mean, var
    mean = x.mean((2, 3))
    return mean, (x - _over_maps(mean)).square_().mean((2, 3))


@torch.no_grad()
def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over every map, not differentiable: (N, C, H, W) -> (N, C)."""
    if kernels := _kernels(x):
        return kernels.moments(x, centered=False)[1].mean(1)
    if _vectorized(x):
        x = promote(x).flatten(2)
        return torch.linalg.vector_norm(x, dim=2).square_().div_(x.shape[2])
    return promote(x).square().mean((2, 3))


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, with (N, C) or (1, C) scale and shift, in the type of x."""
    if kernels := _kernels(x):
        return kernels.combine(None, None, x, scale, shift)
    if _vectorized(x):  # batch norm with given statistics, 0 and 1, on the fly
        flat = _as_channels(x, len(scale))
        scale, shift = scale.reshape(-1), shift.reshape(-1)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        y = torch.native_batch_norm(flat, scale, shift, zero, one, False, 0.0, 0.0)[0]
        return torch.ops.aten._unsafe_view(y, x.shape)  # a view could not be changed in place
    return to_type(torch.addcmul(_over_maps(shift), x, _over_maps(scale)), x)


def sums(dy: Tensor, x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy * (x - center), for (N, C) centers of each map or, for (1, C), of
    each channel; in their shape."""
    if kernels := _kernels(x):
        over = (0, 1) if len(center) == 1 else 1  # parts of maps, and images
        total, product = (v.sum(over).view_as(center) for v in kernels.sums(dy, x, center))
        return total, product
    whole = len(center) == 1 and _vectorized(x, dy, layout=torch.channels_last)
    if whole or _vectorized(x, dy):  # what batch norm's backward pass starts with
        rows, mean = len(center), center.reshape(-1)
        backward = torch.ops.aten.native_batch_norm_backward
        state = (None, None, None, mean, torch.ones_like(mean), True, 0.0, [False, True, True])
        _, product, total = backward(_as_channels(dy, rows), _as_channels(x, rows), *state)
        return total.view_as(center), product.view_as(center)
    dy = promote(dy)
    total, product = dy.sum((2, 3)), (dy * x).sum((2, 3))
    if len(center) == 1:
        total, product = total.sum(0, keepdim=True), product.sum(0, keepdim=True)
    return total, product - center * total


def combine(dy: Tensor, a: Tensor, x: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """a * dy + b * x + c, with (N, C) or (1, C) numbers, in the type of x."""
    if kernels := _kernels(x):
        return kernels.combine(dy, a, x, b, c)
    if c is None:
        dx = x * _over_maps(b)
    elif _vectorized(x) and x.dtype == promote(x).dtype:
        dx = affine(x, b, c)
    else:
        dx = torch.addcmul(_over_maps(c), x, _over_maps(b))
    return to_type(dx.addcmul_(dy, _over_maps(a)), x)


def spread(values: Tensor, images: int) -> Tensor:
    """(G, C) values of groups -> (N, C) of their images, or (1, C) if there is only one group."""
    groups, channels = values.shape
    if groups == 1:
        return values
    return values[:, None].expand(-1, images // groups, -1).reshape(-1, channels)


def gather(values: Tensor, groups: int) -> Tensor:
    """Sums over each group: (N, C) or, of one group, (1, C) -> (G, C)."""
    return values if len(values) == groups else values.unflatten(0, (groups, -1)).sum(1)


class Normalize(torch.autograd.Function):
    """weight * ((x - mean) * inverse * r + d) + bias.

    x: (N, C, H, W); weight, bias: (C,); the others: (G, C), for G groups of images in order; r and
    d, constants, may be None for 1 and 0. `through`: whether mean and inverse = 1 / sqrt(var + eps)
    are of the group itself (with the biased variance), so that the gradient passes through them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, inverse, r, d, through):
        ctx.save_for_backward(x, weight, mean, inverse, r, d)
        ctx.through = through
        scale = weight * inverse if r is None else weight * inverse * r
        shift = torch.addcmul(bias, mean, scale, value=-1)
        if d is not None:
            shift = torch.addcmul(shift, weight, d)
        return affine(x, spread(scale, len(x)), spread(shift, len(x)))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, inverse, r, d = ctx.saved_tensors
        groups, images, n = len(mean), len(x), x.numel() // mean.numel()
        total, product = sums(dy, x, spread(mean, images))
        total, product = gather(total, groups), gather(product, groups)
        factor = inverse if r is None else inverse * r
        a, dweight = weight * factor, factor * product
        if d is not None:
            dweight = torch.addcmul(dweight, d, total)
        if ctx.through:
            b = a * inverse.square() * product / -n
            c = torch.addcmul(a * total / -n, b, mean, value=-1)
            dx = combine(dy, spread(a, images), x, spread(b, images), spread(c, images))
        else:
            dx = to_type(dy * _over_maps(spread(a, images)), x)
        return dx, dweight.sum(0), total.sum(0), None, None, None, None, None


def split(x: Tensor, batch_size: int | None) -> Tensor:
    """(N, C) -> (N / batch_size, batch_size, C): the groups that share statistics, in order."""
    size = batch_size or x.shape[0]
    check_groups(x, size)
    return x.view(x.shape[0] // size, size, -1)


def pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a union of equally large sets, from those of each set."""
    if mean.shape[dim] == 1:
        return mean.squeeze(dim), var.squeeze(dim)
    between, pooled = torch.var_mean(mean, dim=dim, correction=0)
    return pooled, var.mean(dim) + between


def group_moments(x: Tensor, batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every group: (N, C, H, W) -> (G, C), (G, C)."""
    mean, var = moments(x)
    return pool(split(mean, batch_size), split(var, batch_size), dim=1)


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


def move_average(average: Tensor, values: Tensor, rate: float) -> None:
    """Move `average` on by those G updates, in place."""
    if len(values) == 1:
        average.lerp_(values[0].to(average.dtype), rate)
        return
    age = torch.arange(len(values) - 1, -1, -1, device=values.device).double()
    moved = average * (1 - rate) ** len(values) + rate * ((1 - rate) ** age @ values.double())
    average.copy_(moved)


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
