"""How a run's network is computed: compiled as a whole, layer by layer, or as it is written."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from norms.layer import Leaf

Mode = Literal["network", "layers", "false"]

# On one core of a Xeon: what convolutions do in a second of ResNet-20's training, and how long an
# update takes to start however small it is.
MULTIPLY_ADDS_PER_SECOND = 40e9
UPDATE_OVERHEAD = 3e-3
# Seconds of training from which compiling pays on a CPU: for ResNet-20 it takes 40 to 80 the first
# time and saves a tenth (PyTorch's batch norm) to a half (`bn` in groups) of a step, so from 80 to
# 800 on (results/training).
MIN_SECONDS = 300
MIN_MULTIPLY_ADDS = 1e8  # of a forward pass from which two threads are faster than one


@dataclass(frozen=True)
class Choice:
    """How to compute, and why so."""

    mode: Mode
    reason: str


EAGER = Choice("false", "as told")


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Of one image's forward pass, in convolutions and linear layers."""
    total = 0

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    return total


def estimate_seconds(multiply_adds: int, updates: int, images: int) -> float:
    """About how long a training takes on one core; `images`: of an update on this device."""
    return updates * (UPDATE_OVERHEAD + 3 * images * multiply_adds / MULTIPLY_ADDS_PER_SECOND)


def choose(setting: str | bool, device: str, expected: float, before: Mode | None) -> Choice:
    """`setting`: the key `runtime.compile`; `device`: its type; `expected`: seconds of training on
    one core; `before`: how a checkpoint was computed, which `auto` keeps to."""
    if setting != "auto":
        return Choice(setting or "false", "as told")  # type: ignore[arg-type]
    if before:
        return Choice(before, "as its checkpoint was made")
    if device != "cpu":
        return Choice("network", f"on device={device}")
    if expected < MIN_SECONDS:
        return Choice("false", "training is too short to gain from compiling")
    return Choice("network", "training is long enough to gain from compiling")


def threads(setting: str | int, multiply_adds: int, images: int) -> int | None:
    """`runtime.threads`: None leaves the number to PyTorch. `auto` takes one where a forward pass
    of so many images is too small to be worth sharing."""
    if setting != "auto":
        return int(setting)
    return 1 if images * multiply_adds < MIN_MULTIPLY_ADDS else None


def own_layers(model: nn.Module) -> list[nn.Module]:
    """Our norms and convolutions, but for those that lie in another."""
    inside: set[nn.Module] = set()
    for layer in model.modules():
        if isinstance(layer, Leaf):
            inside |= {*layer.modules()} - {layer}
    return [x for x in model.modules() if isinstance(x, Leaf) and x not in inside]


def compiled(model: nn.Module, mode: Mode) -> Any:
    """What computes, with the weights of `model`; compiles when it is called."""
    if mode == "false":
        return model
    torch.compiler.reset()  # an earlier run's code of this process does not fit
    # An entry for each layer, shape and mode; an error, not quietly eager, when they are used up.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if mode == "network":
        return torch.compile(model, dynamic=False)
    for layer in own_layers(model):
        layer.compile(dynamic=False)
    return model


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
