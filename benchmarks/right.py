"""Whether a GPU computes what it should: tests/test_gpu.py, part `right` of gpu_session.sh.

A cell is a test function with all its parameters; one whose tests have all passed, or were skipped,
is not run again. Without a GPU those for one are skipped, and counted by reason.
"""

import ast
from collections import Counter
from functools import partial
from typing import Any

import pytest

from benchmarks.gpu import Measure, Session, TimeUp
from benchmarks.harness import ROOT

TESTS = ROOT / "tests" / "test_gpu.py"
QUICK = "pws or torchrun"  # of a rehearsal


class Recorder:
    """A plug-in of pytest that counts outcomes, and stops in time."""

    def __init__(self, session: Session):
        self.session, self.counts = session, Counter[str]()
        self.reasons, self.errors = Counter[str](), dict[str, str]()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.session.left() <= 0:
            pytest.exit("time is up", 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.failed:
            self.errors[report.nodeid.rpartition("::")[2]] = str(report.longrepr)[-1500:]


def tested(function: str, session: Session) -> dict[str, Any]:
    # Its own settings: a warning of another version must not look like a wrong result.
    arguments = [f"{TESTS}::{function}", "--no-header", "--no-summary", "-q", "-W", "default"]
    recorder = Recorder(session)
    pytest.main([*arguments, *(["-k", QUICK] if session.tiny else [])], plugins=[recorder])
    if session.left() <= 0:
        raise TimeUp
    found = {"counts": recorder.counts, "reasons": recorder.reasons, "failures": recorder.errors}
    if recorder.errors:
        names = ", ".join(recorder.errors)
        found["error"] = f"{len(recorder.errors)} tests failed: {names}"[:300]
    return found


def cells(session: Session) -> dict[str, Measure]:
    body = ast.parse(TESTS.read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    tests = [name for name in names if name.startswith("test_")]
    return {name: partial(tested, name, session) for name in tests}


def table(result: dict[str, Any]) -> list[str]:
    every = [cell for cell in result["cells"].values() if "counts" in cell]
    counts, reasons = (
        sum((Counter(c[k]) for c in every), Counter()) for k in ("counts", "reasons")
    )
    lines = [", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "no tests"]
    return lines + [f"skipped {number}: {reason}" for reason, number in reasons.items()]
