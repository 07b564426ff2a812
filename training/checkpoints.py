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
        self.asked = self.agreed = 0
        self.waiting = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Checkpoints":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None) and (
                    number != signal.SIGUSR2 or callable(handler)
                ):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.asked and isinstance(error, StoppedError):
            self.save()
        for number, handler in self.before.items():
            # torchrun ends the others by SIGTERM, but first they say that one was lost
            unheard = number == signal.SIGTERM and error and distributed.lost(error)
            signal.signal(number, signal.SIG_IGN if unheard else handler)
        if self.asked and error is None:  # it came behind the last checkpoint
            self.pass_on(self.asked)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Raises `StoppedError` if the run only waits for images and nobody else takes over."""
        self.asked = number
        known = (stop, signal.SIG_DFL, signal.default_int_handler)
        if self.waiting and self.before[number] in known:
            self.waiting = False
            raise StoppedError(number)

    def interruptible(self, items: Iterable[T]) -> Iterator[T]:
        """The `items`, without a signal having to wait for the next one. Several processes must
        agree first."""
        iterator = iter(items)
        while True:
            self.waiting = distributed.size() == 1
            if self.asked:
                self.note(self.asked, None)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.waiting = False
            yield item

    def due(self, update: int, pause: bool) -> bool:
        """Whether one is due after `update`. Several processes agree on what only one of them may
        know, its clock and its signals, where there is a `pause` in which all wait anyway."""
        late = 0 < self.every_minutes * 60 < time.monotonic() - self.last
        if distributed.size() == 1:
            self.agreed = self.asked
        elif pause:
            wish = torch.tensor([self.asked, late])
            dist.all_reduce(wish, dist.ReduceOp.MAX)
            self.agreed, late = int(wish[0]), bool(wish[1])
        else:
            late = False
        planned = self.every_updates > 0 and update % self.every_updates == 0
        return planned or late or self.agreed > 0

    def written(self) -> None:
        """Raises `StoppedError` if that was asked for and nobody else takes over."""
        self.last = time.monotonic()
        number = self.asked if distributed.size() == 1 else self.agreed
        if number:
            self.asked = self.agreed = 0
            self.pass_on(number)

    def pass_on(self, number: int) -> None:
        handler = self.before.get(number)
        if callable(handler):
            handler(number, None)
        else:
            raise StoppedError(number)
