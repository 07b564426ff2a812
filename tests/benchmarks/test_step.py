from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import norms
from benchmarks import bandwidth, formulas, step


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("scheme", step.SCHEMES)
def test_plain_networks_compute_what_ours_do(scheme, batch):
    """In the first update, where MABN's window is still its own batch."""
    results = []
    for form in (lambda model: model, step.plain):
        model = form(step.build("resnet8", scheme, batch, 5)[0])
        for layer in model.modules():
            if isinstance(layer, formulas.PlainMABN):
                layer.batches = 0
        torch.manual_seed(3)
        loss = nn.functional.cross_entropy(
            model(torch.randn(batch, 3, 16, 16)), torch.arange(batch) % 5
        )
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.ndim == 4]))
    (ours, gradients), (theirs, others) = results
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert len(gradients) == len(others)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("scheme", step.SCHEMES)
def test_plain_networks_have_no_layer_of_ours(scheme):
    model = step.plain(step.build("resnet50", scheme, 2, 5)[0])
    own = tuple(getattr(norms, name) for name in norms.__all__ if name.endswith("2d"))
    library = (nn.BatchNorm2d, nn.GroupNorm, *own)
    assert not [layer for layer in model.modules() if isinstance(layer, library)]


def test_a_variant_that_fails_takes_no_other_with_it():
    def broken():
        raise RuntimeError("out of memory")

    rows = step.compare(
        {"timm": lambda: lambda: None, "plain": broken, "eager": lambda: lambda: None},
        batch=2,
        where=torch.device("cpu"),
        rounds=2,
        span=0.0,
    )
    assert rows["plain"] == {"error": "RuntimeError: out of memory"}
    assert rows["timm"]["ratio"] == 1
    assert rows["eager"]["ratio"] > 0


def test_what_a_gpu_is_asked(monkeypatch):
    """The calls that no CPU has, with a device that does nothing."""
    asked = []

    class Nothing:
        def __init__(self, *_):
            pass

        def __getattr__(self, name):
            return lambda *_: asked.append(name)

    memory = dict(memory_allocated=1, max_memory_allocated=2**30 + 1)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    where = SimpleNamespace(type="cuda")

    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    makers = step.variants("resnet8", "mabn", x, y, 10)
    rows = step.compare(
        {name: makers[name] for name in ("timm", "captured")}, 2, where, rounds=1, span=0.0
    )
    assert rows["captured"]["peak_memory_bytes"] == 2**30
    assert asked.count("replay") == 6  # from the fourth update on: 2 to warm up, 2 to count, 2
    asked.clear()
    rows = bandwidth.measure({"fine": lambda: None, "broken": lambda: 1 / 0}, 2, where)
    assert rows["broken"] == {"error": "ZeroDivisionError: division by zero"}
    assert rows["fine"]["ms"] >= 0
    assert asked.count("replay") == 3
