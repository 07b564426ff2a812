"""Batches of photographs that stay on disk, read ahead by worker processes.

Workers decode, cut out, scale and mirror; colours are changed on the device, to which the images
travel as bytes. As with data that lives on the device, order and augmentation are pure functions of
(seed, epoch, index): the number of workers changes nothing, and an epoch that is entered in the
middle reads nothing of what it skips.
"""

import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.decoding import decode
from data.loader import check_size, shard
from data.splits import Files, describe_skipped
from data.transforms import COLOURS, CROPS, centre, cut, scale

log = logging.getLogger("smallbatch")
BLOCK = 32  # images that a worker delivers at once, however small or large the SGD batch
TRIES = 100  # images in a row that may be unreadable
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1

Job = tuple[str, int | None, np.ndarray]
"""Of which split, for which epoch (None: as in evaluation), which images."""
Block = tuple[Tensor, Tensor, Tensor, list[str]]
"""Pixels (N, 3, H, W) uint8, indices (N,), colour shifts (N, 3), and what could not be read."""


# --- what a worker does


class Photographs:
    """Reads the images of a `Job`: the part of a `Stream` that its workers have a copy of."""

    def __init__(
        self,
        splits: dict[str, Files],
        seed: int,
        size: int,
        resize: int,
        crop: str | int,
        flip: bool,
        lighting: float,
        skip: bool,
    ):
        self.splits, self.seed, self.size, self.resize = splits, seed, size, resize
        self.crop, self.flip, self.lighting, self.skip = crop, flip, lighting, skip

    def __getitem__(self, job: Job) -> Block:
        split, epoch, wanted = job
        files, index, unread = self.splits[split], list[int](), list[str]()
        pixels = torch.empty((len(wanted), self.size, self.size, 3), dtype=torch.uint8)
        images, colours = pixels.permute(0, 3, 1, 2), torch.zeros((len(wanted), 3))
        for first in wanted.tolist():
            n = len(index)
            # In training the next image takes an unreadable one's place: SGD batches are full.
            for i in range(first, first + (TRIES if epoch is not None else 1)):
                try:
                    image = decode(files.path(i % len(files)), files.apply_exif)
                except ValueError as error:
                    unread.append(str(error))
                    if self.skip:
                        continue
                    return images[:0], torch.empty(0), colours[:0], unread
                if epoch is None or not self.crop:
                    images[n] = centre(image, self.size, self.resize)
                else:
                    images[n], colours[n] = self.augment(image, epoch, first)
                index.append(i % len(files))
                break
        n = len(index)
        return images[:n], torch.tensor(index, dtype=torch.int64), colours[:n], unread

    def augment(self, image: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """A window of the image, mirrored or not, and what is added to its colours."""
        rng = np.random.default_rng([self.seed, epoch, 1 + index])  # without it: the order's
        mirror = rng.integers(2) and self.flip
        height, width = image.shape[1:]
        window = cut(image, CROPS[str(self.crop)](width, height, rng))
        window = scale(window, self.size, self.size)
        shift = np.zeros(3)
        if self.lighting:
            shift = COLOURS @ rng.normal(0, 1, 3) * (255 * self.lighting)
        return window.flip(2) if mirror else window, torch.from_numpy(shift)


class Jobs:
    """The order of work, for a `DataLoader`, which outlives it with its workers."""

    def __init__(self) -> None:
        self.now: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
        return iter(self.now)


def _as_it_is(block: Any) -> Any:
    return block


def _end_with_parent(worker: int) -> None:
    """Without this, workers of a killed run would live as long as the server that forked them,
    which lives as long as they do."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- batches


class Stream:
    """`train`: SGD batches of augmented images; `test`: every test image exactly once.

    `crop`: "random_resized" or "random_square", scaled to `size`, or 0: the images of an
    evaluation, never mirrored; `flip`: mirror half of the images; `lighting`: standard deviation of
    AlexNet's colour noise; `pixels`: "standardized" by ImageNet's mean and deviation, or "bgr_255",
    BGR from 0 to 255. Evaluation scales the short side to `resize` and cuts the middle out.
    `workers`: processes; 0: none; None: as many as torch has threads. `on_error`: "raise", or
    "skip" unreadable images and log how many at the end of a pass: evaluation leaves them out,
    training takes the next one instead.

    Batches raise `ValueError` for an unreadable image, `ChildProcessError` if a worker is gone.
    """

    def __init__(
        self,
        train: Files,
        test: Files,
        sgd_batch: int,
        seed: int,
        size: int = 224,
        resize: int = 256,
        crop: str | int = "random_resized",
        flip: bool = True,
        lighting: float = 0.0,
        pixels: str = "standardized",
        workers: int | None = None,
        on_error: str = "raise",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ):
        check_size(sgd_batch, len(train))
        self.rank, self.world_size = rank, world_size
        self.seed, self.sgd_batch = seed, sgd_batch
        self.updates_per_epoch, self.dropped = divmod(len(train), sgd_batch)
        self._unreadable: dict[str, set[str]] = {"train": set(), "test": set()}
        self.labels, self.test_labels = train.labels, test.labels
        self.device, self.lighting = torch.device(device), lighting
        self.reversed = pixels == "bgr_255"
        self.mean = [0.0] * 3 if self.reversed else list(MEAN)
        self.std = [1 / 255] * 3 if self.reversed else list(STD)
        constants = [[1 / (255 * s), -m / s] for m, s in zip(self.mean, self.std, strict=True)]
        self.scale, self.shift = torch.tensor(constants, device=device).T[:, :, None, None]

        self.workers = torch.get_num_threads() if workers is None else workers
        self.skip = on_error == "skip"
        self.photographs = Photographs(
            {"train": train, "test": test}, seed, size, resize, crop, flip, lighting, self.skip
        )
        self.jobs, self.turn = Jobs(), 0
        # Workers come from a server without our threads, files and locks: a fork of this process
        # could hang on the first, and would hold the lock of a run that was killed.
        server = multiprocessing.get_context("forkserver") if self.workers else None
        if server:
            server.set_forkserver_preload(["torch", "torchvision.io", "PIL.Image"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            self.blocks: Iterable[Block] = DataLoader(
                self.photographs,  # type: ignore[arg-type]
                batch_size=None,
                sampler=self.jobs,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_end_with_parent,
                multiprocessing_context=server,
                generator=torch.Generator(),  # it draws a seed for nothing, but not from the run's
                persistent_workers=self.workers > 0,
            )

    @property
    def unreadable(self) -> dict[str, int]:
        """How many images of each split could not be read so far."""
        return {split: len(found) for split, found in self._unreadable.items()}

    def __len__(self) -> int:
        return self.updates_per_epoch

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The SGD batches of an epoch from number `start` on: (S, 3, H, W) float32, (S,)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))
        order = order[start * self.sgd_batch : len(self) * self.sgd_batch]
        order = shard(order, self.sgd_batch, self.rank, self.world_size)
        return self.batches(self.read("train", epoch, order), self.sgd_batch // self.world_size)

    def test(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in order, at most `size` at a time."""
        images = np.arange(len(self.test_labels))
        order = np.array_split(images, self.world_size)[self.rank]
        return self.batches(self.read("test", None, order), size)

    def sample(self, count: int) -> Tensor:
        """The first `count` training images of epoch 0 as in evaluation, whatever the batch."""
        order = np.random.default_rng([self.seed, 0]).permutation(len(self.labels))[:count]
        images, _, colours, _ = block = self.photographs["train", None, order]
        self.check(block, 1)
        return self.normalize(images.to(self.device), colours.to(self.device))

    def batches(
        self, blocks: Iterable[tuple[Tensor, ...]], size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`size` images at a time; the bytes of large batches are put together, not the floats, and
        small ones are normalized together."""
        for images, colours, labels in regroup(blocks, max(size, BLOCK // size * size)):
            pixels = self.normalize(images, colours)
            yield from zip(pixels.split(size), labels.split(size), strict=True)

    def read(
        self, split: str, epoch: int | None, order: np.ndarray
    ) -> Iterator[tuple[Tensor, ...]]:
        """The images `order` of a split, some at a time: bytes, what is to be added to their
        colours, labels; all on the device."""
        self.jobs.now = [(split, epoch, order[i : i + BLOCK]) for i in range(0, len(order), BLOCK)]
        self.turn += 1
        turn, labels = self.turn, self.labels if split == "train" else self.test_labels
        unread: list[str] = []
        try:
            for wanted, block in zip(self.jobs.now, self.blocks, strict=True):
                if turn != self.turn:  # the workers read for somebody else now
                    raise RuntimeError("batches of an earlier train() or test() of this loader")
                images, index, colours, failed = block
                self.check(block, len(wanted[2]) if split == "train" else 0)
                unread += failed
                self._unreadable[split].update(failed)
                on_device = images.to(self.device, non_blocking=True)
                yield on_device, colours.to(self.device), labels[index].to(self.device)
            if split == "test" and 0 < len(unread) == len(order):
                raise ValueError(f"none of the images can be read; the first: {unread[0]}")
        except RuntimeError as error:
            if "worker (pid" not in str(error):
                raise
            raise ChildProcessError(
                f"data.workers={self.workers}: one was killed ({str(error)[:100]}), often for want "
                f"of memory or of room in /dev/shm; fewer workers need less, 0 none"
            ) from error
        finally:  # also where the last update comes before the epoch's end
            if unread:
                log.warning(f"  {describe_skipped(split, unread)}")

    def check(self, block: Block, least: int) -> None:
        """Raise `ValueError` if an image could not be read and none may be skipped, or if fewer
        than `least` are left."""
        if block[3] and not self.skip:
            raise ValueError(f"{block[3][0]}; data.on_error=skip goes on without such images")
        if len(block[1]) < least:
            raise ValueError(f"too many images in a row cannot be read; the first: {block[3][0]}")

    def normalize(self, images: Tensor, colours: Tensor) -> Tensor:
        """Bytes, and what is to be added to their colours, to the network's float32."""
        if self.reversed:
            images, colours = images.flip(1), colours.flip(1)
        pixels = torch.empty(images.shape, device=self.device)
        # A processor takes an image at a time, which stays in its cache.
        at_once = 1 if self.device.type == "cpu" else len(images)
        parts = (x.split(at_once) for x in (colours, images, pixels))
        for shift, part, out in zip(*parts, strict=True):
            out.copy_(part)
            if self.lighting:
                out.add_(shift[:, :, None, None]).clamp_(0, 255).floor_()
            out.mul_(self.scale).add_(self.shift)
        return pixels


def regroup(blocks: Iterable[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of some tensors in the same order, `size` at a time; the last may be fewer."""
    held: list[tuple[Tensor, ...]] = []
    for block in blocks:
        held.append(block)
        count = sum(len(part[0]) for part in held)
        if count >= size:
            whole = count // size * size
            joined = [x[0] if len(x) == 1 else torch.cat(x) for x in zip(*held, strict=True)]
            yield from zip(*(x[:whole].split(size) for x in joined), strict=True)
            held = [tuple(x[whole:] for x in joined)] if whole < count else []
    if held:
        rest = tuple(map(torch.cat, zip(*held, strict=True)))
        if len(rest[0]):
            yield rest
