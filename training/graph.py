"""An optimizer step recorded once as a CUDA graph: from then on an update is a single launch.

At small batches a GPU computes a layer in less time than Python takes to launch it; a recorded
step waits for nobody.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training import distributed
from training.schema import Config

log = logging.getLogger("smallbatch")
Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
WARM_UP = 3  # updates before the recording, in which libraries choose and allocate what they need


def unsupported_reason(cfg: Config, device: torch.device) -> str:
    """Why the steps of a run cannot be recorded; empty where they can."""
    debug = getattr(cfg, "debug", None)
    reasons = {
        f"device={device.type} has none": device.type != "cuda",
        f"devices={distributed.world_size()} share a step": distributed.world_size() > 1,
        "precision=float16 asks the device for its loss scale": cfg.recipe.precision == "float16",
        f"probe={cfg.probe.name} looks into every step": cfg.probe.name != "none",
        "debug=profile shows its operators": debug is not None and debug.name == "profile",
    }
    return next((reason for reason, true in reasons.items() if true), "")


def enabled(cfg: Config, device: torch.device) -> bool:
    """Whether the key `runtime.graph` comes to a recorded step; raises `ValueError` where it is
    asked for and cannot be."""
    setting, reason = cfg.runtime.graph, unsupported_reason(cfg, device)
    if setting is True and reason:
        raise ValueError(f"runtime.graph=true: no CUDA graph, {reason}; expected auto or false")
    return not reason if setting == "auto" else bool(setting)


def capture(compute: Compute, images: Tensor, labels: Tensor, stream: Any) -> tuple[Any, Any]:
    """A function that computes again, from and to the same memory, and where its results are."""
    graph = torch.cuda.CUDAGraph()
    # Threads that load images may go on using the device.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = compute(images, labels)
    return graph.replay, results


class CUDAGraphStep:
    """What `compute` does, on inputs of one shape: the first `WARM_UP` times by calling it, then by
    playing back a record of it; by calling it also where that fails, which is said once.

    `compute` must leave everything on the device and take what changes, such as the learning rate,
    from tensors. It is called on a stream of its own, on which everybody else waits for it.
    """

    def __init__(self, compute: Compute, device: torch.device):
        self.compute, self.device, self.calls = compute, device, 0
        self.stream: Any = torch.cuda.Stream(device)
        self.replay: Any = None
        self.failed = False

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls > WARM_UP and not self.replay and not self.failed:
            self.capture(images, labels)
        if not self.replay:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                results = self.compute(images, labels)
            current.wait_stream(self.stream)
            return results
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.replay()
        loss, correct = self.results  # which the next call overwrites
        return loss.clone(), correct.clone()

    def capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        try:
            self.replay, self.results = capture(self.compute, self.images, self.labels, self.stream)
        except RuntimeError as error:
            self.failed = True
            log.warning(
                f"  runtime.graph: the step of this network cannot be recorded as a CUDA graph "
                f"({str(error).splitlines()[0]}); going on without"
            )
