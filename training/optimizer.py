"""The optimizer's parameter groups and its learning rate."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


def parameter_groups(model: nn.Module, recipe: Any) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, by the type of their module.

    Without: those that a layer names in `no_weight_decay`; and, unless `recipe.weight_decay_norms`,
    whatever is not the weight of a convolution, a linear layer or an embedding.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = name in getattr(module, "no_weight_decay", ())
            is_weight = isinstance(module, WEIGHTS) and name == "weight"
            keep = not exempt and (recipe.weight_decay_norms or is_weight)
            (decayed if keep else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def sgd(model: nn.Module, recipe: Any, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameter_groups(model, recipe),
        lr=lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        fused=True,
    )


def adamw(model: nn.Module, recipe: Any, lr: float) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101): each step takes lr * weight_decay *
    weight from a weight."""
    groups = parameter_groups(model, recipe)
    on_gpu = groups[0]["params"][0].is_cuda  # where a step may be recorded
    return torch.optim.AdamW(
        groups, lr=lr, betas=tuple(recipe.betas), fused=True, capturable=on_gpu
    )


def build(model: nn.Module, recipe: Any, lr: float) -> torch.optim.Optimizer:
    """The one of `recipe.optimizer`."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}
    return kinds[recipe.optimizer](model, recipe, lr)


def learning_rate(update: int, updates: int, peak: float, recipe: Any) -> float:
    """For update 0, 1, … of `updates`: a linear rise, then the schedule from `peak` down."""
    warmup = round(recipe.warmup * updates)
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if recipe.schedule == "step":
        return peak * recipe.lr_decay ** sum(
            update >= round(m * updates) for m in recipe.milestones
        )
    done = (update - warmup) / max(1, updates - warmup)
    return peak * (1 - done if recipe.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
