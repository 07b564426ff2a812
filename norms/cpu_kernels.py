"""Layers on a CPU, in C: the passes of `norms/kernels.py`; MABN, BCN and weight standardization.

cpu_kernels.c is compiled when it is first needed, in a second, for this processor, and kept in the
user's cache folder ($XDG_CACHE_HOME, else ~/.cache). That takes Linux and a C compiler with OpenMP:
`cc`, or what the environment names in CC. Without, or with CC set to nothing, layers make do with
what PyTorch and NumPy have, in more time; results differ by rounding. Images are of float32 or
float64, contiguous or channels-last; all else is PyTorch's.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norms.numbers import plain, recorded

SOURCE = Path(__file__).with_suffix(".c")
REAL = {torch.float32: "float", torch.float64: "double"}
FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fPIC -shared"
GRAIN = 32768  # elements that are worth a second thread, as in PyTorch
CHANNELS = 16384  # that have room on a thread's stack

# How many pointers, whole numbers and fractions each takes, in this order; `threads` comes last.
FUNCTIONS = {
    "moments": (3, 4, 0),
    "sums": (5, 5, 0),
    "combine": (6, 5, 0),
    "mabn_forward": (10, 8, 2),
    "mabn_backward": (10, 6, 0),
    "bcn_forward": (14, 7, 3),
    "bcn_backward": (18, 7, 0),
    "standardize": (5, 3, 1),
    "standardize_backward": (6, 2, 0),
}


def compiler() -> list[str]:
    """The command of the C compiler; [] if there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    found = sys.platform == "linux" and command and shutil.which(command[0])
    return [found, *command[1:]] if found else []


