"""Images with labels, and stratified parts of them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """`images`: (N, C, H, W) uint8; `labels`: (N,) int64; `errors`: (N,) why an image could not be
    read, "" if it could, or None if all could."""

    images: Tensor
    labels: Tensor
    errors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        errors = None if self.errors is None else self.errors[index.numpy()]
        return Split(self.images[index], self.labels[index], errors)

    @property
    def unread(self) -> list[str]:
        return [] if self.errors is None else [str(error) for error in self.errors if error]

    def replace_unread(self) -> "Split":
        """The next image that could be read in the place of each that could not, so that the order
        of the others stays. Raises `ValueError` if there is none."""
        if not self.unread:
            return self
        good = np.flatnonzero(self.errors == "")
        if not len(good):
            raise ValueError(f"none of the images can be read; the first: {self.unread[0]}")
        following = good[np.searchsorted(good, np.arange(len(self))) % len(good)]
        return replace(self.take(torch.from_numpy(following)), errors=None)

    def drop_unread(self) -> "Split":
        """The images that could be read. Raises `ValueError` if there is none."""
        if len(self.unread) == len(self) > 0:
            raise ValueError(f"none of the images can be read; the first: {self.unread[0]}")
        return self.take(torch.from_numpy(self.errors == "")) if self.unread else self


@dataclass(frozen=True)
class Files:
    """Images that stay on disk. `names`: (N,) bytes, paths below `root`; `labels`: (N,) int64;
    `apply_exif`: whether they are turned as EXIF says.

    An array of bytes and not a list of texts: a million names are a single copy for each worker.
    """

    root: Path
    names: np.ndarray
    labels: Tensor
    apply_exif: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Files":
        return replace(self, names=self.names[index.numpy()], labels=self.labels[index])

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])


def describe_skipped(part: str, unread: list[str]) -> str:
    """What data.on_error=skip did, in one line."""
    instead = "left out" if part == "test" else "replaced by the next ones"
    more = f"; and {len(unread) - 3} more" if len(unread) > 3 else ""
    return (
        f"data.on_error=skip: {len(unread)} unreadable {part} images {instead}: "
        f"{'; '.join(unread[:3])}{more}"
    )


Part = TypeVar("Part", Split, Files)


def stratified(split: Part, fraction: float, salt: int) -> tuple[Part, Part]:
    """`split` in two, the first with `fraction` of every class (rounded, at least one image).

    Which images is a function of `salt` alone: not of the run's seed, so that all runs of a study
    see the same ones. Both parts keep the order of `split`.
    """
    chosen = torch.zeros(len(split), dtype=torch.bool)
    rng = np.random.default_rng([salt, 0x5711])
    counts = split.labels.unique(return_counts=True)[1]
    for members in split.labels.argsort(stable=True).split(counts.tolist()):
        count = max(1, round(fraction * len(members)))
        chosen[members[torch.from_numpy(rng.permutation(len(members))[:count])]] = True
    return split.take(chosen), split.take(~chosen)
