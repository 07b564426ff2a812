"""The arithmetic between a layer's passes on a GPU, as one Triton kernel forward and one backward.

At batch 2 a layer's passes take a few microseconds, and so does every operation on its few numbers
per channel, of which MABN has some forty and BCN seventy in a step. These kernels are for images
that all share statistics (`protocol=direct`). With groups each operation computes more at once;
there the layers do with those of `norms/mabn.py` and `norms/bcn.py`, which have the formulas.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from norms import kernels

TILE = 2048  # numbers that a program has in registers


@triton.jit
def _total(values, c, C, rows, R: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr):
    """The sum of the rows of (rows, C)."""
    total = tl.zeros([B], ACC)
    for start in range(0, rows, R):
        r = start + tl.arange(0, R)
        there = (r < rows)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(values + r[:, None] * C + c[None, :], mask=there, other=0), 0)
    return total


@triton.jit
def _push(window, new, own, c, C, W: tl.constexpr, P: tl.constexpr):
    """Moves (W, C) on by one value; the mean of all W, or the value alone where `own`."""
    row = tl.arange(0, P)
    there = (row < W - 1)[:, None] & (c < C)[None, :]
    at = window + row[:, None] * C + c[None, :]
    kept = tl.load(at + C, mask=there, other=0).to(new.dtype)
    tl.debug_barrier()  # all are read before one is written over
    tl.store(at, kept, mask=there)
    tl.store(window + (W - 1) * C + c, new, mask=c < C)
    return tl.where(own, new, (tl.sum(kept, 0) + new) / W)


@triton.jit
def _mabn_forward(
    square, running, window, tracked, gain, inverse, own, C, rows,
    OWN: tl.constexpr, FREE: tl.constexpr, MOMENTUM: tl.constexpr, EPS: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, R: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * B + tl.arange(0, B)
    step = tl.load(tracked) + 1
    tl.store(own, step < OWN, mask=tl.program_id(0) == 0)
    chi = _push(window, _total(square, c, C, rows, R, B, ACC) / rows, step < OWN, c, C, W, P)
    before = tl.load(running + c, mask=c < C, other=1).to(ACC)
    tl.store(running + c, chi + MOMENTUM * (before - chi), mask=c < C)
    root = tl.sqrt(chi + EPS)
    r = root / tl.sqrt(before + EPS)
    r = tl.where(r < 0.2, tl.full([B], 0.2, ACC), r)  # unlike minimum and maximum leaves NaN
    r = tl.where(r > 5, 5, r)
    tl.store(gain + c, tl.where(step > FREE, r, 1.0) / root, mask=c < C)
    tl.store(inverse + c, 1 / root, mask=c < C)


@triton.jit
def _mabn_backward(
    total, product, weight, gain, inverse, own, window, a, b, dweight, dbias, C, rows, n,
    W: tl.constexpr, P: tl.constexpr, R: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * B + tl.arange(0, B)
    there = c < C
    sum_product = _total(product, c, C, rows, R, B, ACC)
    g = tl.load(gain + c, mask=there, other=0)
    i = tl.load(inverse + c, mask=there, other=0)
    scale = tl.load(weight + c, mask=there, other=0).to(ACC) * g
    psi = _push(window, scale * sum_product / n, tl.load(own) != 0, c, C, W, P)
    tl.store(a + c, scale, mask=there)
    tl.store(b + c, -i * i * psi, mask=there)
    tl.store(dweight + c, g * sum_product, mask=there)
    tl.store(dbias + c, _total(total, c, C, rows, R, B, ACC), mask=there)


@triton.jit
def _bcn_forward(
    mean, var, bn_weight, bn_bias, weight, bias, running_mean, running_var,
    scale, shift, center, inverse, z_mean, z_inverse, N, C, K, S, count,
    ESTIMATED: tl.constexpr, RATE: tl.constexpr, BN_EPS: tl.constexpr, EPS: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program has the S channels of a group, of all N images."""
    k, n, s = tl.program_id(0), tl.arange(0, P), tl.arange(0, B)
    c, here = k * S + s, s < S
    there = (n < N)[:, None] & here[None, :]
    at = n[:, None] * C + c[None, :]
    mu, v = tl.load(mean + at, mask=there, other=0), tl.load(var + at, mask=there, other=0)
    # the batch norm's statistics
    middle = tl.sum(mu, 0) / N
    away = tl.where(there, mu - middle[None, :], 0)
    spread = (tl.sum(v, 0) + tl.sum(away * away, 0)) / N
    old_mean = tl.load(running_mean + c, mask=here, other=0)
    old_var = tl.load(running_var + c, mask=here, other=1)
    if ESTIMATED:
        moved = spread + (middle - old_mean) * (middle - old_mean)
    else:
        moved = spread * count / (count - 1)  # unbiased
    new_mean, new_var = old_mean + RATE * (middle - old_mean), old_var + RATE * (moved - old_var)
    tl.store(running_mean + c, new_mean, mask=here)
    tl.store(running_var + c, new_var, mask=here)
    if ESTIMATED:
        middle, spread = new_mean, new_var
    i = 1 / tl.sqrt(spread + BN_EPS)
    tl.store(center + c, middle, mask=here)
    tl.store(inverse + c, i, mask=here)
    # the channel norm's, of z = p * (x - middle) + bn_bias
    p = tl.load(bn_weight + c, mask=here, other=0).to(ACC) * i
    z = (mu - middle[None, :]) * p[None, :]
    z += tl.load(bn_bias + c, mask=here, other=0).to(ACC)[None, :]
    zm = tl.sum(tl.where(there, z, 0), 1) / S
    z -= zm[:, None]
    zi = 1 / tl.sqrt(tl.sum(tl.where(there, v * (p * p)[None, :] + z * z, 0), 1) / S + EPS)
    tl.store(z_mean + n * K + k, zm, mask=n < N)
    tl.store(z_inverse + n * K + k, zi, mask=n < N)
    # y = scale * x + shift
    gain = tl.load(weight + k).to(ACC) * zi
    by = p[None, :] * gain[:, None]
    tl.store(scale + at, by, mask=there)
    plus = z * gain[:, None] + tl.load(bias + k).to(ACC) - mu * by
    tl.store(shift + at, plus, mask=there)


