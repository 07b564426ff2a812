"""ImageNet's tree of photographs: looked through before a run starts, read while it trains."""

import os
from pathlib import Path

import numpy as np
import torch

from data.sources import EXTENSIONS, Source
from data.splits import Files

ARCHIVES = {part: f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")}
CLASSES, TRAIN, VAL = 1000, 1_281_167, 50_000
ENDINGS = tuple(EXTENSIONS)
EXPECTED = "expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG in it"


def tree(root: str | None, size: int, complete: bool = True) -> Source:
    """The tree at `root`, train/<class>/<image> beside val/<class>/<image>, for crops of `size`.

    Classes are numbered in the order of their names, as in torchvision and published weights.
    Opens no image. Raises `FileNotFoundError` or `ValueError` if the tree is not there, its parts
    do not match, or, if `complete`, classes or images are not as many as ImageNet has.
    """
    if root is None:
        raise ValueError(f"data.root=null: data=imagenet needs the path of a folder; {EXPECTED}")
    path = Path(str(root)).expanduser()
    for part in (path, path / "train", path / "val"):
        if not part.is_dir():
            kaggle = path / "ILSVRC" / "Data" / "CLS-LOC"
            found = "does not exist" if part == path else f"has no folder {part.name}/"
            meant = f"did you mean data.root={kaggle}? " if kaggle.is_dir() else ""
            if any((path / archive).exists() for archive in ARCHIVES.values()):
                meant = f"python scripts/prepare_imagenet.py {root} unpacks its archives; "
            raise FileNotFoundError(f"data.root={root}: {found}; {meant}{EXPECTED}")
    train, val = (_classes(path / part) for part in ("train", "val"))
    if not val:
        raise ValueError(
            f"data.root={root}: val/ has no folders, its images are not sorted by class; "
            f"python scripts/prepare_imagenet.py {root} sorts them"
        )
    for one, other, here, there in (("train", "val", train, val), ("val", "train", val, train)):
        lost = sorted(set(here) - set(there))
        if lost:
            raise ValueError(
                f"data.root={root}: {one}/{lost[0]} has no {other}/{lost[0]} ({len(lost)} of "
                f"{len(here)} classes); expected the same class folders in both"
            )
    if len(train) < 2:
        raise ValueError(f"data.root={root}: {len(train)} classes; expected at least 2")
    splits = _files(path / "train", train), _files(path / "val", val)
    counts = (len(train), len(splits[0]), len(splits[1]))
    if complete and counts != (CLASSES, TRAIN, VAL):
        raise ValueError(
            f"data.root={root}: {counts[0]:,} classes, {counts[1]:,} training and {counts[2]:,} "
            f"validation images; ImageNet has {CLASSES:,}, {TRAIN:,} and {VAL:,}; "
            f"data.complete=false takes what is there"
        )
    return Source(len(train), 3, size, len(splits[0]), True, lambda: splits, train)


def _classes(part: Path) -> list[str]:
    with os.scandir(part) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _files(part: Path, classes: list[str]) -> Files:
    """Every image of a part, class by class, in the order of their names."""
    found, labels = [], []
    for label, name in enumerate(classes):
        with os.scandir(part / name) as entries:  # no look at each file: there are a million
            files = sorted(
                os.fsencode(f"{name}/{e.name}")
                for e in entries
                if e.name.lower().endswith(ENDINGS) and not e.name.startswith(".")
            )
        if not files:
            raise FileNotFoundError(f"data.root: {part / name} holds no images")
        found.append(np.array(files))
        labels.append(torch.full((len(files),), label))
    return Files(part, np.concatenate(found), torch.cat(labels))
