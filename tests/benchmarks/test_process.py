import json
import sys
from pathlib import Path

import pytest

from benchmarks import process

VERSION = process.installed("lightning")
PEERS = ["plain", "lightning"] if VERSION else ["plain"]
LEFT_OUT = "lightning: not installed, left out; pip install -c constraints.txt '.[peers]'"


@pytest.fixture
def measured(call, tmp_path, monkeypatch):
    """`python -m benchmarks.process`, small, in this process: result, table and what it said."""

    def run():
        sizes = ["--images", "50", "--epochs", "1", "--rounds", "1", "--workers", "0"]
        said = []
        monkeypatch.setattr(process.harness, "say", said.append)
        assert call("process", *sizes) == (0, "")
        out = tmp_path / "out"
        return json.loads((out / "process.json").read_text()), (out / "README.md").read_text(), said

    return run


def test_all_programs_do_the_same_work_and_are_measured(measured, monkeypatch):
    run, epochs, updates = process.run_program, {}, []

    def watched(command, where, threads):
        cost = run(command, where, threads)
        lines = (where / "out.txt").read_text().splitlines()
        name = command[2] if command[1] == "-m" else Path(command[1]).name
        epochs[name] = [line for line in lines if line.startswith("epoch ")]
        updates.extend(
            json.loads(f.read_text())["updates"] for f in where.glob("whole*/**/result.json")
        )
        return cost

    monkeypatch.setattr(process, "run_program", watched)
    result, table, said = measured()
    assert (LEFT_OUT in said) == (VERSION is None)
    compared = [f"train.py to {peer}" for peer in PEERS]
    assert set(result["rows"]) == {"train.py", "start", *PEERS, *compared}
    ours = result["rows"]["train.py"]
    for peer in PEERS:
        ratio = result["rows"][f"train.py to {peer}"]
        for kind in process.KINDS:
            assert ours[kind] > 0
            expected = ours[kind] / result["rows"][peer][kind]
            assert ratio[kind] == pytest.approx(expected, rel=1e-2)
        assert f"| train.py to {peer} |" in table
    assert set(updates) == {25, 1}  # of the whole training and of the start
    # Peers have the same loss and accuracies, so the same updates and test images.
    told = [epochs[process.PEERS[peer]][0].rpartition(",")[0] for peer in PEERS]  # no speed
    assert "loss" in told[0]
    assert set(told) == {told[0]}


@pytest.mark.parametrize("version", [None, "2.6.6"])
def test_lightning_is_a_row_or_said_to_be_left_out(measured, monkeypatch, version):
    monkeypatch.setattr(process, "installed", lambda package: version)
    monkeypatch.setattr(process, "run_program", lambda *_: dict.fromkeys(process.KINDS, 1.0))
    result, table, said = measured()
    assert (LEFT_OUT in said) == (version is None)
    assert ("lightning" in result["rows"]) == (version is not None)
    assert f"lightning {version or 'not installed'}" in table


def test_a_program_that_fails_is_shown(tmp_path: Path):
    with pytest.raises(ValueError, match="no such thing"):
        process.run_program(
            [sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path, 1
        )
