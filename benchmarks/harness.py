"""What all benchmarks share: interleaved rounds, processes to measure in, what is said of times,
the machine, the file and the page.

A round times every case once, in shuffled order, so that a busy machine slows all of them; ratios
are taken within a round.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from training.files import write

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- measured -->\n", "<!-- /measured -->\n")  # around the tables in README.md
Key = TypeVar("Key", bound=Hashable)
Words = TypeVar("Words", bound=tuple[str, ...])
say = partial(print, flush=True)


def interleave(
    timers: Mapping[Key, Callable[[], Any]], rounds: int, warm_up: int = 1, quiet: bool = False
) -> dict[Key, list[Any]]:
    """What every timer says in every round."""
    found: dict[Key, list[Any]] = {key: [] for key in timers}
    order, shuffle = list(timers), random.Random(0).shuffle
    for number in range(-warm_up, rounds):
        shuffle(order)
        for key in order:
            value = timers[key]()
            if number >= 0:
                found[key].append(value)
        if not quiet:
            say(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up")
    return found


def spread(values: Any, name: str, extremes: bool = False) -> dict[str, float]:
    """The median as `name`; the interquartile range, or with `extremes` least and most."""
    v = np.asarray(values, float)
    if extremes:
        said = {"": np.median(v), "_min": v.min(), "_max": v.max()}
    else:
        said = {"": np.median(v), "_iqr": np.subtract(*np.percentile(v, [75, 25]))}
    return {name + end: float(f"{value:.4g}") for end, value in said.items()}


def ratio(values: Any, base: Any, name: str = "ratio") -> dict[str, float]:
    """Median, least and most of the ratios within rounds."""
    return spread(np.asarray(values, float) / np.asarray(base, float), name, extremes=True)


class Worker:
    """A process of benchmarks/worker.py on the code of `folder`; used in a `with`."""

    def __init__(self, folder: Path = ROOT, threads: int = 1, **environ: str):
        environ = {"OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": "1"} | environ
        # glibc keeps what a step frees, as train.py tells it to
        environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
        program = [sys.executable, str(ROOT / "benchmarks" / "worker.py")]
        self.process = subprocess.Popen(
            [*program, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | environ,
        )
        self.requests: Any = self.process.stdin
        self.answers: Any = self.process.stdout

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.requests.close()
        self.answers.close()
        self.process.wait()

    def ask(self, **request: Any) -> Any:
        """Raises `ValueError` where the answer is an error, or there is none."""
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        line = self.answers.readline()
        reply = json.loads(line) if line else {"error": "the process ended; it says why above"}
        if isinstance(reply, dict):
            raise ValueError(f"{next(iter(request.values()))}: {reply['error']}")
        return reply

    def make(self, key: str, **case: Any) -> float:
        return self.ask(make=key, case=case)

    def timer(self, key: str, span: float) -> Callable[[], float]:
        return lambda: self.ask(time=key, span=span)


def measure(
    cases: Mapping[tuple[str, Path], Mapping[Words, dict[str, Any]]],
    rounds: int,
    threads: int,
    span: float = 0.0,
    kept: bool = False,
) -> tuple[dict[Words, list[float]], dict[Words, int]]:
    """Milliseconds of every case in every round, and the bytes it keeps where `kept`. Cases under
    one key are measured in one process, on the code of the folder in it."""
    timers: dict[Words, Callable[[], float]] = {}
    held: dict[Words, int] = {}
    with ExitStack() as stack:
        for (_, folder), own in cases.items():
            worker = stack.enter_context(Worker(folder, threads))
            for key, case in own.items():
                name = ", ".join(key)
                say(f"{name}: {worker.make(name, **case):.1f} s for the first call")
                timers[key] = worker.timer(name, span)
                held |= {key: worker.ask(kept=name)} if kept else {}
        return interleave(timers, rounds), held


def compile_seconds(threads: int = 1, **case: Any) -> dict[str, float]:
    """Seconds of the first call in a new process: with an empty cache of compiled code, and with
    what the first process has left there."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold_s", "warm_s"):
            with Worker(threads=threads, TORCHINDUCTOR_CACHE_DIR=cache) as worker:
                found[name] = round(worker.make("it", **case), 2)
    return found


def machine(where: torch.device) -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpus)
    cpu = {"cpu": model[1] if model else platform.machine(), "threads": torch.get_num_threads()}
    gpu = {"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}
    return gpu | cpu | {"python": platform.python_version(), "torch": torch.__version__}


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown, numbers with two decimals; a row's first cell names it."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def within(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """`median (iqr)`, or `median (least – most)`."""
    middle, least = f"{row[name]:.{digits}f}", row.get(f"{name}_min")
    if least is None:
        return f"{middle} ({row[f'{name}_iqr']:.{digits}f})"
    return f"{middle} ({least:.{digits}f} – {row[f'{name}_max']:.{digits}f})"


def command(name: str) -> str:
    """As it was called, without this machine's folders."""
    words = [re.sub(r"(^|=)[^=]*/.*", r"\1FOLDER", word) for word in sys.argv[1:]]
    return " ".join([f"python -m benchmarks.{name}", *words])


def publish(args: argparse.Namespace, result: dict[str, Any], tables: list[str]) -> None:
    """Write NAME.json and, between its marks in README.md, the tables; what stands around them is
    written by hand and stays. `result` has `setting` and `environment`."""
    name = args.name
    result = {"command": command(name)} | result
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    facts = result["setting"] | result["environment"]
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
    note = "Medians over the rounds; in brackets the interquartile range or least and most"
    text = "\n\n".join([f"    {result['command']}", *tables, f"{note}; {told}."])
    page = args.out / "README.md"
    before, _, rest = (
        page.read_text() if page.exists() else f"# {name}\n\n" + "".join(MARKS)
    ).partition(MARKS[0])
    write(page, f"{before}{MARKS[0]}\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    say(f"{text}\n{page}: the words around the tables are as they were")


def parser(doc: str | None, name: str, **numbers: int) -> argparse.ArgumentParser:
    """With a whole number from 1 for each of `numbers`, which are the defaults."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(name=name, numbers=list(numbers), quick=False)
    for key, default in numbers.items():
        made.add_argument(f"--{key}", type=int, default=default, help=f"default: {default}")
    made.add_argument(
        "--out", type=Path, help=f"folder; default: results/{name}, quick: runs/{name}"
    )
    return made


def main(made: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Parse, check and run; a mistake is one line and exit status 1 or 2."""
    args = made.parse_args()
    low = [f"--{key}" for key in args.numbers if getattr(args, key) < 1]
    if low:
        made.error(f"{', '.join(low)}: expected whole numbers from 1")
    args.out = args.out or Path("runs" if args.quick else "results") / args.name
    try:
        run(args)
    except (ValueError, OSError) as error:
        made.exit(1, f"error: {error}\n")
