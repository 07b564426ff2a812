import json

import pytest
import torch

from benchmarks import harness, layers, worker


@pytest.mark.parametrize("side", [14, 7])
@pytest.mark.parametrize("name", [n for n in worker.NORMS if not n.startswith("nn.")])
def test_no_norm_keeps_more_than_batch_norm(name, side):
    """The input, and small tensors with a number per image and channel."""
    shape = [4, 64, side, side]
    size = worker.Layer("norm", name, shape).kept()
    activation, small = 4 * torch.Size(shape).numel(), 4 * shape[0] * shape[1]
    assert activation <= size <= activation + 16 * small


@pytest.mark.parametrize("what", ["norm", "conv"])
def test_every_layer_is_made_and_measured(what):
    for name in worker.NORMS if what == "norm" else worker.CONVS:
        shape = [4, 64, 5, 5] if what == "norm" else [8, 4, 3]
        layer = worker.Layer(what, name, shape, format="channels-last")
        layer()
        assert all(p.grad is not None for p in layer.layer.parameters() if p.requires_grad), name
        first = layer.x.grad.clone() if what == "norm" else next(layer.layer.parameters()).grad
        layer()  # gradients do not add up
        second = layer.x.grad if what == "norm" else next(layer.layer.parameters()).grad
        assert second.abs().max() < 1.9 * first.abs().max(), name


def test_the_file_and_the_tables(call, tmp_path):
    """Compiled layers beside eager ones, and another checkout's (here: this one's)."""
    args = ["--quick", "--rounds", "2", "--layers", "mabn", "--shapes", "64x4"]
    assert call("layers", *args, "--before", harness.ROOT)[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert list(result["norms"]) == ["all 1", "2x64x4x4", "8x16x8x8"]
    assert list(result["weights"]) == ["weights, 8 to 8, 3x3"]
    for title, rows in (result["norms"] | result["weights"]).items():
        assert f"\n{title}:\n" in text
        base = "nn.Conv2d" if "weights" in title else "nn.BatchNorm2d"
        expected = [(base, "eager"), *(("mabn", way) for way in ("eager", "layers", "before"))]
        assert [(r["layer"], r["way"]) for r in rows[::2]] == expected
        assert {r["ratio"] for r in rows if r["layer"] == base} == {1}
        assert all(r["ms"] > 0 for r in rows)
        if base != "nn.Conv2d":
            assert all(1 <= r["kept"] < 2 for r in rows)
    assert text.count("\n| mabn | compiled |") == 4
    assert result["compile"] == []


def test_all_norms_together_are_weighted_by_their_number():
    row = dict(layer="nn.BatchNorm2d", way="eager", format="contiguous", kept=1.0, ratio=1.0)
    ours = row | dict(layer="bn")
    tables = [
        [row | {"ms": 1.0}, ours | {"ms": 2.0, "ratio": 2.0}],
        [row | {"ms": 10.0}, ours | {"ms": 5.0, "ratio": 0.5, "kept": 1.5}],
    ]
    base, found = layers.whole(tables, [6, 1])
    assert (base["ms"], base["ratio"]) == (16, 1)
    assert (found["ms"], found["ratio"], found["kept"]) == (17, 1.062, 1.5)
    assert (found["ratio_min"], found["ratio_max"]) == (0.5, 2)
