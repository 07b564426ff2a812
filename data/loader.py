"""Batches of a data set that lives on the device as uint8.

What an image looks like in an epoch, and when it comes, are pure functions of (seed, epoch, index):
so a run can go on in the middle of an epoch without replaying it, and the SGD batch, the protocol
and the device change neither.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.splits import Split

BLOCK = 512  # images that are cut out and normalized at once, however small the batch


def shard(order: np.ndarray, sgd_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Of an order of images, those of one process: its part of every SGD batch, in order."""
    return order.reshape(-1, world_size, sgd_batch // world_size)[:, rank].reshape(-1)


def check_size(wanted: int, images: int, key: str = "") -> None:
    """Raise `ValueError` if there are not so many training images as an SGD batch needs, or as the
    `key` asks for."""
    if wanted > images:
        raise ValueError(
            f"{key or f'protocol.sgd_batch={wanted} (of batch and protocol)'}: larger than the "
            f"data set; expected at most its {images} training images"
        )


class Loader:
    """`train`: SGD batches of augmented images; `test`: every test image exactly once.

    `crop`: pixels of zero padding from which a window of the original size is cut; `flip`: mirror
    half of the images; `rank` of `world_size`: give this process's part alone. Pixels are
    normalized by the training images' `mean` and `std`, in units of 0 to 1, one for each channel.
    """

    reversed = False  # whether the network gets the channels in reverse order

    def __init__(
        self,
        train: Split,
        test: Split,
        sgd_batch: int,
        seed: int,
        crop: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ):
        check_size(sgd_batch, len(train))
        self.seed, self.sgd_batch, self.crop, self.flip = seed, sgd_batch, crop, flip
        self.rank, self.world_size = rank, world_size
        self.updates_per_epoch, self.dropped = divmod(len(train), sgd_batch)
        self.unreadable = {"train": len(train.unread), "test": len(test.unread)}
        train, test = train.replace_unread(), test.drop_unread()
        # Histograms, not sums of floats: the same to the last bit on every device.
        values = np.arange(256) / 255
        stats = []
        for channel in train.images.transpose(0, 1).numpy():
            weights = np.bincount(channel.ravel(), minlength=256)
            mean = np.average(values, weights=weights)
            stats.append((mean, np.average((values - mean) ** 2, weights=weights) ** 0.5 or 1.0))
        self.mean, self.std = [float(m) for m, _ in stats], [float(s) for _, s in stats]
        constants = torch.tensor([self.mean, self.std], dtype=torch.float32, device=device)
        mean, std = constants[:, :, None, None]
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.size = train.images.shape[-1]
        # Zeros around the images once, so that a crop is a single gather from them.
        self.images = F.pad(train.images.to(device), (crop,) * 4)
        self.labels = train.labels.to(device)
        self.test_images, self.test_labels = test.images.to(device), test.labels.to(device)

    def __len__(self) -> int:
        return self.updates_per_epoch

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The SGD batches of an epoch from number `start` on: (S, C, H, W) float32, (S,)."""
        size = self.sgd_batch // self.world_size
        rng = np.random.default_rng([self.seed, epoch])
        count = len(self.labels)
        order = rng.permutation(count)[start * self.sgd_batch : len(self) * self.sgd_batch]
        order = shard(order, self.sgd_batch, self.rank, self.world_size)
        shifts = rng.integers(0, 2 * self.crop + 1, (count, 2))  # of every image, by its index
        mirrored = rng.integers(0, 2, count) * self.flip
        draws = torch.from_numpy(np.column_stack([order, shifts[order], mirrored[order]]))
        block = max(1, BLOCK // size) * size
        if self.images.is_cuda:  # so that nothing waits for the copy
            draws = draws.pin_memory()
        for part in draws.to(self.images.device, non_blocking=True).split(block):
            images, labels = self.augment(*part.T)
            yield from zip(images.split(size), labels.split(size), strict=True)

    def augment(self, index: Tensor, y: Tensor, x: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
        """Image `index[i]` from row `y[i]` and column `x[i]` of the padded one, mirrored or not."""
        window = torch.arange(self.size, device=index.device)
        columns = torch.where(mirror[:, None] > 0, self.size - 1 - window, window)
        rows, columns = y[:, None] + window, x[:, None] + columns
        cut = self.images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return self.normalize(cut.permute(0, 3, 1, 2)), self.labels[index]

    def test(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in order, at most `size` at a time."""
        own = (
            x.tensor_split(self.world_size)[self.rank] for x in (self.test_images, self.test_labels)
        )
        for images, labels in zip(*(x.split(size) for x in own), strict=True):
            yield self.normalize(images), labels

    def sample(self, count: int) -> Tensor:
        """The first `count` training images of epoch 0 as they are, whatever the batch size."""
        order = np.random.default_rng([self.seed, 0]).permutation(len(self.labels))[:count]
        inner = slice(self.crop, self.crop + self.size)
        index = torch.from_numpy(order).to(self.images.device)
        return self.normalize(self.images[index][:, :, inner, inner])

    def normalize(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift
