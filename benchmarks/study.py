"""Tables on a GPU, within minutes: parts `table`, `direct` and `resnet34` of gpu_session.sh.

table     experiment=cifar10_table seed by seed: CIFAR-10, ResNet-20, ghost, 30 epochs; schemes
          without batch statistics at batch 32 alone, where they compute what they do everywhere
direct    the same with a step for every batch of 2 images
resnet34  experiment=pws_cifar10: bn, gn and pws at batch 128, as many of 200 epochs as fit

Each is a few commands `train.py -m … hydra/launcher=pool`, `--at-once` runs at a time. When the
time is up they are interrupted as by Ctrl-C, and the next call goes on: exactly where they were if
the runs' folder is still there, else with the runs that PART-runs.tar.gz says are finished. The
learning rate is the recipe's, or `--lr`; it is not chosen for each scheme, which would take the
experiment's own four sweeps first. PART.json has every run's result and its accuracy by epoch.
"""

import csv
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import Cells, Measure, Session, TimeUp
from benchmarks.harness import ROOT

SUMMARY = 30.0  # seconds to stop runs and to draw a table
STOP = 15.0  # of them, for the launcher to end its runs
KEPT = (
    *("status", "top1", "best_top1", "norm", "batch_size", "sgd_batch_size", "seed", "epochs"),
    *("updates", "learning_rate", "images_per_second", "wall_seconds", "peak_memory_bytes"),
)
SWEEPS = {
    "table": [
        "experiment=cifar10_table norm=bn,bcn,mabn batch=2,4,8,16,32 seed=0",
        "experiment=cifar10_table norm=gn,ws_gn,pws batch=32 seed=0,1,2",
        "experiment=cifar10_table norm=bn,bcn,mabn batch=2,4,8,16,32 seed=1",
        "experiment=cifar10_table norm=bn,bcn,mabn batch=2,4,8,16,32 seed=2",
    ],
    "direct": [
        "experiment=cifar10_table study=cifar10_table_direct protocol=direct batch=2 seed=0 "
        "norm=bn,mabn,pws,bcn,gn,ws_gn"
    ],
    "resnet34": ["experiment=pws_cifar10 norm=bn,gn,pws batch=128 seed=0"],
}
TINY = [
    "data=digits model=resnet8 protocol=ghost protocol.sgd_batch=8 recipe.epochs=1 "
    "data.train_fraction=0.05 norm=bn,gn batch=4 seed=0 study=tiny hydra.launcher.workers=2"
]


def sweeps(session: Session) -> dict[str, list[str]]:
    """What is trained, and the overrides that say so."""
    own = ["hydra/launcher=pool", f"device={'cpu' if session.tiny else 'auto'}"]
    own += [f"hydra.launcher.runs_per_gpu={session.at_once}", f"runtime.runs={session.runs}"]
    own += ["runtime.progress=none", "checkpoint.every_minutes=1"]
    own += [f"recipe.lr={session.lr}"] if session.lr else []
    if session.data and not session.tiny:
        tree = (session.data / "train").is_dir()
        own.append(f"data.{'root' if tree else 'cache'}={session.data}")
    return {
        what: [*what.split(), *own] for what in (TINY if session.tiny else SWEEPS[session.part])
    }


def read(overrides: list[str]) -> dict[str, Any]:
    """The data once before many runs want it at once: images decoded from files are kept."""
    import data
    from training.study import composed, composing, jobs

    with composing():
        cfg, _ = composed(*jobs(overrides)[0])
        train, test = data.resolve(cfg.data, cfg.batch, cfg.recipe).read()
    return {"training_images": len(train), "test_images": len(test)}


