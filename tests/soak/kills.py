"""Signals at random moments: the same command, given again, ends as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch

from tests.data.folders import noise
from tests.soak.harness import ROOT, Child, Outcome, Part, different, snapshot, until

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
UPDATE = re.compile(r"after update (\d+)")
SMALL = ["runtime.runs=runs", "runtime.threads=1", "runtime.log_every=5", "study=s"]
DIGITS = [*SMALL, "data.train_fraction=0.3", "batch=8", "recipe.epochs=3"]
PHOTOS = [*SMALL, "data=folder", "data.root=../photos", "data.size=16", "model=resnet8", "batch=4"]
SWEEP = ["train.py", "-m", *DIGITS, "norm=bn,mabn", "checkpoint.every_updates=20"]
SCENARIOS: dict[str, tuple[int, list[str]]] = {  # how often, and the command
    "training": (6, ["train.py", *DIGITS, "norm=mabn", "checkpoint.every_updates=40"]),
    "training, ghost": (4, ["train.py", *DIGITS, "norm=bcn", "protocol=ghost", "recipe.ema=0.9"]),
    "training, mixed": (3, ["train.py", *DIGITS, "norm=brn", "recipe.cutmix=1", "recipe.mixup=1"]),
    "training, probe": (3, ["train.py", *DIGITS, "norm=pws", "probe=gradient_shift"]),
    "training, memory": (4, ["train.py", *PHOTOS, "recipe=digits", "data.cache=cache"]),
    "training, disk": (4, ["train.py", *PHOTOS, "recipe=imagenet", "data.workers=0",
                           "recipe.epochs=10"]),
    "evaluation in training": (5, ["train.py", *DIGITS, "batch=64", "recipe.epochs=30",
                                   "runtime.eval_batch=20"]),
    "checkpointing": (6, ["train.py", *DIGITS, "norm=mabn", "checkpoint.every_updates=1",
                          "recipe.epochs=1"]),
    "sweep, basic": (6, SWEEP),
    "sweep, pool": (3, [*SWEEP, "hydra/launcher=pool", "hydra.launcher.workers=2",
                        "hydra.launcher.threads=1"]),
    "torchrun": (3, ["torchrun", "--standalone", "--nproc-per-node=2", f"{ROOT}/train.py",
                     *DIGITS, "checkpoint.every_updates=20"]),
    "evaluation": (4, ["scripts/evaluate.py", "runs/s/RUN", "--csv", "runs/classes.csv",
                       "--json", "runs/evaluation.json"]),
    "table": (4, ["scripts/table.py", "runs/s", "--baseline", "bn"]),
}  # fmt: skip


class Scenario:
    """A command, how long it takes, and what it leaves when nobody disturbs it."""

    def __init__(self, name: str, home: Path):
        self.name, self.words = name, SCENARIOS[name][1]
        self.several = self.words[0] == "torchrun" or "-m" in self.words
        self.study = home / "study" if self.words[0].startswith("scripts/") else None
        if self.study:  # it reads what others have left
            if not self.study.exists():
                self.study.mkdir()
                self.undisturbed(SWEEP, self.study)
            run = next(self.study.glob("runs/s/bn-*")).name
            self.words = [word.replace("RUN", run) for word in self.words]
        folder = home / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        self.prepare(folder)
        self.seconds = self.undisturbed(self.words, folder).seconds
        self.files = snapshot(folder)

    def prepare(self, folder: Path) -> None:
        if self.study:
            shutil.copytree(self.study / "runs", folder / "runs")

    def undisturbed(self, words: list[str], folder: Path) -> Outcome:
        done = Child(words, folder).wait()
        assert done.status == 0, done
        return done


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill(scenario: Scenario, folder: Path, rng: random.Random, part: Part) -> bool:
    """Send a signal at a random moment, most to the command itself and some to a process that it
    started; returns whether there was anything left to disturb."""
    child, number = Child(scenario.words, folder), rng.choice(SIGNALS)
    time.sleep(rng.random() * scenario.seconds)
    family = child.family()
    victim = family[0] if rng.random() < 0.7 else rng.choice(family)
    with suppress(ProcessLookupError):
        os.kill(victim, number)
    outcome = child.wait()
    if not until(lambda: all(gone(pid) for pid in family)):
        part.fault(f"{number.name}: processes are left", outcome)
    if outcome.status == 0:
        return False
    part.tried[f"{number.name} {scenario.name}"] += 1
    if scenario.words[0] == "torchrun":  # which has tracebacks and lines of its own
        if outcome.hung or f'File "{ROOT}/training' in outcome.err:
            part.fault(f"{number.name}: hung or a traceback", outcome)
        return True
    part.judge(outcome, killed=number, one_line=not scenario.several)
    last = [line for line in outcome.err.splitlines() if line.startswith("interrupted; ")]
    promised = UPDATE.search(last[-1]) if last else None
    files = list(folder.glob("runs/s/*/last.pt"))
    if promised and victim == child.pid:
        updates = [torch.load(f, weights_only=True)["progress"]["update"] for f in files]
        if int(promised[1]) not in updates:
            part.fault(f"promised update {promised[1]}, there are {updates}", outcome)
    if last and "starts again" in last[-1] and files and not scenario.several:
        part.fault("said to start again beside a checkpoint", outcome)
    return True


def run(part: Part, count: int, only: int | None) -> None:
    noise(part.home / "photos", train=60, test=20)
    known: dict[str, Scenario] = {}
    names, weights = list(SCENARIOS), [weight for weight, _ in SCENARIOS.values()]
    for rng, folder in part.tries(count, only):
        [name] = rng.choices(names, weights)
        scenario = known.get(name) or known.setdefault(name, Scenario(name, part.home))
        scenario.prepare(folder)
        for _ in range(rng.randint(1, 3)):
            if not kill(scenario, folder, rng, part):
                break
        done = Child(scenario.words, folder).wait()
        if done.status:
            part.fault("the same command does not go on", done)
        elif differ := different(scenario.files, snapshot(folder)):
            part.fault(f"not as undisturbed: {', '.join(differ)}", done)
        if part.tried.total() >= count:
            break
