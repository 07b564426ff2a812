import json
import sys

import pytest

from benchmarks import inference


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """`python benchmarks/inference.py ARGS…` in this process: exit status, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["inference.py", *args, "--out", str(tmp_path)])
        try:
            inference.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capfd.readouterr().err

    return run


def test_every_scheme_has_a_row_and_the_words_stay(call, tmp_path):
    assert call("--quick", "--batch", "1") == (0, "")
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{page.read_text()}\nafter\n")
    assert call("--quick", "gn", "--channels-last") == (0, "")
    text = page.read_text()
    assert text.startswith("before\n\n# inference\n")
    assert text.endswith("<!-- /measured -->\n\nafter\n")
    assert text.count("\n| gn |") == text.count("\n| bn |") == 1
    assert "\n| mabn |" not in text
    assert [r["norm"] for r in json.loads((tmp_path / "inference.json").read_text())["rows"]] == [
        "bn",
        "gn",
    ]


def test_the_file(call, tmp_path):
    call("--quick")
    result = json.loads((tmp_path / "inference.json").read_text())
    assert list(result) == ["command", "environment", "setting", "rows"]
    assert set(result["environment"]) == {"cpu", "threads", "python", "torch", "C compiler"}
    assert result["setting"] == {
        "model": "resnet8",
        "batch": 4,
        "size": 32,
        "rounds": 2,
        "device": "cpu",
        "channels_last": False,
    }
    rows = {r.pop("norm"): r for r in result["rows"]}
    assert list(rows) == inference.SCHEMES
    for row in rows.values():
        times = [f"{k}{end}" for k in ("unfolded", "folded") for end in ("_ms", "_iqr_ms")]
        ratios = ["ratio_to_bn_unfolded", "ratio_to_bn_folded"]
        assert set(row) == {*times, *ratios, "norm_layers_left", "parameters"}
        assert all(value >= 0 for value in row.values())
        assert row["unfolded_ms"] > 0
        assert row["folded_ms"] > 0
    assert rows["bn"]["ratio_to_bn_unfolded"] == rows["bn"]["ratio_to_bn_folded"] == 1
    left = {name: row["norm_layers_left"] for name, row in rows.items()}
    assert left == dict.fromkeys(inference.SCHEMES, 7) | dict.fromkeys(
        ("bn", "mabn", "brn", "ws_bn"), 0
    ) | {"pws": 2, "evonorm_s0": 4}


def test_ratios_are_taken_within_rounds():
    """A machine that is ten times slower in one round changes no ratio."""
    import numpy as np

    bn, gn = np.array([1.0, 10.0, 1.0, 2.0]), np.array([1.5, 15.0, 1.5, 3.0])
    times = {("bn", "unfolded"): bn, ("bn", "folded"): bn}
    times |= {("gn", "unfolded"): gn, ("gn", "folded"): 2 * gn}
    found = inference.summary("gn", times)
    assert (found["ratio_to_bn_unfolded"], found["ratio_to_bn_folded"]) == (1.5, 3)
    assert (found["unfolded_ms"], found["unfolded_iqr_ms"]) == (2.25, 4.5)


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        (("nothing",), 1, "error: norm=nothing: unknown"),
        (("--model", "resnet9"), 1, "error: model.name=resnet9: unknown"),
        (("--device", "tpu"), 1, "error: device=tpu: expected auto, cpu"),
        (("--rounds", "0"), 2, "expected whole numbers from 1"),
    ],
)
def test_mistakes_get_one_line(call, args, status, told):
    found, err = call("--quick", *args) if args == ("nothing",) else call(*args)
    assert found == status
    assert told in err
