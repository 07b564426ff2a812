"""Photographs on a GPU: how many a second, and whether it waits for them: part `pipeline` of
gpu_session.sh.

The loader alone, with a worker for every core, then optimizer steps of ResNet-50 with the images
that it delivers, beside the same steps with one batch again and again: what is lacking to their
speed is waiting. The photographs are shown many times over, so that an epoch lasts; from the second
time on they come from the memory of the operating system, as a data set does that fits into it.
"""

import os
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Measure, Session
from benchmarks.loader import link
from benchmarks.step import clean, ours, synchronize, timed
from data.imagenet import tree
from data.stream import Stream


def stream(root: Path, batch: int, size: int, workers: int, where: torch.device) -> Stream:
    train, val = tree(str(root), size, verify_counts=False).read()
    resize = round(size * 8 / 7)
    return Stream(train, val, batch, 0, size, resize, workers=workers, device=where)


def forever(loader: Stream) -> Generator[tuple[Tensor, Tensor], None, None]:
    epoch = 0
    while True:
        yield from loader.train(epoch)
        epoch += 1


def rate(batches: Iterator[Any], step: Any, seconds: float, where: torch.device) -> float:
    """Images per second, after a time in which what has been read ahead is used up."""
    for warm in (True, False):
        images, start, end = 0, time.perf_counter(), seconds / (3 if warm else 1)
        while time.perf_counter() - start < end:
            x, y = next(batches)
            if step:
                step(x, y)
            images += len(y)
        synchronize(where)
    return images / (time.perf_counter() - start)


def photographs(place: Path, count: int) -> Path:
    """Made up, for the rehearsal."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    place.mkdir(exist_ok=True)
    for i in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        colours.resize((80, 64)).save(place / f"{i}.jpg")
    return place


def cells(session: Session) -> dict[str, Measure]:
    where, tiny = torch.device(session.device), session.tiny
    if session.photos is None and not tiny:
        raise ValueError("--photos: expected a folder of JPEGs")
    network, classes = ("resnet8", 10) if tiny else ("resnet50", 1000)
    size, seconds, all_of_them = (16, 0.1, 1) if tiny else (224, 12.0, 10_000)
    workers = 1 if tiny else len(os.sched_getaffinity(0))
    batches = (2,) if tiny else (32, 256)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers

    def with_photographs(call: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            shown = session.photos or photographs(Path(temporary) / "photographs", 6)
            found = len(link(shown, Path(temporary) / "tree", all_of_them))
            try:
                return call(Path(temporary) / "tree") | {"photographs": found, "workers": workers}
            finally:
                clean(where)

    def alone(root: Path) -> dict[str, Any]:
        with closing(forever(stream(root, batches[0], size, workers, where))) as images:
            return {"images_per_second": round(rate(images, None, seconds, where), 1)}

    def fed(batch: int, precision: str, graph: bool, root: Path) -> dict[str, Any]:
        with closing(forever(stream(root, batch, size, workers, where))) as images:
            x, y = next(images)
            step = ours(network, "bn", x, y, classes, precision=precision, graph=graph)
            for _ in range(6):
                step(x, y)
            steps = max(2, round(seconds / 6 / timed(partial(step, x, y), 2, where)))
            same = batch / timed(partial(step, x, y), steps, where)
            fresh = rate(images, step, seconds, where)
        values = {"same_batch_images_per_second": round(same, 1)}
        values |= {"images_per_second": round(fresh, 1), "waits": round(1 - fresh / same, 4)}
        return values

    found: dict[str, Measure] = {"loader": partial(with_photographs, alone)}
    for precision in ("float32", "bfloat16"):
        for batch in batches:
            for graph in (False,) if tiny else (True, False):
                key = f"{network} batch {batch} {precision} {'captured' if graph else 'eager'}"
                call = partial(fed, batch, precision, graph)
                found[key] = partial(with_photographs, call)
    return found


def table(result: dict[str, Any]) -> list[str]:
    lines = []
    for key, cell in result["cells"].items():
        if "images_per_second" not in cell:
            continue
        told = f"{key}: {cell['images_per_second']:.0f} images/s, {cell['workers']} workers"
        if "waits" in cell:
            told += f"; with the same batch {cell['same_batch_images_per_second']:.0f}, "
            told += f"so it waits {100 * cell['waits']:.0f} % of the time"
        lines.append(told)
    return lines
