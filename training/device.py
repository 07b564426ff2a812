"""Where a run computes."""

import gc
from typing import Any

import torch

from training import distributed
from training.run import Say

CORES = torch.get_num_threads()  # PyTorch's own choice, before anything has changed it


def find(name: str) -> torch.device:
    """The device of the key `device`; raises `ValueError` if there is none of that name."""
    gpus = torch.cuda.device_count()
    if distributed.size() > 1 and gpus and name in ("auto", "cuda"):
        own = distributed.local_rank()
        if own >= gpus:
            raise ValueError(
                f"devices: process {own + 1} on this machine has no GPU of its own; "
                f"expected at most {gpus} processes here, or device=cpu"
            )
        torch.cuda.set_device(own)
        return torch.device("cuda", own)
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in allowed:
        why = "" if gpus or not str(name).startswith("cuda") else "torch finds no GPU here; "
        raise ValueError(f"device={name}: {why}expected {', '.join(allowed)}")
    return torch.device(name)


def prepare(device: torch.device, threads: int | None, state: Any, say: Say) -> None:
    """Undo what an earlier run in this process left, and set the number of CPU threads: the
    configured one, else the checkpoint's, else PyTorch's own choice, one for every core."""
    before = state["threads"] if state else None
    torch.set_num_threads(threads or before or CORES)
    if before and before != torch.get_num_threads() and device.type == "cpu":
        say(
            f"runtime.threads={threads}: the checkpoint was made with {before}, so the last bits "
            f"will differ from those of an uninterrupted run"
        )
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
