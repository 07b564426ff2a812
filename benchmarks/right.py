"""Whether a GPU computes what it should: tests/test_gpu.py, part `right` of gpu_session.sh.

A cell is a test; one that has passed is not run again. Without a GPU those for one are skipped,
and counted by reason.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import AGAIN, Cells, answers

TESTS = Path(__file__).resolve().parent.parent / "tests" / "test_gpu.py"
QUICK = "convolution or captured or torchrun"  # of a rehearsal


class Recorder:
    """A plug-in of pytest that keeps every outcome, and stops in time."""

    def __init__(self, cells: Cells):
        self.cells = cells

    def outcome(self, item: pytest.Item) -> str | None:
        return self.cells.result["cells"].get(item.name, {}).get("outcome")

    def known(self, item: pytest.Item) -> bool:
        """Whether it has passed, or has been run in this session."""
        session = self.cells.result["cells"].get(item.name, {}).get("session")
        return self.outcome(item) == "passed" or session == self.cells.number

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        done = [item for item in items if self.known(item)]
        self.cells.say(f"{len(done)} of {len(items)} tests have passed already")
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if not self.known(item)]
        items.sort(key=lambda item: self.outcome(item) == "failed")  # last: they may not come back

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.cells.session.left() <= 0:
            pytest.exit(f"time is up before {item.name}; the same command goes on from here", 0)
        if item.get_closest_marker("gpu"):
            self.cells.add(item.name, {"outcome": "failed", "error": "did not come back"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.when != "call" and report.passed:
            return
        values: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped and isinstance(report.longrepr, tuple):
            values["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            values["error"] = str(report.longrepr).strip().splitlines()[-1][:300]
            values["traceback"] = str(report.longrepr)[-3000:]
        self.cells.add(name, values)
        if report.failed:
            self.cells.say(f"{name}: {values['error']}")
        elif len(self.cells.result["cells"]) % 50 == 0:
            self.cells.say(f"{len(self.cells.result['cells'])} tests")
        if report.failed and not answers(self.cells.session.device):
            os._exit(AGAIN)


def run(cells: Cells) -> None:
    # Its own settings: a warning of another version must not look like a wrong result.
    arguments = [str(TESTS), "--no-header", "--no-summary", "--tb=short", "-W", "default"]
    arguments += ["-k", QUICK] if cells.session.tiny else []
    status = pytest.main(arguments, plugins=[Recorder(cells)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ValueError(f"pytest: exit status {int(status)}, see above")


def table(result: dict[str, Any]) -> list[str]:
    every = result["cells"].values()
    counts = Counter(cell["outcome"] for cell in every)
    lines = [", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "no tests"]
    reasons = Counter(cell["reason"] for cell in every if "reason" in cell)
    return lines + [f"skipped {number}: {reason}" for reason, number in reasons.items()]
