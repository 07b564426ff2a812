"""Which files below a folder are images: one answer for every reader, with what is passed over."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.splits import Files

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
JUNK = {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini"}  # of systems, in any case
SAMPLES = 256  # images of a split whose content the fingerprint looks at
HEAD = 2**16  # bytes of each

Ignored = dict[str, tuple[int, str]]
"""Files that are not read, by kind: how many, and the first of them."""
Fingerprint = dict[str, dict[str, list[Any]]]
"""{"train": {class: [images, digest]}, "test": …}"""


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden or left by an operating system."""
    return name.startswith(".") or name.lower() in JUNK


def printable(path: str | Path) -> str:
    """The path as text that any terminal and file can take, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def describe_ignored(ignored: Ignored) -> str:
    """In one line; empty if every file is read."""
    kinds = sorted(ignored.items(), key=lambda item: -item[1][0])
    told = [f"{count:,} {kind} ({first})" for kind, (count, first) in kinds[:6]]
    told += [f"{len(kinds) - 6} more kinds"] if len(kinds) > 6 else []
    return f"not read: {', '.join(told)}" if told else ""


@dataclass(frozen=True)
class Listing:
    """The images of a folder train/<class>/… beside test/<class>/… (or val/)."""

    classes: list[str]
    train: Files
    test: Files
    ignored: Ignored

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return {
            "train": _digests(self.train, self.classes),
            "test": _digests(self.test, self.classes),
        }


def list_images(root: Any, path: Path, test: str, apply_exif: bool) -> Listing:
    """The images of `path`/train and `path`/`test`, `root` being that path as the user typed it.

    Classes are numbered in the order of their names, images listed in that of theirs, which every
    seed's order of batches builds on. Opens no image. Raises `ValueError` if a class is in one part
    only, holds no images, or has a name that cannot be printed, or if there are fewer than two.
    """
    ignored: Ignored = {}
    parts = ("train", test)
    try:
        found = {part: _class_folders(path / part, ignored) for part in parts}
        for one, other in (parts, parts[::-1]):
            lost = sorted(found[one] - found[other])
            if lost:
                raise ValueError(
                    f"data.root={root}: {one}/{printable(lost[0])} has no {other}/"
                    f"{printable(lost[0])} ({len(lost)} of {len(found[one])} classes); expected "
                    f"the same class folders in both"
                )
        classes = sorted(found["train"])
        for name in classes:
            if not printable(name) == name:
                raise ValueError(
                    f"data.root={root}: the class folder {printable(name)} has a name that is not "
                    f"UTF-8; expected another name, in train/ and in {test}/"
                )
        if len(classes) < 2:
            raise ValueError(f"data.root={root}: {len(classes)} classes; expected at least 2")
        train, tested = (_images(path / part, classes, apply_exif, ignored) for part in parts)
    except OSError as error:
        raise ValueError(
            f"data.root={root}: cannot list {printable(error.filename or path)} ({error.strerror})"
        ) from error
    for part, files in zip(parts, (train, tested), strict=True):
        counts = torch.bincount(files.labels, minlength=len(classes)).tolist()
        empty = [f"{part}/{name}" for name, count in zip(classes, counts, strict=True) if not count]
        if empty:
            held: Ignored = {}
            list(walk(path / empty[0], "", held))
            of = f", nor do {len(empty) - 1} more classes" if len(empty) > 1 else ""
            raise ValueError(
                f"data.root={root}: {empty[0]} holds no images"
                f"{f' ({describe_ignored(held)})' if held else ''}{of}; expected files that end in "
                f"{', '.join(SUFFIXES)} in every class folder"
            )
    return Listing(classes, train, tested, ignored)


def _note(ignored: Ignored, kind: str, name: str) -> None:
    count, first = ignored.get(kind, (0, printable(name)))
    ignored[kind] = (count + 1, first)


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "image", or what else it is. Looks at no file but where a link leads: there may be
    a million, and a folder's listing tells the rest."""
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "dangling link" if entry.is_symlink() else "special file"
    except OSError:  # a link to itself, or to where we may not look
        return "dangling link"
    if entry.name.lower().endswith(SUFFIXES):
        return "image"
    return printable(Path(entry.name).suffix.lower()) or "file without a suffix"


