"""A step that is recorded once and played back; tests/test_gpu.py has the real recording."""

from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from tests.training.test_step import PLAN, batches, network, recipe
from training import distributed, graph
from training.step import Step


class Stream:
    def __init__(self, device):
        pass

    def wait_stream(self, stream):
        pass


@pytest.fixture
def played(monkeypatch):
    """A recording without a GPU: what was recorded is computed again, from and to the memory of the
    first time."""
    recordings = []

    def record(compute, images, labels, stream):
        results = (torch.tensor(0.0), torch.tensor(0.0))

        def replay():
            for old, new in zip(results, compute(images, labels), strict=True):
                old.copy_(new)

        recordings.append(compute)
        return replay, results

    monkeypatch.setattr(graph, "capture", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return recordings


def pair(scheme, options):
    """The same step twice, the first recorded, with its learning rate in a tensor as on a GPU."""
    recorded = Step(network(scheme), PLAN, recipe(**options), graph=True)
    recorded.lr = [torch.tensor(0.0) for _ in recorded.optimizer.param_groups]
    return recorded, Step(network(scheme), PLAN, recipe(**options))


def same(recorded, plain, updates=7):
    found = []
    for i, (images, labels) in enumerate(batches(updates)):
        lr = 0.1 / (i + 1)
        found.append(zip(recorded(images, labels, lr), plain(images, labels, lr), strict=True))
    for results in found:  # only now: none may be overwritten by a later one
        for ours, theirs in results:
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        recorded.eval_model.state_dict().values(),
        plain.eval_model.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("bn", {}),
        ("mabn", {"clip": 1.0}),
        ("pws", {"ema": 0.5}),
        ("bcn", {"optimizer": "adamw", "betas": [0.9, 0.99]}),
    ],
)
def test_played_back_steps_are_the_steps(played, scheme, options):
    same(*pair(scheme, options))
    assert len(played) == 1


def test_what_cannot_be_recorded_goes_on_without(played, monkeypatch, caplog):
    def record(*args):
        played.append(args)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graph, "capture", record)
    same(*pair("bn", {}))
    assert len(played) == 1
    assert caplog.messages == [
        "  runtime.graph: the step of this network cannot be recorded as a CUDA graph "
        "(operation not permitted); going on without"
    ]


def test_why_not(monkeypatch):
    def config(**values):
        values = {"recipe.precision": "float32", "probe.name": "none", "debug": None} | values
        cfg = OmegaConf.create({"runtime": {"graph": values.pop("graph", "auto")}})
        for key, value in values.items():
            OmegaConf.update(cfg, key, value)
        return cfg

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert graph.enabled(config(), gpu)
    assert graph.enabled(config(graph=True), gpu)
    assert not graph.enabled(config(graph=False), gpu)
    assert not graph.enabled(config(), cpu)
    for key, value, reason in (
        ("recipe.precision", "float16", "precision=float16 asks"),
        ("probe.name", "batch_statistics", "probe=batch_statistics looks into every step"),
        ("debug", {"name": "profile"}, "debug=profile shows"),
    ):
        assert graph.unsupported_reason(config(**{key: value}), gpu).startswith(reason)
        assert not graph.enabled(config(**{key: value}), gpu)
        with pytest.raises(ValueError, match=r"^runtime.graph=true: no CUDA graph, "):
            graph.enabled(config(graph=True, **{key: value}), gpu)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert graph.unsupported_reason(config(), gpu) == "devices=2 share a step"


def test_asked_for_without_a_gpu(train):
    outcome = train("runtime.graph=true", "device=cpu")
    expected = "error: runtime.graph=true: no CUDA graph, device=cpu has none; expected auto or"
    assert outcome.err.splitlines() == [f"{expected} false"]
    assert not outcome.runs.exists()


def test_frozen_statistics_are_recorded_anew(played):
    recorded, plain = pair("bn", {})
    same(recorded, plain)
    for step in (recorded, plain):
        step.freeze_statistics()
        step.freeze_statistics()  # as every epoch does
    before = [value.clone() for value in recorded.model.buffers()]
    same(recorded, plain)
    assert len(played) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, recorded.model.buffers(), strict=True))
