"""Make ImageNet's tree: unpack its archives, sort the validation images, count; copy it smaller.

    python scripts/prepare_imagenet.py ROOT [--labels FILE]
    python scripts/prepare_imagenet.py ROOT --resize 256 --to FOLDER [--quality 90] [--workers 8]

ROOT holds ImageNet's archives ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or what came out
of them: train/<wnid>/*.JPEG and val/*.JPEG, sorted or not. Labels are read from Kaggle's
LOC_val_solution.csv, from the development kit ILSVRC2012_devkit_t12.tar.gz, from torchvision's
meta.bin, or from a text file with a wnid a line, in the order of the images' numbers; the first
three are found in ROOT.

--resize N writes a copy with short sides of at most N pixels (PIL, bicubic, JPEG of the given
quality with colours at full resolution; EXIF is left out). Images that are not larger are copied
byte for byte.

Every file is whole or not there: if interrupted, the same command goes on.
"""

import argparse
import io
import json
import os
import re
import sys
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.decoding import to_rgb
from data.imagenet import ARCHIVES, CLASSES, VAL, tree
from data.listing import describe_ignored, is_junk
from training.files import write
from training.process import run_script

LABELS = ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12.tar.gz", "meta.bin")
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_labels(file: Path) -> dict[int, str]:
    """The wnid of every validation image, by its number from 1. Raises `ValueError`, `OSError`."""
    try:
        if file.suffix == ".gz":
            labels = _devkit(file)
        elif file.suffix == ".bin":  # torchvision's: names of the classes, wnids of the images
            labels = dict(enumerate(torch.load(file, weights_only=True)[1], 1))
        else:
            lines = file.read_text().split("\n")
            if file.suffix == ".csv":
                found = re.compile(NUMBER.pattern + r",(n\d{8})\b")
                labels = {int(m[1]): m[2] for line in lines if (m := found.match(line))}
            else:
                labels = {i: line.strip() for i, line in enumerate(lines, 1) if line.strip()}
    except (OSError, ValueError, tarfile.TarError, LookupError, UnpicklingError) as error:
        raise ValueError(f"--labels {file}: cannot be read ({error})") from error
    wrong = [wnid for wnid in labels.values() if not re.fullmatch(r"n\d{8}", wnid)]
    if wrong or set(labels) != set(range(1, VAL + 1)) or len(set(labels.values())) != CLASSES:
        what = f"{wrong[0][:40]!r} among them" if wrong else f"of {len(set(labels.values()))} wnids"
        raise ValueError(
            f"--labels {file}: {len(labels):,} labels, {what}; expected {VAL:,} of {CLASSES:,}"
        )
    return labels


