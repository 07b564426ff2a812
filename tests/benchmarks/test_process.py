import json
import sys
from pathlib import Path

import pytest

from benchmarks import process

VERSION = process.installed("lightning")
PEERS = ["plain", "lightning"] if VERSION else ["plain"]
LEFT_OUT = "lightning: not installed, left out; pip install -c constraints.txt '.[peers]'\n"


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """`python benchmarks/process.py`, small, in this process: result, table and what it said."""

    def run():
        sizes = ["--images", "50", "--epochs", "1", "--rounds", "1", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["process.py", *sizes, "--out", str(tmp_path)])
        process.main()
        result = json.loads((tmp_path / "process.json").read_text())
        return result, (tmp_path / "README.md").read_text(), capsys.readouterr().out

    return run


def test_all_programs_do_the_same_work_and_are_measured(call, monkeypatch):
    run, epochs, updates = process.run, {}, []

    def watched(command, where, threads):
        cost = run(command, where, threads)
        lines = (where / "out.txt").read_text().splitlines()
        epochs[Path(command[1]).name] = [line for line in lines if line.startswith("epoch ")]
        updates.extend(
            json.loads(f.read_text())["updates"] for f in where.glob("whole*/**/result.json")
        )
        return cost

    monkeypatch.setattr(process, "run", watched)
    result, table, said = call()
    assert (LEFT_OUT in said) == (VERSION is None)
    assert set(result["rows"]) == {"train.py", "start", *PEERS}
    assert list(result["ratios"]) == PEERS
    ours = result["rows"]["train.py"]
    for peer, ratio in result["ratios"].items():
        for kind in process.KINDS:
            assert ours[kind] > 0
            assert ratio[kind] == pytest.approx(ours[kind] / result["rows"][peer][kind])
        assert f"| train.py to {peer} |" in table
    assert updates == [25]
    # Peers have the same loss and accuracies, so the same updates and test images.
    told = [epochs[process.PEERS[peer]][0].rpartition(",")[0] for peer in PEERS]  # no speed
    assert "loss" in told[0]
    assert set(told) == {told[0]}


@pytest.mark.parametrize("version", [None, "2.6.6"])
def test_lightning_is_a_row_or_said_to_be_left_out(call, monkeypatch, version):
    monkeypatch.setattr(process, "installed", lambda package: version)
    monkeypatch.setattr(process, "run", lambda *_: dict.fromkeys(process.KINDS, 1.0))
    result, table, said = call()
    assert (LEFT_OUT in said) == (version is None)
    for part in (result["rows"], result["ratios"]):
        assert ("lightning" in part) == (version is not None)
    assert f"lightning {version or 'not installed'}" in table


def test_a_program_that_fails_is_shown(tmp_path: Path):
    with pytest.raises(ValueError, match="no such thing"):
        process.run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path, 1)
    assert process.spread([1.0]) == 0.0
