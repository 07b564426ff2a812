import json
import sys
from pathlib import Path

import pytest

from benchmarks import process


def test_both_programs_train_and_are_measured(tmp_path, monkeypatch):
    out = tmp_path / "out"
    sizes = ["--images", "50", "--epochs", "1", "--rounds", "1", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["process.py", *sizes, "--out", str(out)])
    process.main()
    result = json.loads((out / "process.json").read_text())
    assert set(result["rows"]) == {"train.py", "plain", "start"}
    ours, theirs = (result["rows"][name] for name in ("train.py", "plain"))
    for kind in process.KINDS:
        assert ours[kind] > 0
        assert result["ratio"][kind] == pytest.approx(ours[kind] / theirs[kind])
    assert "| train.py to plain |" in (out / "README.md").read_text()


def test_a_program_that_fails_is_shown(tmp_path: Path):
    with pytest.raises(ValueError, match="no such thing"):
        process.run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path, 1)
    assert process.spread([1.0]) == 0.0
