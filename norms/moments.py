"""Statistics that all the layers share.

A batch norm's mean and variance over a group of images, and a channel norm's over a group of
channels, both follow in closed form from the moments of each single map. Every layer here is
x * scale + shift with one number per image and channel, and its gradient is a * dy + b * x + c with
numbers that follow from each map's sums of dy and dy * x. So forward an activation is read for its
moments, and again while y is written; backward x and dy are read for their sums, and again while dx
is written: the passes of batch norm. Everything between is arithmetic on a few numbers per image
and channel (`norms/numbers.py`), and these and x are all that is kept for the backward pass.

`moments`, `mean_square`, `affine`, `sums` and `combine` are the functions that touch activations.
On a GPU each is a kernel of `norms/kernels.py`, on a CPU a function of `norms/cpu_kernels.c`, in
just those passes. On a CPU without a C compiler they call those of PyTorch's kernels that are
vectorized, as if every map were a channel or a group (`torch.var_mean`, and batch norm of
contiguous images, add up one value after another there), which costs two things more than those
passes: the kernel for the moments writes the normalized maps as well, which are thrown away, and dx
is written in two steps, unless all images are one group and it is batch norm's own gradient.
Everywhere else they are plain operations, which a compiler of PyTorch's fuses.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from norms import cpu_kernels
from norms.numbers import Array, arrays, eager, gather, plain, pool, quiet, spread, tensor

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_unsafe_view = torch.ops.aten._unsafe_view.default


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


def _kernels(x: Tensor) -> Any:
    """`norms.kernels` or `norms.cpu_kernels` where they are for x, else None."""
    if x.is_cuda:
        return _triton() if plain(x) and eager(x) else None
    return cpu_kernels if eager(x) and cpu_kernels.take(x) else None


@cache
def _triton() -> Any:
    try:
        from norms import kernels
    except ImportError:  # PyTorch for some systems comes without Triton
        return None
    return kernels


def number_kernels(x: Tensor, groups: int) -> Any:
    """`norms.number_kernels` where they are for x, of one group of images, else None."""
    if groups > 1 or _kernels(x) in (None, cpu_kernels):
        return None
    from norms import number_kernels

    return number_kernels


def _vectorized(x: Tensor, layout: Any = torch.contiguous_format) -> bool:
    """Whether to view maps as channels for a CPU kernel."""
    return x.is_cpu and x.is_contiguous(memory_format=layout) and plain(x) and eager(x)


@lru_cache(256)
def _constants(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros and ones, of float32 for half precision; not to be written to."""
    zeros = torch.zeros(count, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    return zeros, torch.ones_like(zeros)


def _as_channels(x: Tensor, rows: int) -> Tensor:
    """A view of contiguous images in which each row of (rows, C) numbers, one for all images or one
    for each, is a channel's."""
    return x if rows == 1 else x.view(1, -1, *x.shape[2:])


def _over_maps(values: Array) -> Tensor:
    return tensor(values.reshape(*values.shape, 1, 1))


def moments(x: Tensor) -> tuple[Array, Array]:
    """Mean and biased variance of every map: (N, C, H, W) -> (N, C), (N, C)."""
    if kernels := _kernels(x):
        return arrays(*kernels.moments(x))[1:]
    if _vectorized(x):
        n, c, h, w = x.shape
        one = _constants(c, x.dtype)[1]
        # Without an eps the reciprocal deviation is exact, and infinite where there is no variance.
        _, mean, reciprocal = torch.native_group_norm(x, one, one, n, c, h * w, c, 0.0)
        return arrays(mean, reciprocal.pow_(-2))[1:]
    x = promote(x)
    if x.is_cpu and not torch.compiler.is_compiling():
        mean = x.mean((2, 3))
        var = (x - _over_maps(mean)).square_().mean((2, 3))
    else:
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    return arrays(mean, var)[1:]


def mean_square(x: Tensor) -> Array:
    """Mean of x^2 over every map: (N, C, H, W) -> (N, C)."""
    if kernels := _kernels(x):
        square = kernels.moments(x, centered=False)[1]
        return arrays(square.mean(1) if square.shape[1] > 1 else square.squeeze(1))[1]
    if _vectorized(x):
        square = torch.linalg.vector_norm(promote(x), dim=(2, 3)).square_()
        return arrays(square)[1] / (x.shape[2] * x.shape[3])
    return arrays(promote(x).square().mean((2, 3)))[1]


def affine(x: Tensor, scale: Array, shift: Array) -> Tensor:
    """x * scale + shift, with (N, C) or (1, C) numbers, in the type of x."""
    if kernels := _kernels(x):
        return kernels.combine(None, None, x, tensor(scale), tensor(shift))
    if _vectorized(x):  # batch norm with given statistics, 0 and 1, on the fly
        rows = len(scale)
        if len(shift) < rows:
            shift = tensor(shift).expand(rows, -1)
        scale, shift = (promote(tensor(v.reshape(-1))) for v in (scale, shift))
        state = (scale, shift, *_constants(len(scale), x.dtype))
        y = torch.native_batch_norm(_as_channels(x, rows), *state, False, 0.0, 0.0)[0]
        return y if rows == 1 else _unsafe_view(y, x.shape)  # a view could not be changed in place
    return to_type(torch.addcmul(_over_maps(shift), x, _over_maps(scale)), x)


def sums(dy: Tensor, x: Tensor, center: Array | None = None, rows: int = 1) -> tuple[Array, Array]:
    """The sums of dy and of dy * (x - center), for (N, C) centers of each map or, for (1, C), of
    each channel; in their shape. Without a center around 0, for so many rows."""
    rows = rows if center is None else len(center)
    if kernels := _kernels(x):
        both = kernels.sums(dy, x, tensor(center)).view(2, rows, -1, x.shape[1])
        return arrays(*(both.sum(2) if both.shape[2] > 1 else both.squeeze(2)))[1:]
    shape, last = (rows, x.shape[1]), rows == 1 and _vectorized(x, torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    if (last or _vectorized(x)) and dy.is_contiguous(memory_format=layout):
        # what batch norm's backward pass starts with
        zero, one = _constants(rows * x.shape[1], x.dtype)
        mean = zero if center is None else tensor(center.reshape(-1))
        state = (None, None, None, mean, one, True, 0.0, [False, True, True])
        maps = (_as_channels(dy, rows), _as_channels(x, rows))
        _, product, total = _batch_norm_backward(*maps, *state)
        return arrays(total.view(shape), product.view(shape))[1:]
    dy, center = promote(dy), tensor(center)
    total, product = dy.sum((2, 3)), (dy * x).sum((2, 3))
    if rows == 1:
        total, product = total.sum(0, keepdim=True), product.sum(0, keepdim=True)
    return arrays(total, product if center is None else product - center * total)[1:]


def combine(dy: Tensor, a: Array, x: Tensor, b: Array, c: Array | None = None) -> Tensor:
    """a * dy + b * x + c, with (N, C) or (1, C) numbers, in the type of x."""
    if kernels := _kernels(x):
        return kernels.combine(dy, tensor(a), x, tensor(b), tensor(c))
    if c is None:
        dx = x * _over_maps(b)
    elif _vectorized(x) and x.dtype == promote(x).dtype:
        dx = affine(x, b, c)
    else:
        dx = torch.addcmul(_over_maps(c), x, _over_maps(b))
    return to_type(dx.addcmul_(dy, _over_maps(a)), x)


class Normalize(torch.autograd.Function):
    """weight * ((x - mean) * inverse * r + d) + bias.

    x: (N, C, H, W); weight, bias: (C,); the others: (G, C), for G groups of images in order; r and
    d, constants, may be None for 1 and 0. `through`: whether mean and inverse = 1 / sqrt(var + eps)
    are of the group itself (with the biased variance), so that the gradient passes through them.
    """

    @staticmethod
    @quiet
    def forward(ctx, x, weight, bias, mean, inverse, r, d, through):
        ctx.save_for_backward(x, weight, mean, inverse, r, d)
        ctx.through = through
        _, weight, bias, mean, inverse, r, d = arrays(weight, bias, mean, inverse, r, d)
        scale = weight * inverse if r is None else weight * inverse * r
        shift = bias - mean * scale if d is None else bias - mean * scale + weight * d
        return affine(x, spread(scale, len(x)), spread(shift, len(x)))

    @staticmethod
    @once_differentiable
    @quiet
    def backward(ctx, dy):
        x, *saved = ctx.saved_tensors
        groups, images, n = len(saved[1]), len(x), x.numel() // saved[1].numel()
        if groups == 1 and eager(x):
            return *_one_group(dy, x, *saved, through=ctx.through), *(None,) * 5
        numbers = arrays(*sums(dy, x, spread(saved[1], images)), *saved)
        _, total, product, weight, mean, inverse, r, d = numbers
        total, product = gather(total, groups), gather(product, groups)
        factor = inverse if r is None else inverse * r
        a, dweight = weight * factor, factor * product
        if d is not None:
            dweight = dweight + d * total
        if ctx.through:
            b = a * inverse**2 * product / -n
            c = a * total / -n - b * mean
            dx = combine(dy, spread(a, images), x, spread(b, images), spread(c, images))
        else:
            dx = to_type(dy * _over_maps(spread(a, images)), x)
        return dx, tensor(dweight.sum(0)), tensor(total.sum(0)), None, None, None, None, None


def _one_group(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, r: Tensor | None,
    d: Tensor | None, *, through: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias where all images are one group: batch norm's."""
    scale = promote(weight) if r is None else weight * r[0]
    # Batch norm takes the statistics of the batch in training, those that move in evaluation.
    moving = (None, None) if through else (mean[0], inverse[0].pow(-2))
    state = (scale, *moving, mean[0], inverse[0], through, 0.0, [True, True, True])
    dx, dweight, dbias = _batch_norm_backward(dy, x, *state)
    if r is not None:
        dweight = dweight * r[0]
    return dx, dweight if d is None else dweight + dbias * d[0], dbias


def count_groups(x: Array, batch_size: int | None) -> int:
    """Groups of `batch_size` images (None: all of them) that share statistics."""
    check_groups(x, batch_size or x.shape[0])
    return x.shape[0] // batch_size if batch_size else 1


def split(x: Array, batch_size: int | None) -> Array:
    """(N, C) -> (G, N / G, C): the groups that share statistics, in order."""
    return x.reshape(count_groups(x, batch_size), -1, x.shape[1])


def pooled(mean: Array, var: Array, batch_size: int | None) -> tuple[Array, Array]:
    """Moments of every group from those of every map: (N, C) -> (G, C), twice."""
    return pool(split(mean, batch_size), split(var, batch_size), dim=1)


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
