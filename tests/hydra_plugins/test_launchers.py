"""Launchers: the same runs, whoever starts them, and whatever happens to them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException, MissingConfigException
from hydra.utils import instantiate
from rich.console import Console

import hydra_plugins.pool_launcher
import training.progress
from hydra_plugins.launcher_defaults import options
from hydra_plugins.pool_launcher import PoolLauncher
from tests.processes import Forked
from training import cli
from training.study import cells, jobs, requested, state

ROOT = Path(__file__).parent.parent.parent
SMALL = ["recipe.epochs=2", "data.train_fraction=0.2", "runtime.threads=1", "study=s"]


def start(runs: Path, *args: str) -> Forked:
    return Forked(["-m", *SMALL, f"runtime.runs={runs}", *args])


def finish(process: Forked) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


def weights(runs: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for file in sorted(runs.glob("s/*/result.json")):
        state = torch.load(file.with_name("last.pt"), weights_only=True)
        found[file.parent.name] = state["model"]
    return found


def assert_same(one: Path, other: Path, count: int) -> None:
    """Bit for bit, also what their tables would be made of."""
    ours, theirs = weights(one), weights(other)
    assert len(ours) == count
    assert ours.keys() == theirs.keys()
    for run in ours:
        assert all(torch.equal(ours[run][key], theirs[run][key]) for key in ours[run]), run
        results = [json.loads((x / "s" / run / "result.json").read_text()) for x in (one, other)]
        for key in ("status", "top1", "top5", "best_top1", "test_loss", "updates"):
            assert results[0][key] == results[1][key]


def until(condition, process: Forked):
    """What `condition` gives, once it gives something."""
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def basic(tmp_path_factory) -> Path:
    """A study of two runs, undisturbed, one after another."""
    runs = tmp_path_factory.mktemp("basic")
    status, _, err = finish(start(runs, "norm=bn,mabn", "batch=4"))
    assert status == 0, err
    return runs


POOL = ["hydra/launcher=pool", "hydra.launcher.workers=2"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("workers", 0, "a whole number from 1"),
        ("gpus", 3, "a list, such as [0,2] or []"),
        ("gpus", "all", "a list, such as [0,2] or []"),
    ],
)
def test_what_pool_cannot_use_is_named(key, value, expected):
    with pytest.raises(InstantiationException) as refused:
        instantiate({"_target_": "hydra_plugins.pool_launcher.PoolLauncher", key: value})
    assert cli.explain(refused.value) == f"hydra.launcher.{key}={value}: expected {expected}"


def test_pool_survives_the_death_of_its_launcher_and_of_a_worker(basic, tmp_path):
    command = [*POOL, "norm=bn,mabn", "batch=4", "checkpoint.every_updates=10"]
    command.append("runtime.log_every=5")

    def stopped() -> list[int]:
        """A process that has something to go on from and something to do, and that waits."""
        for file in tmp_path.glob("s/*/last.pt"):
            try:
                pid = json.loads(file.with_name("progress.json").read_text())["pid"]
                os.kill(pid, signal.SIGSTOP)
            except (FileNotFoundError, ProcessLookupError):  # finished in the meantime
                continue
            if file.with_name("progress.json").exists():
                return [pid]
            os.kill(pid, signal.SIGCONT)
        return []

    launcher = start(tmp_path, *command)
    [orphan] = until(stopped, launcher)
    launcher.kill()
    launcher.communicate()
    os.kill(orphan, signal.SIGCONT)
    while "running" in (now := {state(x).name for x in (tmp_path / "s").glob("*-s0*")}):
        time.sleep(0.05)  # orphans end by themselves
    assert "interrupted" in now
    while Path(f"/proc/{orphan}").exists():
        time.sleep(0.05)

    launcher = start(tmp_path, *command)
    [victim] = until(stopped, launcher)
    os.kill(victim, signal.SIGKILL)
    status, out, err = finish(launcher)
    said = err.strip().splitlines()
    assert status == 1, err
    assert "killed by SIGKILL (out of memory?); it can go on from its last checkpoint" in said[0]
    assert "1 of these runs failed" in said[-1]
    assert sum(state(x).name == "failed" for x in (tmp_path / "s").glob("*-s0*")) == 1

    status, out, err = finish(start(tmp_path, *command))
    assert status == 0, err
    assert out.count("finished already, skipped") == 1
    assert_same(basic, tmp_path, 2)
    assert any("goes on after update" in x.read_text() for x in tmp_path.glob("s/*/log.txt"))
    assert len((tmp_path / "s" / "commands.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "batches"),
    [(signal.SIGINT, "4"), (signal.SIGHUP, "4"), (signal.SIGTERM, "999999,4")],
)
def test_pool_keeps_failures_apart_and_stops_at_a_signal(tmp_path, number, batches):
    command = [*POOL, "norm=gn", f"batch={batches}", "recipe.epochs=2000"]
    launcher = start(tmp_path, *command)
    *failing, going = (tmp_path / "s" / x.folder.name for x in cells(jobs([*SMALL, *command])))
    until(lambda: (going / "progress.json").exists(), launcher)
    until(lambda: all(state(folder).name == "failed" for folder in failing), launcher)
    pid = json.loads((going / "progress.json").read_text())["pid"]
    launcher.send_signal(number)
    status, out, err = finish(launcher)
    assert status == 128 + number
    assert ("larger than the data set" in err) == bool(failing)
    last = "interrupted; the same command goes on with these runs, as said of each"
    assert err.strip().splitlines()[-1] == last
    assert "Traceback" not in err
    assert not Path(f"/proc/{pid}").exists()
    assert state(going).name == "interrupted"
    done = torch.load(going / "last.pt", weights_only=True)["progress"]["update"]
    said = f"interrupted; the same command goes on from here, after update {done}"
    assert said == (going / "log.txt").read_text().splitlines()[-1]
    assert f"{going}: {said}" in out


def test_options_of_another_folder_reach_every_process(tmp_path):
    """And the board, from wherever it is looked at; a folder of the plug-ins' name hides none."""
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "norm" / "bn.yaml", tmp_path / "mine" / "norm" / "my bn.yaml")
    (tmp_path / "other" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "other" / "hydra_plugins" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "other")}
    for name, given in (
        ("pool", ["--config-dir", "mine", "hydra/launcher=pool"]),
        ("basic", ["hydra.searchpath=[file://mine]"]),
    ):
        command = [sys.executable, str(ROOT / "train.py"), *given, "norm=my bn,gn", "-m"]
        command += ["runtime.runs=runs", "runtime.threads=1", "recipe.updates=2", f"study={name}"]
        made = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        assert not made.stderr
        study = tmp_path / "runs" / name
        runs, problems = requested(study)
        assert not problems
        assert sorted(run.folder for run in runs) == sorted(
            result.parent for result in study.glob("*/result.json")
        )
        assert len(runs) == 2


