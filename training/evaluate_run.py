"""How good a finished run's network is, as a whole and class by class, on its test images or on
others."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import data
import norms
from data.transforms import CROPS
from training import dataset, protocol
from training import device as devices
from training.cli import as_typed
from training.config import check, typed
from training.evaluation import (
    check_statistics,
    evaluate,
    evaluated_by,
    images_at_once,
    with_statistics,
)
from training.files import read_data
from training.messages import MISTAKES
from training.restore import configuration, read_finished, trained
from training.study import composed, composing

# What may differ from the run.
OWN = ("data", "device", "runtime.eval_batch", "runtime.threads")
OWN_GROUPS = ("data.", "evaluation.")


def with_overrides(run: DictConfig, overrides: list[str]) -> DictConfig:
    """A run's configuration with other data or another device. Raises what composing raises."""
    overrides = [as_typed(word) for word in overrides]
    keys = [str(o.key_or_group) for o in OverridesParser.create().parse_overrides(overrides)]
    for key, word in zip(keys, overrides, strict=True):
        if key not in OWN and not key.startswith(OWN_GROUPS):
            raise ValueError(
                f"{word}: is the run's; expected data.KEY=…, evaluation.KEY=… or one of "
                f"{', '.join(OWN)}"
            )
    with composing():
        words = [] if "data" in keys else [f"data={run.data.name}"]
        words += [f"evaluation.statistics={evaluated_by(run).statistics}", *overrides]
        own, full = composed(*words)
        HydraConfig.instance().set_config(full)
        check(own)
    cfg = run.copy()
    cfg.data = own.data if "data" in keys else OmegaConf.merge(own.data, run.data)
    cfg.evaluation = evaluated_by(run)
    for key in keys:
        if key != "data":
            OmegaConf.update(cfg, key, OmegaConf.select(own, key))
    return cfg


class Images:
    """The test images of a configuration, whatever its training makes of the others."""

    def __init__(self, cfg: DictConfig):
        plain = {"flip": False, "lighting": 0.0, "mixup": 0.0, "cutmix": 0.0}
        recipe = OmegaConf.merge(cfg.recipe, plain)
        if recipe.crop not in CROPS:
            recipe.crop = "random_resized" if cfg.data.name == "imagenet" else 0
        elif cfg.data.name not in ("imagenet", "folder"):  # which have images of all sizes
            recipe = OmegaConf.merge(recipe, {"crop": 0, "pixels": "standardized"})
        self.cfg, self.recipe = cfg, recipe
        self.source = data.resolve(cfg.data, 1, recipe)

    def load(self, where: torch.device, debug: Any = None) -> Any:
        return data.load(
            self.source, self.cfg.data, self.recipe, 1, self.cfg.seed, where, debug=debug
        )


def normalize_as(loader: Any, pixels: dict[str, Any]) -> bool:
    """Give the images of a loader the normalization `pixels` of a run's result; returns whether
    their channels have still to be reversed."""
    reverse = pixels.get("reversed", False) and not loader.reversed
    if (loader.mean, loader.std) != (pixels["mean"], pixels["std"]):
        constants = torch.tensor([pixels["mean"], pixels["std"]], device=loader.scale.device)
        mean, std = constants[:, :, None, None].flip(1 if reverse else ())
        loader.scale, loader.shift = 1 / (255 * std), -mean / std
    return reverse


def check_data(run: Path, cfg: DictConfig, source: data.Source) -> None:
    """Raise `ValueError` if the images of a run's own configuration are others by now."""
    if differ := dataset.compare(run, cfg, source.listing):
        raise ValueError(
            f"data.root={cfg.data.get('root')}: not the data of {run} any more "
            f"({'; '.join(differ)}); data.root=PATH evaluates on others of the same classes"
        )


def trained_on(run: Path, cfg: DictConfig, where: torch.device) -> Any:
    """The training images of a run as it saw them."""
    plan = protocol.plan(typed(cfg))
    source = data.resolve(cfg.data, plan.sgd_batch, cfg.recipe)
    check_data(run, cfg, source)
    return data.load(
        *(source, cfg.data, cfg.recipe, plan.sgd_batch, cfg.seed, where), debug=cfg.get("debug")
    )


