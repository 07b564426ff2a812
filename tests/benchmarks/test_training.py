import json
from argparse import Namespace

import pytest
import torch
from torch import nn

import models
import norms
from benchmarks import harness, training, worker

SMALL = ["--quick", "--model", "resnet8", "--size", "16", "--images", "8", "--rounds", "2"]


def test_the_file_and_the_tables(call, tmp_path):
    """Another checkout's (here: this one's) beside ours, in the same rounds."""
    args = [*SMALL, "--before", harness.ROOT, "--ways", "eager"]
    assert call("training", "gn", "pws", *args) == (0, "")
    text = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    found = [(r["norm"], r["code"], r["way"]) for r in result["rows"][::2]]
    assert found == [
        ("nn.BatchNorm2d", "now", "eager"),
        ("gn", "now", "eager"),
        ("pws", "now", "eager"),
        ("pws", "before", "eager"),
    ]
    assert all(r["ratio_min"] <= r["ratio"] <= r["ratio_max"] for r in result["rows"])
    assert [r["norm"] for r in result["best"]] == ["nn.BatchNorm2d", "gn", "pws"]
    assert result["best"][0]["ratio"] == 1
    assert [r for r in result["best"] if "to_before" in r] == [result["best"][2]]
    assert text.count("\n| pws | eager, before |") == 1
    assert all(f"\n| {name} | " in text for name in result["memory_bytes"])


def test_ways_and_codes_that_do_not_exist_are_not_measured():
    args = Namespace(norms=["gn", "mabn"], before="x", ways=training.WAYS)
    found = {case[:3] for case in training.cases(args)}
    assert ("gn", "now", "network") in found
    assert {("mabn", "now", "network"), ("mabn", "before", "eager")} <= found
    assert not {("gn", "now", "layers"), ("mabn", "before", "network")} & found
    assert len(found) == 2 + 2 + 3 + 1


def test_the_fastest_of_each_is_compared_within_rounds():
    def case(name, code, format):
        return name, code, "eager", format

    times = {
        case("nn.BatchNorm2d", "now", "contiguous"): [4.0, 40.0],
        case("nn.BatchNorm2d", "now", "channels-last"): [2.0, 20.0],
        case("bn", "now", "contiguous"): [3.0, 30.0],
        case("bn", "now", "channels-last"): [9.0, 90.0],
        case("bn", "before", "contiguous"): [6.0, 60.0],
    }
    base, bn = training.best(times)
    assert (base["format"], base["ratio"]) == ("channels-last", 1)
    assert (bn["format"], bn["ratio"], bn["to_before"]) == ("contiguous", 1.5, 0.5)


def test_a_step_is_forward_backward_and_optimizer(monkeypatch):
    """In training mode; a learning rate, which the benchmark sets to 0, moves the weights."""
    made, build, sgd = [], models.build, torch.optim.SGD

    def kept(*args, **how):
        made.append(build(*args, **how))
        return made[-1]

    monkeypatch.setattr(models, "build", kept)
    monkeypatch.setattr(torch.optim, "SGD", lambda p, **how: sgd(p, **how | {"lr": 0.1}))
    step = worker.make("network", name="bn", model="resnet8", images=4, size=8, batch=2)
    [model] = made
    before = [p.clone() for p in model.parameters()]
    step()
    assert model.training
    assert all(p.grad is not None for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert next(m for m in model.modules() if hasattr(m, "batch_size")).batch_size == 2


def test_layers_are_compiled_one_by_one_and_only_ours(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append((self, how)))
    network = models.build("resnet8", scheme=norms.build("ws_gn"), num_classes=3)
    assert worker.compiled(network, "layers") is network
    assert {type(layer) for layer, _ in compiled} == {norms.WSConv2d}
    assert all(how == {"dynamic": False} for _, how in compiled)


def test_memory_of_the_sizes_that_are_named():
    large = {"model": "resnet8", "images": 4, "size": 32, "batch": 2}
    held = {name: training.needs(name, large) for name in ("bn", "pws")}
    more = {name: training.needs(name, large | {"images": 8}) for name in held}
    assert held["pws"] < held["bn"]  # no norm between whose input is kept
    for name, size in held.items():
        assert size < more[name] < 2 * size  # weights do not grow with the images


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("nothing",), "error: norm=nothing: unknown"),
        (("bn", "--images", "7"), "--images 7: expected a multiple of --batch 2"),
        (("bn", "--model", "resnet9", "--ways", "eager"), "model.name=resnet9: unknown"),
    ],
)
def test_mistakes_get_one_line(call, args, told):
    found, err = call("training", *args)
    assert found == 1
    assert told in err
