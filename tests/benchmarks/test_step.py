from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks import bandwidth, step


def test_a_variant_that_fails_takes_no_other_with_it():
    def broken():
        raise RuntimeError("out of memory")

    makers = {"timm": lambda: lambda: None, "captured": broken, "eager": lambda: lambda: None}
    rows = step.compare(makers, torch.device("cpu"), rounds=2, span=0.0)
    assert rows["captured"] == {"error": "RuntimeError: out of memory"}
    assert rows["timm"]["speed"] == 1
    assert rows["eager"]["speed"] > 0


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
    there = {name: makers[name] for name in ("timm", "captured")}
    rows = step.compare(there, where, rounds=1, span=0.0)
    assert rows["captured"]["peak_memory_bytes"] == 2**30
    assert asked.count("replay") == 6  # from the fourth update on: 2 to warm up, 2 to count, 2
    asked.clear()
    calls = {"fine": lambda: None, "broken": lambda: 1 / 0}
    there = {name: partial(bandwidth.recorded, call, where) for name, call in calls.items()}
    rows = step.compare(there, where, 2, 0.0)
    assert rows["broken"] == {"error": "ZeroDivisionError: division by zero"}
    assert rows["fine"]["ms"] >= 0
    assert asked.count("replay") == 3 + 2 + 2 + 2 * 2