FAKE = """
import os, pathlib, sys, time
place = pathlib.Path(sys.argv[1].split("=")[1]) / os.environ["CUDA_VISIBLE_DEVICES"]
place.mkdir(exist_ok=True)
mine = place / str(os.getpid())
mine.touch()
assert len(list(place.iterdir())) <= 2, "more than two at a time on a GPU"
time.sleep(0.1 * (int(sys.argv[2].split("=")[1]) % 3))
mine.unlink()
assert (sys.argv[-1], os.environ["OMP_NUM_THREADS"]) == ("device=cuda", "3")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_pool_queues_runs_for_gpus(tmp_path, monkeypatch, terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100, highlight=False)
    monkeypatch.setattr(training.progress, "console", console)
    monkeypatch.setattr(hydra_plugins.pool_launcher, "console", console)
    monkeypatch.setattr(cli.Report, "failures", 0)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", return_hydra_config=True)
        launcher = PoolLauncher(gpus=[5, 7], runs_per_gpu=2, threads=3)
        launcher.setup(hydra_context=None, task_function=test_every_launcher, config=config)
        assert launcher.places() == ["5", "7", "5", "7"]
        launcher.script = str(tmp_path / "fake.py")
        Path(launcher.script).write_text(FAKE)
        work = [[f"runtime.runs={tmp_path}", f"seed={seed}"] for seed in range(9)]
        returns = launcher.launch(work, 0)
    assert [r.status.name for r in returns] == ["COMPLETED"] * 9, screen.getvalue()
    assert sorted(x.name for x in tmp_path.iterdir() if x.name.isdigit()) == ["5", "7"]
    assert "9 runs, 4 at a time, CPU threads of each: 3; GPUs 5, 7" in screen.getvalue()
    assert ("9/9 runs" in screen.getvalue()) == terminal
    assert ("starting" in screen.getvalue()) == terminal


def test_pool_finds_its_places(monkeypatch):
    def places(device="auto", **options):
        launcher = PoolLauncher(**options)
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            launcher.config = compose("config", [f"device={device}"])
        return launcher.places()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert places(workers=3) == ["", "", ""]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert places() == ["0", "1"]
    assert places(device="cpu", workers=1) == [""]
    assert places(gpus=[], workers=1) == [""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert places(runs_per_gpu=2) == ["3", "GPU-5", "3", "GPU-5"]
    with pytest.raises(ValueError, match=r"device=cuda:1: pool chooses; name GPUs with hydra\."):
        places(device="cuda:1")
    with pytest.raises(ValueError, match=r"hydra\.launcher\.workers=0: expected a whole number"):
        PoolLauncher(workers=0)


LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": [],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher(basic, tmp_path, launcher):
    command = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher], "norm=bn,mabn"]
    words = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, f"runtime.runs={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [*words, *command, "batch=4,999999"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert_same(basic, tmp_path, 2)
    assert done.stderr.count("larger than the data set") >= 2
    assert launcher != "joblib" or "Traceback" not in done.stderr  # the only one that shares stderr
    assert "2 of these runs failed, see above; the same command tries them again" in done.stderr


def test_options_for_clusters_fit_the_project(tmp_path):
    slurm = options()["submitit_slurm"]
    assert slurm.max_num_timeout == 100
    assert slurm.submitit_folder.startswith("${runtime.runs}/${study}/")
    for launcher in ("submitit_slurm", "submitit_local", "ray", "joblib", "pool"):
        command = [sys.executable, str(ROOT / "train.py"), f"hydra/launcher={launcher}"]
        command += ["--cfg", "hydra", "-p", "hydra.launcher"]
        shown = subprocess.run(command, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert not shown.stderr
        assert ("max_num_timeout: 100" in shown.stdout) == (launcher == "submitit_slurm")
        if launcher == "ray":
            assert "max_calls: 1" in shown.stdout


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm", "ray"])
def test_a_missing_launcher_says_what_to_install(launcher):
    error = MissingConfigException("", f"hydra/launcher/{launcher}", ["basic", "pool"])
    extra = launcher.split("_")[0]
    assert cli.explain(error) == (
        f"hydra/launcher={launcher}: not installed; pip install -c constraints.txt '.[{extra}]'"
    )
