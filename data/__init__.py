"""Data sets by name, their parts and their batches."""

from typing import Any

from data.loader import Loader
from data.sources import Source, cifar, digits, folder, synthetic
from data.splits import Split, stratified

__all__ = ["Loader", "Source", "Split", "find", "read"]


def find(config: Any) -> Source:
    """The data set of a `data` config group. Raises `ValueError` or `FileNotFoundError` if what
    it names is not there; reads no images yet."""
    for key, low, high in (("train_fraction", 0.0, 1.0), ("holdout", -1e-9, 0.9)):
        if not low < config[key] <= high:
            allowed = "above 0 and at most 1" if key == "train_fraction" else "from 0 to 0.9"
            raise ValueError(f"data.{key}={config[key]}: expected a number {allowed}")
    if config.name == "digits":
        return digits()
    if config.name == "synthetic":
        keys = ("size", "classes", "channels", "train_images", "test_images")
        return synthetic(**{key: config[key] for key in keys})
    if config.name == "folder":
        return folder(config.root, config.size, config.cache)
    return cifar(config.name, config.root, config.cache)


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