def train(cells: Cells, what: str, overrides: list[str]) -> dict[str, Any]:
    """A sweep, from where it was. Raises `TimeUp` when it had to be stopped."""
    session, start = cells.session, time.time()
    spent = cells.result.setdefault("spent", {})  # seconds, of all sessions
    command = [sys.executable, "train.py", "-m", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        process.wait(max(0.1, session.left() - SUMMARY))
    except subprocess.TimeoutExpired:
        raise TimeUp from None
    finally:
        if process.poll() is None:  # also where something else went wrong
            process.send_signal(signal.SIGINT)  # the launcher ends its runs
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        spent[what] = round(spent.get(what, 0.0) + time.time() - start, 1)
    if process.returncode:
        raise RuntimeError(f"train.py: exit status {process.returncode}; it says why above")
    paths = ("data.root=", "data.cache=", "runtime.runs=")
    told = [override for override in overrides if not override.startswith(paths)]
    return {"command": " ".join(["python3 train.py -m", *told])}


def folder(session: Session) -> Path:
    """Of the study."""
    names = {"table": "cifar10_table", "direct": "cifar10_table_direct", "resnet34": "pws_cifar10"}
    return session.runs / ("tiny" if session.tiny else names[session.part])


def outcome(run: Path) -> dict[str, Any]:
    """How far a run is: of its result what matters here, and its accuracy by epoch."""
    file, metrics, error = run / "result.json", run / "metrics.csv", run / "error.txt"
    found = json.loads(file.read_text()) if file.exists() else {"status": "unfinished"}
    values = {key: found[key] for key in KEPT if key in found}
    if metrics.exists():
        rows = csv.DictReader(metrics.read_text().splitlines())
        values["test_top1"] = [round(float(r["test_top1"]), 2) for r in rows if r["test_top1"]]
    return values | ({"error": error.read_text().strip()} if error.exists() else {})


def pack(study: Path, archive: Path) -> None:
    """The finished runs without checkpoints and events, so that another machine can skip them."""
    temporary = archive.with_name(archive.name + ".tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        for file in sorted(study.glob("*/result.json")):
            for part in (".hydra", "result.json", "metrics.csv"):
                if (file.parent / part).exists():
                    tar.add(file.parent / part, f"{study.name}/{file.parent.name}/{part}")
    temporary.replace(archive)


def unpack(study: Path, archive: Path) -> None:
    """The same on a machine that has not seen them."""
    if archive.exists() and not study.exists():
        study.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(study.parent, filter="data")


def summarize(session: Session, cells: Cells) -> None:
    study, lr = folder(session), session.lr
    runs = {path.parent.name: outcome(path.parent) for path in sorted(study.glob("*/.hydra"))}
    told = f"recipe.lr={lr}" if lr else "the recipe's, not chosen"
    cells.result["setting"] = {"at_once": session.at_once, "learning_rate": told}
    cells.result["runs"] = runs
    cells.save()
    if any(run["status"] != "unfinished" for run in runs.values()):
        pack(study, session.out / f"{session.part}-runs.tar.gz")
        out = study.parent / f"{study.name}-table"
        command = [sys.executable, "scripts/table.py", str(study), "--out", str(out)]
        left = max(5.0, session.until - time.time() - 2)
        subprocess.run(command, cwd=ROOT, timeout=left, stdout=subprocess.DEVNULL, check=True)
        for made in ("table.md", "table.csv", "accuracy_vs_batch.png"):
            if (out / made).exists():
                shutil.copy(out / made, session.out / f"{session.part}{Path(made).suffix}")


def run(cells: Cells) -> None:
    session = cells.session
    session.runs, session.out = session.runs.absolute(), session.out.absolute()
    unpack(folder(session), session.out / f"{session.part}-runs.tar.gz")
    planned = sweeps(session)
    if not any(cells.open(what) for what in planned):
        cells.say(f"{len(planned)} of {len(planned)} cells are there already")
        return
    cells.result["cells"].pop("data", None)  # of another machine, perhaps
    measures: dict[str, Measure] = {"data": partial(read, next(iter(planned.values())))}
    cells.run(measures | {what: partial(train, cells, what, planned[what]) for what in planned})
    try:
        summarize(session, cells)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        cells.say(f"no table: {error}")


def table(result: dict[str, Any]) -> list[str]:
    """Every run: its accuracy, or how far it is."""
    runs, lines = result.get("runs", {}), []
    for name, run in runs.items():
        tops = run.get("test_top1", [])
        told = f", top-1 {tops[-1]:.2f}, best {max(tops):.2f}" if tops else ""
        lines.append(f"{name}: {run['status']}, {len(tops)} epochs{told}")
    finished = sum(run["status"] == "finished" for run in runs.values())
    return [*lines, f"{finished} runs finished in {sum(result.get('spent', {}).values()):.0f} s"]
