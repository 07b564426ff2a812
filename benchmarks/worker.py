"""What is timed, in a process of its own: forward and backward of a layer, or a network's step.

    python benchmarks/worker.py FOLDER THREADS

takes `norms`, `models` and `training` from FOLDER, which may hold another commit; of this folder it
imports nothing. Each line of its input is a request in JSON, each line of its output the answer:

    {"make": NAME, "case": {…}}     seconds of the first call, the compiler's included
    {"time": NAME, "span": 0.01}    milliseconds of a call, of so many as take `span` seconds
    {"kept": NAME}                  bytes that the forward pass keeps for the backward one
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
NORMS = ("nn.BatchNorm2d", "nn.GroupNorm", "bn", "mabn", "bcn", "bcn estimated", "estimated bn",
         "brn")  # fmt: skip
CONVS = ("nn.Conv2d", "ws_gn", "bcn", "pws", "mabn", "timm StdConv2d", "timm ScaledStdConv2d")


def norm(name: str, channels: int, batch: int) -> nn.Module:
    """A layer whose statistics are over `batch` images, past its warm-up and schedule."""
    import norms

    groups = min(32, channels // 2)
    makers: dict[str, Callable[[], nn.Module]] = {
        "nn.BatchNorm2d": lambda: nn.BatchNorm2d(channels),
        "nn.GroupNorm": lambda: nn.GroupNorm(groups, channels),
        "bn": lambda: norms.GhostBatchNorm2d(channels, batch),
        "mabn": lambda: norms.MABN2d(channels, batch),
        "bcn": lambda: norms.BatchChannelNorm2d(channels, groups, batch),
        "bcn estimated": lambda: norms.BatchChannelNorm2d(channels, groups, batch, rate=0.01),
        "estimated bn": lambda: norms.EstimatedBatchNorm2d(channels, 0.01, batch),
        "brn": lambda: norms.BatchRenorm2d(
            channels, batch, start=0, r_until=1, d_until=1, fixed_weight=False
        ),
    }
    layer = makers[name]()
    for counter in layer.buffers():
        if not counter.is_floating_point():
            counter.fill_(2000)
    return layer


def conv(name: str, channels_in: int, channels_out: int, kernel: int) -> nn.Module:
    import norms

    shape = (channels_in, channels_out, kernel)
    if name.startswith("timm"):
        from timm import layers

        return getattr(layers, name.split()[1])(*shape, padding=0, bias=False)
    makers: dict[str, Callable[..., nn.Module]] = {
        "nn.Conv2d": nn.Conv2d,
        "ws_gn": norms.WSConv2d,
        "bcn": lambda *shape, bias: norms.WSConv2d(*shape, bias=bias, eps_inside=True),
        "pws": norms.PWSConv2d,
        "mabn": norms.CenteredConv2d,
    }
    return makers[name](*shape, bias=False)


def compiled(network: nn.Module, way: str) -> Any:
    """The network as it is (`eager`), with our layers compiled one by one (`layers`), or compiled
    as a whole (`network`)."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**4
    if way == "layers":
        from training.compile import own_layers

        for layer in own_layers(network):
            layer.compile(dynamic=False)
    return torch.compile(network, dynamic=False) if way == "network" else network


class Layer:
    """Forward and backward of a layer; `half`: under bfloat16 autocast, which gives it such x."""

    def __init__(
        self, what: str, name: str, shape: list[int], batch: int = 2, way: str = "eager",
        format: str = "contiguous", device: str = "cpu", half: bool = False,
    ):  # fmt: skip
        torch.manual_seed(0)
        layout, self.half = FORMATS[format], half
        kind = norm(name, shape[1], batch) if what == "norm" else conv(name, *shape)
        # a convolution at one output position, where weights are nearly all there is
        size = shape if what == "norm" else [1, shape[0], shape[2], shape[2]]
        self.layer = kind.to(device).to(memory_format=layout)
        x = torch.randn(size).to(device, torch.bfloat16 if half else None, memory_format=layout)
        self.x = x.requires_grad_(what == "norm")
        with torch.no_grad():
            self.dy = torch.randn_like(self.forward())
        if way == "layers":
            compiled(self.layer, way)

    def forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.half):
            return self.layer(self.x)

    def __call__(self) -> None:
        for tensor in (self.x, *self.layer.parameters()):
            tensor.grad = None
        self.forward().backward(self.dy)

    def kept(self) -> int:
        """Bytes of all tensors that are saved, the input included, parameters and buffers not."""
        own = {t.untyped_storage().data_ptr() for t in self.layer.state_dict().values()}
        found: dict[int, Tensor] = {}  # holds them, so that no address comes twice

        def keep(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = self.forward()
        y.backward(self.dy)  # MABN's backward pass is part of its state
        return sum(t.untyped_storage().nbytes() for p, t in found.items() if p not in own)


def step(
    name: str, model: str, images: int, size: int, batch: int, way: str = "eager",
    format: str = "contiguous", device: str = "cpu", classes: int = 10,
) -> Callable[[], None]:  # fmt: skip
    """An optimizer step of a network on random images. The learning rate is 0, so that no step
    differs from the one before. Statistics are over `batch` images, those of PyTorch's own batch
    norm (`nn.BatchNorm2d`) over all of them."""
    import models
    import norms

    torch.manual_seed(0)
    if name == "nn.BatchNorm2d":
        scheme = dataclasses.replace(norms.build("bn"), norm=nn.BatchNorm2d)
    else:
        scheme = norms.build(name, batch_size=batch)
    network = models.build(model, scheme=scheme, num_classes=classes, zero_init=False)
    layout = FORMATS[format]
    network.to(device).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, fused=True)
    forward = compiled(network, way)
    x = torch.randn(images, 3, size, size).to(device, memory_format=layout)
    y = torch.arange(images, device=device) % classes

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return run


def make(what: str, **case: Any) -> Callable[[], None]:
    return step(**case) if what == "network" else Layer(what, **case)


def clock(threads: int) -> Callable[[], float]:
    """On one thread of a CPU the process's own time, which other programs do not add to."""
    return time.process_time if threads == 1 else time.perf_counter


def serve(threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    now, calls, took = clock(threads), dict[str, Any](), dict[str, float]()
    for line in sys.stdin:
        request = json.loads(line)
        reply: Any
        try:
            if "make" in request:
                name = request["make"]
                call = calls[name] = make(**request["case"])
                start = time.perf_counter()
                call()
                reply, start = time.perf_counter() - start, now()
                call()
                took[name] = max(1e-6, now() - start)
            elif "kept" in request:
                reply = calls[request["kept"]].kept()
            else:
                name = request["time"]
                count, start = max(1, math.ceil(request["span"] / took[name])), now()
                for _ in range(count):
                    calls[name]()
                reply = 1000 * (now() - start) / count
        except Exception as error:  # whatever it is, who asked is told
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(reply), file=answer, flush=True)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    serve(int(sys.argv[2]), answers)
