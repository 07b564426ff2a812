"""When a run writes a checkpoint between the ends of its epochs."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from training import distributed
from training.process import STOP, StoppedError, stop

T = TypeVar("T")
SIGNALS = (*STOP, signal.SIGUSR1, signal.SIGUSR2)


class Checkpoints:
    """Due every so many updates, every so many minutes (0: never), and within the `with` when a
    signal comes by which a terminal or a scheduler announces that a run must go.

    A handler that stood there before, such as submitit's, which puts the job into the queue again,
    is called when the checkpoint is written; what was ignored stays so, and SIGUSR2 is left alone
    unless it had a handler.
    """

    def __init__(self, every_updates: int, every_minutes: float, save: Callable[[], None]):
        self.every_updates, self.every_minutes, self.save = every_updates, every_minutes, save
        self.last = time.monotonic()
        self.signal = self.agreed_signal = 0
        self.idle = False
        self.handlers_before: dict[int, Any] = {}

    def __enter__(self) -> "Checkpoints":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None) and (
                    number != signal.SIGUSR2 or callable(handler)
                ):
                    self.handlers_before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.signal and isinstance(error, StoppedError):
            self.save()
        for number, handler in self.handlers_before.items():
            # torchrun ends the others by SIGTERM, but first they say that one was lost
            unheard = number == signal.SIGTERM and error and distributed.is_lost_peer(error)
            signal.signal(number, signal.SIG_IGN if unheard else handler)
        if self.signal and error is None:  # it came behind the last checkpoint
            self.hand_over(self.signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Raises `StoppedError` if the run only waits for images and nobody else takes over."""
        self.signal = number
        known = (stop, signal.SIG_DFL, signal.default_int_handler)
        if self.idle and self.handlers_before[number] in known:
            self.idle = False
            raise StoppedError(number)

    def interruptible(self, items: Iterable[T]) -> Iterator[T]:
        """The `items`, without a signal having to wait for the next one. Several processes must
        agree first."""
        iterator = iter(items)
        while True:
            self.idle = distributed.world_size() == 1
            if self.signal:
                self.on_signal(self.signal, None)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.idle = False
            yield item

    def due(self, update: int, pause: bool) -> bool:
        """Whether one is due after `update`. Several processes agree on what only one of them may
        know, its clock and its signals, where there is a `pause` in which all wait anyway."""
        late = 0 < self.every_minutes * 60 < time.monotonic() - self.last
        if distributed.world_size() == 1:
            self.agreed_signal = self.signal
        elif pause:
            wanted = torch.tensor([self.signal, late])
            dist.all_reduce(wanted, dist.ReduceOp.MAX)
            self.agreed_signal, late = int(wanted[0]), bool(wanted[1])
        else:
            late = False
        planned = self.every_updates > 0 and update % self.every_updates == 0
        return planned or late or self.agreed_signal > 0

    def written(self) -> None:
        """Raises `StoppedError` if that was asked for and nobody else takes over."""
        self.last = time.monotonic()
        number = self.signal if distributed.world_size() == 1 else self.agreed_signal
        if number:
            self.signal = self.agreed_signal = 0
            self.hand_over(number)

    def hand_over(self, number: int) -> None:
        handler = self.handlers_before.get(number)
        if callable(handler):
            handler(number, None)
        else:
            raise StoppedError(number)
