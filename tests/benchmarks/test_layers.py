import json
from argparse import Namespace

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
    """Another checkout's layers (here: this one's) beside ours, in the same rounds."""
    args = ["--quick", "--eager", "--rounds", "2", "--layers", "mabn", "--shapes", "64x4"]
    assert call("layers", *args, "--before", harness.ROOT) == (0, "")
    text = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert list(result["norms"]) == ["all 1", "2x64x4x4", "8x16x8x8"]
    assert list(result["weights"]) == ["weights, 8 to 8, 3x3"]
    for title, rows in (result["norms"] | result["weights"]).items():
        assert f"\n{title}:\n" in text
        base = "nn.Conv2d" if "weights" in title else "nn.BatchNorm2d"
        expected = [(base, "eager"), *(("mabn", way) for way in ("eager", "before"))]
        assert [(r["layer"], r["way"]) for r in rows[::2]] == expected
        assert {r["ratio"] for r in rows if r["layer"] == base} == {1}
        assert all(r["ms"] > 0 for r in rows)
        if base != "nn.Conv2d":
            assert all(1 <= r["kept"] < 2 for r in rows)
    assert text.count("\n| mabn | before |") == 4
    assert result["compile"] == []


def test_a_compiled_layer_is_measured_as_an_eager_one(tmp_path):
    case = dict(what="norm", name="mabn", shape=(4, 64, 14, 14))
    with harness.Worker(TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) as worker:
        worker.make("eager", **case)
        assert not list(tmp_path.iterdir())
        worker.make("compiled", way="layers", **case)
        assert list(tmp_path.iterdir())  # where a new process would find the code
        assert worker.timer("compiled", 0.001)() > 0
        assert worker.ask(kept="compiled") <= worker.ask(kept="eager")


def test_compile_times_are_of_new_processes_and_one_cache(monkeypatch):
    started = []

    class Worker:
        def __init__(self, threads, **environ):
            started.append(environ["TORCHINDUCTOR_CACHE_DIR"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def make(self, key, **case):
            return 10.0 / len(started)

    monkeypatch.setattr(harness, "Worker", Worker)
    args = Namespace(layers=["mabn"], images=2, threads=1)
    rows = layers.compile_times(args)
    assert [(r["layer"], r["what"], r["cold_s"], r["warm_s"]) for r in rows] == [
        ("mabn", "norm", 10, 5),
        ("mabn", "conv", 3.33, 2.5),
    ]
    assert started[0] == started[1] != started[2] == started[3]


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