def _class_folders(part: Path, ignored: Ignored) -> set[str]:
    found = set()
    with os.scandir(part) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            kind = "" if is_junk(entry.name) else _kind(entry)
            if kind == "folder":
                found.add(entry.name)
            elif kind:
                kind = "image outside of class folders" if kind == "image" else kind
                _note(ignored, kind, f"{part.name}/{entry.name}")
    return found


def _images(part: Path, classes: list[str], apply_exif: bool, ignored: Ignored) -> Files:
    names: list[np.ndarray] = []
    counts: list[int] = []
    above = len(part.name) + 1
    for name in classes:
        found = walk(part / name, f"{part.name}/{name}/", ignored)
        names.append(np.array([os.fsencode(file)[above:] for file in found], dtype=np.bytes_))
        counts.append(len(names[-1]))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Files(part, np.concatenate(names), labels, apply_exif)


def walk(
    folder: str | Path,
    below: str = "",
    ignored: Ignored | None = None,
    seen: set[tuple[int, int]] | None = None,
) -> Iterator[str]:
    """Every image below `folder`, `below` before its path, in the order of the path's parts. Links
    are followed, but no folder is entered twice. Other files are added to `ignored`."""
    ignored, seen = {} if ignored is None else ignored, set() if seen is None else seen
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in seen:
        _note(ignored, "link to a folder listed already", below.rstrip("/"))
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if is_junk(entry.name):
                continue
            kind = _kind(entry)
            if kind == "image":
                yield below + entry.name
            elif kind == "folder":
                yield from walk(entry.path, f"{below}{entry.name}/", ignored, seen)
            else:
                _note(ignored, kind, below + entry.name)


# --- the fingerprint


def _digests(files: Files, classes: list[str]) -> dict[str, list[Any]]:
    """Of every class, how many images it has and a digest of their names, with sizes and first
    bytes of some.

    Names of all and the content of a few, evenly spread: sizes of all would take a look at every
    file, minutes for a million on a network's disk, and would not tell apart files without
    compression. Another data set whose files have the same names (000.png, …) shows in the first
    few, an image that was added, removed or renamed in the names.
    """
    sampled = range(0, len(files), -(-len(files) // SAMPLES) or 1)
    content = {i: _head(files.path(i)) for i in sampled}
    found, start = {}, 0
    for name, count in zip(classes, torch.bincount(files.labels).tolist(), strict=True):
        own = range(start, start + count)
        skip = len(os.fsencode(name)) + 1  # so that the digest is of the class, however called
        digest = hashlib.sha256(b"\0".join(n[skip:] for n in files.names[start : own.stop]))
        for i in own[-start % sampled.step :: sampled.step]:
            digest.update(content[i])
        found[name] = [count, digest.hexdigest()[:16]]
        start = own.stop
    return found


def _head(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return b"\0%d\0" % os.fstat(opened.fileno()).st_size + opened.read(HEAD)
    except OSError:  # whoever reads it says so
        return b"\0unreadable\0"


def differences(there: Fingerprint, here: Fingerprint) -> list[str]:
    """What tells one data set from another, in a few words each; empty if they are the same."""
    found = []
    for part, what in (("train", "training"), ("test", "test")):
        one, other = (sum(n for n, _ in side[part].values()) for side in (there, here))
        if one != other:
            found.append(f"{one:,} {what} images there, {other:,} here")
    added, lost = (
        sorted(set(a["train"]) - set(b["train"])) for a, b in ((here, there), (there, here))
    )
    if added or lost:
        names = [f"+{name}" for name in added] + [f"-{name}" for name in lost]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        found.append(f"classes {' '.join(names[:6])}{more}")
    changed = [
        f"{part}/{name}"
        for part in ("train", "test")
        for name in there[part]
        if name in here[part] and there[part][name] != here[part][name]
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        found.append(f"other files in {', '.join(changed[:3])}{more}")
    return found
