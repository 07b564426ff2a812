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
    """`images`: (N, C, H, W) uint8; `labels`: (N,) int64; `unreadable`: images that are not among
    them."""

    images: Tensor
    labels: Tensor
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        return replace(self, images=self.images[index], labels=self.labels[index])


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
