import sys
from importlib import import_module

import pytest


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """`python -m benchmarks.NAME ARGS… --out OUT` in this process: exit status, stderr."""

    def run(name, *args):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored after the test
        monkeypatch.setattr(sys, "argv", [name, *map(str, args), "--out", str(tmp_path / "out")])
        try:
            import_module(f"benchmarks.{name}").main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capfd.readouterr().err

    return run
