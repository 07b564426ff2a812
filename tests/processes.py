"""`python train.py` as processes of their own, forked from the tests' process, which has PyTorch
already: importing it anew would take most of the time. What only a new interpreter shows
(`python -P`, closed standard output, what is imported, launchers and torchrun) starts one."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import training.cli
from training.process import STOP

TRAIN = Path(__file__).parent.parent / "train.py"


class Forked:
    """As `subprocess.Popen` with text pipes; `environment`: variables beside the present ones."""

    def __init__(self, words: list[str], script: Path = TRAIN, **environment: str):
        self.files = [os.memfd_create(name) for name in ("out", "err")]
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with warnings.catch_warnings():  # Python 3.12 warns: pytest-xdist has threads, ours none
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os._exit(self.child(words, script, environment))
            finally:
                os._exit(99)

    def child(self, words: list[str], script: Path, environment: dict[str, str]) -> int:
        os.setpgid(0, 0)
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
        for number, file in enumerate(self.files, 1):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ |= environment
        report = training.cli.Report
        report.failures, report.reported, report.folders = 0, set(), []
        sys.argv = [str(script), *words]
        status = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return status

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 500) -> tuple[str, str]:
        """Standard output and error, once it has ended; raises as `Popen` when it does not."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired("train.py", timeout)
            time.sleep(0.005)
        said = []
        for number in self.files:
            with open(number) as file:
                file.seek(0)
                said.append(file.read())
        self.files = []
        return said[0], said[1]


def free_port() -> str:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fork_ranks(count: int, words: list[str], script: Path = TRAIN) -> list[Forked]:
    """The processes of one run, as torchrun starts them."""
    shared = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(count)]
    return [Forked(words, script, **shared, **rank) for rank in ranks]
