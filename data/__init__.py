"""Data sets by name, their parts and their batches."""

import logging
from typing import Any

import numpy as np
import torch

from data import imagenet
from data.listing import describe_ignored
from data.loader import Loader, check_size
from data.mixing import Mixed
from data.sources import Source, cifar, digits, folder, synthetic
from data.splits import Files, Split, describe_skipped, stratified
from data.stream import Stream
from data.transforms import CROPS

log = logging.getLogger("smallbatch")
__all__ = ["Files", "Loader", "Mixed", "Source", "Split", "Stream", "load", "read", "resolve"]


def resolve(config: Any, sgd_batch: int, recipe: Any) -> Source:
    """The data set of a `data` config group, for a training by a `recipe`. Raises `ValueError` or
    `FileNotFoundError` if it is not there or does not fit; reads no images yet."""
    for key, low, high in (("train_fraction", 0.0, 1.0), ("holdout", -1e-9, 0.9)):
        if not low < config[key] <= high:
            allowed = "above 0 and at most 1" if key == "train_fraction" else "from 0 to 0.9"
            raise ValueError(f"data.{key}={config[key]}: expected a number {allowed}")
    check_recipe(config.name, recipe)
    if config.name == "digits":
        source = digits()
    elif config.name == "synthetic":
        keys = ("size", "classes", "channels", "train_images", "test_images")
        source = synthetic(**{key: config[key] for key in keys})
    elif config.name == "folder":
        on_disk = recipe.crop in CROPS
        if config.resize is not None and not on_disk:
            raise ValueError(
                f"data.resize={config.resize}: has no effect on images that are held in memory; "
                f"expected null, or recipe.crop={' or '.join(CROPS)}"
            )
        if config.resize is not None:
            check_resize(config.resize, config.size)
        how = dict(on_disk=on_disk, on_error=config.on_error)
        source = folder(config.root, config.size, config.cache, **how)
    elif config.name == "imagenet":
        check_resize(config.resize, config.size)
        source = imagenet.tree(config.root, config.size, config.verify_counts)
    else:
        source = cifar(config.name, config.root, config.cache, config.get("on_error", "raise"))
    if recipe.flip and not source.mirror:
        raise ValueError(
            f"recipe.flip=true: a mirrored image of data={config.name} has another class or none; "
            f"expected false"
        )
    left = source.train_images * (1 - config.holdout) * config.train_fraction
    check_size(sgd_batch, round(left + source.num_classes))  # rounded class by class
    return source


def check_recipe(name: str, recipe: Any) -> None:
    """Raise `ValueError` for an augmentation that the data set `name` does not have."""
    if recipe.crop in CROPS and name in ("imagenet", "folder"):
        return
    if name == "imagenet":
        raise ValueError(
            f"recipe.crop={recipe.crop}: data=imagenet has photographs of all sizes; expected "
            f"{' or '.join(CROPS)} (recipe=imagenet has the first)"
        )
    if recipe.crop in CROPS:
        raise ValueError(
            f"recipe.crop={recipe.crop}: data={name} has images of one size; expected the pixels "
            f"of zero padding (recipe=cifar has 4)"
        )
    for key, plain in (("lighting", 0.0), ("pixels", "standardized")):
        if recipe.get(key, plain) != plain:
            raise ValueError(
                f"recipe.{key}={recipe[key]}: is for photographs that are read from disk (by "
                f"recipe.crop={' or '.join(CROPS)}); expected {plain} with data={name}"
            )


def check_resize(resize: int, size: int) -> None:
    if resize < size:
        raise ValueError(f"data.resize={resize}: expected at least data.size={size}")


def read(source: Source, config: Any) -> tuple[Any, Any]:
    """Training and test images, after `data.holdout` and `data.train_fraction`: two of `Split`, or
    of `Files` where they stay on disk.

    With a holdout, that part of every class of the training images stands in for the test images,
    which are not touched.
    """
    train, test = source.read()
    if config.holdout > 0:
        test, train = stratified(train, config.holdout, salt=1)
    if config.train_fraction < 1:
        train, _ = stratified(train, config.train_fraction, salt=2)
    return train, test


def load(
    source: Source,
    config: Any,
    recipe: Any,
    sgd_batch: int,
    seed: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    debug: Any = None,
) -> Loader | Stream | Mixed:
    """The batches of a data set for one training: on the device where it fits, else from disk.
    `rank` of `world_size`: the part of this process alone.

    `debug`, a `debug` config group: with `images`, so many training images, which are the test
    images too, and nothing is augmented; with `test_images`, the first test images.
    """
    listing = source.listing
    if listing and listing.ignored:
        log.info(f"  data.root={config.root}: {describe_ignored(listing.ignored)}")
    train, test = read(source, config)
    keys = dict(crop=recipe.crop, flip=recipe.flip)
    keys |= {key: recipe[key] for key in ("lighting", "pixels") if key in recipe}
    if debug and "test_images" in debug:
        test = test.take(torch.arange(min(debug.test_images, len(test))))
    few = debug and debug.get("images")
    if few:
        check_size(few, len(train), f"debug.images={few}")
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
        train = test = train.take(order[:few])
        keys |= {"crop": 0, "flip": False, "lighting": 0.0}
    own: dict[str, Any] = dict(device=device, rank=rank, world_size=world_size)
    loader: Loader | Stream
    if isinstance(train, Split):
        for part, split in (("train", train), ("test", test)):
            if split.unread:
                log.warning(f"  {describe_skipped(part, split.unread)}")
        loader = Loader(train, test, sgd_batch, seed, keys["crop"], keys["flip"], **own)
    else:
        keys |= {key: config[key] for key in ("size", "workers", "on_error")}
        keys["resize"] = round(config.size * 8 / 7) if config.resize is None else config.resize
        loader = Stream(train, test, sgd_batch, seed, **own, **keys)
    mixup, cutmix = recipe.get("mixup", 0.0), recipe.get("cutmix", 0.0)
    if (mixup or cutmix) and not few:
        return Mixed(loader, mixup, cutmix, source.num_classes, seed, rank)
    return loader