def measure(run: Path, overrides: list[str], folded: bool, averaged: bool) -> dict[str, Any]:
    """Accuracies in %, `classes` with a row for each. Raises `ValueError`, `OSError` and what
    composing raises."""
    own = configuration(run)
    cfg = with_overrides(own, overrides)
    where = devices.resolve(cfg.device)
    result = read_finished(run) if (run / "result.json").exists() else None
    images = home = Images(cfg)
    same = cfg.data == OmegaConf.merge(cfg.data, own.data)
    kept = run / dataset.FILE
    if not same and not result:
        home = Images(own)
    elif not same and not kept.exists():
        with suppress(*MISTAKES):  # it need not be there any more
            home = Images(own)
    source = images.source
    if not result or not {"data", "data.root"} & {word.split("=")[0] for word in overrides}:
        check_data(run, own, home.source)
    classes = result["classes"] if result else home.source.num_classes
    channels = result["image_shape"][0] if result else home.source.channels
    if (source.num_classes, source.channels) != (classes, channels):
        raise ValueError(
            f"data={cfg.data.name}: {source.num_classes} classes and {source.channels} channels; "
            f"expected the run's {classes} and {channels}"
        )
    model, scheme, state = trained(run, cfg, classes, channels, averaged)
    by = cfg.evaluation
    if folded and (by.statistics == "batch" or by.alpha):
        key = "alpha" if by.alpha else "statistics"
        raise ValueError(
            f"evaluation.{key}={by[key]}: --folded leaves no batch norms; expected "
            f"{'0.0' if by.alpha else 'running or precise'}"
        )
    check_statistics(by, 0, model, scheme)
    devices.prepare(where, cfg.runtime.threads, None, state)
    debug = own.get("debug")  # a run that looked at some images only
    loader = images.load(where, debug if same else None)
    pixels = result["pixels"] if result else None
    if pixels is None:
        origin = loader if same else home.load(torch.device("cpu"), debug)
        pixels = {"mean": origin.mean, "std": origin.std, "reversed": origin.reversed}
    reverse = normalize_as(loader, pixels)
    theirs = list(read_data(kept)["files"]["train"]) if kept.exists() else home.source.classes
    for i, (here, there) in enumerate(zip(source.classes, theirs, strict=False)):
        if here != there:
            raise ValueError(
                f"data={cfg.data.name}: class {i} is {here}, the run's is {there}; expected the "
                f"classes of the run"
            )

    answers: list[Tensor] = []
    truth: list[Tensor] = []

    def answer(model: nn.Module, inputs: Any, logits: Tensor) -> None:
        answers.append(logits.float().topk(min(5, classes), 1).indices[:, 0].cpu())

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, labels in loader.test(images_at_once(by, cfg.runtime.eval_batch)):
            truth.append(labels.cpu())
            yield x.flip(1) if reverse else x, labels

    layout = devices.memory_format(cfg.runtime.get("channels_last"), scheme.channels_last)
    model.to(where).to(memory_format=layout)
    half = torch.float16 if cfg.recipe.precision == "float16" else torch.bfloat16
    with torch.autocast(where.type, half, enabled=cfg.recipe.precision != "float32"):
        model = with_statistics(
            model, by.statistics == "precise" and trained_on(run, own, where), by
        )
        if folded:
            model = norms.fold(model)
        model.register_forward_hook(answer)
        found = evaluate(model, batches())
    index = torch.cat(truth) * classes + torch.cat(answers)
    table = index.bincount(minlength=classes**2).view(classes, classes)  # truth by answer
    wrong = table - table.diag().diag()
    names = source.classes or [str(i) for i in range(classes)]
    rows = [
        {
            "class": i,
            "name": names[i],
            "images": total,
            "correct": correct,
            "top1": 100 * correct / total if total else None,
            "taken_for": names[int(wrong[i].argmax())] if total > correct else None,
        }
        for i, (total, correct) in enumerate(
            zip(table.sum(1).tolist(), table.diag().tolist(), strict=True)
        )
    ]
    return {
        "run": str(run),
        "update": state["progress"]["update"],
        "finished": result is not None,
        "weights": "average" if averaged and state.get("ema") else "last",
        "folded": folded,
        "evaluation": OmegaConf.to_container(by),
        "data": cfg.data.name,
        "root": cfg.data.get("root"),
        "images": len(index),
        "top1": found["test_top1"],
        "top5": found["test_top5"],
        "loss": found["test_loss"],
        "as_in_result": result["top1"] == found["test_top1"]
        if result and same and by == evaluated_by(own)
        else None,
        "classes": rows,
    }
