"""One part of scripts/gpu_session.sh: measured cell by cell, within a time limit, going on from
what is already there.

    python3 -m benchmarks.gpu PART --seconds 540 [--tiny]
    python3 -m benchmarks.gpu --show PART…          # the tables of what is there

A part is a module with `cells(session)`, names and what measures them, most interesting first; a
cell has what is printed of it as `told`, or the module says it in `table(result)`. PART.json is
written after every cell. A cell that fails is one line in it, and is tried again by the next call;
one that is stopped by the limit is not in it. `--tiny` rehearses on the CPU.
"""

import argparse
import importlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from training.files import write

PARTS = {  # and the modules that measure them
    **{name: name for name in ("right", "step", "together", "pipeline")},
    **{"layers": "bandwidth", **dict.fromkeys(("table", "direct", "resnet34"), "study")},
}
AGAIN = 75  # exit status: the device does not answer any more, a fresh process may go on
Measure = Callable[[], dict[str, Any]]


class TimeUp(BaseException):  # as KeyboardInterrupt: no `except Exception` holds it
    """The part is to end now."""


@dataclass
class Session:
    """What a part is told."""

    part: str
    out: Path
    until: float
    """By the wall clock, when it has to be over."""
    tiny: bool = False
    data: Path | None = None
    photos: Path | None = None
    runs: Path = Path("runs")
    at_once: int = 8
    lr: float | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    def left(self) -> float:
        """Seconds, some being kept to stop and to write."""
        return self.until - time.time() - 5


class Cells:
    """What a part has measured: PART.json."""

    def __init__(self, session: Session):
        self.session, self.file = session, session.out / f"{session.part}.json"
        self.started, self.armed = time.time(), False
        empty: dict[str, Any] = {"part": session.part, "sessions": [], "cells": {}}
        self.result: dict[str, Any] = (
            json.loads(self.file.read_text()) if self.file.exists() else empty
        )
        same = self.result["sessions"] and self.result["sessions"][-1]["until"] == session.until
        if not same:  # it is not this session that had to start again
            self.result["sessions"].append(
                {
                    "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                    "until": session.until,
                    "command": harness.command("gpu"),
                    "environment": versions(session.device),
                }
            )
        self.number = len(self.result["sessions"]) - 1
        self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write(self.file, json.dumps(self.result, indent=1) + "\n")

    def say(self, text: str) -> None:
        print(f"[{self.session.part} {time.time() - self.started:4.0f} s] {text}", flush=True)

    def open(self, key: str) -> bool:
        """Whether it is still to be measured, by this session."""
        known = self.result["cells"].get(key)
        return known is None or ("error" in known and known["session"] != self.number)

    def add(self, key: str, values: dict[str, Any]) -> None:
        self.result["cells"][key] = values | {"session": self.number}
        self.save()

    def run(self, measures: Mapping[str, Measure]) -> None:
        """Measure what is open, what failed before last, until the time is up."""
        todo = [key for key in measures if self.open(key)]
        todo.sort(key=lambda key: key in self.result["cells"])
        self.say(f"{len(measures) - len(todo)} of {len(measures)} cells are there already")
        signal.signal(signal.SIGALRM, self.alarm)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.session.left()), 1)
        for number, key in enumerate(todo, 1):
            before, start = self.result["cells"].get(key), time.time()
            self.add(key, {"error": "did not come back"})  # should it take this process with it
            try:
                self.armed = True
                if self.session.left() <= 0:
                    raise TimeUp
                values = measures[key]()
                self.armed = False
            except (TimeUp, Exception) as error:  # whatever it is, others are still to be measured
                self.armed = False
                if isinstance(error, TimeUp) or self.session.left() <= 0:
                    self.say(f"time is up before {key}; the same command goes on from here")
                    del self.result["cells"][key]
                    self.result["cells"] |= {key: before} if before else {}
                    self.save()
                    break
                values = {"error": one_line(error)}
            took = round(time.time() - start, 1)
            self.add(key, {**values, "seconds": took})
            said = f"error: {values['error']}" if "error" in values else f"{took} s"
            self.say(f"{number}/{len(todo)} {key}: {said}")
            if "error" in values and not answers(self.session.device):
                self.say("the device does not answer any more")
                os._exit(AGAIN)  # nothing in this process can be freed in order
        signal.setitimer(signal.ITIMER_REAL, 0)

    def alarm(self, *_: Any) -> None:
        if self.armed:
            raise TimeUp


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def answers(device: str) -> bool:
    """Whether a GPU still computes, after an error that may have been one of its own."""
    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.ones(8, device=device).sum().item()
    except Exception:
        return False
    return True


def versions(device: str) -> dict[str, Any]:
    found = harness.machine(torch.device(device)) | {"cores": len(os.sched_getaffinity(0))}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    there = {d.name: d.version for d in distributions()}
    return found | {n: there.get(n) for n in ("torchvision", "timm", "triton", "hydra-core")}


def folder(tiny: bool) -> Path:
    """Where results are, by default: those of a card beside the other results."""
    if tiny:
        return Path("runs/gpu/cpu")
    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; --tiny rehearses on the CPU")
    name = torch.cuda.get_device_name()
    return Path("results/gpu") / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def show(part: str, out: Path) -> None:
    file, module = out / f"{part}.json", importlib.import_module(f"benchmarks.{PARTS[part]}")
    print(f"\n{part}: {file if file.exists() else 'nothing yet'}")
    if not file.exists():
        return
    result = json.loads(file.read_text())
    lines = module.table(result) if hasattr(module, "table") else []
    for key, cell in result["cells"].items():
        lines += [f"{key}: {cell[name]}" for name in ("told", "error") if name in cell]
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", metavar="PART", help=", ".join(PARTS))
    add("--seconds", type=float, default=540, help="for the part; default: 540")
    add("--until", type=float, help="the same as a time of the clock, in seconds since 1970")
    add("--out", type=Path, help="folder; default: results/gpu/<card>, tiny: runs/gpu/cpu")
    add("--tiny", action="store_true", help="a rehearsal on the CPU, seconds long")
    add("--data", type=Path, help="CIFAR-10: data.root, or torchvision's folder of it")
    add("--photos", type=Path, help="a folder of JPEGs, for the pipeline")
    add("--runs", type=Path, default=Path("runs"), help="folder of the studies; default: runs")
    add("--at-once", type=int, default=8, help="trainings at once on the card; default: 8")
    add("--lr", type=float, help="recipe.lr of the studies; default: the recipe's")
    add("--show", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part}: unknown; expected {', '.join(PARTS)}")
    try:
        out = args.out or folder(args.tiny)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    if not args.show:
        if len(args.parts) > 1:
            parser.error("expected one PART; scripts/gpu_session.sh takes several")
        until = args.until or time.time() + args.seconds
        keys = ("tiny", "data", "photos", "runs", "at_once", "lr")
        session = Session(args.parts[0], out, until, **{key: getattr(args, key) for key in keys})
        module = importlib.import_module(f"benchmarks.{PARTS[session.part]}")
        if session.tiny:
            torch.set_num_threads(1)
        cells = Cells(session)
        try:
            module.run(cells) if hasattr(module, "run") else cells.run(module.cells(session))
        except (ValueError, OSError) as error:  # before the first cell: nothing to be measured
            parser.exit(1, f"error: {error}\n")
    for part in args.parts:
        show(part, out)


if __name__ == "__main__":
    importlib.import_module("benchmarks.gpu").main()  # the one whose TimeUp the parts know
