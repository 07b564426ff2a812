"""A training step on a GPU, beside the loops that others write: part `step` of gpu_session.sh.

ResNet-20 on 32 pixels and ResNet-50 on 224, protocol `direct`, batches of 1 to 256 images, six
schemes, float32 as PyTorch's defaults have it. In one cell, in turn:

timm      the network with batch norm (ResNet-50: timm's; ResNet-20: ours, whose layers then are
          PyTorch's own) in timm's training loop, which fetches the loss at every step
plain     the scheme with its layers as their formulas read (benchmarks/formulas.py), in that loop
eager     our step, call by call
captured  our step as a CUDA graph
compiled, compiled and captured: our step by torch.compile, in cells of their own, since that takes
          up to minutes

Images are random and lie on the device already. Times are of whole runs of steps between two
synchronisations; a round times every variant once, in shuffled order, and ratios to `timm` are
taken within a round. The learning rate is 0, so that no round differs from the one before. Peak
memory is that of the fourth and fifth step, when a graph is recorded, over what was there before.

`kernels` cells: the time of a captured step as a multiple of what its kernels take, by profiler.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models
import norms
from benchmarks.formulas import plain
from benchmarks.gpu import Measure, Session, one_line
from training import device
from training.protocol import Plan
from training.step import Step

SCHEMES = ("bn", "mabn", "pws", "bcn", "gn", "ws_gn")
NETWORKS = {"resnet20": (32, 10), "resnet50": (224, 1000)}  # pixels and classes
BATCHES = (2, 1, 4, 8, 32, 256)
TINY = {"resnet8": (16, 10)}
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WARM = 3  # calls of a step before it is recorded
Run = Callable[[], Any]


# --- the steps


def build(network: str, scheme: str, batch: int, classes: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    made = norms.build(scheme, batch_size=batch, sgd_batch_size=batch)
    return models.build(network, scheme=made, num_classes=classes, zero_init=False).train(), made


def recipe(name: str = "cifar", **values: Any) -> Any:
    """The recipe, with what every recipe has."""
    from omegaconf import OmegaConf

    common = OmegaConf.load(CONFIGS / "config.yaml").recipe
    return OmegaConf.merge(common, OmegaConf.load(CONFIGS / "recipe" / f"{name}.yaml"), values)


def refuse(text: str) -> None:
    """A step that cannot be recorded goes on without, and is not what is to be measured."""
    raise RuntimeError(text.strip())


def ours(
    network: str,
    scheme: str,
    images: Tensor,
    labels: Tensor,
    classes: int,
    precision: str = "float32",
    **how: Any,
) -> Callable[[Tensor, Tensor], Any]:
    """Our step, set up as train.py does it."""
    where, batch = images.device, len(images)
    model, made = build(network, scheme, batch, classes)
    device.prepare(where, None, None, print)
    model.to(where).to(memory_format=device.memory_format("auto", made.channels_last))
    plan = Plan(batch, batch, 1, batch, 0.0)
    step = Step(model, plan, recipe(precision=precision), say=refuse, **how)
    return lambda images, labels: step(images, labels, 0.0)


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> Run:
    """A turn of timm's training loop: its SGD, which is PyTorch's with weight decay for weights
    alone, and the loss fetched at every step."""
    model = model.to(images.device).train()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    criterion = nn.CrossEntropyLoss()
    seen = {"loss": 0.0, "images": 0}

    def turn() -> None:
        output = model(images)
        loss = criterion(output, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen["loss"] += loss.item() * len(images)
        seen["images"] += len(images)

    return turn


def variants(network: str, scheme: str, images: Tensor, labels: Tensor, classes: int) -> Any:
    """What makes each of them."""
    batch = len(images)

    def timms() -> Run:
        if network.startswith("resnet50"):
            import timm

            torch.manual_seed(0)
            model = timm.create_model(network, num_classes=classes)
        else:  # timm has none
            model = models.build(network, scheme=norms.build("bn"), num_classes=classes)
        return loop(model, images, labels)

    def formulas() -> Run:
        return loop(plain(build(network, scheme, batch, classes)[0]), images, labels)

    def own(**how: Any) -> Run:
        return partial(ours(network, scheme, images, labels, classes, **how), images, labels)

    return {
        "timm": timms,
        "captured": partial(own, graph=True),
        "eager": own,
        "plain": formulas,
        "compiled": partial(own, compiled=True),
        "compiled and captured": partial(own, compiled=True, graph=True),
    }


# --- the clock


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
    """Seconds a step takes, of so many in a run."""
    synchronize(where)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(where)
    return (time.perf_counter() - start) / steps


def warmed(make: Callable[[], Run], where: torch.device) -> tuple[Run, Any]:
    """A variant that has run, and its peak memory."""
    before = clean(where)
    step = make()
    for _ in range(WARM):
        step()
    synchronize(where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    for _ in range(2):  # a graph is recorded
        step()
    synchronize(where)
    peak = torch.cuda.max_memory_allocated(where) - before if where.type == "cuda" else None
    return step, peak


def interleaved(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """What each timer says in every round, in shuffled order."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    order, shuffle = list(timers), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            found[name].append(timers[name]())
    return {name: np.array(values) for name, values in found.items()}


def spread(values: np.ndarray) -> float:
    return float(np.subtract(*np.percentile(values, [75, 25])))


