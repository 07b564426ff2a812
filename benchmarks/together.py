"""How many trainings at once a card takes: part `together` of gpu_session.sh.

ResNet-20, `ghost` with batches of 2 and an SGD batch of 128, the augmentation included, on random
images: images per second of all together, as processes (what `hydra/launcher=pool` starts) and as
threads of one process, each with its stream and, on a GPU, its step recorded as a CUDA graph. They
start together, when the last of them has warmed up.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import data
from benchmarks.gpu import Measure, Session
from benchmarks.step import build, clean, recipe, refuse, synchronize
from training import device
from training.protocol import Plan
from training.step import Step

WARM = 6  # updates before the clock starts: a graph is recorded with the fourth


def training(kind: str, network: str, batch: int, sgd_batch: int) -> Callable[[], None]:
    """An update, on the next images; the first ones are done."""
    where = torch.device(kind)
    torch.backends.cudnn.benchmark = True  # as train.py has it
    model, scheme = build(network, "bn", batch, 10)
    model.to(where).to(memory_format=device.memory_format("auto", scheme.channels_last))
    plan = Plan(batch, sgd_batch, 1, sgd_batch, 0.0)
    step = Step(model, plan, recipe(), graph=where.type == "cuda", say=refuse)
    train, test = data.sources.synthetic(32, 10, 3, 8 * sgd_batch, 10).read()
    loader = data.Loader(train, test, sgd_batch, 0, crop=4, flip=True, device=where)

    def batches() -> Iterator[Any]:
        epoch = 0
        while True:
            yield from loader.train(epoch)
            epoch += 1

    images = batches()

    def update() -> None:
        x, y = next(images)
        step(x, y, 0.0)

    for _ in range(WARM):
        update()
    synchronize(where)
    return update


def count(update: Callable[[], None], seconds: float, where: torch.device) -> tuple[int, float]:
    """Updates until the time is over, and how long they took."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            update()
        synchronize(where)  # the queue of launches would run far ahead
        done += 4
    return done, time.perf_counter() - start


def process(start: Any, found: Any, seconds: float, *what: Any) -> None:
    torch.set_num_threads(1)
    update = training(*what)
    start.wait(180)
    found.put(count(update, seconds, torch.device(what[0])))


def processes(number: int, seconds: float, what: tuple[Any, ...]) -> list[tuple[int, float]]:
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(number), context.Queue()
    arguments = (start, found, seconds, *what)
    workers = [context.Process(target=process, args=arguments) for _ in range(number)]
    try:
        for worker in workers:
            worker.start()
        rates: list[tuple[int, float]] = []
        while len(rates) < number:
            if not found.empty():
                rates.append(found.get())
            elif any(worker.exitcode for worker in workers):
                raise RuntimeError("one of the processes failed; it says why above")
            time.sleep(0.02)
        return rates
    finally:
        for worker in workers:
            worker.join(5) if worker.exitcode == 0 else worker.terminate()
            worker.join()


def streams(number: int, seconds: float, what: tuple[Any, ...]) -> list[tuple[int, float]]:
    where = torch.device(what[0])
    updates = [training(*what) for _ in range(number)]
    start, rates, errors = threading.Barrier(number), list[tuple[int, float]](), list[str]()

    def thread(update: Callable[[], None]) -> None:
        own = torch.cuda.Stream() if where.type == "cuda" else None
        try:
            with torch.cuda.stream(own) if own else nullcontext():
                start.wait(60)
                rates.append(count_on(own, update))
        except Exception as error:
            errors.append(str(error))

    def count_on(own: Any, update: Callable[[], None]) -> tuple[int, float]:
        if own is None:
            return count(update, seconds, where)
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for _ in range(4):
                update()
            own.synchronize()  # this stream alone, not its neighbours
            done += 4
        return done, time.perf_counter() - begin

    threads = [threading.Thread(target=thread, args=(u,), daemon=True) for u in updates]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if errors:
        raise RuntimeError(errors[0])
    return rates


def cells(session: Session) -> dict[str, Measure]:
    tiny = session.tiny
    what = (session.device, "resnet8" if tiny else "resnet20", 2, 8 if tiny else 128)
    seconds = 0.2 if tiny else 6.0

    def cell(way: Callable[..., list[tuple[int, float]]], number: int) -> dict[str, Any]:
        try:
            each = [what[3] * done / took for done, took in way(number, seconds, what)]
        finally:
            clean(torch.device(session.device))
        values = {"images_per_second": round(sum(each), 1), "least": round(min(each), 1)}
        return values | {"most": round(max(each), 1)}

    found: dict[str, Measure] = {}
    for number in (1, 2) if tiny else (1, 2, 4, 8, 16):
        found[f"{number} processes"] = partial(cell, processes, number)
        found[f"{number} streams"] = partial(cell, streams, number)
    return found


def table(result: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {cell['images_per_second']:.0f} images/s (each {cell['least']:.0f} to "
        f"{cell['most']:.0f})"
        for key, cell in result["cells"].items()
        if "images_per_second" in cell
    ]
