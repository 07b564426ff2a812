"""How good a network is, and by which statistics its batch norms normalize test images."""

import copy
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import norms
from data.stream import regroup
from norms.layer import Leaf
from training import distributed
from training.schema import Evaluation

log = logging.getLogger("smallbatch")

RUNNING = {"statistics": "running", "batches": 100, "batch_size": 100, "alpha": 0.0}


def batch_norms(model: nn.Module) -> list[Any]:
    """What PyTorch knows as batch norms; of ours all but `evonorm_b0` that follow the batch."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


def check_statistics(by: Evaluation, freeze: int, model: nn.Module, scheme: norms.Scheme) -> None:
    """Raise `ValueError` where statistics of a network cannot be chosen as `by`, the group
    `evaluation`, or frozen; say where it has none."""
    keys = {  # usual value, value
        "evaluation.statistics": ("running", by.statistics),
        "evaluation.alpha": (0.0, by.alpha),
        "recipe.freeze_statistics": (0, freeze),
    }
    for key, (usual, value) in keys.items():
        if value == usual or batch_norms(model):
            continue
        if not scheme.batch_independent:
            raise ValueError(
                f"{key}={value}: the layers of norm={scheme.name} are no batch norms to PyTorch; "
                f"expected {usual}"
            )
        log.info(f"{key}={value}: norm={scheme.name} has no running statistics, nothing changes")


def with_statistics(model: nn.Module, loader: Any, by: Evaluation) -> nn.Module:
    """The network to evaluate: `model`, or, where `by` (the group `evaluation`) asks for other
    statistics than its running ones, a copy of it that has them, so that whoever interrupts saves
    the network as it was. `loader` has training images."""
    if (by.statistics == "running" and not by.alpha) or not batch_norms(model):
        return model
    model = copy.deepcopy(model)
    if by.statistics == "precise":
        reestimate(model, training_images(loader, by.batch_size, by.batches))
    if by.statistics == "batch" or by.alpha:
        alpha = None if by.statistics == "batch" else by.alpha
        for layer, norm in called_batch_norms(model):
            layer.register_forward_pre_hook(partial(renormalize, norm, alpha))
    return model


def evaluated_by(cfg: Any) -> Any:
    """The group `evaluation` as it counts at the end of a training: frozen statistics are not
    estimated anew."""
    by = OmegaConf.merge(RUNNING, cfg.get("evaluation", {}))
    if by.statistics == "precise" and cfg.recipe.get("freeze_statistics"):
        by.statistics = "running"
    return by


def images_at_once(by: Evaluation, eval_batch: int) -> int:
    """Test images of a forward pass."""
    return by.batch_size if by.statistics == "batch" else eval_batch


def training_images(loader: Any, size: int, count: int) -> Iterator[Tensor]:
    """The first whole batches of epoch 0, each process's part of `count` of them; of fewer images,
    a single batch of all."""
    blocks = regroup(((images,) for images, _ in loader.train(0)), size)
    for i, (images,) in enumerate(islice(blocks, -(-count // distributed.world_size()))):
        if i == 0 or len(images) == size:
            yield images


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the state of all batch norms to what these batches, each as a whole, give under fixed
    weights: PyTorch's `update_bn`, averaged over processes."""
    layers = [layer for layer in batch_norms(model) if hasattr(layer, "batch_size")]
    sizes = [layer.batch_size for layer in layers]
    device = next(model.parameters()).device
    for layer in layers:
        layer.batch_size = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # of dropout
        update_bn(batches, model)
    for layer, size in zip(layers, sizes, strict=True):
        layer.batch_size = size
    if distributed.world_size() > 1:
        for norm in batch_norms(model):
            for value in norm.buffers():
                if value.is_floating_point():
                    distributed.all_reduce(value).div_(distributed.world_size())


def called_batch_norms(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Every batch norm, and in front of it the layer that is called: itself, or one of ours around
    it, which takes its statistics without calling it."""
    around = {
        norm: layer
        for layer in model.modules()
        if isinstance(layer, Leaf) and not isinstance(layer, _BatchNorm)
        for norm in batch_norms(layer)
    }
    return [(around.get(norm, norm), norm) for norm in batch_norms(model)]


def renormalize(norm: Any, alpha: float | None, layer: nn.Module, inputs: Any) -> Any:
    """The input for which a batch norm, normalizing by its running mean and variance, returns what
    it would by others: those of this batch, or, with `alpha`, those of (1 - alpha) of the running
    E[x] and E[x^2] and alpha of each image's own (Summers and Dinneen, arXiv 1906.03548)."""
    x, *rest = inputs
    wide = x if x.dtype == torch.float64 else x.float()
    maps = tuple(range(2, x.dim()))
    shape = (1, -1, *(1 for _ in maps))
    running_mean, running_var = (v.view(shape) for v in (norm.running_mean, norm.running_var))
    over = maps if alpha is not None else (0, *maps)

    def average(values: Tensor) -> Tensor:
        return values.mean(over, keepdim=True) if over else values

    mean = average(wide) * getattr(norm, "centers", True)
    if alpha is None:
        var = average((wide - mean).square())
    else:
        mean = torch.lerp(running_mean.expand_as(mean), mean, alpha)
        square = (running_var + running_mean.square()).expand_as(mean)
        var = (torch.lerp(square, average(wide.square()), alpha) - mean.square()).clamp_min(0)
    factor = torch.sqrt((running_var + norm.eps) / (var + norm.eps))
    return ((wide - mean) * factor + running_mean, *rest)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean cross-entropy and the accuracies in %, over every image once."""
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in batches:
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack(
            [loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(loss) * len(labels)]
        )
    loss, top1, top5, count = distributed.all_reduce(sums).tolist()
    return {
        "test_loss": loss / count,
        "test_top1": 100 * (top1 / count),
        "test_top5": 100 * (top5 / count),
    }
