"""A training step on a GPU, beside the loop that others write: part `step` of gpu_session.sh.

ResNet-20 on 32 pixels and ResNet-50 on 224, protocol `direct`, batches of 1 to 256 images, six
schemes, float32 as PyTorch's defaults have it. In one cell, in turn:

timm      the network with PyTorch's batch norm (ResNet-50: timm's own) in timm's training loop,
          which fetches the loss at every step
eager     our step, call by call
captured  our step as a CUDA graph
compiled, compiled and captured: our step by torch.compile, in cells of their own, since that takes
          up to minutes

Images are random and lie on the device already. Times are of whole runs of steps between two
synchronisations; ratios are to `timm`. The learning rate is 0, so that no round differs from the
one before. Peak memory is that of the fourth and fifth step, when a graph is recorded, over what
was there before.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import models
import norms
from benchmarks import harness
from benchmarks.gpu import Measure, Session, one_line
from training import device
from training.compile import Choice
from training.protocol import Plan
from training.step import Step

SCHEMES = ("bn", "mabn", "pws", "bcn", "gn", "ws_gn")
NETWORKS = {"resnet20": (32, 10), "resnet50": (224, 1000)}  # pixels and classes
BATCHES = (2, 1, 4, 8, 32, 256)
TINY = {"resnet8": (16, 10)}
EAGER, COMPILED = ("timm", "captured", "eager"), ("timm", "compiled", "compiled and captured")
NETWORK = Choice("network", "as told")
Run = Callable[[], Any]


def recipe(name: str = "cifar", **values: Any) -> Any:
    """The recipe, with what every recipe has."""
    configs = harness.ROOT / "configs"
    common = OmegaConf.load(configs / "config.yaml").recipe
    return OmegaConf.merge(common, OmegaConf.load(configs / "recipe" / f"{name}.yaml"), values)


def ours(
    network: str, scheme: str, batch: int, sgd_batch: int, where: torch.device, classes: int = 10,
    precision: str = "float32", **how: Any,
) -> Callable[[Tensor, Tensor], Any]:  # fmt: skip
    """Our step, set up as train.py does it."""
    torch.manual_seed(0)
    made = norms.build(scheme, batch_size=batch, sgd_batch_size=sgd_batch)
    model = models.build(network, scheme=made, num_classes=classes, zero_init=False).train()
    device.prepare(where, "auto", None, None)
    model.to(where).to(memory_format=device.memory_format("auto", made.channels_last))
    plan = Plan(batch, sgd_batch, 1, sgd_batch, 0.0)
    step = Step(model, plan, recipe(precision=precision), **how)

    def run(images: Tensor, labels: Tensor) -> Any:
        done = step(images, labels, 0.0)
        if step.graph_step and step.graph_step.failed:  # not what is to be measured
            raise RuntimeError("the step cannot be recorded as a CUDA graph")
        return done

    return run


def loop(network: str, images: Tensor, labels: Tensor, classes: int) -> Run:
    """A turn of timm's training loop: its SGD, which is PyTorch's with weight decay for weights
    alone, and the loss fetched at every step."""
    if network.startswith("resnet50"):
        import timm

        model: Any = timm.create_model(network, num_classes=classes)
    else:  # timm has none
        own = dataclasses.replace(norms.build("bn"), norm=nn.BatchNorm2d)
        model = models.build(network, scheme=own, num_classes=classes)
    model = model.to(images.device).train()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    criterion, seen = nn.CrossEntropyLoss(), {"loss": 0.0}

    def turn() -> None:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen["loss"] += loss.item() * len(images)

    return turn


def synchronize(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def clean(where: torch.device) -> int:
    """Give everything back; returns the bytes that are still allocated."""
    gc.collect()
    if where.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(where)


def timed(step: Run, steps: int, where: torch.device) -> float:
    """Milliseconds a step takes, of so many in a run."""
    synchronize(where)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(where)
    return 1000 * (time.perf_counter() - start) / steps


def warmed(make: Callable[[], Run], where: torch.device) -> tuple[Run, Any]:
    """What was made, having run, and its peak memory."""
    before, step = clean(where), make()
    timed(step, 3, where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    timed(step, 2, where)  # a graph is recorded
    return step, torch.cuda.max_memory_allocated(where) - before if where.type == "cuda" else None


def compare(
    makers: dict[str, Callable[[], Run]], where: torch.device, rounds: int, span: float
) -> dict[str, Any]:
    """Milliseconds and memory of what each makes, and its speed as a multiple of the first's; one
    that fails takes no other with it. `span`: milliseconds of a run of steps."""
    timers: dict[str, Callable[[], float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            step, peak = warmed(make, where)
            count = max(2, round(span / timed(step, 2, where)))
            timers[name] = partial(timed, step, count, where)
            rows[name] = {"peak_memory_bytes": peak, "steps": count}
        except Exception as error:  # out of memory, a layer that cannot be recorded, …
            rows[name] = {"error": one_line(error)}
    times, first = harness.interleave(timers, rounds, warm_up=0, quiet=True), next(iter(makers))
    for name, own in times.items():
        rows[name] |= harness.spread(own, "ms")
        rows[name] |= harness.ratio(times[first], own, "speed") if first in times else {}
    clean(where)
    return rows


def variants(
    network: str, scheme: str, images: Tensor, labels: Tensor, classes: int
) -> dict[str, Callable[[], Run]]:
    def own(**how: Any) -> Run:
        batch = len(images)
        step = ours(network, scheme, batch, batch, images.device, classes, **how)
        return partial(step, images, labels)

    return {
        "timm": partial(loop, network, images, labels, classes),
        "captured": partial(own, graph=True),
        "eager": own,
        "compiled": partial(own, choice=NETWORK),
        "compiled and captured": partial(own, choice=NETWORK, graph=True),
    }


def measure(
    network: str, scheme: str, batch: int, names: tuple[str, ...], session: Session
) -> dict[str, Any]:
    where = torch.device(session.device)
    size, classes = (TINY if session.tiny else NETWORKS)[network]
    rounds, span = (2, 0.0) if session.tiny else (5, 100.0)
    torch.backends.cudnn.benchmark = True  # as train.py and timm's script have it
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=where)
    makers = variants(network, scheme, images, torch.arange(batch, device=where) % classes, classes)
    there = [name for name in names if not session.tiny or name in ("timm", "eager")]
    rows = compare({name: makers[name] for name in there}, where, rounds, span)
    told = []
    for name, row in rows.items():
        if "ms" in row:
            row["images_per_second"] = round(1000 * batch / row["ms"], 1)
        speed = f"{row['speed']:.2f} of it" if "speed" in row else row.get("error", "")[:60]
        images_s = f"{row['images_per_second']} images/s" if name == "timm" and "ms" in row else ""
        told.append(f"{name} {images_s or speed}")
    left_out = {name: {"left_out": "a rehearsal: no GPU"} for name in names if name not in there}
    return {"variants": rows | left_out, "told": ", ".join(told)}


def cells(session: Session) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for names, suffix in ((EAGER, ""), *([] if session.tiny else [(COMPILED, " compiled")])):
        for batch in (2,) if session.tiny else BATCHES:
            for network in TINY if session.tiny else NETWORKS:
                for scheme in SCHEMES:
                    key = f"{network} batch {batch} {scheme}{suffix}"
                    found[key] = partial(measure, network, scheme, batch, names, session)
    return found
