"""The layers alone on a GPU: forward and backward, and how fast they move what they must: part
`layers` of gpu_session.sh.

At the shapes of ResNet-50's norms, float32 and under bfloat16 autocast, contiguous and
channels-last, every layer of benchmarks/layers.py: ours, PyTorch's, and the plain readings of the
formulas. And the standardized convolutions at one output position, where the weights are nearly
all there is to compute.

Calls are recorded as a CUDA graph, `REPEAT` in a row, so that launches do not count; a round times
every layer once, in shuffled order. The bytes are those that a norm must move: forward x is read
for the statistics and again while y is written, backward x and dL/dy are read for their sums and
again while dL/dx is written (estimated batch norm does not need x in that last pass). They are
related to what the card copies in the same time, `copy`, counting reads and writes. Maps of 14
pixels and below fit into its cache and can exceed it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu import Measure, Session, one_line
from benchmarks.layers import SHAPES, WEIGHTS, Fresh, conv_layers, norm_layers
from benchmarks.step import clean, interleaved, spread, timed

REPEAT = 10
NAMED = ("bn", "mabn", "bcn", "bcn estimated", "brn", "nn.GroupNorm, 32 groups")  # in the table
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
Call = Callable[[], Any]


def both_ways(layer: nn.Module, x: Tensor, dy: Tensor, half: bool) -> None:
    """Forward and backward, as training in mixed precision calls it."""
    x.grad = None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        y = layer(x)
    y.backward(dy)


def recorded(call: Call, where: torch.device) -> Call:
    """`REPEAT` calls, on a GPU as one graph."""

    def calls() -> None:
        for _ in range(REPEAT):
            call()

    if where.type != "cuda":
        return calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def measure(calls: Mapping[str, Call], rounds: int, where: torch.device) -> dict[str, Any]:
    """Milliseconds of a call; a layer that cannot be recorded takes no other with it."""
    ready: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            ready[name] = recorded(call, where)
            ready[name]()
        except Exception as error:
            rows[name] = {"error": one_line(error)}
            ready.pop(name, None)
    timers = {name: partial(timed, call, 1, where) for name, call in ready.items()}
    for name, seconds in interleaved(timers, rounds).items():
        t = 1000 * seconds / REPEAT
        rows[name] = {"ms": round(float(np.median(t)), 5), "iqr_ms": round(spread(t), 5)}
    return {name: rows[name] for name in calls}


def copy(where: torch.device, size: int, rounds: int) -> dict[str, Any]:
    """Bytes that a copy on the device reads and writes in a second."""
    a = torch.zeros(size, dtype=torch.uint8, device=where)
    b = torch.empty_like(a)
    row = measure({"copy": lambda: b.copy_(a)}, rounds, where)["copy"]
    return row | {"bytes": 2 * size, "bytes_per_second": round(2 * size / row["ms"] * 1000)}


def norms_at(
    images: int, channels: int, side: int, half: bool, layout: str, rounds: int, where: torch.device
) -> dict[str, Any]:
    torch.manual_seed(0)
    calls, moved = {}, {}
    for name, layer in norm_layers(channels, images).items():
        x = torch.randn(images, channels, side, side, device=where)
        x = x.to(torch.bfloat16 if half else torch.float32, memory_format=FORMATS[layout])
        with torch.no_grad(), torch.autocast(where.type, torch.bfloat16, enabled=half):
            dy = torch.randn_like(layer.to(where)(x))  # of the type that it returns
        calls[name] = partial(both_ways, layer, x.requires_grad_(), dy, half)
        reads = 4 if "estimated" in name else 5
        moved[name] = x.numel() * (reads * x.element_size() + 3 * dy.element_size())
    rows = measure(calls, rounds, where)
    base = rows["nn.BatchNorm2d"].get("ms")
    for name, row in rows.items():
        if "ms" in row:
            row |= {"bytes": moved[name], "bytes_per_second": round(moved[name] / row["ms"] * 1e3)}
            row |= {"ratio": round(row["ms"] / base, 3)} if base else {}
    return {"layers": rows}


def weights_at(
    cin: int, cout: int, kernel: int, layout: str, rounds: int, where: torch.device
) -> dict[str, Any]:
    torch.manual_seed(0)
    calls = {}
    x = torch.randn(1, cin, kernel, kernel, device=where, requires_grad=True)
    for name, layer in conv_layers(cin, cout, kernel).items():
        layer.to(where).to(memory_format=FORMATS[layout])
        dy = torch.randn(1, cout, 1, 1, device=where)
        calls[name] = partial(both_ways, Fresh(layer), x, dy, False)
    rows = measure(calls, rounds, where)
    base = rows["nn.Conv2d"].get("ms")
    for row in rows.values():
        row |= {"ratio": round(row["ms"] / base, 3)} if base and "ms" in row else {}
    return {"layers": rows}


def cells(session: Session) -> dict[str, Measure]:
    where = torch.device(session.device)
    rounds = 2 if session.tiny else 15
    shapes = [(64, 4)] if session.tiny else list(SHAPES)
    weights = [(8, 8, 3)] if session.tiny else WEIGHTS

    def tidy(call: Measure) -> Measure:
        def cell() -> dict[str, Any]:
            try:
                return call()
            finally:
                clean(where)

        return cell

    found = {"copy": tidy(partial(copy, where, 2**20 if session.tiny else 2**31, rounds))}
    for images in (2,) if session.tiny else (32, 2):
        for half in (False, True):
            for layout in FORMATS:
                for channels, side in shapes:
                    kind = "bfloat16" if half else "float32"
                    key = f"{images}x{channels}x{side}x{side} {kind} {layout}"
                    at = (images, channels, side, half, layout, rounds, where)
                    found[key] = tidy(partial(norms_at, *at))
        if images == 32 or session.tiny:
            for cin, cout, kernel in weights:
                for layout in FORMATS:
                    key = f"weights {cin} to {cout}, {kernel}x{kernel} {layout}"
                    found[key] = tidy(partial(weights_at, cin, cout, kernel, layout, rounds, where))
    return found


def table(result: dict[str, Any]) -> list[str]:
    """All 53 norms of ResNet-50, as multiples of `nn.BatchNorm2d`'s time: ours, in brackets the
    formulas, and the bytes over the time as a part of what a copy reaches, at the largest shape."""
    done = result["cells"]
    copied = done.get("copy", {}).get("bytes_per_second")
    lines = [f"copy: {copied / 1e12:.3f} TB/s read and written"] if copied else []
    groups: dict[str, dict[Any, Any]] = {}
    for key, cell in done.items():
        if "layers" not in cell:
            continue
        if key.startswith("weights"):
            rows = cell["layers"].items()
            told = ", ".join(f"{n} {r['ratio']:.2f}" for n, r in rows if "ratio" in r)
            lines.append(f"{key}, to nn.Conv2d: {told}")
            continue
        shape, kind = key.split(" ", 1)
        images, channels, side, _ = map(int, shape.split("x"))
        groups.setdefault(f"{images} images {kind}", {})[channels, side] = cell["layers"]
    for kind, shapes in groups.items():
        largest = shapes[max(shapes, key=lambda shape: shape[0] * shape[1] ** 2)]
        named = []
        for name in NAMED:
            ratios = [
                f"{ratio:.2f}" if (ratio := whole(shapes, other)) else "failed"
                for other in (name, f"{name}, formulas")
                if other in largest
            ]
            speed = largest[name].get("bytes_per_second")
            ratios += [f"{speed / copied:.2f} of a copy"] if speed and copied else []
            named.append(f"{name} {ratios[0]} ({'; '.join(ratios[1:])})")
        lines.append(f"{kind}, {len(shapes)} of {len(SHAPES)} shapes: {', '.join(named)}")
    return lines


def whole(shapes: dict[Any, Any], name: str) -> float | None:
    """A layer's time over that of `nn.BatchNorm2d`, each shape as often as ResNet-50 has it."""
    pairs = [(rows[name].get("ms"), rows["nn.BatchNorm2d"].get("ms")) for rows in shapes.values()]
    if any(None in pair for pair in pairs):
        return None
    counts = [SHAPES.get(shape, 1) for shape in shapes]
    ours, base = (
        sum(count * pair[i] for count, pair in zip(counts, pairs, strict=True)) for i in (0, 1)
    )
    return ours / base
