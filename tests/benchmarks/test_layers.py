import json
import sys

import pytest
import torch

from benchmarks import layers
from norms import BatchChannelNorm2d, BatchRenorm2d, MABN2d


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """`python benchmarks/layers.py ARGS…` in this process: exit status, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["layers.py", *args, "--out", str(tmp_path)])
        try:
            layers.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capfd.readouterr().err

    return run


def test_the_file_and_the_tables(call, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "WEIGHTS", [(8, 8, 3)])
    page = tmp_path / "README.md"
    page.write_text("before\n\n<!-- measured -->\nold\n<!-- /measured -->\n\nafter\n")
    assert call("--quick") == (0, "")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /measured -->\n\nafter\n")
    assert "old" not in text
    result = json.loads((tmp_path / "layers.json").read_text())
    assert result["setting"]["clock"] == "own time"
    assert list(result["norms"]) == ["all 3", "2x64x8x8", "2x128x4x4"]
    total, first, second = ({r["layer"]: r for r in t} for t in result["norms"].values())
    for name, row in total.items():
        assert text.count(f"\n| {name} | ") >= 1
        assert row["ms"] == pytest.approx(2 * first[name]["ms"] + second[name]["ms"], abs=0.01)
    assert first["nn.BatchNorm2d"]["ratio"] == 1
    assert list(result["groups"]) == ["32x64x8x8"]
    assert list(result["weights"]) == ["8 to 8, 3x3", "8 to 8, 3x3, channels-last"]
    (table,) = result["networks"].values()
    assert [(r["layer"], r["to"]) for r in table][-2:] == [("gn", "gn"), ("ws_gn", "gn")]


@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (2, 64, 7, 7)])
def test_no_norm_keeps_more_than_batch_norm(shape):
    """The input, and small tensors with a number per image and channel."""
    made = layers.norm_layers(shape[1], shape[0])
    sizes = {n: layers.kept(x, torch.randn(shape, requires_grad=True)) for n, x in made.items()}
    activation = 4 * torch.Size(shape).numel()
    for name, size in sizes.items():
        if "formulas" in name or "twice" in name:
            assert size >= activation, name
        else:
            small = 4 * shape[0] * shape[1]
            assert activation <= size <= activation + 8 * small, name


def test_plain_forms_compute_what_the_layers_do():
    x, dy = torch.randn(2, 64, 5, 5), torch.randn(2, 64, 5, 5)
    made = layers.norm_layers(64, 2)
    with torch.no_grad():
        for name in ("running_square", "window_square", "window_product"):
            getattr(made["mabn"], name).uniform_(0.5, 1)
        plain = made["mabn, formulas"]
        plain.var = made["mabn"].running_square.clone()
        # the ring's next place is that of the oldest
        for ring, window in ((plain.squares, "window_square"), (plain.products, "window_product")):
            place = torch.arange(len(ring)) + plain.batches + 1
            ring[place % len(ring)] = getattr(made["mabn"], window)
    assert isinstance(made["mabn"], MABN2d)
    assert isinstance(made["bcn"], BatchChannelNorm2d)
    assert isinstance(made["brn"], BatchRenorm2d)
    made["brn"].num_batches_tracked.fill_(5)  # past its schedule
    for name in ("bn", "mabn", "bcn", "bcn estimated", "estimated bn", "brn"):
        results = []
        for key in (name, f"{name}, formulas", "bcn, batch norm twice"):
            if name != "bcn" and "twice" in key:
                continue
            part = x.clone().requires_grad_()
            layers.both_ways(made[key], part, dy)
            results.append((made[key](x), part.grad))
        for y, dx in results[1:]:
            if name != "mabn":  # whose window has moved on by then
                torch.testing.assert_close(y, results[0][0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(dx, results[0][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        (("--device", "tpu"), 1, "error: device=tpu: expected auto, cpu"),
        (("--rounds", "0"), 2, "expected numbers from 1"),
    ],
)
def test_mistakes_get_one_line(call, args, status, told):
    found, err = call(*args)
    assert found == status
    assert told in err
