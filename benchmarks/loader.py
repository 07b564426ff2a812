"""What loading photographs costs: images per second of one core, beside torchvision and timm.

    python -m benchmarks.loader FOLDER [--workers 1] [--batch 32] [--rounds 9]

Everybody's training images of ImageNet, from files to normalized float32 batches of 224 pixels:
random resized crop, mirror, normalization, read by `--workers` processes. `torchvision` is the
pipeline of its reference scripts, `timm` its `create_loader` without and with its prefetcher, all
without other augmentation. A round passes once over the photographs with every pipeline, in
shuffled order, after a pass that starts the workers; ratios are taken within a round. The clock is
the processor time of this process and its workers: images per second of one core, which other
programs on the machine hardly change.

Smallbatch's own time is split by leaving out the end of it: the files decoded, then also cut,
scaled and mirrored, then also normalized in the same process, then with workers.

FOLDER holds photographs, in folders or not; their labels do not matter.
"""

import argparse
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from data.decoding import decode
from data.imagenet import tree
from data.listing import walk
from data.stream import BLOCK, MEAN, STD, Stream

SIZE = 224
OURS = "smallbatch"


def link(folder: Path, root: Path, least: int = 0) -> list[Path]:
    """A tree of two classes in `root` that shows the photographs in `folder`, so often that there
    are at `least` so many; returns them."""
    files = sorted(folder / os.fsdecode(name) for name in walk(folder))
    if len(files) < 2:
        raise ValueError(f"{folder}: {len(files)} photographs; expected at least 2")
    for i, file in enumerate(files * max(1, -(-least // len(files)))):
        for part in ("train", "val"):
            place = root / part / "ab"[i % 2] / f"{i:07d}{file.suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file.resolve())
    return files


def stream(
    root: Path, batch: int, workers: int, size: int = SIZE, where: torch.device | None = None
) -> Stream:
    train, val = tree(str(root), size, verify_counts=False).read()
    device = where or torch.device("cpu")
    return Stream(train, val, batch, 0, size, round(size * 8 / 7), workers=workers, device=device)


def torchvision(root: Path, batch: int, workers: int) -> Callable[[int], Iterable[Any]]:
    """As in its references/classification: PIL, the first version of the transforms."""
    from torchvision import datasets, transforms

    augment = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(MEAN, STD),
    ]
    data = datasets.ImageFolder(str(root / "train"), transforms.Compose(augment))
    loader = torch.utils.data.DataLoader(
        data, batch, True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    return lambda epoch: loader


def timm(root: Path, batch: int, workers: int, prefetcher: bool) -> Callable[[int], Iterable[Any]]:
    from timm.data import ImageDataset, create_loader

    loader = create_loader(
        ImageDataset(str(root / "train")),
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        use_prefetcher=prefetcher,
        color_jitter=None,  # type: ignore[arg-type]  # off; 0 would still call it
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    return lambda epoch: loader


def clock() -> float:
    """Seconds of processor time of this process and of its workers."""
    workers = multiprocessing.active_children()
    return time.process_time() + sum(
        time.clock_gettime((~p.pid << 3) | 2) for p in workers if p.pid
    )


def consume(batches: Iterable[Any]) -> int:
    """Look at no pixel; check that they are what they should be."""
    count = 0
    for images, labels in batches:
        if images.dtype != torch.float32 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"batches of {images.dtype}, {tuple(images.shape)}")
        count += len(labels)
    return count


def passed(batches: Callable[[int], int], epochs: Iterator[int]) -> dict[str, float]:
    """Images per second of one pass, of processor time (`core`) and of the wall's (`wall`)."""
    start, wall = clock(), time.perf_counter()
    count = batches(next(epochs))
    return {"core": count / (clock() - start), "wall": count / (time.perf_counter() - wall)}


def summary(rates: dict[str, dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    """Of the rounds; ours as a ratio to each."""
    ours = rates[OURS]["core"]
    return [
        {"loader": name, **harness.spread(rates[name]["core"], "images_per_core_second")}
        | harness.spread(rates[name]["wall"], "images_per_second")
        | harness.ratio(ours, rates[name]["core"], "smallbatch_to_this")
        for name in names
    ]


def tables(result: dict[str, Any]) -> list[str]:
    heads = {
        "images_per_core_second": "images/s of a core",
        "smallbatch_to_this": "`smallbatch` to it",
        "images_per_second": "images/s by the wall clock",
    }
    rows = [[r["loader"], *(harness.within(r, key, 1) for key in heads)] for r in result["rows"]]
    before = [0.0, *result["parts"].values()]
    took = zip(result["parts"].items(), before, strict=False)
    parts = [[name, here, here - less] for (name, here), less in took]
    title = "`smallbatch`, ms of a core for an image"
    return [
        harness.table(["loader", *heads.values()], rows),
        harness.table([title, "to here", "more"], parts),
    ]


def run(args: argparse.Namespace) -> None:
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: expected a whole number from 0")
    with tempfile.TemporaryDirectory() as root:
        measure(args, Path(root))


def measure(args: argparse.Namespace, root: Path) -> None:
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the workers
    files = link(args.folder, root)
    if len(files) < args.batch:
        raise ValueError(f"--batch {args.batch}: expected at most the {len(files)} photographs")
    alone, ours = (stream(root, args.batch, workers) for workers in (0, args.workers))
    peers = {
        OURS: ours.train,
        "torchvision": torchvision(root, args.batch, args.workers),
        "timm": timm(root, args.batch, args.workers, prefetcher=False),
        "timm, prefetcher": timm(root, args.batch, args.workers, prefetcher=True),
    }

    def whole(batches: Callable[[int], Iterable[Any]]) -> Callable[[int], int]:
        return lambda epoch: consume(batches(epoch))

    def prepared(epoch: int) -> int:
        blocks = np.array_split(np.arange(len(files)), max(1, len(files) // BLOCK))
        return sum(len(alone.photographs["train", epoch, block][1]) for block in blocks)

    parts = {
        "decoded": lambda epoch: len([decode(file).shape for file in files]),
        "cut, scaled, mirrored": prepared,
        "normalized, in one process": whole(alone.train),
    }
    passes = {name: whole(batches) for name, batches in peers.items()} | parts
    timers = {name: partial(passed, whole, itertools.count()) for name, whole in passes.items()}
    rates = {
        name: {clock: np.array([rate[clock] for rate in found]) for clock in ("core", "wall")}
        for name, found in harness.interleave(
            timers, args.rounds
        ).items()  # the first starts workers
    }
    packages = {name: version(name) for name in ("torchvision", "timm", "pillow")}
    result: dict[str, Any] = {
        "environment": harness.machine(torch.device("cpu")) | packages,
        "setting": {"photographs": len(files), "size": SIZE}
        | {key: getattr(args, key) for key in ("workers", "batch", "rounds")},
        "rows": summary(rates, peers),
        "parts": {
            name: round(float(np.median(1000 / rates[of]["core"])), 3)
            for name, of in {**{n: n for n in parts}, f"by {args.workers} workers": OURS}.items()
        },
    }
    harness.publish(args, result, tables(result))


def main() -> None:
    parser = harness.parser(__doc__, "loader", batch=32, threads=1, rounds=9)
    parser.add_argument("folder", type=Path, help="photographs, in folders or not")
    parser.add_argument("--workers", type=int, default=1, help="default: 1")
    harness.main(parser, run)


if __name__ == "__main__":
    main()
