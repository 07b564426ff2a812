"""What a whole training costs at a small batch: `python train.py`, from its start to its end,
beside a plain script (benchmarks/plain.py) and Lightning (benchmarks/lightning_peer.py, left out if
it is not installed), which do the same work.

    python benchmarks/process.py [--batch 2] [--images 2000] [--epochs 2] [--rounds 5]

All train the same network, the same number of updates, with the same augmentation, on the same
folder of small PNGs (random pixels: nothing here depends on what is in them), on the same number of
threads, and evaluate all test images after every epoch. A round runs all, one after the other, in
an order that alternates; ratios are taken within a round. `start` is the time of a run of a single
update, with the reading of the data.

Time is counted twice, by the clock on the wall and as processor time of a process and all its
workers, to which other programs on the machine do not add. Memory is the peak of the largest
process.

Writes process.json and, into README.md, the table; what stands around it is written by hand.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from benchmarks.inference import environment, publish
from training.progress import say

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"plain": "plain.py", "lightning": "lightning_peer.py"}
KINDS = {"wall_s": "wall, s", "processor_s": "processor, s", "memory_mib": "memory, MiB"}


def folder(place: Path, images: int, size: int = 32) -> None:
    """train/<class>/<image>.png and test/<class>/<image>.png, a fifth as many, of ten classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", images), ("test", images // 5)):
        for i in range(count):
            file = place / part / f"class{i % 10}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)


def run(command: list[str], where: Path, threads: int) -> dict[str, float]:
    """What a command costs, from its start to its end. Raises `ValueError` if it fails."""
    environ = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    with open(where / "out.txt", "wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=where, env=environ, stdout=out, stderr=subprocess.STDOUT
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


def commands(
    args: argparse.Namespace, peers: list[str], place: Path, number: int
) -> dict[str, list[str]]:
    """The programs to be compared, in a round of that number."""
    keys = ("model", "batch", "epochs", "workers", "threads")
    theirs = [str(place), *(f"--{key}={getattr(args, key)}" for key in keys)]
    ours = [
        *("data=folder", f"data.root={place}", "norm=bn", f"model={args.model}"),
        *(f"batch={args.batch}", f"recipe.epochs={args.epochs}"),
        *(f"runtime.threads={args.threads}", "device=auto"),
    ]

    def train(name: str) -> list[str]:
        own = place / f"{name}{number}"  # with a cache of its own, so that every run reads the PNGs
        places = [f"runtime.runs={own}", f"data.cache={own / 'cache'}"]
        return [sys.executable, str(ROOT / "train.py"), *ours, *places]

    return {
        "train.py": train("whole"),
        "start": [*train("start"), "recipe.updates=1"],
    } | {name: [sys.executable, str(ROOT / "benchmarks" / PEERS[name]), *theirs] for name in peers}


def spread(values: list[float]) -> float:
    """Interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return high - low


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians and spreads of every kind."""
    values = {kind: [run[kind] for run in runs] for kind in KINDS}
    return {k: median(v) for k, v in values.items()} | {
        f"{k}_iqr": spread(v) for k, v in values.items()
    }


def markdown(result: dict[str, Any]) -> str:
    heads = " | ".join(KINDS.values())
    lines = [f"| | {heads} |", "|---" * (len(KINDS) + 1) + "|"]
    for name, row in result["rows"].items():
        cells = [f"{row[kind]:.1f} ({row[kind + '_iqr']:.1f})" for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for peer, ratio in result["ratios"].items():
        cells = [f"{ratio[kind]:.2f} ({ratio[kind + '_iqr']:.2f})" for kind in KINDS]
        lines.append(f"| train.py to {peer} | {' | '.join(cells)} |")
    told = ", ".join(f"{k} {v}" for k, v in (result["setting"] | result["environment"]).items())
    lines.append(f"\nMedians over the rounds (interquartile range), ratios in a round: {told}.")
    return f"    {result['command']}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet8")
    sizes = dict(batch=2, images=2000, epochs=2, rounds=5, workers=1, threads=1)
    for key, default in sizes.items():
        add(f"--{key}", type=int, default=default, help=f"default: {default}")
    add("--out", type=Path, default=Path("results/process"), help="default: results/process")
    args = parser.parse_args()
    if min(args.batch, args.images // 50, args.epochs, args.rounds, args.threads) < 1:
        parser.error("expected whole numbers from 1, and from 50 images")
    lightning = installed("lightning")
    if not lightning:
        say("lightning: not installed, left out; pip install -c constraints.txt '.[peers]'")
    peers = ["plain", "lightning"] if lightning else ["plain"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("train.py", *peers, "start")}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            folder(place, args.images)
            for number in range(args.rounds):
                programs = commands(args, peers, place, number)
                for name in sorted(programs, reverse=number % 2 == 1):
                    found[name].append(run(programs[name], place, args.threads))
                    print(f"round {number + 1}, {name}: {found[name][-1]['wall_s']:.1f} s")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    result = {
        "command": " ".join(["python benchmarks/process.py", *sys.argv[1:]]),
        "environment": environment(where) | {"lightning": lightning or "not installed"},
        "setting": {key: getattr(args, key) for key in ("model", *sizes)},
        "rows": {name: summary(runs) for name, runs in found.items()},
        "ratios": {
            peer: summary(
                [
                    {kind: ours[kind] / theirs[kind] for kind in KINDS}
                    for ours, theirs in zip(found["train.py"], found[peer], strict=True)
                ]
            )
            for peer in peers
        },
    }
    publish(args.out, "process", result, markdown(result))


if __name__ == "__main__":
    main()
