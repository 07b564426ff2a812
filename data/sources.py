"""The data sets: each function looks at what is there and promises to read it later.

So that a mistake of the user is found before any data is read, a `Source` knows the number of
classes and the shape of an image at once, and reads the images only when asked.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from data.listing import Listing, list_images
from data.memory import hold
from data.splits import Split, stratified


@dataclass(frozen=True)
class Source:
    """A data set that is there to be read."""

    num_classes: int
    channels: int
    size: int
    train_images: int
    mirror: bool
    """Whether a mirrored image keeps its class."""
    read: Callable[..., tuple[Any, Any]]
    """Training and test images: two of `Split`, or of `Files`."""
    classes: list[str] = field(default_factory=list)
    """Their names, as far as they are known before it is read, or then."""
    listing: Listing | None = None
    """The files, where it is a folder of the user's."""


def digits() -> Source:
    """scikit-learn's handwritten digits (1797 images of 8x8 in 17 grey levels; part of UCI's
    Optical Recognition of Handwritten Digits): four fifths of each class train, one fifth tests."""

    def read() -> tuple[Split, Split]:
        # The file itself: load_digits brings all of scikit-learn and scipy, seconds before a start.
        package = importlib.util.find_spec("sklearn")
        if package is None or package.origin is None:
            raise ValueError("data=digits: needs scikit-learn; pip install scikit-learn")
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
        images = np.round(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        everything = Split(torch.from_numpy(images), torch.from_numpy(table[:, -1]))
        return stratified(everything, 0.8, salt=0)

    return Source(10, 1, 8, 1438, False, read, [str(digit) for digit in range(10)])


def synthetic(
    size: int, classes: int, channels: int, train_images: int, test_images: int
) -> Source:
    """Random pixels and labels, for measuring speed."""

    def read() -> tuple[Split, Split]:
        generator = torch.Generator().manual_seed(0)

        def make(count: int) -> Split:
            shape = (count, channels, size, size)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            return Split(images, torch.arange(count) % classes)

        return make(train_images), make(test_images)

    return Source(classes, channels, size, train_images, True, read)


def cifar(name: str, root: str | None, cache: str, on_error: str = "raise") -> Source:
    """CIFAR-10 or -100: from a folder-per-class tree at `root`, else torchvision's, downloaded
    into `cache` where it is not there yet."""
    classes = {"cifar10": 10, "cifar100": 100}[name]
    if root is not None:
        source = folder(root, 32, cache, name, on_error=on_error)
        if source.num_classes != classes:
            raise ValueError(
                f"data.root={root}: {source.num_classes} classes; data={name} has {classes}"
            )
        return source

    names: list[str] = []

    def read() -> tuple[Split, Split]:
        from torchvision import datasets

        place = Path(str(cache)).expanduser()
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]

        def part(train: bool) -> Split:
            try:
                data = kind(place, train=train)
            except RuntimeError:  # not there, or another process is just fetching it
                data = fetch(train)
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            names[:] = data.classes
            return Split(images, torch.tensor(data.targets))

        def fetch(train: bool) -> Any:
            try:
                place.mkdir(parents=True, exist_ok=True)
                with FileLock(place / f".{name}.lock"):
                    return kind(place, train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"data={name}: not found in {place} and the download failed ({error}); put "
                    f"{kind.filename} there, or name a tree of train/<class> and test/<class> "
                    f"images with data.root=PATH; data=digits needs nothing"
                ) from error

        return part(True), part(False)

    return Source(classes, 3, 32, 50_000, True, read, names)


def folder(
    root: str | None,
    size: int,
    cache: str,
    name: str = "folder",
    on_disk: bool = False,
    on_error: str = "raise",
) -> Source:
    """Any tree of images, root/train/<class>/... beside root/test/ or root/val/: RGB, upright.

    The short side scaled to `size` and the centre cut out, kept in memory, and in `cache` as one
    array per split. If `on_disk`, the images stay there, of any size, to be read one by one.
    """
    if root is None:
        raise ValueError(f"data.root=null: data={name} needs the path of a folder with images")
    path = Path(str(root)).expanduser()
    test = next((part for part in ("test", "val") if (path / part).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        found = "does not exist" if not path.is_dir() else "is not a data set"
        raise FileNotFoundError(
            f"data.root={root}: {found}; expected train/<class>/<image> and test/<class>/<image> "
            f"(or val/) in it"
        )
    listing = list_images(root, path, test, apply_exif=True)
    if test == "test" and (path / "val").is_dir():
        listing.ignored["folder beside test/"] = (1, "val")

    needed = (len(listing.train) + len(listing.test)) * 3 * size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not on_disk and needed > 0.8 * memory:
        raise ValueError(
            f"data.root={root}: its images take {needed / 2**30:,.0f} GiB of memory at "
            f"data.size={size}, this machine has {memory / 2**30:,.0f}; recipe=imagenet reads them "
            f"from disk as they are needed"
        )

    def read() -> tuple[Any, Any]:
        if on_disk:
            return listing.train, listing.test
        train = hold(listing.train, "train", size, cache, on_error)
        return train, hold(listing.test, test, size, cache, on_error)

    return Source(
        len(listing.classes), 3, size, len(listing.train), True, read, listing.classes, listing
    )
