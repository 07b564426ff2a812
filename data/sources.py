"""The data sets: each function looks at what is there and promises to read it later.

So that a mistake of the user is found before any data is read, a `Source` knows the number of
classes and the shape of an image at once, and reads the images only when asked.
"""

import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.splits import Files, Split, stratified

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Source:
    """A data set that is there to be read."""

    num_classes: int
    channels: int
    size: int
    train_images: int
    mirror: bool
    """Whether a mirrored image keeps its class."""
    read: Callable[[], tuple[Any, Any]]
    """Training and test images: two of `Split`, or of `Files`."""
    classes: list[str] = field(default_factory=list)
    """Their names, as far as they are known before it is read, or then."""


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


def cifar(name: str, root: str | None, cache: str) -> Source:
    """CIFAR-10 or -100: from a folder-per-class tree at `root`, else torchvision's, downloaded
    into `cache` where it is not there yet."""
    cache = str(Path(str(cache)).expanduser())
    classes = {"cifar10": 10, "cifar100": 100}[name]
    if root is not None:
        source = folder(root, 32, cache, name)
        if source.num_classes != classes:
            raise ValueError(
                f"data.root={root}: {source.num_classes} classes; data={name} has {classes}"
            )
        return source

    names: list[str] = []

    def read() -> tuple[Split, Split]:
        from torchvision import datasets

        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]

        def part(train: bool) -> Split:
            try:
                data = kind(cache, train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"data={name}: not found in {cache} and the download failed ({error}); put "
                    f"{kind.filename} there, or name a tree of train/<class> and test/<class> "
                    f"images with data.root=PATH; data=digits needs nothing"
                ) from error
            names[:] = data.classes
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            return Split(images, torch.tensor(data.targets))

        return part(True), part(False)

    return Source(classes, 3, 32, 50_000, True, read, names)


def folder(
    root: str | None, size: int, cache: str, name: str = "folder", stay: bool = False
) -> Source:
    """Any tree of images, root/train/<class>/... beside root/test/ or root/val/: RGB, upright.

    The short side scaled to `size` and the centre cut out, kept in memory, and in `cache` as one
    array per split. If `stay`, the images stay on disk, of any size, to be read one by one.
    """
    if root is None:
        raise ValueError(f"data.root=null: data={name} needs the path of a folder with images")
    path = Path(str(root)).expanduser()
    test = next((path / part for part in ("test", "val") if (path / part).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        found = "does not exist" if not path.is_dir() else "is not a data set"
        raise FileNotFoundError(
            f"data.root={root}: {found}; expected train/<class>/<image> and test/<class>/<image> "
            f"(or val/) in it"
        )
    classes = sorted(p.name for p in (path / "train").iterdir() if p.is_dir())
    extra = sorted(p.name for p in test.iterdir() if p.is_dir() and p.name not in classes)
    if len(classes) < 2 or extra:
        what = f"{test.name}/{extra[0]} has no train/{extra[0]}" if extra else f"{len(classes)}"
        raise ValueError(
            f"data.root={root}: classes: {what}; expected at least 2, the same in both"
        )
    parts = [(part, _list(part, classes)) for part in (path / "train", test)]

    needed = sum(len(files) for _, files in parts) * 3 * size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not stay and needed > 0.8 * memory:
        raise ValueError(
            f"data.root={root}: its images take {needed / 2**30:,.0f} GiB of memory at "
            f"data.size={size}, this machine has {memory / 2**30:,.0f}; recipe=imagenet reads them "
            f"from disk as they are needed"
        )

    def read() -> tuple[Any, Any]:
        kept = Path(str(cache)).expanduser()
        one, other = (_stay(*p) if stay else _read(*p, size, kept) for p in parts)
        return one, other

    return Source(len(classes), 3, size, len(parts[0][1]), True, read, classes)


def _list(tree: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Every image below `tree` with its class, in a fixed order."""
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((tree / name).rglob("*"))
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise FileNotFoundError(f"data.root: {tree} holds no images ({', '.join(EXTENSIONS)})")
    return files


def _stay(tree: Path, files: list[tuple[Path, int]]) -> Files:
    names = np.array([os.fsencode(file.relative_to(tree)) for file, _ in files])
    return Files(tree, names, torch.tensor([label for _, label in files]), upright=True)


def _read(tree: Path, files: list[tuple[Path, int]], size: int, cache: Path) -> Split:
    # The cache is named by what it was made of: every file's path, size and time of change.
    digest = hashlib.sha256(f"{size}".encode())
    for file, label in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}|{label}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    saved = cache / f"{tree.parent.name}-{tree.name}-{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(saved) as arrays:
            return Split(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged: made anew

    from rich.progress import track

    images = np.empty((len(files), 3, size, size), np.uint8)
    labels = np.array([label for _, label in files])
    for i, (file, _) in enumerate(track(files, f"reading {tree}", transient=True)):
        images[i] = _read_image(file, size)
    saved.parent.mkdir(parents=True, exist_ok=True)
    partial = saved.with_name(f"{saved.name}.{os.getpid()}.npz")
    np.savez(partial, images=images, labels=labels)
    partial.replace(saved)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _read_image(file: Path, size: int) -> np.ndarray:
    """(3, size, size) uint8; the image as its EXIF orientation shows it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data.root: cannot read the image {file} ({error})") from error
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def rgb(image: "Image") -> "Image":
    """The image in eight bits of red, green and blue, whatever its mode."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
