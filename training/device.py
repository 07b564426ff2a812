"""Where a run computes."""

import gc
from functools import cache
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


@cache
def check_compiler(device: torch.device) -> None:
    """Raise `ValueError` if torch cannot compile for this device, tried on a negation."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of four libraries, for whatever is missing
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"runtime.compile=true: torch.compile does not work here ({lines[0][:200]}); expected "
            f"false, or a C++ compiler and, for a GPU, Triton"
        ) from error


def memory_format(wish: bool | str, gains: bool) -> torch.memory_format:
    """How a network's tensors lie in memory: `wish`, the key `runtime.channels_last`; "auto" takes
    channels-last where the scheme `gains` from it."""
    last = gains if wish == "auto" else wish
    return torch.channels_last if last else torch.contiguous_format


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
        if device.index is not None:
            torch.cuda.set_device(device)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = True  # all batches of a run have one shape
