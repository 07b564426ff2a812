"""Sort ImageNet's validation images, which come in one folder, into a folder per class.

    python scripts/prepare_imagenet.py ROOT [--labels FILE]

ROOT holds train/<wnid>/*.JPEG and val/*.JPEG. Labels are read from Kaggle's LOC_val_solution.csv,
from the development kit ILSVRC2012_devkit_t12.tar.gz, or from a text file with a wnid a line, in
the order of the images' numbers; the first two are found in ROOT. Images are moved one by one: if
interrupted, the same command goes on.
"""

import argparse
import re
import sys
import tarfile
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.imagenet import CLASSES, VAL, tree

LABELS = ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12.tar.gz")
NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_labels(file: Path) -> dict[int, str]:
    """The wnid of every validation image, by its number from 1. Raises `ValueError`, `OSError`."""
    try:
        if file.suffix == ".gz":
            labels = _devkit(file)
        else:
            lines = file.read_text().split("\n")
            if file.suffix == ".csv":
                found = re.compile(NUMBER.pattern + r",(n\d{8})\b")
                labels = {int(m[1]): m[2] for line in lines if (m := found.match(line))}
            else:
                labels = {i: line.strip() for i, line in enumerate(lines, 1) if line.strip()}
    except (UnicodeDecodeError, tarfile.TarError, KeyError, IndexError) as error:
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
    images = sorted(p for p in val.iterdir() if p.is_file() and not p.name.startswith("."))
    if not images:
        return 0
    candidates = [labels_file] if labels_file else [root / name for name in LABELS]
    file = next((f for f in candidates if f.exists()), None)
    if file is None:
        raise ValueError(
            f"{candidates[0]}: does not exist; expected --labels FILE, Kaggle's {LABELS[0]} or "
            f"ImageNet's {LABELS[1]}"
        )
    labels = read_labels(file)
    places = []
    for image in images:
        number = NUMBER.match(image.name)
        if not number or int(number[1]) not in labels:
            raise ValueError(f"{image}: has no label; expected ILSVRC2012_val_<number>.JPEG")
        places.append(val / labels[int(number[1])] / image.name)

    from rich.progress import track

    for folder in {place.parent for place in places}:
        folder.mkdir(exist_ok=True)
    for image, place in zip(
        track(images, f"sorting {val}", transient=True, disable=not sys.stderr.isatty()),
        places,
        strict=True,
    ):
        image.rename(place)
    return len(images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder with train/ and val/")
    parser.add_argument("--labels", type=Path, help="labels of the validation images")
    args = parser.parse_args()
    try:
        print(f"{args.root}: {sort(args.root, args.labels):,} validation images sorted")
        source = tree(str(args.root), 224, 256)
        print(
            f"  complete: {source.num_classes:,} classes, {source.train_images:,} training images"
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
