"""The optimizer's parameter groups and its learning rate."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.schema import Recipe

WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by weight decay, which follows from the type of their module, and by the divisor
    of their learning rate, which a layer may name in `lr_divisor`.

    Without weight decay: those that a layer names in `no_weight_decay`; and, unless
    `recipe.weight_decay_norms`, whatever is not the weight of a convolution, a linear layer or an
    embedding.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = name in getattr(module, "no_weight_decay", ())
            is_weight = isinstance(module, WEIGHTS) and name == "weight"
            keep = not exempt and (recipe.weight_decay_norms or is_weight)
            divisor = getattr(module, "lr_divisor", {}).get(name, 1.0)
            groups.setdefault((keep, divisor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if keep else 0.0}
        | ({} if divisor == 1 else {"lr_divisor": divisor})
        for (keep, divisor), parameters in groups.items()
        if parameters
    ]


def all_but_the_head(model: nn.Module) -> list[nn.Parameter]:
    """What adaptive gradient clipping clips: the parameters without those of the last linear
    layer."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    head = set(linear[-1].parameters()) if linear else set()
    return [p for p in model.parameters() if p not in head]


class Light:
    """An optimizer that leaves PyTorch's compiler alone, which others load in order to tell it that
    it need not look at them: two of the five seconds in which a run would start."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(Light, torch.optim.SGD):
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(Light, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def sgd(model: nn.Module, recipe: Recipe, lr: float) -> SGD:
    return SGD(
        parameter_groups(model, recipe),
        lr=lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        fused=True,
    )


def adamw(model: nn.Module, recipe: Recipe, lr: float) -> AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101): each step takes lr * weight_decay *
    weight from a weight."""
    groups = parameter_groups(model, recipe)
    on_gpu = groups[0]["params"][0].is_cuda  # where a step may be recorded
    first, second = recipe.betas
    return AdamW(groups, lr=lr, betas=(first, second), fused=True, capturable=on_gpu)


def build(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """The one of `recipe.optimizer`."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}
    return kinds[recipe.optimizer](model, recipe, lr)


def learning_rate(update: int, updates: int, peak: float, recipe: Recipe) -> float:
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
