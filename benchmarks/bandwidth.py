"""The layers alone on a GPU: forward and backward, and how fast they move what they must: part
`layers` of gpu_session.sh.

At the shapes of ResNet-50's norms, float32 and under bfloat16 autocast, contiguous and
channels-last, every layer of benchmarks/layers.py, at three shapes compiled too; and standardized
convolutions at one output position, where the weights are nearly all there is to compute.

Calls are recorded as a CUDA graph, `REPEAT` in a row, so that launches do not count. The bytes are
those that a norm must move: forward x is read for the statistics and again while y is written,
backward x and dL/dy are read for their sums and again while dL/dx is written (estimated batch norm
does not need x in that last pass). They are related to what the card copies in the same time,
`copy`, counting reads and writes. Maps of 14 pixels and below fit into its cache and can exceed it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import Measure, Session
from benchmarks.layers import LIBRARY, SHAPES, WEIGHTS
from benchmarks.step import compare
from benchmarks.worker import CONVS, FORMATS, NORMS, Layer

REPEAT = 10
COMPILED = [(64, 56), (256, 14), (512, 7)]  # shapes of compiled layers, each of which takes seconds
Call = Callable[[], Any]


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


def copy(where: torch.device, size: int, rounds: int) -> dict[str, Any]:
    """Bytes that a copy on the device reads and writes in a second."""
    a = torch.zeros(size, dtype=torch.uint8, device=where)
    b = torch.empty_like(a)
    makers = {"copy": lambda: recorded(lambda: b.copy_(a), where)}
    row = compare(makers, where, rounds, 0.0)["copy"]
    speed = 2 * size * REPEAT / row["ms"] * 1000
    return row | {"bytes_per_second": speed, "told": f"{speed / 1e12:.2f} TB/s read and written"}


def layers_at(
    what: str, shape: list[int], ways: tuple[str, ...], rounds: int, where: torch.device, **how: Any
) -> dict[str, Any]:
    def make(name: str, way: str) -> Call:
        layer = Layer(what, name, shape, way=way, device=where.type, **how)
        layer()  # compiled before it is recorded
        return recorded(layer, where)

    makers: dict[str, Callable[[], Call]] = {
        name if way == "eager" else f"{name}, compiled": partial(make, name, way)
        for name in (NORMS if what == "norm" else CONVS)
        for way in ways
        if way == "eager" or not name.startswith(LIBRARY)
    }
    rows, told = compare(makers, where, rounds, 0.0), []
    for name, row in rows.items():
        said = f"{name} {row['speed']:.2f}" if "speed" in row else f"{name} failed"
        if "ms" in row and what == "norm":
            passes = (4 if "estimated" in name else 5) + 3
            bytes_ = torch.Size(shape).numel() * passes * (2 if how["half"] else 4)
            row["bytes_per_second"] = round(bytes_ * REPEAT / row["ms"] * 1000)
            said += f" ({row['bytes_per_second'] / 1e12:.2f} TB/s)"
        told.append(said)
    return {"layers": rows, "told": "speed to the first: " + ", ".join(told)}


def cells(session: Session) -> dict[str, Measure]:
    where, tiny = torch.device(session.device), session.tiny
    rounds = 2 if tiny else 15
    weights = [(8, 8, 3)] if tiny else WEIGHTS
    found: dict[str, Measure] = {"copy": partial(copy, where, 2**20 if tiny else 2**31, rounds)}

    def add(key: str, what: str, shape: list[int], compiled: bool, **how: Any) -> None:
        ways = ("eager", "layers") if compiled and not tiny else ("eager",)
        for format in FORMATS:
            cell = partial(layers_at, what, shape, ways, rounds, where, format=format, **how)
            found[f"{key} {format}"] = cell

    for compiled, shapes in ((True, COMPILED), (False, set(SHAPES) - set(COMPILED))):
        for images in (2,) if tiny else (32, 2):
            for half in (False, True):
                for channels, side in [(64, 4)] if tiny else sorted(shapes):
                    shape = [images, channels, side, side]
                    key = f"{'x'.join(map(str, shape))} {'bfloat16' if half else 'float32'}"
                    add(key, "norm", shape, compiled, batch=images, half=half)
    for cin, cout, kernel in weights:
        add(f"weights {cin} to {cout}, {kernel}x{kernel}", "conv", [cin, cout, kernel], True)
    return found
