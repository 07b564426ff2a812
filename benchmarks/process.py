"""What a whole training costs at a small batch: `python train.py`, from its start to its end,
beside a plain script (benchmarks/plain.py) and Lightning (benchmarks/lightning_peer.py, left out if
it is not installed), which do the same work.

    python -m benchmarks.process [--batch 2] [--images 2000] [--epochs 2] [--rounds 5]

All train the same network, the same number of updates, with the same augmentation, on the same
folder of small PNGs (random pixels: nothing here depends on what is in them), on the same number of
threads, and evaluate all test images after every epoch. `start` is the time of a run of a single
update, with the reading of the data.

Time is counted twice, by the clock on the wall and as processor time of a process and all its
workers, to which other programs on the machine do not add. Memory is the peak of the largest
process.
"""

import argparse
import importlib.metadata
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.harness import ROOT

PEERS = {"plain": "benchmarks.plain", "lightning": "benchmarks.lightning_peer"}
KINDS = {"wall_s": "wall, s", "processor_s": "processor, s", "memory_mib": "memory, MiB"}


def folder(place: Path, images: int, size: int = 32) -> None:
    """train/<class>/<image>.png and test/<class>/<image>.png, a fifth as many, of ten classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", images), ("test", images // 5)):
        for i in range(count):
            file = place / part / f"class{i % 10}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)


def run_program(command: list[str], where: Path, threads: int) -> dict[str, float]:
    """What a command costs, from its start to its end. Raises `ValueError` if it fails."""
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    with open(where / "out.txt", "wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=where, env=os.environ | own, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise ValueError(f"{' '.join(command)}: {(where / 'out.txt').read_text()[-500:]}")
    processor = used.ru_utime + used.ru_stime
    return {"wall_s": wall, "processor_s": processor, "memory_mib": used.ru_maxrss / 1024}


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def programs(
    args: argparse.Namespace, peers: list[str], place: Path
) -> dict[str, Callable[[], dict[str, float]]]:
    """What runs each once, in folders of its own, with a cache of its own: every run reads the
    PNGs."""
    keys = ("model", "batch", "epochs", "workers", "threads")
    theirs = [str(place), *(f"--{key}={getattr(args, key)}" for key in keys)]
    ours = [
        *("data=folder", f"data.root={place}", "norm=bn", f"model={args.model}"),
        *(f"batch={args.batch}", f"runtime.threads={args.threads}", "device=auto"),
    ]
    number = itertools.count()

    def train(length: str) -> dict[str, float]:
        own = place / f"whole{next(number)}"
        places = [f"runtime.runs={own}", f"data.cache={own / 'cache'}"]
        return start(str(ROOT / "train.py"), *ours, *places, length)

    def start(*command: str) -> dict[str, float]:
        return run_program([sys.executable, *command], place, args.threads)

    each = {name: partial(start, "-m", PEERS[name], *theirs) for name in peers}
    whole, first = (partial(train, f"recipe.{x}") for x in (f"epochs={args.epochs}", "updates=1"))
    return {"train.py": whole, "start": first, **each}


def run(args: argparse.Namespace) -> None:
    if args.images < 50:
        raise ValueError(f"--images {args.images}: expected at least 50")
    lightning = installed("lightning")
    if not lightning:
        harness.say("lightning: not installed, left out; pip install -c constraints.txt '.[peers]'")
    peers = ["plain", "lightning"] if lightning else ["plain"]
    with tempfile.TemporaryDirectory() as temporary:
        folder(Path(temporary), args.images)
        timers = programs(args, peers, Path(temporary))
        found = harness.interleave(timers, args.rounds, warm_up=0)
    taken = {
        name: {kind: [r[kind] for r in runs] for kind in KINDS} for name, runs in found.items()
    }
    rows: dict[str, dict[str, float]] = {name: {} for name in taken}
    rows |= {f"train.py to {peer}": {} for peer in peers}
    for kind in KINDS:
        for name, values in taken.items():
            rows[name] |= harness.spread(values[kind], kind)
        for peer in peers:
            compared = harness.ratio(taken["train.py"][kind], taken[peer][kind], kind)
            rows[f"train.py to {peer}"] |= compared
    torch.set_num_threads(args.threads)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "environment": harness.machine(where) | {"lightning": lightning or "not installed"},
        "setting": {key: getattr(args, key) for key in ("model", *args.numbers)},
        "rows": rows,
    }
    lines = [
        [name, *(harness.within(row, kind, 1 + ("to " in name)) for kind in KINDS)]
        for name, row in rows.items()
    ]
    harness.publish(args, result, [harness.table(["", *KINDS.values()], lines)])


def main() -> None:
    sizes = dict(batch=2, images=2000, epochs=2, rounds=5, threads=1)
    parser = harness.parser(__doc__, "process", **sizes)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--workers", type=int, default=1, help="of the peers; default: 1")
    harness.main(parser, run)


if __name__ == "__main__":
    main()
