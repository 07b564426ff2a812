"""When a run writes a checkpoint between the ends of its epochs."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from training import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StoppedError(KeyboardInterrupt):
    """By a signal. As after Ctrl-C nothing is wrong: the same command goes on."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number


class Checkpoints:
    """Due every so many updates, every so many minutes (0: never), and within the `with` when
    SIGTERM or SIGUSR1 comes, by which schedulers announce that a run must go.

    A handler that stood there before, such as submitit's, which puts the job into the queue again,
    is called when the checkpoint is written; SIGUSR2 is left alone unless it had one.
    """

    def __init__(self, every_updates: int, every_minutes: float):
        self.every_updates, self.every_minutes = every_updates, every_minutes
        self.last = time.monotonic()
        self.asked = self.agreed = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Checkpoints":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGUSR2 or callable(signal.getsignal(number)):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            # torchrun ends the others by SIGTERM, but first they say that one was lost
            unheard = number == signal.SIGTERM and error and distributed.lost(error)
            signal.signal(number, signal.SIG_IGN if unheard else handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

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
        number, self.asked, self.agreed = self.agreed, 0, 0
        handler = self.before.get(number)
        if callable(handler):
            handler(number, None)
        elif number:
            raise StoppedError(number)
