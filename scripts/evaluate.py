"""How good a run's network is, as a whole and class by class, on its test images or on others.

    python scripts/evaluate.py runs/STUDY/RUN
    python scripts/evaluate.py runs/STUDY/RUN data=folder data.root=PATH device=cpu
    python scripts/evaluate.py runs/STUDY/RUN --folded --csv classes.csv --json evaluation.json

Evaluates the last checkpoint, also of a run that is not over, with the moving average of the
weights where it has one. Other data (`data=…`, `data.KEY=…`) must have the classes of the run's;
its pixels are normalized as the run's training images were.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import data
import norms
from data.transforms import CROPS
from scripts.export import configuration, outcome, trained
from training import device as devices
from training.cli import MISTAKES, explain
from training.config import check
from training.files import write
from training.loop import evaluate
from training.progress import say
from training.run import plain
from training.study import composed, composing

OWN = ("data", "device", "runtime.eval_batch", "runtime.threads")  # what may differ from the run
SHOWN = 10  # of the worst and of the best classes


def configured(run: DictConfig, overrides: list[str]) -> DictConfig:
    """A run's configuration with other data or another device. Raises what composing raises."""
    keys = [str(o.key_or_group) for o in OverridesParser.create().parse_overrides(overrides)]
    for key, word in zip(keys, overrides, strict=True):
        if key not in OWN and not key.startswith("data."):
            raise ValueError(
                f"{word}: is the run's; expected data.KEY=… or one of {', '.join(OWN)}"
            )
    with composing():
        words = overrides if "data" in keys else [f"data={run.data.name}", *overrides]
        own, full = composed(*words)
        HydraConfig.instance().set_config(full)
        check(own)
    cfg = run.copy()
    cfg.data = own.data if "data" in keys else OmegaConf.merge(own.data, run.data)
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
        self.source = data.find(cfg.data, 1, recipe)

    def load(self, where: torch.device, debug: Any = None) -> Any:
        keys = dict(say=say, debug=debug)
        return data.load(self.source, self.cfg.data, self.recipe, 1, self.cfg.seed, where, **keys)


def normalize_as(loader: Any, pixels: dict[str, Any]) -> bool:
    """Give the images of a loader the normalization `pixels` of a run's result; returns whether
    their channels have still to be reversed."""
    reverse = pixels.get("reversed", False) and not loader.reversed
    if (loader.mean, loader.std) != (pixels["mean"], pixels["std"]):
        constants = torch.tensor([pixels["mean"], pixels["std"]], device=loader.scale.device)
        mean, std = constants[:, :, None, None].flip(1 if reverse else ())
        loader.scale, loader.shift = 1 / (255 * std), -mean / std
    return reverse


def measure(run: Path, overrides: list[str], folded: bool, averaged: bool) -> dict[str, Any]:
    """Accuracies in %, `classes` with a row for each. Raises `ValueError`, `OSError` and what
    composing raises."""
    own = configuration(run)
    cfg = configured(own, overrides)
    where = devices.find(cfg.device)
    result = outcome(run) if (run / "result.json").exists() else None
    images = home = Images(cfg)
    same = cfg.data == OmegaConf.merge(cfg.data, own.data)
    if not same and not result:
        home = Images(own)
    elif not same:
        with suppress(*MISTAKES):  # it need not be there any more
            home = Images(own)
    source = images.source
    classes = result["classes"] if result else home.source.num_classes
    channels = result["image_shape"][0] if result else home.source.channels
    if (source.num_classes, source.channels) != (classes, channels):
        raise ValueError(
            f"data={cfg.data.name}: {source.num_classes} classes and {source.channels} channels; "
            f"expected the run's {classes} and {channels}"
        )
    model, scheme, state = trained(run, cfg, classes, channels, averaged)
    if folded:
        model = norms.fold(model)
    devices.prepare(where, cfg.runtime.threads, state, say)
    debug = own.get("debug")  # a run that looked at some images only
    loader = images.load(where, debug if same else None)
    pixels = result["pixels"] if result else None
    if pixels is None:
        origin = loader if same else home.load(torch.device("cpu"), debug)
        pixels = {"mean": origin.mean, "std": origin.std, "reversed": origin.reversed}
    reverse = normalize_as(loader, pixels)
    for i, (here, there) in enumerate(zip(source.classes, home.source.classes, strict=False)):
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
        for x, labels in loader.test(cfg.runtime.eval_batch):
            truth.append(labels.cpu())
            yield x.flip(1) if reverse else x, labels

    layout = devices.memory_format(cfg.runtime.get("channels_last"), scheme.channels_last)
    model.to(where).to(memory_format=layout).register_forward_hook(answer)
    half = torch.float16 if cfg.recipe.precision == "float16" else torch.bfloat16
    with torch.autocast(where.type, half, enabled=cfg.recipe.precision != "float32"):
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
        "data": cfg.data.name,
        "root": cfg.data.get("root"),
        "images": len(index),
        "top1": found["test_top1"],
        "top5": found["test_top5"],
        "loss": found["test_loss"],
        "as_in_result": result["top1"] == found["test_top1"] if result and same else None,
        "classes": rows,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The figures, and the classes from the worst to the best, of many only the two ends."""
    of = "finished" if found["finished"] else f"not over, after update {found['update']}"
    what = [of, *(["moving average of the weights"] if found["weights"] == "average" else [])]
    what += ["folded"] if found["folded"] else []
    console.print(f"{found['run']} ({', '.join(what)})", markup=False)
    on = found["data"] + (f", {found['root']}" if found["root"] else "")
    told = {True: "; top-1 as in result.json", False: "; another top-1 than in result.json"}
    console.print(
        f"  top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f} "
        f"over {found['images']:,} test images of {on}{told.get(found['as_in_result'], '')}",
        markup=False,
    )
    rows = sorted((r for r in found["classes"] if r["images"]), key=lambda r: r["top1"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("class", "images", "top-1 (%)", "most often taken for"):
        table.add_column(title, justify="right" if title in ("images", "top-1 (%)") else "left")
    for i, row in enumerate(rows):
        if SHOWN <= i < len(rows) - SHOWN:
            if i == SHOWN:
                table.add_row(f"… {len(rows) - 2 * SHOWN} more")
            continue
        table.add_row(row["name"], f"{row['images']}", f"{row['top1']:.2f}", row["taken_for"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("overrides", nargs="*", help="data=… data.KEY=… device=… and the like")
    parser.add_argument("--folded", action="store_true", help="the network that norms.fold makes")
    parser.add_argument("--last", action="store_true", help="the weights, not their moving average")
    parser.add_argument("--csv", type=Path, help="file to write the classes to")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    args = parser.parse_intermixed_args()
    try:
        for file in (args.csv, args.json):
            if file and not file.parent.is_dir():
                raise ValueError(f"{file}: its folder does not exist; expected one that does")
        found = measure(args.run, args.overrides, args.folded, not args.last)
        show(found, Console(highlight=False, soft_wrap=True))
        if args.csv:
            text = io.StringIO()
            writer = csv.DictWriter(text, found["classes"][0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(found["classes"])
            write(args.csv, text.getvalue())
        if args.json:
            write(args.json, json.dumps(plain(found), indent=2) + "\n")
    except MISTAKES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
