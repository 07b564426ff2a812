"""ImageNet's tree of photographs: looked through before a run starts, read while it trains."""

from pathlib import Path

from data.listing import list_images
from data.sources import Source

ARCHIVES = {part: f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")}
CLASSES, TRAIN, VAL = 1000, 1_281_167, 50_000
EXPECTED = "expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG in it"


def tree(root: str | None, size: int, verify_counts: bool = True) -> Source:
    """The tree at `root`, train/<class>/<image> beside val/<class>/<image>, for crops of `size`.

    Classes are numbered in the order of their names, as in torchvision and published weights.
    Opens no image. Raises `FileNotFoundError` or `ValueError` if the tree is not there, its parts
    do not match, or, if `verify_counts`, classes or images are not as many as ImageNet has.
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
    if not any(entry.is_dir() for entry in (path / "val").iterdir()):
        raise ValueError(
            f"data.root={root}: val/ has no folders, its images are not sorted by class; "
            f"python scripts/prepare_imagenet.py {root} sorts them"
        )
    listing = list_images(root, path, "val", apply_exif=False)
    splits = listing.train, listing.test
    counts = (len(listing.classes), *map(len, splits))
    if verify_counts and counts != (CLASSES, TRAIN, VAL):
        raise ValueError(
            f"data.root={root}: {counts[0]:,} classes, {counts[1]:,} training and {counts[2]:,} "
            f"validation images; ImageNet has {CLASSES:,}, {TRAIN:,} and {VAL:,}; "
            f"data.verify_counts=false takes what is there"
        )
    read = lambda: splits  # noqa: E731
    return Source(counts[0], 3, size, counts[1], True, read, listing.classes, listing)
