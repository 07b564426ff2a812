import runpy
import sys
from pathlib import Path

import pytest

from reporting import figures

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def drawn_figures():
    """Requested where a test looks at figures: drawing takes most of a table's time."""


@pytest.fixture(autouse=True)
def _no_other_figures(request, monkeypatch):
    if "drawn_figures" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda *args: [])


@pytest.fixture
def script(monkeypatch, capsys):
    """`python scripts/table.py ARGS…` in this process: what it prints."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["table.py", *map(str, words)])
        runpy.run_path(str(ROOT / "scripts" / "table.py"), run_name="__main__")
        return capsys.readouterr().out

    return call
