"""Where a run computes."""

import ctypes
import gc
import logging
import platform
from typing import Any

import torch

from training import distributed

log = logging.getLogger("smallbatch")
CORES = torch.get_num_threads()  # PyTorch's own choice, before anything has changed it


def resolve(name: str) -> torch.device:
    """The device of the key `device`; raises `ValueError` if there is none of that name."""
    gpus = torch.cuda.device_count()
    if distributed.world_size() > 1 and gpus and name in ("auto", "cuda"):
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


def memory_format(setting: bool | str, gains: bool) -> torch.memory_format:
    """How a network's tensors lie in memory: `setting`, the key `runtime.channels_last`; "auto"
    takes channels-last where the scheme `gains` from it."""
    last = gains if setting == "auto" else setting
    return torch.channels_last if last else torch.contiguous_format


def keep_memory() -> None:
    """Tell glibc to keep the memory that a training step frees, which otherwise goes back to the
    kernel and is faulted in again by the next one."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2**30))  # M_TRIM_THRESHOLD: bytes kept free
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(2**25))  # M_MMAP_THRESHOLD: the largest allowed


def prepare(device: torch.device, setting: int | str, threads: int | None, state: Any) -> None:
    """Undo what an earlier run in this process left, and set the number of CPU threads: `threads`,
    or, where `setting`, the key `runtime.threads`, is "auto", the checkpoint's; None: PyTorch's own
    choice, one for every core."""
    before = state["threads"] if state else None
    torch.set_num_threads((setting == "auto" and before) or threads or CORES)
    if before and before != torch.get_num_threads() and device.type == "cpu":
        log.warning(
            f"runtime.threads={setting}: the checkpoint was made with {before}, so the last bits "
            f"will differ from those of an uninterrupted run"
        )
    if device.type == "cpu":
        keep_memory()
    else:
        if device.index is not None:
            torch.cuda.set_device(device)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = True  # all batches of a run have one shape
