import json
import sys

import pytest
import torch

from benchmarks import training


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """`python benchmarks/training.py ARGS…` in this process: exit status, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["training.py", *args, "--out", str(tmp_path)])
        try:
            training.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capfd.readouterr().err

    return run


def test_the_file_and_the_words_around_the_table(call, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n\n<!-- measured -->\nold\n<!-- /measured -->\n\nafter\n")
    assert call("--quick", "gn", "pws") == (0, "")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /measured -->\n\nafter\n")
    assert "old" not in text
    result = json.loads((tmp_path / "training.json").read_text())
    assert list(result) == ["command", "environment", "setting", "memory_setting", "rows"]
    assert result["setting"] == {
        "model": "resnet8",
        "size": 16,
        "forward": 64,
        "rounds": 2,
        "device": "cpu",
        "batches": [2, 32, 64],
        "clock": "own time",
    }
    rows = {row.pop("norm"): row for row in result["rows"]}
    assert list(rows) == ["bn", "gn", "pws"]
    for name, row in rows.items():
        assert text.count(f"\n| {name} |") == 1
        keys = [f"batch_{b}{end}" for b in (2, 32, 64) for end in ("_ms", "_iqr_ms")]
        ratios = [f"ratio_to_bn_batch_{b}" for b in (2, 32, 64)]
        assert set(row) == {*keys, *ratios, "memory_bytes"}
        assert all(row[f"batch_{b}_ms"] > 0 for b in (2, 32, 64))
    assert {rows["bn"][f"ratio_to_bn_batch_{b}"] for b in (2, 32, 64)} == {1}


def test_a_step_is_forward_backward_and_optimizer(monkeypatch):
    """It trains in training mode and moves by the learning rate, which the benchmark sets to 0."""
    made = []

    def sgd(model, recipe, lr):
        assert (model.training, lr, recipe.momentum) == (True, 0.0, 0.9)
        made.append((model, torch.optim.SGD(model.parameters(), lr=0.1)))
        return made[0][1]

    monkeypatch.setattr(training, "sgd", sgd)
    step = training.step("bn", "resnet8", 2, torch.device("cpu"))
    model = made[0][0]
    before = [p.clone() for p in model.parameters()]
    step(torch.randn(4, 3, 8, 8))
    assert all(p.grad is not None for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert next(m for m in model.modules() if hasattr(m, "batch_size")).batch_size == 2


def test_memory_of_the_sizes_that_are_named():
    large = {"model": "resnet8", "images": 4, "size": 32, "batch": 2}
    held = {name: training.needs(name, large) for name in ("bn", "pws")}
    more = {name: training.needs(name, large | {"images": 8}) for name in held}
    assert held["pws"] < held["bn"]  # no norm between whose input is kept
    for name, size in held.items():
        assert size < more[name] < 2 * size  # weights do not grow with the images


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        (("nothing",), 1, "error: norm=nothing: unknown"),
        (("--model", "resnet9"), 1, "error: model.name=resnet9: unknown"),
        (("--device", "tpu"), 1, "error: device=tpu: expected auto, cpu"),
        (("--rounds", "0"), 2, "expected whole numbers from 1"),
        (("--forward", "48"), 2, "--forward 48: expected a multiple of 32 from 64"),
    ],
)
def test_mistakes_get_one_line(call, args, status, told):
    found, err = call(*args)
    assert found == status
    assert told in err