def _devkit(file: Path) -> dict[int, str]:
    from scipy.io import loadmat

    with tarfile.open(file) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers()}

        def content(name: str) -> IO[bytes]:
            opened = archive.extractfile(members[name])
            if opened is None:
                raise KeyError(name)
            return opened

        synsets = loadmat(content("meta.mat"), squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        truth = content("ILSVRC2012_validation_ground_truth.txt").read().split()
    return {number: wnids[int(label)] for number, label in enumerate(truth, 1)}


def sort(root: Path, labels_file: Path | None) -> int:
    """Move the images that lie in root/val/ into their folders; returns how many. Moves none if one
    of them has no label. Raises `ValueError`, `OSError`."""
    val = root / "val"
    if not val.is_dir():
        raise ValueError(f"{root}: has no folder val/; expected val/ILSVRC2012_val_00000001.JPEG …")
    images = sorted(p for p in val.iterdir() if p.is_file() and not is_junk(p.name))
    if not images:
        return 0
    candidates = [labels_file] if labels_file else [root / name for name in LABELS]
    file = next((f for f in candidates if f.exists()), None)
    if file is None:
        raise ValueError(
            f"{candidates[0]}: does not exist; expected --labels FILE, Kaggle's {LABELS[0]}, "
            f"ImageNet's {LABELS[1]} or torchvision's {LABELS[2]}"
        )
    labels = read_labels(file)
    places = []
    for image in images:
        number = NUMBER.match(image.name)
        if not number or int(number[1]) not in labels:
            raise ValueError(f"{image}: has no label; expected ILSVRC2012_val_<number>.JPEG")
        places.append(val / labels[int(number[1])] / image.name)

    for folder in {place.parent for place in places}:
        folder.mkdir(exist_ok=True)
    for image, place in zip(track(images, f"sorting {val}"), places, strict=True):
        image.rename(place)
    return len(images)


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """The items, with a bar on a terminal."""
    from rich.progress import track

    bar = {"transient": True, "disable": not sys.stderr.isatty()}
    yield from track(items, what, total, **bar)  # type: ignore[arg-type]


def unpack(root: Path) -> int:
    """Write the images of the archives in `root` that are not in the tree; returns how many."""
    count = 0
    archive = root / ARCHIVES["train"]
    if archive.exists():
        with tarfile.open(archive) as outer:  # an archive for each class
            for member in track(outer, f"unpacking {archive}", CLASSES):
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    folder = root / "train" / Path(member.name).stem
                    count += sum(put(inner, image, folder / image.name) for image in inner)
    archive = root / ARCHIVES["val"]
    if archive.exists():
        have = {file.name for file in (root / "val").glob("*/*.JPEG")}  # sorted already
        with tarfile.open(archive) as images:
            for image in track(images, f"unpacking {archive}", VAL):
                name = Path(image.name).name
                count += name not in have and put(images, image, root / "val" / name)
    return count


def put(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> bool:
    """Write a file of an archive, unless it is there; returns whether it wrote."""
    source = archive.extractfile(member)  # None: a folder
    if source is None or place.exists():
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place, source.read())
    return True


def shrink(file: Path, root: Path, to: Path, short: int, quality: int) -> str | None:
    """Copy one image with its short side at most `short` pixels, unless it is there. Returns what
    is wrong with it."""
    from PIL import Image

    place = to / file.relative_to(root)
    if place.exists():
        return None
    try:
        content = file.read_bytes()
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")  # of damaged metadata
            image.load()
            if min(image.size) > short:
                size = [int(short * side / min(image.size)) for side in image.size]
                smaller = to_rgb(image).resize((size[0], size[1]), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                smaller.save(buffer, "JPEG", quality=quality, subsampling=0)
                content = buffer.getvalue()
    except Exception as error:  # a damaged file can end in about any
        return f"{file}: cannot be read ({error})"
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place, content)
    return None


def copy(root: Path, to: Path, short: int, quality: int, workers: int, complete: bool) -> int:
    """A copy of the tree with smaller images; returns how many it has. Raises `ValueError` at the
    end if images cannot be read; the others are copied."""
    made = {"short_side": short, "quality": quality, "of": str(root.resolve())}
    note = to / "copy.json"
    if to.resolve() == root.resolve():
        raise ValueError(f"--to {to}: is ROOT itself; expected another folder")
    if note.exists() and json.loads(note.read_text()) != made:
        raise ValueError(f"--to {to}: {note.name} says that another copy is there; remove it first")
    parts = tree(str(root), 1, complete).read()
    files = [part.path(i) for part in parts for i in range(len(part))]
    to.mkdir(parents=True, exist_ok=True)
    write(note, json.dumps(made) + "\n")
    work = partial(shrink, root=root, to=to, short=short, quality=quality)
    # Not forked: a fork of a process with threads may hang.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        done = pool.map(work, files, chunksize=16)
        wrong = [what for what in track(done, f"copying to {to}", len(files)) if what]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}; all others are in {to}")
    return len(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("root", type=Path, help="folder with ImageNet's archives, or with train/ and val/")
    add("--labels", type=Path, help="labels of the validation images")
    add("--part", action="store_true", help="a part of ImageNet: do not check how many images")
    add("--resize", type=int, metavar="N", help="write a copy with short sides of N pixels")
    add("--to", type=Path, metavar="FOLDER", help="where the copy goes")
    add("--quality", type=int, default=90, help="of the copy's JPEGs, 1 to 100; default: 90")
    add("--workers", type=int, default=os.cpu_count(), help="processes; default: a core each")
    args = parser.parse_args()
    if (args.resize is None) != (args.to is None):
        parser.error("--resize and --to: expected both or neither")
    if args.workers < 1 or not 1 <= args.quality <= 100 or (args.resize or 1) < 1:
        parser.error("--resize, --workers: expected whole numbers from 1; --quality: from 1 to 100")
    try:
        if unpacked := unpack(args.root):
            print(f"{args.root}: {unpacked:,} images unpacked")
        print(f"{args.root}: {sort(args.root, args.labels):,} validation images sorted")
        source = tree(str(args.root), 1, not args.part)
        ignored = describe_ignored(source.listing.ignored) if source.listing else ""
        print(
            f"  {'found' if args.part else 'complete'}: {source.num_classes:,} classes, "
            f"{source.train_images:,} training images, {len(source.read()[1]):,} for validation"
            f"{'; ' if ignored else ''}{ignored}"
        )
        if args.to:
            keys = (args.to, args.resize, args.quality, args.workers, not args.part)
            print(f"{args.to}: {copy(args.root, *keys):,} images with short sides of {args.resize}")
    except (ValueError, OSError, tarfile.TarError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
