"""Data sets by name, their parts and their batches."""

from typing import Any

from data.loader import Loader, check_size
from data.sources import Source, cifar, digits, folder, synthetic
from data.splits import Split, stratified

__all__ = ["Loader", "Source", "Split", "find", "read"]


def find(config: Any, sgd_batch: int, flip: bool) -> Source:
    """The data set of a `data` config group, for such a training. Raises `ValueError` or
    `FileNotFoundError` if it is not there or does not fit; reads no images yet."""
    for key, low, high in (("train_fraction", 0.0, 1.0), ("holdout", -1e-9, 0.9)):
        if not low < config[key] <= high:
            allowed = "above 0 and at most 1" if key == "train_fraction" else "from 0 to 0.9"
            raise ValueError(f"data.{key}={config[key]}: expected a number {allowed}")
    if config.name == "digits":
        source = digits()
    elif config.name == "synthetic":
        keys = ("size", "classes", "channels", "train_images", "test_images")
        source = synthetic(**{key: config[key] for key in keys})
    elif config.name == "folder":
        source = folder(config.root, config.size, config.cache)
    else:
        source = cifar(config.name, config.root, config.cache)
    if flip and not source.mirror:
        raise ValueError(
            f"recipe.flip=true: a mirrored image of data={config.name} has another class or none; "
            f"expected false"
        )
    left = source.train_images * (1 - config.holdout) * config.train_fraction
    check_size(sgd_batch, round(left + source.num_classes))  # rounded class by class
    return source


def read(source: Source, config: Any) -> tuple[Split, Split]:
    """Training and test images, after `data.holdout` and `data.train_fraction`.

    With a holdout, that part of every class of the training images stands in for the test images,
    which are not touched.
    """
    train, test = source.read()
    if config.holdout > 0:
        test, train = stratified(train, config.holdout, salt=1)
    if config.train_fraction < 1:
        train, _ = stratified(train, config.train_fraction, salt=2)
    return train, test
