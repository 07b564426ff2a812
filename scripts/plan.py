"""What a study will cost, before anyone pays for it.

    python scripts/plan.py experiment=cifar10_table              # the overrides of train.py -m
    python scripts/plan.py experiment=gn_imagenet --speed 938    # images/s of a device you know
    python scripts/plan.py norm=bn,pws batch=2,32 --gpus 1,8,64 --memory 24

For every cell its epochs, updates, time and memory; then the hours of all runs that are not over
yet, on one or more devices with one run on each at a time. The time of an update is that of the
finished runs of the same cell, or else measured here, on random images; `--speed` gives it instead.
Memory is that of weights, gradients and momentum with all that the forward pass keeps for the
backward one, counted without computing anything; a device needs some hundred MiB besides.
"""

import argparse
import heapq
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import data
import models
import norms
from data.imagenet import CLASSES, TRAIN, VAL
from training import device as devices
from training import protocol
from training.cli import MISTAKES, explain
from training.optimizer import build
from training.study import Cell, cells, jobs, state

TEST_IMAGES = {"digits": 359, "cifar10": 10_000, "cifar100": 10_000, "imagenet": VAL}
FORWARD = 1 / 3  # of an update's time per image: the backward pass takes twice the forward one
GIB = 2**30


@dataclass
class Row:
    """The runs of one scheme at one batch size."""

    cfg: DictConfig
    scheme: str
    plan: protocol.Plan
    epochs: float
    updates: int
    test_images: int
    """In all evaluations of a run."""
    memory: int
    """Bytes."""
    batch_free: bool
    runs: int = 0
    left: int = 0
    """Runs that are not over."""
    seconds: float = 0.0
    """Of an update."""
    source: str = ""
    speeds: list[float] = field(default_factory=list)
    """Images/s of the finished runs."""

    @property
    def hours(self) -> float:
        """Of one run."""
        evaluation = self.test_images * FORWARD * self.seconds / self.plan.sgd_batch
        return (self.updates * self.seconds + evaluation) / 3600


def network(cfg: DictConfig, plan: protocol.Plan, classes: int, channels: int) -> Any:
    """The scheme and the untrained network of a run, on the device of the context."""
    options = {k: v for k, v in cfg.norm.items() if k != "name"}
    sizes = dict(batch_size=plan.batch, sgd_batch_size=plan.share)
    scheme = norms.build(cfg.norm.name, **sizes, **options)
    keys = {**cfg.model, "weights": None}
    return scheme, models.build(**keys, scheme=scheme, num_classes=classes, in_channels=channels)


def shape_of_data(cfg: DictConfig, plan: protocol.Plan) -> tuple[int, int, int, int]:
    """Classes, channels, pixels of a side and training images, before any part is left out."""
    if cfg.data.name == "imagenet" and cfg.data.root is None:  # it need not be here yet
        return CLASSES, 3, cfg.data.size, TRAIN
    source = data.find(cfg.data, plan.sgd_batch, cfg.recipe)
    return source.num_classes, source.channels, source.size, source.train_images


