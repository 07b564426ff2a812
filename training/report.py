"""What a run says before it starts, and the result that it leaves."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from training import graph
from training.compile import Choice
from training.config import choices
from training.evaluation import batch_norms, evaluated_by
from training.loop import Progress
from training.protocol import Plan
from training.schema import Config

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy")


def model_name(cfg: Config) -> str:
    library, name = cfg.model["library"], cfg.model["name"]
    return f"{library}/{name}" if library else name


def channels_last(model: nn.Module) -> bool:
    """Whether its convolutions' weights lie so in memory."""
    maps = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    return any(p.is_contiguous(memory_format=torch.channels_last) for p in maps)


def plural(count: int, what: str) -> str:
    """As in 1 update, 2 updates."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def describe(
    cfg: Config,
    plan: Plan,
    model: nn.Module,
    loader: Any,
    device: torch.device,
    choice: Choice,
) -> str:
    """The numbers that follow from the configuration, in a few lines."""
    recipe, per_epoch = cfg.recipe, len(loader)
    groups, passes = plan.micro_batch // plan.batch, plan.per_device_batch // plan.micro_batch
    how = (
        f"{passes} forward passes of {plan.micro_batch} images"
        if passes > 1
        else "one forward pass"
    )
    if groups > 1:
        how += f", {groups} groups of {plan.batch} in each"
    if plan.devices > 1:
        how = f"on each of {plan.devices} devices, {how}"
    if recipe.updates:
        length = f"{plural(recipe.updates, 'update')}, an epoch has {per_epoch}"
    else:
        length = f"{plural(recipe.epochs or 0, 'epoch')} of {plural(per_epoch, 'update')}"
    left = f", leaving out {plural(loader.dropped, 'image')}" if loader.dropped else ""
    why = graph.unsupported_reason(cfg, device)
    clip = 0.0 if recipe.clip == "agc" else float(recipe.clip)
    extras = {
        f"clip {clip:g}": clip,
        f"mixup {recipe.mixup:g}": recipe.mixup,
        f"cutmix {recipe.cutmix:g}": recipe.cutmix,
        f"adaptive gradient clipping {recipe.clip_factor:g}": recipe.clip == "agc",
        "adamw": recipe.optimizer == "adamw",
        f"evaluated is the weights' moving average ({recipe.ema:g})": recipe.ema,
        "channels last in memory": channels_last(model),
        "the step recorded as a CUDA graph": graph.enabled(cfg, device),
        f"no CUDA graph, {why}": why and device.type == "cuda" and cfg.runtime.graph is not False,
        f"compiled ({choice.mode}): {choice.reason}": choice.mode != "false",
        f"not compiled: {choice.reason}": choice.mode == "false",
    }
    also = ", ".join(text for text, there in extras.items() if there)
    also = f"  {also}\n" if also else ""
    on = plural(torch.get_num_threads(), "thread") if device.type == "cpu" else ""
    if device.type == "cuda":
        on = torch.cuda.get_device_name(device)
    return (
        f"  batch size {plan.batch} (images that share statistics), SGD batch {plan.sgd_batch} "
        f"({cfg.protocol.name}: {how})\n"
        f"  learning rate {plan.lr:g} = {recipe.lr:g} x {plan.sgd_batch} / {recipe.lr_batch}, "
        f"{recipe.schedule}; {length}{left}\n"
        f"{also}"
        f"  {model_name(cfg)} with {parameters(model):,} parameters on {cfg.data.name}: "
        f"{len(loader.labels):,} training, {len(loader.test_labels):,} test images; "
        f"{device.type}{', ' if on else ''}{on}"
    )


def hyperparameters(cfg: Config, plan: Plan) -> dict[str, Any]:
    """The same keys in every run, none of them empty: TensorBoard drops a column otherwise."""
    return {
        "norm": choices()["norm"],
        "batch_size": plan.batch,
        "sgd_batch_size": plan.sgd_batch,
        "protocol": cfg.protocol.name,
        "learning_rate": plan.lr,
        "model": model_name(cfg),
        "data": cfg.data.name,
        "recipe": cfg.recipe.name,
        "seed": cfg.seed,
    }


def closing(result: dict[str, Any]) -> str:
    """The line behind a run."""
    if result["status"] == "diverged":
        return f"  diverged: the loss of update {result['diverged_at_update']} is not finite"
    return (
        f"  top-1 {result['top1']:.2f} % after {plural(result['updates'], 'update')}, "
        f"{result['wall_seconds']:.1f} s"
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def result(
    cfg: Config,
    plan: Plan,
    source: Any,
    model: nn.Module,
    loader: Any,
    batch_independent: bool,
    now: Progress,
) -> dict[str, Any]:
    """The content of result.json. Accuracies in %, times in seconds; null after divergence.
    `image_shape`, `classes` and `pixels` are what it takes to use the network without the data."""
    device = next(model.parameters()).device
    rows = [r for r in now.rows if r["test_top1"] != ""]
    diverged = now.diverged
    last = rows[-1] if rows and not diverged else {}
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "status": "diverged" if diverged else "finished",
        "diverged_at_update": now.diverged_at,
        "top1": last.get("test_top1"),
        "top5": last.get("test_top5"),
        "best_top1": max(r["test_top1"] for r in rows) if last else None,
        "test_loss": last.get("test_loss"),
        "study": cfg.study,
        **hyperparameters(cfg, plan),
        "debug": getattr(getattr(cfg, "debug", None), "name", None),
        "micro_batch": plan.micro_batch,
        "devices": plan.devices,
        "ema": cfg.recipe.ema,
        "evaluation": dict(evaluated_by(cfg)) if batch_norms(model) else None,
        "epochs": now.update / len(loader),
        "updates": now.update,
        "parameters": parameters(model),
        "batch_independent": batch_independent,
        "train_images": len(loader.labels),
        "test_images": len(loader.test_labels),
        "ignored_files": sum(n for n, _ in source.listing.ignored.values())
        if source.listing
        else 0,
        "unreadable_images": sum(loader.unreadable.values()),
        "image_shape": [source.channels, source.size, source.size],
        "classes": source.num_classes,
        "pixels": {"mean": loader.mean, "std": loader.std, "reversed": loader.reversed},
        "images_per_second": now.update * plan.sgd_batch / max(now.train_seconds, 1e-9),
        "wall_seconds": now.wall_seconds,
        "peak_memory_bytes": memory,
        "threads": torch.get_num_threads(),
        "compiled": now.compiled.mode,
        "compiled_reason": now.compiled.reason,
        "graph": now.graph,
        "channels_last": channels_last(model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }
