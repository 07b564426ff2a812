"""`runtime.compile`, `runtime.threads`: what is chosen and why; compiled it computes the same."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import models
import norms
from tests.training.test_step import PLAN, batches, recipe
from training import compile as c
from training.step import Step


@pytest.mark.parametrize(
    ("wish", "device", "seconds", "before", "mode", "reason"),
    [
        ("auto", "cpu", 20, None, "false", "too short"),
        ("auto", "cpu", 3600, None, "network", "long enough"),
        ("auto", "cuda", 20, None, "network", "device=cuda"),
        ("auto", "cpu", 3600, "false", "false", "checkpoint"),
        ("auto", "cpu", 20, "layers", "layers", "checkpoint"),
        ("layers", "cpu", 20, "network", "layers", "as told"),
        (False, "cuda", 3600, None, "false", "as told"),
    ],
)
def test_choice(wish, device, seconds, before, mode, reason):
    choice = c.choose(wish, device, seconds, before)
    assert choice.mode == mode
    assert reason in choice.reason


def test_expected_seconds_grow_with_the_work():
    """An hour and more for twenty epochs of CIFAR-10, seconds for the digits."""
    with torch.device("meta"):
        resnet20 = models.build("resnet20", scheme=norms.build("bn"), num_classes=10)
        resnet8 = models.build("resnet8", scheme=norms.build("bn"), num_classes=10, in_channels=1)
    work = c.multiply_adds(resnet20, (3, 32, 32))
    assert work == pytest.approx(41e6, rel=0.02)  # He et al., arXiv 1512.03385
    assert 1800 < c.estimate_seconds(work, 20 * 390, 128) < 3 * 3600
    assert c.estimate_seconds(c.multiply_adds(resnet8, (1, 8, 8)), 2157, 2) < 30


@pytest.mark.parametrize(
    ("wish", "work", "images", "threads"),
    [("auto", 41e6, 2, 1), ("auto", 41e6, 128, None), ("auto", 8e5, 32, 1), (3, 8e5, 2, 3)],
)
def test_threads(wish, work, images, threads):
    assert c.threads(wish, work, images) == threads


def small(name):
    torch.manual_seed(1)
    scheme = norms.build(name, batch_size=2)
    layers = scheme.conv(1, 4, 3), scheme.norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("name", "mode"), [("mabn", "network"), ("bcn", "layers")])
def test_compiled_equals_eager(name, mode, caplog):
    """Inductor's code, of a network of a few layers; the trial pass has left no trace."""
    caplog.set_level("INFO", "smallbatch")
    ends = []
    for choice in (c.EAGER, c.Choice(mode, "")):
        step = Step(small(name), PLAN, recipe(), choice)
        losses = [step(*batch, 0.1)[0].item() for batch in batches(3)]
        ends.append((losses, step.state_dict()["model"]))
        assert step.state_dict()["compiled"] == choice.mode, caplog.messages
    (said,) = (r.getMessage() for r in caplog.records if r.name == "smallbatch")
    assert "compiled in" in said
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert list(ends[0][1]) == list(ends[1][1])
    for key, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][key], value, rtol=1e-3, atol=1e-5)


def aot_eager(model, **options):
    """The graphs that are captured, without Inductor, which takes minutes for a whole network."""
    return partial(torch._dynamo.optimize("aot_eager", **options))(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, in torch 2.11
def test_a_compiled_run_with_a_probe(train, monkeypatch):
    monkeypatch.setattr(torch, "compile", aot_eager)
    keys = ["batch=8", "norm=mabn", "probe=gradient_shift", "probe.every=3", "recipe.updates=7"]
    rows = []
    for mode in ("false", "network"):
        done = train(*keys, f"runtime.compile={mode}", f"study=compiled-{mode}")
        assert done.status == 0, done.err
        assert ("compiled (network): as told" in done.out) == (mode == "network")
        folder = next(done.runs.glob(f"compiled-{mode}/mabn*"))
        rows.append(torch.load(folder / "last.pt", weights_only=True)["progress"]["rows"][0])
        result = json.loads((folder / "result.json").read_text())
        assert (result["compiled"], result["compiled_reason"]) == (mode, "as told")
    same = [key for key in rows[0] if key.startswith("probe/") or key == "train_loss"]
    assert len(same) > 1
    # Centred filters' means are zero but for rounding.
    expected = pytest.approx([rows[0][k] for k in same], rel=1e-3, abs=1e-6)
    assert [rows[1][k] for k in same] == expected


@pytest.mark.parametrize("mode", ["network", "layers"])
def test_a_compiler_that_fails_is_told_and_done_without(mode, train, monkeypatch):
    """To the same bits as a run that never asked for it."""

    def compile(*args, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    ends = []
    for wish in (mode, "false"):
        keys = ["norm=mabn", "recipe.updates=3", f"runtime.compile={wish}", f"study=wish-{wish}"]
        done = train(*keys)
        assert done.status == 0, done.err
        folder = next(done.runs.glob(f"wish-{wish}/mabn*"))
        ends.append(torch.load(folder / "last.pt", weights_only=True)["model"])
        result = json.loads((folder / "result.json").read_text())
        assert result["compiled"] == "false"
        if wish != "false":
            told = f"runtime.compile={mode}: torch.compile does not work here (RuntimeError: No "
            assert told in done.out
            assert result["compiled_reason"] == "compiling failed"
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_a_resume_that_computes_otherwise_says_so(train, monkeypatch):
    monkeypatch.setattr(torch, "compile", aot_eager)
    keys = ["recipe.updates=4", "checkpoint.every_updates=2", "norm=gn"]
    begun = train(*keys, "runtime.compile=network")
    assert begun.status == 0, begun.err
    (begun.run() / "result.json").unlink()
    for name in ("last.pt", "previous.pt"):
        state = torch.load(begun.run() / name, weights_only=True)
        assert state["compiled"] == "network"
    (begun.run() / "last.pt").unlink()
    again = train(*keys, "runtime.compile=false")
    assert "runtime.compile=false: the checkpoint was made with network, so the last" in again.out
