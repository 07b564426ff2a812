import os
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import training.cli
from training.process import STOP, StoppedError

ROOT = Path(__file__).parent.parent
# Numbers of threads change last bits, and tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
settings.register_profile("same_every_time", derandomize=True, deadline=None)
settings.load_profile("same_every_time")


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored after each test; train.py sets it
    monkeypatch.setattr(StoppedError, "last", -1.0)  # no signal of an earlier test
    before = {number: signal.getsignal(number) for number in STOP}  # handled by train.py
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def as_default():
    """float64 for whatever a test creates."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Outcome:
    status: int
    out: str
    err: str
    runs: Path

    def run(self, name: str = "") -> Path:
        """The folder of the only run, or of the one whose name starts so."""
        folders = [p.parent for p in self.runs.glob(f"*/{name}*/.lock")]
        assert len(folders) == 1, folders
        return folders[0]


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """`python train.py ARGS…` in this process (importing torch anew would take most of the time),
    with runs/ in the test's own folder, one thread and a small part of the digits."""

    def call(*args: str, quick: bool = True, runs: Path = tmp_path / "runs") -> Outcome:
        small = ["recipe.epochs=1", "data.train_fraction=0.1"] if quick else []
        if any(a.startswith("recipe.updates=") for a in args):
            small = small[1:]
        own = [f"runtime.runs={runs}", "runtime.threads=1"]
        monkeypatch.setattr(training.cli.Report, "failures", 0)
        monkeypatch.setattr(training.cli.Report, "reported", set())
        monkeypatch.setattr(training.cli.Report, "folders", [])
        flags = [a for a in args if a.startswith("-")]
        rest = [a for a in args if not a.startswith("-")]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *small, *own, *rest])
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        torch.set_num_threads(1)
        out, err = capfd.readouterr()
        return Outcome(status, out, err, runs)

    return call