def build(real: str) -> Path | None:
    """Where the library for numbers of this type is, compiled now unless it was before; None if
    there is no compiler, and a warning if it fails."""
    command = compiler()
    if not command:
        return None
    command += [f"-DREAL={real}", *FLAGS.split()]
    told = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in told if line.startswith(("flags", "Features"))}
    made_of = [SOURCE.read_text(), *command, *sorted(processor)]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "smallbatch", "kernels"
    )
    target = folder / f"{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # others may compile it now as well
            made = Path(own, target.name)
            subprocess.run(
                [*command, str(SOURCE), "-lm", "-o", str(made)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            made.replace(target)
    return target


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, (pointers, whole, fractions) in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype = None
        function.argtypes = [
            *[ctypes.c_void_p] * pointers,
            *[ctypes.c_int64] * whole,
            *[ctypes.c_double] * fractions,
            ctypes.c_int64,
        ]
    return loaded


@cache
def library(dtype: torch.dtype) -> Any:
    """The compiled functions for numbers of this type, or None."""
    try:
        path = build(REAL[dtype])
        return _load(path) if path else None
    except (
        *(OSError, RuntimeError, ValueError, AttributeError),
        subprocess.CalledProcessError,
    ) as error:
        said = getattr(error, "stderr", None) or str(error)
        why = next((line for line in said.splitlines() if "error" in line), said.strip())
        warnings.warn(
            f"norms/cpu_kernels.c: not in use, so layers take longer on this CPU ({why}); "
            f"CC= in the environment does without it",
            stacklevel=2,
        )
        return None


def take(x: Tensor, *numbers: Tensor) -> bool:
    """Whether the functions are there for these images and numbers, and nothing follows them."""
    return (
        x.is_cpu
        and x.dtype in REAL
        and not recorded()
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        and plain(x)
        and not x.is_neg()
        and x.numel() > 0
        and x.shape[1] <= CHANNELS
        and all(_is_like(v, x) for v in numbers)
        and library(x.dtype) is not None
    )


def _is_like(v: Tensor, x: Tensor) -> bool:
    """Counters and flags have a type of their own."""
    own = v.dtype == x.dtype or v.dtype == torch.int64
    return own and v.is_cpu and v.is_contiguous() and plain(v)


def _check(x: Tensor, *numbers: Tensor) -> None:
    for v in numbers:
        if v.shape[-1] != x.shape[1]:
            raise ValueError(f"expected {v.shape[-1]} channels, got images of {x.shape[1]}")


def _call(name: str, x: Tensor, tensors: Sequence[Tensor | None], *values: float) -> None:
    threads = torch.get_num_threads() if x.numel() > GRAIN else 1
    pointers = [None if v is None else v.data_ptr() for v in tensors]
    getattr(library(x.dtype), name)(*pointers, *values, threads)


def _sizes(x: Tensor, groups: int = 0) -> tuple[int, ...]:
    """(G, N / G,) or (N,); C, H * W, and whether memory is channels-last."""
    n, c, h, w = x.shape
    images = (groups, n // groups) if groups else (n,)
    return *images, c, h * w, not x.is_contiguous()


def _as_x(dy: Tensor, x: Tensor) -> Tensor:
    """dy in a memory like that of x."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return dy.resolve_neg().contiguous(memory_format=layout)


def _unpacked(x: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What was saved for the backward pass, which a hook may have laid out in another way."""
    x = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    return x, [v.contiguous() for v in saved]


def _numbers(v: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """v in the type of x and in as many rows as `like`."""
    return v.to(x.dtype).expand_as(like).contiguous()


def moments(x: Tensor, centered: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every map: (N, C, H, W) -> (N, C) twice. Unless `centered`, the
    second is the mean square, (N, 1, C)."""
    mean, var = x.new_empty((2, len(x), x.shape[1])).unbind()
    _call("moments", x, (x, mean, var), *_sizes(x))
    return mean, var if centered else var.addcmul_(mean, mean)[:, None]


def sums(dy: Tensor, x: Tensor, center: Tensor | None) -> Tensor:
    """Sums of dy and of dy * (x - center) over every map, (2, N, 1, C); center: (N, C) or (1, C),
    or None for 0."""
    both = x.new_empty((2, len(x), 1, x.shape[1]))
    center = x.new_zeros((1, x.shape[1])) if center is None else _numbers(center, x, center)
    rows = x.shape[1] if len(center) > 1 else 0
    _call("sums", x, (_as_x(dy, x), x, center, *both.unbind()), *_sizes(x), rows)
    return both


def combine(dy: Tensor | None, a: Tensor | None, x: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """a * dy + b * x + c; a, b, c: all (N, C) or all (1, C); a term whose number is None is left
    out."""
    out, b = torch.empty_like(x), _numbers(b, x, b)
    c = torch.zeros_like(b) if c is None else _numbers(c, x, b)
    rows = x.shape[1] if len(b) > 1 else 0
    first = (None, None) if dy is None or a is None else (_as_x(dy, x), _numbers(a, x, b))
    _call("combine", x, (*first, x, b, c, out), *_sizes(x), rows)
    return out


def mabn_forward(
    x: Tensor, weight: Tensor, bias: Tensor, running: Tensor, window: Tensor, tracked: Tensor,
    groups: int, warmup: int, momentum: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """y of MABN2d in training, the release version; gain, inverse and own of `MABN2d.update`; moves
    all of its state on but the counter, `tracked`."""
    _check(x, weight, bias, running, window)
    y, numbers = torch.empty_like(x), x.new_empty((2, groups, x.shape[1]))
    kept = [*numbers.unbind(), x.new_empty((groups, 1), dtype=torch.bool)]
    starts = (int(max(len(window) + 1, warmup)), int(max(1000, warmup)))
    tensors = (x, weight, bias, running, window, tracked, y, *kept)
    _call("mabn_forward", x, tensors, *_sizes(x, groups), len(window), *starts, momentum, eps)
    return [y, *kept]


def mabn_backward(dy: Tensor, x: Tensor, *saved: Tensor, window: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x, weight and bias; moves the window on. `saved`: weight and what was
    kept."""
    x, kept = _unpacked(x, saved)
    results = (torch.empty_like(x), *x.new_empty((2, x.shape[1])).unbind())
    tensors = (_as_x(dy, x), x, *kept, window, *results)
    _call("mabn_backward", x, tensors, *_sizes(x, len(kept[1])), len(window))
    return results


def bcn_forward(
    x: Tensor, bn_weight: Tensor, bn_bias: Tensor, weight: Tensor, bias: Tensor,
    running_mean: Tensor, running_var: Tensor, groups: int, estimated: bool, rate: float,
    bn_eps: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """y of BatchChannelNorm2d in training, and what `BatchChannelNorm2d.numbers` keeps; moves the
    moving statistics on."""
    _check(x, bn_weight, bn_bias, running_mean, running_var)
    n, c, k = *x.shape[:2], len(weight)
    shapes = ((2, n, c), (2, groups, c), (2, n, k))
    y, kept = torch.empty_like(x), [v for shape in shapes for v in x.new_empty(shape).unbind()]
    tensors = (x, bn_weight, bn_bias, weight, bias, running_mean, running_var, y, *kept)
    sizes = _sizes(x, groups)
    _call("bcn_forward", x, tensors, *sizes[:3], k, *sizes[3:], estimated, rate, bn_eps, eps)
    return [y, *kept]


def bcn_backward(dy: Tensor, x: Tensor, *saved: Tensor, through: bool) -> list[Tensor]:
    """The gradients of x and the four parameters; `saved`: bn_weight, bn_bias, weight and what was
    kept."""
    x, inputs = _unpacked(x, saved)
    n, c, k, groups = *x.shape[:2], len(saved[2]), len(saved[5])
    numbers = (x.new_empty((2, c)), x.new_empty((2, k)), x.new_empty((2, n, c)))
    results = [torch.empty_like(x), *(v for pair in numbers for v in pair.unbind())]
    sizes = _sizes(x, groups)
    tensors = (_as_x(dy, x), x, *inputs, *results)
    _call("bcn_backward", x, tensors, *sizes[:3], k, *sizes[3:], through)
    return results[:5]


def standardize(rows: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, ...]:
    """(x - mean) / (std + eps) of every row of (1, C, n, 1), with the variance over n - 1 if it is
    `unbiased`; and what the gradient needs, (C,) each."""
    _, c, n, _ = rows.shape
    y, kept = torch.empty_like(rows), rows.new_empty((3, c)).unbind()
    _call("standardize", rows, (rows, y, *kept), c, n, unbiased, eps)
    return y, *kept


def standardize_backward(dy: Tensor, rows: Tensor, *kept: Tensor) -> Tensor:
    """The gradient of rows."""
    _, c, n, _ = rows.shape
    dx = torch.empty_like(rows)
    dense = [v.resolve_neg().contiguous() for v in (dy, rows, *kept)]
    _call("standardize_backward", rows, (*dense, dx), c, n)
    return dx