def compare(
    makers: dict[str, Callable[[], Run]], batch: int, where: torch.device, rounds: int, span: float
) -> dict[str, Any]:
    """Images per second and memory of every variant, and its ratio to `timm`; a variant that fails
    takes no other with it. `span`: seconds of a run of steps."""
    steps: dict[str, Run] = {}
    counts: dict[str, int] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            steps[name], peak = warmed(make, where)
            counts[name] = max(2, round(span / timed(steps[name], 2, where)))
            rows[name] = {"peak_memory_bytes": peak, "steps": counts[name]}
        except Exception as error:  # out of memory, a layer that cannot be recorded, …
            rows[name] = {"error": one_line(error)}
            steps.pop(name, None)
    timers = {name: partial(timed, step, counts[name], where) for name, step in steps.items()}
    taken = interleaved(timers, rounds)
    for name, t in taken.items():
        rows[name] |= {
            "images_per_second": round(float(np.median(batch / t)), 2),
            "iqr": round(spread(batch / t), 2),
            "ms": round(1000 * float(np.median(t)), 4),
        }
        if "timm" in taken:
            ratios = taken["timm"] / t
            rows[name] |= {"ratio": round(float(np.median(ratios)), 3)}
            rows[name] |= {"ratio_iqr": round(spread(ratios), 3)}
    return rows


def kernels(step: Run, count: int, where: torch.device) -> dict[str, Any]:
    """What a step's kernels take, one after another, beside the step itself."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    steps = max(count, 2)
    alone = float(np.median([timed(step, steps, where) for _ in range(5)]))
    cuda = where.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        timed(step, steps, where)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    found = [
        event
        for event in profiler.events() or []
        if event.device_type == kind
        and event.cpu_parent is None
        and not getattr(event, "is_user_annotation", False)
    ]
    total = sum(event.time_range.elapsed_us() for event in found) / steps / 1e6
    by_name: dict[str, float] = {}
    for event in found:
        by_name[event.name[:90]] = by_name.get(event.name[:90], 0.0) + event.time_range.elapsed_us()
    top = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {
        "step_ms": round(1000 * alone, 4),
        "kernels_ms": round(1000 * total, 4),
        "kernels": round(len(found) / steps, 1),
        "ratio": round(alone / total, 3) if total else None,
        "longest_us_a_step": {name: round(us / steps, 2) for name, us in top},
    }


# --- the part


def cells(session: Session) -> dict[str, Measure]:
    where = torch.device(session.device)
    torch.backends.cudnn.benchmark = True  # as train.py and timm's script have it
    networks, batches = (TINY, (2,)) if session.tiny else (NETWORKS, BATCHES)
    rounds, span = (2, 0.0) if session.tiny else (5, 0.1)
    why = "a rehearsal: no GPU" if where.type == "cpu" else ""

    def inputs(network: str, batch: int) -> tuple[Tensor, Tensor, int]:
        size, classes = networks[network]
        torch.manual_seed(0)
        images = torch.randn(batch, 3, size, size, device=where)
        return images, torch.arange(batch, device=where) % classes, classes

    def chosen(network: str, batch: int, scheme: str, names: tuple[str, ...]) -> dict[str, Any]:
        left_out = [name for name in names if why and name not in ("timm", "eager", "plain")]
        makers = variants(network, scheme, *inputs(network, batch))
        makers = {name: makers[name] for name in names if name not in left_out}
        try:
            rows = compare(makers, batch, where, rounds, span)
        finally:
            clean(where)
        return {"variants": rows | {name: {"left_out": why} for name in left_out}}

    def profiled(network: str, batch: int, scheme: str) -> dict[str, Any]:
        name = "eager" if why else "captured"
        make = variants(network, scheme, *inputs(network, batch))[name]
        try:
            return {"variant": name} | kernels(warmed(make, where)[0], 2 if why else 50, where)
        finally:
            clean(where)

    found: dict[str, Measure] = {}
    interpreted = ("timm", "captured", "eager", "plain")
    compiled = ("timm", "compiled", "compiled and captured")
    for batch in batches:
        for network in networks:
            for scheme in SCHEMES:
                key = f"{network} batch {batch} {scheme}"
                found[key] = partial(chosen, network, batch, scheme, interpreted)
        if batch == 2:
            for network in networks:
                for scheme in SCHEMES[:2] if session.tiny else SCHEMES:
                    key = f"{network} batch {batch} {scheme} kernels"
                    found[key] = partial(profiled, network, batch, scheme)
    for batch in batches:
        for network in networks:
            for scheme in SCHEMES[:1] if session.tiny else SCHEMES:
                key = f"{network} batch {batch} {scheme} compiled"
                found[key] = partial(chosen, network, batch, scheme, compiled)
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Images per second, and multiples of timm's."""
    names = ("captured", "eager", "compiled", "compiled and captured", "plain")
    lines = ["images/s of `timm`; the others as multiples of it; GiB of timm, captured"]
    for key, cell in result["cells"].items():
        if "ratio" in cell:
            lines.append(
                f"{key}: {cell['variant']} step {cell['step_ms']:.3f} ms, {cell['kernels']:.0f} "
                f"kernels {cell['kernels_ms']:.3f} ms, ratio {cell['ratio']:.2f}"
            )
        rows = cell.get("variants", {})
        if not rows:
            continue
        said = [f"timm {rows['timm'].get('images_per_second', 0):.0f}"]
        for name in names:
            row = rows.get(name, {})
            told = row.get("left_out") or row.get("error", "")[:60]
            if "ratio" in row:
                told = f"{row['ratio']:.2f}"
            said += [f"{name} {told}"] if told else []
        held = [rows.get(name, {}).get("peak_memory_bytes") for name in ("timm", "captured")]
        said += [f"{bytes_ / 2**30:.2f}" for bytes_ in held if bytes_]
        lines.append(f"{key}: {' | '.join(said)}")
    return lines