def memory(model: torch.nn.Module, shape: tuple[int, ...], half: bool) -> int:
    """Bytes in training, of a network on the meta device and a forward pass of `shape`."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # else another storage could come to have its address
        return tensor

    alive: list[torch.Tensor] = []
    parameters = list(model.parameters())
    own = {p.untyped_storage()._cdata for p in parameters}
    with (
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model.train()(torch.empty(shape))
    held = sum(size for storage, size in kept.items() if storage not in own)
    return held + sum(3 * p.numel() * p.element_size() for p in parameters)


def measure(row: Row, shape: tuple[int, ...], classes: int, where: torch.device) -> float:
    """Seconds of an update, of which on a CPU only a part may be computed."""
    cfg, plan = row.cfg, row.plan
    images = plan.forward
    if where.type == "cpu":  # enough to be in proportion
        enough = 64 if shape[-1] <= 64 else 8
        images = min(plan.forward, plan.batch * math.ceil(enough / plan.batch))
    with torch.device(where):
        _, model = network(cfg, plan, classes, shape[1])
        model.train()
        optimizer = build(model, cfg.recipe, 0.0)
        x, y = torch.randn(images, *shape[1:]), torch.randint(classes, (images,))
    half = torch.float16 if cfg.recipe.precision == "float16" else torch.bfloat16
    cast = torch.autocast(where.type, half, enabled=cfg.recipe.precision != "float32")
    times: list[float] = []
    while len(times) < 2 or (sum(times[1:]) < 1 and len(times) < 30):
        start = time.perf_counter()
        optimizer.zero_grad()
        with cast:
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * plan.sgd_batch / images  # the first one warms up


def rows(found: list[Cell], speed: float | None, where: torch.device, limit: float) -> list[Row]:
    """A row for every scheme and batch size, or whatever else is swept but the seed."""
    made: dict[tuple[str, ...], Row] = {}
    common = set.intersection(*(set(cell.overrides) for cell in found))
    for cell in found:
        key = tuple(o for o in cell.overrides if not o.startswith("seed="))
        own = [o for o in key if o not in common and not o.startswith(("norm=", "batch="))]
        if key not in made:
            plan = protocol.plan(cell.cfg)
            classes, channels, size, images = shape_of_data(cell.cfg, plan)
            shape = (plan.forward, channels, size, size)
            with torch.device("meta"):
                scheme, model = network(cell.cfg, plan, classes, channels)
            needs = memory(model, shape, cell.cfg.recipe.precision != "float32")
            settings, recipe = cell.cfg.data, cell.cfg.recipe
            train = images * (1 - settings.holdout) * settings.train_fraction
            per_epoch = int(train) // plan.sgd_batch
            updates = recipe.updates or recipe.epochs * per_epoch
            test = settings.get("test_images") or TEST_IMAGES.get(settings.name, 0)
            test = round(images * settings.holdout) or test
            epochs = updates / per_epoch
            row = made[key] = Row(
                cell.cfg,
                " ".join([scheme_of(cell), *own]),
                plan,
                epochs,
                updates,
                test * max(1, int(epochs / recipe.eval_every)),
                needs,
                scheme.batch_free,
            )
        row = made[key]
        row.runs += 1
        over = state(cell.folder).name in ("finished", "diverged")
        row.left += not over
        if over:
            result = json.loads((cell.folder / "result.json").read_text())
            row.speeds.append(result["images_per_second"])
    for row in made.values():
        if speed:
            row.seconds, row.source = row.plan.sgd_batch / speed, "given"
        elif row.speeds:
            mean = sum(row.speeds) / len(row.speeds)
            row.seconds = row.plan.sgd_batch / mean
            row.source = f"{len(row.speeds)} finished"
        elif row.memory > limit:
            row.source = "does not fit"
        else:
            classes, channels, pixels, _ = shape_of_data(row.cfg, row.plan)
            told = f"measuring {row.scheme} at batch {row.plan.batch} (--speed gives it instead)"
            with Console(stderr=True).status(told, refresh_per_second=2):
                row.seconds = measure(row, (0, channels, pixels, pixels), classes, where)
            row.source = "measured"
    return list(made.values())


def scheme_of(cell: Cell) -> str:
    """The scheme of a run."""
    named = [o.removeprefix("norm=") for o in cell.overrides if o.startswith("norm=")]
    return named[-1] if named else cell.cfg.norm.name


def makespan(hours: list[float], gpus: int) -> float:
    """Hours until all runs are over, the longest first on whichever device is free."""
    free = [0.0] * gpus
    for each in sorted(hours, reverse=True):
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def text(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def size(memory: float) -> str:
    return f"{memory / GIB:.1f} GiB" if memory >= GIB else f"{memory / 2**20:.0f} MiB"


def show(made: list[Row], gpus: list[int], limit: float, where: str, console: Console) -> None:
    title = f"on {where}, one run at a time on each device"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("scheme", "batch", "SGD batch", "runs left", "epochs", "updates", "ms/update"):
        justify: Any = "right" if column != "scheme" else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for column in ("images/s", "time from", "memory", "a run"):
        table.add_column(column, justify="right", overflow="fold")
    for row in made:
        plan = row.plan
        table.add_row(
            *(row.scheme, str(plan.batch), str(plan.sgd_batch), f"{row.left}/{row.runs}"),
            *(f"{row.epochs:g}", f"{row.updates:,}"),
            *(f"{1000 * row.seconds:,.1f}", f"{plan.sgd_batch / row.seconds:,.0f}")
            if row.seconds
            else ("–", "–"),
            *(row.source, size(row.memory), text(row.hours) if row.seconds else "–"),
        )
    console.print(table)
    hours = [row.hours for row in made for _ in range(row.left)]
    if hours:
        console.print(
            f"{len(hours)} runs, {text(sum(hours))} in all, {text(max(hours))} the longest: "
            + ", ".join(f"{n} device{'s' * (n > 1)} {text(makespan(hours, n))}" for n in gpus)
        )
    for row in made:
        if row.memory > limit:
            smaller = f"protocol.forward={row.plan.batch} needs less"
            console.print(
                f"warning: {row.scheme} at batch {row.plan.batch} needs about "
                f"{size(row.memory)} and the device has {size(limit)}; "
                + (
                    smaller
                    if row.plan.forward > row.plan.batch
                    else "only a smaller model needs less"
                )
            )
    same = [row for row in made if row.batch_free and row.cfg.protocol.name != "direct"]
    alike = Counter((row.scheme, row.plan.sgd_batch) for row in same if row.left)
    names = sorted({scheme for (scheme, _), count in alike.items() if count > 1})
    if names:
        console.print(
            f"{', '.join(names)}: without batch statistics, the same computation at every "
            f"batch size that has the same SGD batch; one is enough, the table says so"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of train.py -m")
    parser.add_argument("--speed", type=float, help="images/s in training, instead of measuring")
    parser.add_argument("--memory", type=float, help="GiB of the device (default: of this one)")
    parser.add_argument("--gpus", default="1,8,64", help="numbers of devices (default: 1,8,64)")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    try:
        gpus = [int(n) for n in args.gpus.split(",") if int(n) > 0]
    except ValueError:
        gpus = []
    if not gpus:
        parser.error(f"--gpus {args.gpus}: expected whole numbers from 1, such as 1,8,64")
    for option in ("speed", "memory"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            parser.error(f"--{option} {value:g}: expected a number above 0")
    try:
        found = cells(jobs(args.overrides), checked=True)
        where = devices.find(found[0].cfg.device)
        here = torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else physical_memory()
        limit = args.memory * GIB if args.memory else here
        made = rows(found, args.speed, where, limit)
    except MISTAKES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "this CPU"
    show(made, gpus, limit, "a device of that speed" if args.speed else name, console)


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    main()
