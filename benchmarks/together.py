"""How many trainings at once a card takes: part `together` of gpu_session.sh.

ResNet-20, `ghost` with batches of 2 and an SGD batch of 128, the augmentation included, on random
images: images per second of all together, as the processes that `hydra/launcher=pool` starts. They
start together, when the last of them has warmed up.
"""

import itertools
import multiprocessing
import time
from functools import partial
from typing import Any

import torch

import data
from benchmarks.gpu import Measure, Session
from benchmarks.step import ours, synchronize

WARM = 6  # updates before the clock starts: a graph is recorded with the fourth


def train(start: Any, found: Any, seconds: float, kind: str, network: str, sgd_batch: int) -> None:
    """Images per second from `start` on, until the time is over."""
    torch.set_num_threads(1)
    where = torch.device(kind)
    step = ours(network, "bn", 2, sgd_batch, where, graph=kind == "cuda")
    images = data.sources.synthetic(32, 10, 3, 8 * sgd_batch, 10).read()
    loader = data.Loader(*images, sgd_batch, 0, crop=4, flip=True, device=where)
    batches = itertools.chain.from_iterable(loader.train(epoch) for epoch in itertools.count())

    def updates(count: int) -> None:
        for x, y in itertools.islice(batches, count):
            step(x, y)
        synchronize(where)  # the queue of launches would run far ahead

    updates(WARM)
    start.wait(180)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        updates(4)
        done += 4 * sgd_batch
    found.put(done / (time.perf_counter() - begin))


def processes(number: int, seconds: float, *what: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(number), context.Queue()
    workers = [
        context.Process(target=train, args=(start, found, seconds, *what)) for _ in range(number)
    ]
    try:
        for worker in workers:
            worker.start()
        rates: list[float] = []
        while len(rates) < number:
            if not found.empty():
                rates.append(found.get())
            elif any(worker.exitcode for worker in workers):
                raise RuntimeError("one of the processes failed; it says why above")
            time.sleep(0.02)
    finally:
        for worker in workers:
            worker.join(5) if worker.exitcode == 0 else worker.terminate()
            worker.join()
    told = f"{sum(rates):.0f} images/s (each {min(rates):.0f} to {max(rates):.0f})"
    return {"images_per_second": rates, "told": told}


def cells(session: Session) -> dict[str, Measure]:
    what = ("resnet8", 8) if session.tiny else ("resnet20", 128)
    seconds, numbers = (0.2, (1, 2)) if session.tiny else (6.0, (1, 2, 4, 8, 16))
    return {
        f"{number} processes": partial(processes, number, seconds, session.device, *what)
        for number in numbers
    }
