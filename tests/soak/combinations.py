"""Random keys with valid, edge and absurd values: a result or one line, and nothing else."""

import random
import signal
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.data.folders import noise
from tests.soak.harness import ROOT, Child, Outcome, Part

LONG, STOPPED = 12.0, 60.0  # seconds until a run is told to stop, and those that it then has
SMALL = ["runtime.runs=runs", "runtime.threads=1", "runtime.compile=false"]
SMALL += ["recipe.epochs=null", "recipe.updates=2", "data.train_fraction=0.1"]
DATA = [  # without a download
    ["data=digits"], ["data=digits"], ["data=synthetic", "model=resnet8", "data.train_images=64",
     "data.test_images=8", "data.train_fraction=1.0"],
    ["data=folder", "data.root=../photos", "model=resnet8", "data.train_fraction=1.0", "batch=4"],
    ["data=folder", "data.root=../photos", "model=resnet8", "data.train_fraction=1.0", "batch=4",
     "recipe=imagenet", "data.size=16", "data.workers=0"],
    ["data=imagenet", "data.root=../photos", "model=resnet8", "data.train_fraction=1.0", "batch=4",
     "data.verify_counts=false", "data.size=16", "data.resize=20", "data.workers=0"],
    ["data=cifar10"],
]  # fmt: skip
GROUPS = ("model", "protocol", "protocol", "recipe", "data", "probe",
          "experiment", "debug", "hydra/launcher")  # fmt: skip
NUMBERS = ["0", "1", "2", "3", "4", "8", "16", "64", "0.5", "0.1", "1.0", "1e-3"]
TEXTS = ["auto", "true", "false", "null", "none", "first", "mean", "skip", "raise", "cosine",
         "adamw", "bfloat16", "float16", "bar", "post", "pws", "fan_out", "cpu", "random_resized",
         "layers_", "[0.5]", "[0.1,0.2]", "batch", "running", "imagenet", "tensorflow"]  # fmt: skip
EDGES = ["-1", "-0.0", "2147483648", "9007199254740991", "9007199254740992", "1e-300", "1e300",
         "0.9999999999", "1.0000001", "1025", "1e-45", "4294967296", "-1e-9", "1e9"]  # fmt: skip
ABSURD = ["nan", "inf", "-inf", "1e999", "", "''", '" "', "'2'", "[]", "{}", "[1,2]", "[[1]]",
          "{a: 1}", "{a: {b: c}}", "[null]", "ü", "a/b", "..", "/dev/null", "/proc/none", "~",
          "${batch}", "${nope}", "${times:2}", "${times:a,b}", "${oc.env:HOME}", "${oc.env:NOPE}",
          "${.}", "???", "0x10", "1_000", "0b1", "1e3", "²", "a b", "a=b", "a,", "[", "'", '"',
          "\\", "'a\nb'", "'\x1b[31m'", "x" * 300, "1" * 400, "glob(*)", "range(3)", "choice(1)",
          "int(2)", "str(1)", "shuffle(1,2)", "@a", "!!python/none", "%s", "{0}", "[bold]", "-m",
          "*", "?", "\U0001f600", "\u202e", "tag(a,1)", "interval(0,1)", "sort(1)"]  # fmt: skip
HYDRA = ["hydra.run.dir", "hydra.sweep.subdir", "hydra.job.name", "hydra.verbose",
         "hydra.job.chdir", "hydra.output_subdir", "hydra.sweeper.max_batch_size", "hydra.mode",
         "hydra.launcher.workers", "hydra.searchpath", "hydra.help.template", "hydra.sweeper",
         "hydra.job.env_set", "hydra.callbacks", "hydra/job_logging", "hydra/output"]  # fmt: skip
FLAGS = ["-m", "--cfg=job", "--help", "--info", "--resolve", "--package=model", "--hydra-help",
         "--config-dir=.", "--config-name=x", "--cfg=hydra", "--shell-completion=install=bash",
         "--version", "-c", "--run", "-x", "--"]  # fmt: skip


def keys() -> dict[str, dict[str, Any]]:
    """What can be overridden and its default, for each scheme."""
    from training.config import flatten

    found: dict[str, dict[str, Any]] = {}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        more = flatten(compose("config", ["data=imagenet", "debug=overfit", "protocol=ghost"]))
        for norm in options("norm"):
            found[norm] = more | flatten(compose("config", [f"norm={norm}"]))
    GlobalHydra.instance().clear()
    return found


def options(group: str) -> list[str]:
    files = sorted((ROOT / "configs" / group).glob("*.yaml"))
    more = {"hydra/launcher": ["basic", "joblib"], "experiment": ["null"], "debug": ["null"]}
    return [file.stem for file in files] + more.get(group, [])


def value(rng: random.Random, default: Any = None) -> str:
    """More often than not of the default's type."""
    own = TEXTS if default is None or isinstance(default, str) else NUMBERS
    own = ["true", "false"] if isinstance(default, bool) else own
    return rng.choice(rng.choices([own, NUMBERS, TEXTS, EDGES, ABSURD], [8, 1, 1, 2, 2])[0])


def words(rng: random.Random, known: dict[str, dict[str, Any]]) -> list[str]:
    """A command: something small that would run, and a few overrides of it."""
    norm = rng.choice(list(known))
    chosen = [*SMALL, *rng.choice(DATA), f"norm={norm}"]
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.2:
            group = rng.choice(GROUPS)
            name = rng.choice(options(group)) if rng.random() < 0.9 else value(rng)
            chosen.append(f"{group}={name}")
        elif kind < 0.93:
            key, default = rng.choice(list(known[norm].items()))
            sign = rng.choices(["", "+", "++", "~"], [40, 1, 1, 1])[0]
            given = ",".join(value(rng, default) for _ in range(rng.choices([1, 2], [9, 1])[0]))
            chosen.append(f"{sign}{key}={given}" if sign != "~" or kind > 0.5 else f"~{key}")
        elif kind < 0.97:
            chosen.append(f"{rng.choice(HYDRA)}={value(rng)}")
        else:
            chosen.insert(rng.randrange(len(chosen)), rng.choice(FLAGS))
    sweep = any("," in word and "[" not in word for word in chosen)
    return ["-m", *chosen] if sweep or rng.random() < 0.1 else chosen


def attempt(command: list[str], folder: Path) -> Outcome:
    """The command; one that goes on and on, as was asked for, is told to stop."""
    child = Child(["train.py", *command], folder)
    return child.wait(LONG, then=signal.SIGTERM, more=STOPPED)


def run(part: Part, count: int, only: int | None) -> None:
    noise(part.home / "photos", train=10, test=4)
    known = keys()
    for rng, folder in part.tries(count, only):
        command = words(rng, known)
        outcome = attempt(command, folder)
        kind = {0: "results", 1: "refused", 2: "not composed"}.get(outcome.status, "stopped")
        part.tried[kind] += 1
        sweep = "-m" in command
        part.judge(outcome, one_line=not sweep, killed=signal.SIGTERM)
        spilled = [f.name for f in folder.parent.iterdir() if not f.name.startswith(("comb", "ph"))]
        if spilled:
            part.fault(f"files in another folder: {spilled}", outcome)
