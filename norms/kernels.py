"""The passes of `norms/moments.py` over activations on a GPU, as Triton kernels.

Each reads an activation once and, for those that give one, writes one: forward `moments` and then
`combine`, backward `sums` and then `combine`, which are batch norm's two reads and a write forward
and four reads and a write backward. Where there are few maps their parts are read side by side, and
`_pool` joins the moments. Half precision is computed in float32, float64 in itself.

A program takes a tile of positions and channels of one image, whose longer side follows memory:
contiguous maps are read along positions, channels-last ones along channels.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements that a program has in registers
PROGRAMS = 1024  # that keep a large GPU busy


@triton.jit
def _tile(n, positions, channels, stride_n, stride_c, stride_p):
    return n * stride_n + channels[None, :] * stride_c + positions[:, None] * stride_p


@triton.jit
def _moments(
    x, mean, var, C, L, xn, xc, xp,
    P: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Mean and variance over L positions, tile by tile (Chan, Golub and LeVeque's update); the mean
    square alone unless CENTERED."""
    n, s = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * B + tl.arange(0, B)
    average, square = tl.zeros([B], ACC), tl.zeros([B], ACC)
    for start in range(0, L, P):
        p = start + tl.arange(0, P)
        there = (p < L)[:, None] & (c < C)[None, :]
        v = tl.load(x + _tile(n, s * L + p, c, xn, xc, xp), mask=there, other=0).to(ACC)
        if CENTERED:
            count = tl.minimum(P, L - start).to(ACC)
            own = tl.sum(v, 0) / count
            v = tl.where(there, v - own[None, :], 0)
            share = count / (start + count)
            step = own - average
            average += step * share
            square += step * step * share * start
        square += tl.sum(v * v, 0)
    to = (n * tl.num_programs(2) + s) * C + c
    if CENTERED:
        tl.store(mean + to, average, mask=c < C)
    tl.store(var + to, square / L, mask=c < C)


@triton.jit
def _pool(part_mean, part_var, mean, var, C, parts, R: tl.constexpr, B: tl.constexpr):
    """The moments of maps from those of their parts, all as large: (N, parts, C) -> (N, C)."""
    n = tl.program_id(0)
    part, c = tl.arange(0, R), tl.program_id(1) * B + tl.arange(0, B)
    there = (part < parts)[:, None] & (c < C)[None, :]
    at = (n * parts + part)[:, None] * C + c[None, :]
    own = tl.load(part_mean + at, mask=there, other=0)
    average = tl.sum(own, 0) / parts
    away = tl.where(there, own - average[None, :], 0)
    square = tl.sum(tl.load(part_var + at, mask=there, other=0) + away * away, 0) / parts
    tl.store(mean + n * C + c, average, mask=c < C)
    tl.store(var + n * C + c, square, mask=c < C)


