"""What loading photographs costs: images per second of one core, beside torchvision and timm.

    python benchmarks/loader.py FOLDER [--workers 1] [--batch 32] [--rounds 9]

Everybody's training images of ImageNet, from files to normalized float32 batches of 224 pixels:
random resized crop, mirror, normalization, read by `--workers` processes. `torchvision` is the
pipeline of its reference scripts, `timm` its `create_loader` without and with its prefetcher, all
without other augmentation. A round passes once over the photographs with every pipeline, in
shuffled order, after a pass that starts the workers; ratios are taken within a round. The clock is
the processor time of this process and its workers: images per second of one core, which other
programs on the machine hardly change.

Smallbatch's own time is split by leaving out the end of it: the files decoded, then also cut,
scaled and mirrored, then also normalized in the same process, then with workers.

Writes loader.json and, into README.md, the tables; what stands around them is written by hand.
FOLDER holds photographs, in folders or not; their labels do not matter.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.inference import environment, publish
from data.decoding import decode
from data.imagenet import tree
from data.listing import walk
from data.stream import BLOCK, MEAN, STD, Stream
from data.transforms import centre, cut, random_resized, scale
from training.progress import say

SIZE, RESIZE = 224, 256
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


def stream(root: Path, batch: int, workers: int) -> Stream:
    train, val = tree(str(root), SIZE, verify_counts=False).read()
    return Stream(train, val, batch, 0, SIZE, RESIZE, workers=workers)


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


def measure(
    passes: dict[str, Callable[[int], int]], rounds: int
) -> dict[str, dict[str, np.ndarray]]:
    """Images per second in every round, of processor time (`core`) and of the wall's (`wall`)."""
    rates: dict[str, dict[str, list[float]]] = {name: {"core": [], "wall": []} for name in passes}
    order, shuffle = list(passes), random.Random(0).shuffle
    for i in range(rounds + 1):  # the first starts the workers
        shuffle(order)
        for name in order:
            start, wall = clock(), time.perf_counter()
            count = passes[name](i)
            rates[name]["core"].append(count / (clock() - start))
            rates[name]["wall"].append(count / (time.perf_counter() - wall))
        told = ", ".join(f"{name} {r['core'][-1]:.0f}" for name, r in rates.items())
        say(f"round {i} of {rounds}: {told} images/s" if i else "started")
    return {name: {k: np.array(v[1:]) for k, v in r.items()} for name, r in rates.items()}


def differences(files: list[Path], seed: int = 0) -> dict[str, dict[str, float]]:
    """Grey levels between our pixels and torchvision's: as decoded, in a random window, and in
    evaluation."""
    from PIL import Image
    from torchvision.transforms import functional as to

    found: dict[str, list[torch.Tensor]] = {"decoded": [], "window": [], "evaluation": []}
    for i, file in enumerate(files):
        with warnings.catch_warnings(), Image.open(file) as opened:
            warnings.simplefilter("ignore")
            theirs = opened.convert("RGB")
        ours = decode(file)
        x, y, w, h = box = random_resized(*theirs.size, np.random.default_rng([seed, i]))
        evaluated = to.center_crop(to.resize(theirs, [RESIZE]), [SIZE, SIZE])
        pairs = {
            "decoded": (ours, theirs),
            "window": (
                scale(cut(ours, box), SIZE, SIZE),
                to.resized_crop(theirs, y, x, h, w, [SIZE, SIZE]),
            ),
            "evaluation": (centre(ours, SIZE, RESIZE), evaluated),
        }
        for name, (a, b) in pairs.items():
            deviation = (a.int() - to.pil_to_tensor(b).int()).abs().float()
            found[name].append(torch.stack([deviation.mean(), deviation.max()]))
    stacked = {name: torch.stack(values) for name, values in found.items()}
    return {
        name: {"mean": round(v[:, 0].mean().item(), 4), "largest": v[:, 1].max().item()}
        for name, v in stacked.items()
    }


def summary(rates: dict[str, dict[str, np.ndarray]], names: Iterable[str]) -> list[dict[str, Any]]:
    """Medians over the rounds; ours as a ratio to each, within a round."""
    rows = []
    for name in names:
        core, wall = rates[name]["core"], rates[name]["wall"]
        values = {
            "images_per_core_second": np.median(core),
            "iqr": np.subtract(*np.percentile(core, [75, 25])),
            "ms_per_image": np.median(1000 / core),
            "images_per_second": np.median(wall),
            "smallbatch_to_this": np.median(rates[OURS]["core"] / core),
        }
        rows.append({"loader": name} | {k: round(float(v), 3) for k, v in values.items()})
    return rows


def markdown(result: dict[str, Any]) -> str:
    lines = ["| loader | images/s of a core | `smallbatch` to it | images/s by the wall clock |"]
    lines.append("|---|---:|---:|---:|")
    for r in result["rows"]:
        lines.append(
            f"| {r['loader']} | {r['images_per_core_second']:.0f} ({r['iqr']:.0f}) | "
            f"{r['smallbatch_to_this']:.2f} | {r['images_per_second']:.0f} |"
        )
    lines += ["", "| `smallbatch`, ms of a core for an image | to here | more |", "|---|---:|---:|"]
    before = 0.0
    for name, took in result["parts"].items():
        lines.append(f"| {name} | {took:.2f} | {took - before:.2f} |")
        before = took
    lines += ["", "| grey levels from torchvision's | on average | at most |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {d['mean']:.4f} | {d['largest']:.0f} |"
        for name, d in result["differences"].items()
    ]
    told = ", ".join(
        f"{k.replace('_', ' ')} {v}" for k, v in (result["setting"] | result["environment"]).items()
    )
    lines.append(f"\nMedians over the rounds (interquartile range), ratios within a round: {told}.")
    return f"    {result['command']}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="photographs, in folders or not")
    for key, default in dict(workers=1, batch=32, threads=1, rounds=9).items():
        add(f"--{key}", type=int, default=default, help=f"default: {default}")
    add("--out", type=Path, default=Path("results/loader"), help="default: results/loader")
    args = parser.parse_args()
    if args.workers < 0 or min(args.batch, args.threads, args.rounds) < 1:
        parser.error(
            "--batch, --threads, --rounds: expected whole numbers from 1; --workers from 0"
        )
    try:
        with tempfile.TemporaryDirectory() as root:
            run(args, Path(root))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(args: argparse.Namespace, root: Path) -> None:
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the workers
    files = link(args.folder, root)
    if len(files) < args.batch:
        raise ValueError(f"--batch {args.batch}: expected at most the {len(files)} photographs")
    deviations = differences(files)
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
    rates = measure(passes, args.rounds)
    keys = ("workers", "batch", "rounds")
    options = " ".join(f"--{key} {getattr(args, key)}" for key in (*keys, "threads"))
    packages = {name: version(name) for name in ("torchvision", "timm", "pillow")}
    result: dict[str, Any] = {
        "command": f"python benchmarks/loader.py FOLDER {options}",
        "environment": environment(torch.device("cpu")) | packages,
        "setting": {"photographs": len(files), "size": SIZE} | {k: getattr(args, k) for k in keys},
        "rows": summary(rates, peers),
        "parts": {name: round(float(np.median(1000 / rates[name]["core"])), 3) for name in parts},
        "differences": deviations,
    }
    result["parts"][f"delivered by {args.workers} workers"] = result["rows"][0]["ms_per_image"]
    publish(args.out, "loader", result, markdown(result))


if __name__ == "__main__":
    main()
