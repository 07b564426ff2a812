"""Photographs on a GPU: how many a second, and whether it waits for them: part `pipeline` of
gpu_session.sh.

The loader alone, with a worker for every core, then optimizer steps of ResNet-50 with the images
that it delivers, beside the same steps with one batch again and again: what is lacking to their
speed is waiting. The photographs are shown many times over, so that an epoch lasts; from the second
time on they come from the memory of the operating system, as a data set does that fits into it.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu import Measure, Session
from benchmarks.loader import link, stream
from benchmarks.step import clean, ours, synchronize, timed


def rate(batches: Iterator[Any], step: Any, seconds: float, where: torch.device) -> float:
    """Images per second, after a time in which what has been read ahead is used up."""
    for span in (seconds / 3, seconds):
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < span:
            x, y = next(batches)
            if step:
                step(x, y)
            images += len(y)
        synchronize(where)
    return images / (time.perf_counter() - start)


def photographs(place: Path, count: int) -> Path:
    """Made up, for the rehearsal."""
    rng = np.random.default_rng(0)
    place.mkdir()
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
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers

    def with_photographs(batch: int, call: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary) / "tree"
            shown = session.photos or photographs(Path(temporary) / "photographs", 6)
            found = len(link(shown, root, all_of_them))
            loader = stream(root, batch, workers, size, where)
            epochs = (loader.train(epoch) for epoch in itertools.count())
            try:
                values = call(itertools.chain.from_iterable(epochs))
            finally:
                clean(where)
        return values | {"photographs": found, "workers": workers}

    def alone(images: Iterator[Any]) -> dict[str, Any]:
        found = rate(images, None, seconds, where)
        return {"images_per_second": found, "told": f"{found:.0f} images/s, {workers} workers"}

    def fed(batch: int, precision: str, graph: bool, images: Iterator[Any]) -> dict[str, Any]:
        x, y = next(images)
        step = ours(network, "bn", batch, batch, where, classes, precision, graph=graph)
        timed(partial(step, x, y), 6, where)
        steps = max(2, round(seconds * 1000 / 6 / timed(partial(step, x, y), 2, where)))
        same = 1000 * batch / timed(partial(step, x, y), steps, where)
        fresh = rate(images, step, seconds, where)
        told = f"{fresh:.0f} images/s; with the same batch {same:.0f}, so it waits "
        told += f"{100 * (1 - fresh / same):.0f} % of the time"
        said = {"same_batch_images_per_second": same, "images_per_second": fresh}
        return said | {"waits": 1 - fresh / same, "told": told}

    found: dict[str, Measure] = {"loader": partial(with_photographs, 2 if tiny else 32, alone)}
    for precision in ("float32", "bfloat16"):
        for batch in (2,) if tiny else (32, 256):
            for graph in (False,) if tiny else (True, False):
                key = f"{network} batch {batch} {precision} {'captured' if graph else 'eager'}"
                call = partial(fed, batch, precision, graph)
                found[key] = partial(with_photographs, batch, call)
    return found