@triton.jit
def _sums(
    dy, x, center, total, product, C, L, dn, dc, dp, xn, xc, xp, rows,
    P: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """The sums of dy and of dy * (x - center) over L positions; of dy * x unless CENTERED."""
    n, s = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * B + tl.arange(0, B)
    middle = tl.zeros([B], ACC)
    if CENTERED:
        middle = tl.load(center + n * rows + c, mask=c < C, other=0)
    sum_dy, sum_product = tl.zeros([B], ACC), tl.zeros([B], ACC)
    for start in range(0, L, P):
        p = start + tl.arange(0, P)
        there = (p < L)[:, None] & (c < C)[None, :]
        g = tl.load(dy + _tile(n, s * L + p, c, dn, dc, dp), mask=there, other=0).to(ACC)
        v = tl.load(x + _tile(n, s * L + p, c, xn, xc, xp), mask=there, other=0).to(ACC)
        sum_dy += tl.sum(g, 0)
        sum_product += tl.sum(g * (v - middle[None, :]), 0)  # g is 0 outside
    to = (n * tl.num_programs(2) + s) * C + c
    tl.store(total + to, sum_dy, mask=c < C)
    tl.store(product + to, sum_product, mask=c < C)


@triton.jit
def _combine(
    dy, a, x, b, shift, out, C, L, dn, dc, dp, xn, xc, xp, rows,
    P: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
    GRADIENT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """a * dy + b * x + shift, in x's memory; the first term with GRADIENT, the last with SHIFT."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    p = tl.program_id(2) * P + tl.arange(0, P)
    there = (p < L)[:, None] & (c < C)[None, :]
    own = n * rows + c
    at = _tile(n, p, c, xn, xc, xp)
    y = tl.load(x + at, mask=there, other=0).to(ACC)
    y *= tl.load(b + own, mask=c < C, other=0)[None, :]
    if SHIFT:
        y += tl.load(shift + own, mask=c < C, other=0)[None, :]
    if GRADIENT:
        g = tl.load(dy + _tile(n, p, c, dn, dc, dp), mask=there, other=0).to(ACC)
        y += g * tl.load(a + own, mask=c < C, other=0)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


def accumulator(x: Tensor) -> tuple[Any, torch.dtype]:
    double = x.dtype == torch.float64
    return (tl.float64, torch.float64) if double else (tl.float32, torch.float32)


def dense(x: Tensor) -> Tensor:
    """As it is where its maps can be read position by position, else a copy."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x if x.is_contiguous() or last else x.contiguous()


def tile(x: Tensor) -> tuple[int, int]:
    """Positions and channels of a program's tile."""
    _, channels, height, width = x.shape
    if x.is_contiguous():
        positions = min(TILE, triton.next_power_of_2(height * width))
        return positions, min(TILE // positions, triton.next_power_of_2(channels))
    own = min(64, triton.next_power_of_2(channels))
    return min(TILE // own, triton.next_power_of_2(height * width)), own


@cache
def parts(positions: int, least: int, programs: int) -> int:
    """Into how many equal parts of at least so many positions to cut maps, which are read by
    `programs` otherwise, so that there are PROGRAMS in all, or as many as there can be."""
    counts = [n for n in range(1, positions // least + 1) if positions % n == 0] or [1]
    return next((n for n in counts if n * programs >= PROGRAMS), counts[-1])


def grid(x: Tensor) -> tuple[tuple[int, int, int], int, int, int]:
    """Programs by image, channels and part of a map; positions in a part; the tile."""
    n, c, h, w = x.shape
    p, b = tile(x)
    blocks = triton.cdiv(c, b)
    count = parts(h * w, max(p, 64), n * blocks)
    return (n, blocks, count), h * w // count, p, b


def spans(x: Tensor) -> tuple[int, int, int]:
    """Elements from an image, a channel and a position to the next."""
    return x.stride(0), x.stride(1), x.flatten(2).stride(2)


def moments(x: Tensor, centered: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every map: (N, C, H, W) -> (N, C) twice. Unless `centered`, the
    second is the mean square of parts of the maps, (N, parts, C), and the first is not set."""
    x = dense(x)
    programs, length, p, b = grid(x)
    acc, dtype = accumulator(x)
    mean, var = x.new_empty((2, len(x), programs[2], x.shape[1]), dtype=dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _moments[programs](
            x, mean, var, x.shape[1], length, *spans(x), P=p, B=b, ACC=acc, CENTERED=centered
        )
        if not centered:
            return mean, var
        n, count, channels = mean.shape
        if count == 1:
            return mean[:, 0], var[:, 0]
        rows = triton.next_power_of_2(count)
        width = min(triton.next_power_of_2(channels), max(1, TILE // rows))
        pooled = mean.new_empty((2, n, channels))
        _pool[n, triton.cdiv(channels, width)](mean, var, *pooled, channels, count, R=rows, B=width)
        return pooled[0], pooled[1]


def sums(dy: Tensor, x: Tensor, center: Tensor | None) -> Tensor:
    """Sums of dy and of dy * (x - center) over every map, by its parts: (2, N, parts, C);
    center: (N, C) or (1, C), or None for 0."""
    x, dy = dense(x), dense(dy)
    programs, length, p, b = grid(x)
    acc, dtype = accumulator(x)
    both = x.new_empty((2, len(x), programs[2], x.shape[1]), dtype=dtype)
    middle = x if center is None else center.to(dtype).contiguous()
    rows = 0 if center is None or len(center) == 1 else x.shape[1]
    with torch.cuda.device_of(x):
        _sums[programs](
            dy, x, middle, *both, x.shape[1], length, *spans(dy), *spans(x), rows,
            P=p, B=b, ACC=acc, CENTERED=center is not None,
        )  # fmt: skip
    return both


def combine(dy: Tensor | None, a: Tensor | None, x: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """a * dy + b * x + c in the type and the memory of x; a, b, c: all (N, C) or all (1, C); a term
    whose number is None is left out."""
    x = dense(x)
    out = torch.empty_like(x)
    (n, channels, h, w), (positions, width) = x.shape, tile(x)
    programs = (n, triton.cdiv(channels, width), triton.cdiv(h * w, positions))
    acc, dtype = accumulator(x)
    b = b.to(dtype).contiguous()
    rows = channels if len(b) > 1 else 0
    numbers = [b if v is None else v.to(dtype).expand_as(b).contiguous() for v in (a, c)]
    gradient = x if dy is None else dense(dy)
    with torch.cuda.device_of(x):
        _combine[programs](
            gradient, numbers[0], x, b, numbers[1], out, channels, h * w,
            *spans(gradient), *spans(x), rows,
            P=positions, B=width, ACC=acc, GRADIENT=dy is not None, SHIFT=c is not None,
        )  # fmt: skip
    return out
