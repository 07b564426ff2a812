"""Several processes that share an SGD batch: one for each GPU, started by torchrun or submitit.

Every process composes the same configuration and takes its part of each SGD batch and of the test
images; gradients are averaged by DistributedDataParallel, so weights stay equal. Buffers, such as
running statistics, are each process's own. Only the first writes files and speaks. With one process
nothing here does anything.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from training.process import waiting_in_c

if TYPE_CHECKING:  # torch is imported where it is used: --help asks for the rank, too
    from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for the slowest of the others
store: Any = None  # what the processes leave for each other


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """Among the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK") or rank())


def check_environment() -> None:
    """Raise `ValueError` for variables that no starter of processes sets."""
    hint = "; torchrun sets them all, and a single process needs none: env -u WORLD_SIZE -u RANK"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name) or "1"
        if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) < 1):
            least = 1 if name == "WORLD_SIZE" else 0
            raise ValueError(f"{name}={value}: expected a whole number from {least}{hint}")
    if rank() >= world_size():
        raise ValueError(f"RANK={rank()}: expected less than WORLD_SIZE={world_size()}{hint}")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world_size() > 1 and not os.environ.get(name):
            raise ValueError(f"WORLD_SIZE={world_size()}: needs {name} as well{hint}")


def init(devices: int) -> None:
    """Meet the others. Raises `ValueError` if all together are not `devices`."""
    global store
    if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    if devices != world_size():
        plural = "es" * (world_size() > 1)
        raise ValueError(
            f"devices={devices}: {world_size()} process{plural} started this run; "
            f"expected torchrun --nproc-per-node={devices}, or devices={world_size()}"
        )
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waits = (
        f"process {rank()} of {world_size()} waits for the others at {where}, for {TIMEOUT} at most"
    )
    telling = threading.Timer(5, print, [waits], {"file": sys.stderr, "flush": True})
    telling.daemon = True
    telling.start()
    try:
        with waiting_in_c():
            store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            named = dist.PrefixStore("run", store)
            dist.init_process_group(
                backend, store=named, rank=rank(), world_size=world_size(), timeout=TIMEOUT
            )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"WORLD_SIZE={world_size()}: the processes did not meet at {where} ({reason})"
        ) from error
    finally:
        telling.cancel()


def reports_errors() -> bool:
    """Whether this process is to tell of an error: of several that meet it, the quickest does. The
    others give it a moment, since torchrun ends all when one of them ends."""
    try:
        quickest = store.add("told", 1) == 1 if store is not None else rank() == 0
    except RuntimeError:  # the store went with the first process
        quickest = True
    if not quickest:
        time.sleep(2)
    return quickest


def is_lost_peer(error: BaseException) -> bool:
    """Whether it says that another process is gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    names = [kind.__name__ for kind in type(error).__mro__]
    return "DistError" in names or "gloo" in str(error) or "NCCL" in str(error)


def rank_zero_only(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, in the first process alone."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        if rank() == 0:
            function(*args, **kwargs)

    return call


def broadcast_result(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, called by the first process, whose return value or exception all get."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if world_size() == 1:
            return function(*args, **kwargs)
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if rank() == 0:
            try:
                outcome[0] = function(*args, **kwargs)
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    return call


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the first; an empty list in the others."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def broadcast_model(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if world_size() > 1:
        import torch.distributed as dist

        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def data_parallel(network: Any, has_unused: bool) -> Any:
    """The network with gradients that are averaged over all processes, None for a parameter that
    none of them used; `has_unused`: whether there are such. Buffers stay each process's own."""
    from torch.nn.parallel import DistributedDataParallel

    # Of one input channel, with which both memory formats are the same; of a key whose successor
    # torch 2.11 does not have.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return DistributedDataParallel(
        network,
        broadcast_buffers=False,
        init_sync=False,
        find_unused_parameters=has_unused,
        gradient_as_bucket_view=True,
    )


def share_buffers(model: nn.Module, rule: str) -> None:
    """Give every process the buffers of the first (`first`), or running statistics averaged over
    all (`mean`)."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    for name, value in model.named_buffers():
        if rule == "first":
            dist.broadcast(value, 0)
        elif name.rpartition(".")[2].startswith(("running_", "moving_")):
            all_reduce(value).div_(world_size())


@contextmanager
def evaluation_buffers(model: nn.Module, rule: str) -> Iterator[None]:
    """The model as it is to be evaluated, in every process: meanwhile with the buffers of the first
    (`first`), or from now on with running statistics averaged over all (`mean`)."""
    own = [value.clone() for value in model.buffers()] if rule == "first" else []
    share_buffers(model, rule)
    yield
    for value, before in zip(model.buffers(), own, strict=False):
        value.copy_(before)


def destroy() -> None:
    """At the end of a process; NCCL complains otherwise."""
    if store is not None:
        import torch.distributed as dist

        with suppress(Exception):
            dist.destroy_process_group()
