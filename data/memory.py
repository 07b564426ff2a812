"""Images of a folder held in memory at one size, with a cache of what was decoded."""

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from data.decoding import decode
from data.listing import printable
from data.splits import Files, Split

log = logging.getLogger("smallbatch")


def hold(files: Files, part: str, size: int, cache: str, on_error: str) -> Split:
    """The images, short side scaled to `size` and the centre cut out. Raises `ValueError` for one
    that cannot be read, or, if `on_error` is "skip", for a class of which none can.

    A copy is kept in `cache`. It saves time and nothing depends on it: one that is damaged or
    cannot be written costs a line. It holds all images or is not there.
    """
    name = _cache_name(files, part, size)
    shape = (len(files), 3, size, size)
    kept: Path | None = None
    try:
        kept = Path(str(cache)).expanduser() / name
        if kept.exists():
            with open(kept, "rb") as file, np.load(file) as arrays:
                images = arrays["images"]
            if images.shape == shape and images.dtype == np.uint8:
                return Split(torch.from_numpy(images), files.labels)
            raise ValueError("of another shape")
    except Exception as error:  # of NumPy and zipfile, for whatever the file holds
        log.warning(
            f"  data.cache={cache}: {name} cannot be read ({_reason(error)}); the images are read"
        )

    images, unread = np.empty(shape, np.uint8), dict[int, str]()
    for i in _track(len(files), f"reading {printable(files.root)}"):
        try:
            images[i] = _fit(decode(files.path(i), files.apply_exif), size)
        except ValueError as error:
            if on_error != "skip":
                raise ValueError(
                    f"{error}; data.on_error=skip goes on without such images"
                ) from None
            unread[i] = str(error)
    if unread:  # there is no copy, so that they are said again the next time
        errors = np.array([unread.get(i, "") for i in range(len(files))])
        split = Split(torch.from_numpy(images), files.labels, errors)
        lost = set(files.labels.tolist()) - set(split.drop_unread().labels.tolist())
        for i, what in unread.items():
            if int(files.labels[i]) in lost:
                folder = os.fsdecode(files.names[i]).split("/")[0]
                raise ValueError(
                    f"none of the images of {part}/{folder} can be read; the first: {what}"
                )
        return split
    try:
        if kept:
            _save(kept, images)
    except OSError as error:
        log.warning(f"  data.cache={cache}: cannot be written ({_reason(error)}); nothing is kept")
    return Split(torch.from_numpy(images), files.labels)


def _cache_name(files: Files, part: str, size: int) -> str:
    """It tells what the copy was made of: every file's path, size and time of change."""
    digest = hashlib.sha256(os.fsencode(f"{files.root.resolve()}|{size}|{files.apply_exif}"))
    for i, label in enumerate(files.labels.tolist()):
        digest.update(b"|%d|%s" % (label, files.names[i]))
        try:
            status = files.path(i).stat()
            digest.update(b"|%d|%d" % (status.st_size, status.st_mtime_ns))
        except OSError:  # gone since the listing, so there can be no copy of it
            digest.update(os.urandom(16))
    return f"{printable(files.root.parent.name)[:100]}-{part}-{digest.hexdigest()[:16]}.npz"


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split())[:100] or type(error).__name__


def _fit(image: torch.Tensor, size: int) -> np.ndarray:
    """(3, size, size)."""
    from PIL import Image, ImageOps

    if image.shape[1:] != (size, size):
        shown = Image.fromarray(image.permute(1, 2, 0).numpy())
        fitted = ImageOps.fit(shown, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(fitted).transpose(2, 0, 1)
    return image.numpy()


def _track(count: int, what: str) -> Iterable[int]:
    """The numbers below `count`, with a bar on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    if sys.stderr is None or not sys.stderr.isatty():
        return range(count)
    return track(range(count), escape(what), transient=True, console=Console(stderr=True))


def _save(file: Path, images: np.ndarray) -> None:
    """All of it or nothing, also where several processes write at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".tmp", f"{file.name}.", file.parent)
    try:
        with open(handle, "wb") as opened:
            np.savez(opened, images=images)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink()
        raise
