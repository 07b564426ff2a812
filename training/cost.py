"""What runs will cost: their updates, the time of one, and their memory."""

import heapq
import math
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.console import Console

import data
from data.imagenet import CLASSES, TRAIN, VAL
from training import protocol
from training.config import typed
from training.evaluation import batch_norms
from training.files import read_result
from training.optimizer import build
from training.restore import network
from training.study import Cell, state

TEST_IMAGES = {"digits": 359, "cifar10": 10_000, "cifar100": 10_000, "imagenet": VAL}
FORWARD = 1 / 3  # of an update's time per image: the backward pass takes twice the forward one


@dataclass
class Row:
    """The runs of one scheme at one batch size."""

    cfg: DictConfig
    scheme: str
    plan: protocol.Plan
    epochs: float
    updates: int
    forward_images: int
    """Beside those of the updates: in all evaluations of a run."""
    memory: int
    """Bytes."""
    batch_independent: bool
    second_pass: bool
    """Whether the images of an update pass once more."""
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
        forward = FORWARD / (1 + FORWARD * self.second_pass) * self.seconds / self.plan.sgd_batch
        return (self.updates * self.seconds + self.forward_images * forward) / 3600


def shape_of_data(cfg: DictConfig, plan: protocol.Plan) -> tuple[int, int, int, int]:
    """Classes, channels, pixels of a side and training images, before any part is left out."""
    if cfg.data.name == "imagenet" and cfg.data.root is None:  # it need not be here yet
        return CLASSES, 3, cfg.data.size, TRAIN
    source = data.resolve(cfg.data, plan.sgd_batch, cfg.recipe)
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
    images = plan.micro_batch
    if where.type == "cpu":  # enough to be in proportion
        enough = 64 if shape[-1] <= 64 else 8
        images = min(plan.micro_batch, plan.batch * math.ceil(enough / plan.batch))
    with torch.device(where):
        scheme, model = network(cfg, plan, classes, shape[1])
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
        if scheme.second_pass:
            with torch.no_grad(), scheme.second_pass(model), cast:
                model(x)
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
            plan = protocol.plan(typed(cell.cfg))
            classes, channels, size, images = shape_of_data(cell.cfg, plan)
            shape = (plan.micro_batch, channels, size, size)
            with torch.device("meta"):
                scheme, model = network(cell.cfg, plan, classes, channels)
            needs = memory(model, shape, cell.cfg.recipe.precision != "float32")
            settings, recipe = cell.cfg.data, cell.cfg.recipe
            train = images * (1 - settings.holdout) * settings.train_fraction
            per_epoch = int(train) // plan.sgd_batch
            updates = protocol.count_updates(recipe, per_epoch)
            test = settings.get("test_images") or TEST_IMAGES.get(settings.name, 0)
            test = round(images * settings.holdout) or test
            epochs = updates / per_epoch
            evaluations = max(1, int(epochs / recipe.eval_every))
            forward = test * evaluations
            by = cell.cfg.evaluation
            if by.statistics == "precise" and batch_norms(model):
                last = max(1, int((epochs - recipe.freeze_statistics) / recipe.eval_every))
                forward += min(evaluations, last) * min(by.batches * by.batch_size, int(train))
            row = made[key] = Row(
                cell.cfg,
                " ".join([scheme_of(cell), *own]),
                plan,
                epochs,
                updates,
                forward,
                needs,
                scheme.batch_independent,
                scheme.second_pass is not None,
            )
        row = made[key]
        row.runs += 1
        over = state(cell.folder).name in ("finished", "diverged")
        row.left += not over
        if over:
            row.speeds.append(read_result(cell.folder)["images_per_second"])
    for row in made.values():
        if speed:
            row.seconds, row.source = row.plan.sgd_batch / speed, "given"
            row.seconds *= 1 + FORWARD * row.second_pass
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