@triton.jit
def _bcn_backward(
    total, product, bn_weight, bn_bias, weight, mean, var, center, inverse, z_mean, z_inverse,
    a, b, c, dbn_weight, dbn_bias, dweight, dbias, N, C, K, S, area,
    THROUGH: tl.constexpr, P: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    k, n, s = tl.program_id(0), tl.arange(0, P), tl.arange(0, B)
    ch, here = k * S + s, s < S
    there = (n < N)[:, None] & here[None, :]
    at = n[:, None] * C + ch[None, :]
    mu, v = tl.load(mean + at, mask=there, other=0), tl.load(var + at, mask=there, other=0)
    t, pr = tl.load(total + at, mask=there, other=0), tl.load(product + at, mask=there, other=0)
    i = tl.load(inverse + ch, mask=here, other=0)
    w = tl.load(bn_weight + ch, mask=here, other=0).to(ACC) * i
    away = mu - tl.load(center + ch, mask=here, other=0)[None, :]
    zm = tl.load(z_mean + n * K + k, mask=n < N, other=0)
    zi = tl.load(z_inverse + n * K + k, mask=n < N, other=0)
    # y = weight * u + bias with u = (x - mean) * p + q
    p = w[None, :] * zi[:, None]
    q = away * w[None, :] + tl.load(bn_bias + ch, mask=here, other=0).to(ACC)[None, :]
    q = (q - zm[:, None]) * zi[:, None]
    db, dw = tl.sum(t, 1), tl.sum(p * pr + q * t, 1)
    tl.store(dbias + k, tl.sum(db, 0))
    tl.store(dweight + k, tl.sum(dw, 0))
    # dz = g * dy + bz * (x - mean) + cz
    g = tl.load(weight + k).to(ACC) * zi
    of_all = -g / (S * area)
    bz = (of_all * dw)[:, None] * p
    cz = (of_all * db)[:, None] + (of_all * dw)[:, None] * q
    # the sums of dz and of dz * (x - center)
    dz = tl.where(there, g[:, None] * t + area * cz, 0)
    dzx = tl.where(there, g[:, None] * pr + away * dz + area * bz * v, 0)
    sum_dz, sum_dzx = tl.sum(dz, 0), tl.sum(dzx, 0)
    tl.store(dbn_bias + ch, sum_dz, mask=here)
    tl.store(dbn_weight + ch, i * sum_dzx, mask=here)
    if THROUGH:
        of_dzx = (-sum_dzx * i * i / (N * area))[None, :]
        bz += of_dzx
        cz += of_dzx * away - (sum_dz / (N * area))[None, :]
    bz *= w[None, :]
    tl.store(a + at, g[:, None] * w[None, :], mask=there)
    tl.store(b + at, bz, mask=there)
    tl.store(c + at, cz * w[None, :] - bz * mu, mask=there)


def _block(channels: int, rows: int, window: int) -> tuple[tuple[int], dict[str, Any]]:
    """Programs, and the sizes of their tiles."""
    p, r = triton.next_power_of_2(window), min(256, triton.next_power_of_2(rows))
    b = max(16, min(64, TILE // max(p, r)))
    return (triton.cdiv(channels, b),), dict(W=window, P=p, R=r, B=b)


def mabn_forward(
    x: Tensor, running: Tensor, window: Tensor, tracked: Tensor, warmup: int, momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`MABN2d.update` of one group, all but its counter: gain and inverse, (1, C), and own."""
    square = kernels.moments(x, centered=False)[1]
    channels, rows = x.shape[1], len(x) * square.shape[1]
    gain, inverse = square.new_empty((2, 1, channels))
    own = x.new_empty((1, 1), dtype=torch.bool)
    programs, sizes = _block(channels, rows, len(window))
    with torch.cuda.device_of(x):
        _mabn_forward[programs](
            square, running, window, tracked, gain, inverse, own, channels, rows,
            OWN=max(len(window) + 1, warmup), FREE=max(1000, warmup), MOMENTUM=momentum, EPS=eps,
            ACC=kernels.accumulator(x)[0], **sizes,
        )  # fmt: skip
    return gain, inverse, own


def mabn_backward(
    dy: Tensor, x: Tensor, weight: Tensor, gain: Tensor, inverse: Tensor, own: Tensor,
    window: Tensor,
) -> list[Tensor]:  # fmt: skip
    """a and b of dL/dx = a * dy + b * x, (1, C), and the gradients of weight and bias."""
    channels = x.shape[1]
    total, product = kernels.sums(dy, x, None)
    rows = len(x) * total.shape[1]
    a, b, dweight, dbias = total.new_empty((4, 1, channels))
    programs, sizes = _block(channels, rows, len(window))
    with torch.cuda.device_of(x):
        _mabn_backward[programs](
            total, product, weight, gain, inverse, own, window, a, b, dweight, dbias,
            channels, rows, x.numel() // channels, ACC=kernels.accumulator(x)[0], **sizes,
        )  # fmt: skip
    return [a, b, dweight[0], dbias[0]]


def fits(images: int, group: int) -> bool:
    """Whether a program has the registers for so many images of so many channels."""
    return triton.next_power_of_2(images) * triton.next_power_of_2(group) <= TILE


def _group(images: int, channels: int, groups: int, acc: Any) -> dict[str, Any]:
    p, b = triton.next_power_of_2(images), triton.next_power_of_2(channels // groups)
    return dict(P=p, B=b, ACC=acc, num_warps=8 if p * b >= 1024 else 4)


def bcn_forward(
    x: Tensor, mean: Tensor, var: Tensor, bn_weight: Tensor, bn_bias: Tensor, weight: Tensor,
    bias: Tensor, running_mean: Tensor, running_var: Tensor, estimated: bool, rate: float,
    bn_eps: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """`BatchChannelNorm2d.numbers` of one group in training, all but the batch norm's counter."""
    (n, channels), groups = mean.shape, len(weight)
    scale, shift = mean.new_empty((2, n, channels))
    center, inverse = mean.new_empty((2, 1, channels))
    z_mean, z_inverse = mean.new_empty((2, n, groups))
    results = [scale, shift, mean, var, center, inverse, z_mean, z_inverse]
    with torch.cuda.device_of(x):
        _bcn_forward[(groups,)](
            mean, var, bn_weight, bn_bias, weight, bias, running_mean, running_var,
            scale, shift, *results[4:], n, channels, groups, channels // groups,
            x.numel() // channels, ESTIMATED=estimated, RATE=rate, BN_EPS=bn_eps, EPS=eps,
            **_group(n, channels, groups, kernels.accumulator(x)[0]),
        )  # fmt: skip
    return results


def bcn_backward(
    total: Tensor, product: Tensor, saved: list[Tensor], area: int, through: bool
) -> list[Tensor]:
    """a, b and c of dL/dx = a * dy + b * x + c, (N, C), and the gradients of the parameters."""
    (n, channels), groups = total.shape, len(saved[2])
    a, b, c = total.new_empty((3, n, channels))
    dbn_weight, dbn_bias = total.new_empty((2, channels))
    dweight, dbias = total.new_empty((2, groups))
    results = [a, b, c, dbn_weight, dbn_bias, dweight, dbias]
    with torch.cuda.device_of(total):
        _bcn_backward[(groups,)](
            total, product, *saved, *results, n, channels, groups, channels // groups, area,
            THROUGH=through, **_group(n, channels, groups, kernels.accumulator(total)[0]),
        )  # fmt: skip
    return results
