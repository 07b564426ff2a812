import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def script(monkeypatch, capsys):
    """`python scripts/table.py ARGS…` in this process: what it prints."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["table.py", *map(str, words)])
        runpy.run_path(str(ROOT / "scripts" / "table.py"), run_name="__main__")
        return capsys.readouterr().out

    return call
