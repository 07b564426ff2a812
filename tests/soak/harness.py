"""What the parts of the soak share: a command in a forked child, what is wrong with how it ended,
and what it left behind, times aside."""

import csv
import ctypes
import importlib
import io
import json
import logging
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 150.0  # seconds after which a command hangs
MEMORY = 6 * 2**30  # bytes that a child may allocate
IMPORTED = ("train", "scripts.evaluate", "scripts.study", "scripts.table", "reporting.figures",
            "training.loop", "training.tensorboard", "models.resnet", "data.stream", "timm",
            "torchvision.io", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
            "matplotlib.pyplot", "pandas.io.formats.style", "jinja2", "tabulate", "PIL.ImageOps",
            "PIL.WebPImagePlugin", "PIL.TiffImagePlugin")  # fmt: skip
TIMES = {"images_per_second", "seconds", "wall_seconds", "train_seconds", "epoch_seconds"}
TIMES |= {"compiled_reason", "reason", "run/images_per_second"}
UNCOMPARED = {"log.txt", "progress.json", ".lock", ".commands.lock", ".table.lock"}
UNCOMPARED |= {"multirun.yaml", "nowhere"}  # Hydra's own, and where a link of that name leads it


def warm() -> None:
    """Import what the children need, so that none of them has to."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    for name in IMPORTED:
        importlib.import_module(name)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # what it skips is what is tried
    torch.set_num_threads(1)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose("config")
    GlobalHydra.instance().clear()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)


# --- one command


@dataclass
class Outcome:
    """How a command ended."""

    words: list[str]
    status: int
    """Of the exit; negative: the signal that ended it."""
    out: str
    err: str
    seconds: float
    hung: bool

    def wrong(self, one_line: bool = True, killed: int = 0) -> list[str]:
        """What no command may do. `one_line`: an error is a single line; `killed`: by this signal,
        so that both it and the status of a program that heeds it are right."""
        found = [f"hung for {self.seconds:.0f} s"] if self.hung else []
        if "Traceback (most recent" in self.err + self.out:
            found.append("a traceback")
        right = {0, 1, 2} | ({-killed, 128 + killed} if killed else set())
        if self.status not in right and not self.hung:
            found.append(f"status {self.status}")
        lines = [line for line in self.err.splitlines() if line.strip()]
        if self.status in (1, 2) and one_line and len(lines) != 1:
            found.append(f"{len(lines)} lines of error")
        if self.status in (1, 2) and not any(line.startswith("error: ") for line in lines):
            found.append("no line that says why")
        if self.status == 0 and one_line and lines:
            found.append("something on stderr")
        return found

    def __str__(self) -> str:
        command = " ".join(self.words)
        told = "\n".join((self.out[-600:] + self.err[-2500:]).strip().splitlines()[-25:])
        return f"$ {command}\n-> {self.status} after {self.seconds:.1f} s\n{told}"


class Child:
    """`python SCRIPT WORDS…` in a fork of this process, in `folder`, with a session of its own.
    SCRIPT is a file of the project, or `torchrun` for the module behind it."""

    def __init__(self, words: list[str], folder: Path):
        self.words, self.start = words, time.monotonic()
        self.files = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                self.prepare(folder)
                code = self.run()
            finally:
                with suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def prepare(self, folder: Path) -> None:
        os.setsid()
        # Until the script says otherwise: what the interpreter does before it is not ours.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(folder)
        for number, file in enumerate(self.files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):  # as Python opens them
            raw = io.FileIO(number, "w", closefd=False)
            stream = io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=number == 2)
            name = ("stdout", "stderr")[number - 1]
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.environ |= {"HOME": str(folder), "SMALLBATCH_CACHE": str(folder / "cache")}
        os.environ["https_proxy"] = os.environ["http_proxy"] = "http://127.0.0.1:9"  # no download
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        obey_permissions()

    def run(self) -> int:
        script, *arguments = self.words
        sys.argv = [script, *arguments]
        try:
            if script == "torchrun":
                runpy.run_module("torch.distributed.run", run_name="__main__")
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            return 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1

    def family(self) -> list[int]:
        """This process and those that it started, of all generations."""
        found = [self.pid]
        for pid in found:
            for file in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    found += map(int, file.read_text().split())
                except OSError:
                    continue
        return found

    def wait(self, patience: float = PATIENCE, then: int = 0, more: float = 0.0) -> Outcome:
        """`then`: a signal that it gets when the patience is over, and `more` patience."""
        hung, deadline = False, time.monotonic() + patience
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline and then:
                os.kill(self.pid, then)
                then, deadline = 0, time.monotonic() + more
            elif time.monotonic() > deadline:
                hung = True
                for pid in reversed(self.family()):
                    os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        status = os.waitstatus_to_exitcode(ended[1])
        out, err = (file.read_text(errors="replace") for file in self.files)
        return Outcome(self.words, status, out, err, time.monotonic() - self.start, hung)


def obey_permissions() -> None:
    """Let root, too, be refused what the permissions of a file forbid (CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH, the second and third bit of the kernel's capabilities)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    if libc.capget(header, data) == 0:
        data[0] &= ~0b110
        libc.capset(header, data)


# --- what a command left


def plain(value: Any) -> Any:
    """Tensors as bytes, and without what measures time."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    return repr(value)  # so that NaN is NaN


def points(folder: Path) -> Any:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if any(not os.access(file, os.R_OK) or file.is_dir() for file in folder.glob("events.*")):
        return "no files"
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("images_per_second")]
    return {tag: [(e.step, repr(e.value)) for e in events.Scalars(tag)] for tag in tags}


def content(file: Path, home: Path) -> Any:
    """Of a file, times aside; a damaged one is its bytes."""
    try:
        if file.suffix == ".pt":
            return plain(torch.load(file, weights_only=True))
        if file.suffix == ".json":
            return plain(json.loads(file.read_text()))
        if file.name == "metrics.csv":
            return [plain(row) for row in csv.DictReader(file.open(newline=""))]
        if file.suffix in (".yaml", ".txt"):
            return file.read_text().replace(str(home), "HOME")
        if file.suffix == ".svg":  # matplotlib's names of parts are random
            return len(file.read_bytes()) > 0
        return file.read_bytes()
    except Exception:
        return file.read_bytes() if file.is_file() and os.access(file, os.R_OK) else "no file"


def snapshot(home: Path, runs: str = "runs") -> dict[str, Any]:
    """Every file below `home/runs`, by its name, in a form that can be compared."""
    found: dict[str, Any] = {}
    for file in sorted((home / runs).rglob("*")):
        name = str(file.relative_to(home))
        if file.name in UNCOMPARED or file.is_dir():
            continue
        if ".tfevents." in file.name:
            found[str(Path(name).parent / "events")] = points(file.parent)
        else:
            found[name] = content(file, home)
    # The checkpoint before the last is where the interruption was.
    return {k: v for k, v in found.items() if not k.endswith("previous.pt")}


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(k for k in one.keys() | other.keys() if one.get(k, "") != other.get(k, ""))


# --- a part


@dataclass
class Part:
    """What was tried and what was wrong. Every try has random numbers of its own, so that
    `--part NAME --only NUMBER` repeats it."""

    name: str
    seed: int
    home: Path
    minutes: float = float("inf")
    tried: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def tries(self, count: int, only: int | None = None) -> Iterator[tuple[random.Random, Path]]:
        """Random numbers and an empty folder, `count` times or until the time is over."""
        begin = time.monotonic()
        for self.number in range(count) if only is None else [only]:
            if time.monotonic() - begin > 60 * self.minutes:
                break
            folder = self.home / f"{self.name}-{self.number}"
            folder.mkdir()
            before = len(self.faults)
            yield random.Random(f"{self.seed} {self.name} {self.number}"), folder
            if len(self.faults) == before and only is None:
                remove(folder)
            if self.number % 50 == 49:
                minutes = (time.monotonic() - begin) / 60
                print(f"{self.name}: {self.number + 1}, {minutes:.1f} min", flush=True)

    def fault(self, what: str, outcome: object = "") -> None:
        self.faults.append(what)
        print(f"FAULT {self.name} {self.number} (seed {self.seed}): {what}\n{outcome}", flush=True)

    def judge(self, outcome: Outcome, **keys: Any) -> bool:
        if found := outcome.wrong(**keys):
            self.fault(", ".join(found), outcome)
        return not found


def remove(folder: Path) -> None:
    """Whatever its permissions."""

    def allow(function: Callable[..., Any], path: str, error: Any) -> None:
        Path(path).parent.chmod(0o700)
        if not Path(path).is_symlink() and Path(path).is_dir():
            Path(path).chmod(0o700)
        function(path)

    for name in (folder, *folder.parent.glob(f"{folder.name}.*")):
        if name.is_dir() and not name.is_symlink():
            shutil.rmtree(name, onerror=allow)
        else:
            name.unlink()


def until(condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
