"""Images of an SGD batch mixed in pairs: mixup (arXiv 1710.09412) and cutmix (1905.04899)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor


@contextmanager
def drawing(*seed: int) -> Iterator[None]:
    """NumPy's global generator, which timm draws from, starts at `seed`; afterwards it is as it
    was."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


class Mixed:
    """A loader whose training images are mixed by timm: in an SGD batch of S images the i-th with
    the (S-1-i)-th, all in the same proportion, which is beta distributed with `mixup` or `cutmix`
    as its parameter; with both above 0 a coin decides.

    Labels become the classes' shares, (S, classes). What is drawn is a pure function of (seed,
    epoch, number of the SGD batch, rank).
    """

    def __init__(
        self, loader: Any, mixup: float, cutmix: float, classes: int, seed: int, rank: int = 0
    ):
        from timm.data.mixup import Mixup  # two seconds

        self.loader, self.seed, self.rank = loader, seed, rank
        # The loss smooths labels, mixed or not.
        self.mix = Mixup(mixup, cutmix, num_classes=classes, label_smoothing=0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The SGD batches of an epoch from number `start` on: (S, C, H, W), (S, classes)."""
        for number, (images, labels) in enumerate(self.loader.train(epoch, start), start):
            with drawing(self.seed, epoch, number, self.rank):
                mixed = self.mix(images, labels)
            yield mixed
