"""What a process and its surroundings owe each other: signals, output, where the project lies."""

import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STOP = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)  # Ctrl-C, a closed terminal, a scheduler


class StoppedError(KeyboardInterrupt):
    """By a signal, so nothing is wrong. Its notes say what the same command will do."""

    last = -1.0

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number
        StoppedError.last = time.monotonic()


def stop(number: int, frame: FrameType | None) -> None:
    """The handler of `STOP`. What comes within a second is the same wish once more: a terminal and
    a parent process often pass on the same one."""
    if time.monotonic() - StoppedError.last > 1:
        raise StoppedError(number)


def set_handlers(handler: signal.Handlers | None = None) -> None:
    """Let `STOP` raise `StoppedError`, or do what `handler` says; what is ignored, as by nohup,
    stays so."""
    for number in STOP:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop if handler is None else handler)


def run_script(main: Callable[[], object]) -> None:
    """Call the `main` of a script. Ctrl-C ends it in a line, as does an output that nobody takes;
    files are whole or not there, and written before anything is printed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # which was closed
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        os._exit(1)  # Python would try once more to print


@contextmanager
def waiting_in_c() -> Iterator[None]:
    """Signals end the process at once: Python's handlers would wait for the call to return."""
    before = {number: signal.getsignal(number) for number in STOP}
    set_handlers(signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output(io.FileIO):
    """A file descriptor that is never worth a run: what nobody takes any more is dropped."""

    lost = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if self.fileno() == 1 and not self.lost:
                with suppress(OSError):
                    os.write(2, f"standard output: {error.strerror}; going on without\n".encode())
            self.lost = True
            return len(data)


def open_output() -> None:
    """Let standard output and error take everything: a closed one, one whose reader is gone, a full
    disk, a terminal without the letter."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody's who has replaced it
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        with suppress(OSError):
            stream.flush() if stream else None
        encoding = stream.encoding if stream else "utf-8"
        lines = number == 2 or os.isatty(number)
        raw = io.BufferedWriter(Output(number, "w", closefd=False))
        new = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=lines)
        setattr(sys, name, new)


def find_project() -> None:
    """Let the processes that this one starts find the project from any folder, and Hydra its
    plug-ins beside a package that calls itself `hydra_plugins`."""
    path = os.environ.get("PYTHONPATH", "")
    if str(ROOT) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), path]))
    plugins = importlib.import_module("hydra_plugins")  # a namespace, of many packages
    if str(ROOT / "hydra_plugins") not in plugins.__path__:
        plugins.__path__.append(str(ROOT / "hydra_plugins"))
