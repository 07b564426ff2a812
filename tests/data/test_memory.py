"""Images of a folder held in memory: the cache, and images that cannot be read."""

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import data
from data import memory
from data.sources import folder
from tests.data.folders import noise


@pytest.fixture
def root(tmp_path):
    return noise(tmp_path / "tree")


@pytest.fixture
def read(root, caplog):
    """Both parts of the tree, and what is said of them."""

    def call(root, cache, **keys):
        caplog.clear()
        return *folder(str(root), 10, str(cache), **keys).read(), list(caplog.messages)

    return call


def nothing_in_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/dev/null")
    return "~/.cache/smallbatch"


def a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def full(monkeypatch, tmp_path):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    return tmp_path / "full"


def nobody(monkeypatch, tmp_path):
    return "~nobody-of-this-name/cache"


@pytest.mark.parametrize("spoil", [nothing_in_home, a_file, full, nobody])
def test_a_cache_that_cannot_be_written_costs_a_line(root, tmp_path, monkeypatch, spoil, read):
    expected = read(root, tmp_path / "cache")[0]
    cache = spoil(monkeypatch, tmp_path)
    train, _, said = read(root, cache)
    assert torch.equal(train.images, expected.images)
    assert len(said) == 2  # for each part
    assert all(line.startswith(f"  data.cache={cache}: ") for line in said)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_line_is_said_once_and_the_run_goes_on(root, tmp_path, train):
    (tmp_path / "file").write_text("mine")
    keys = [f"data.root={root}", f"data.cache={tmp_path / 'file'}", "data.size=10"]
    keys += ["data.train_fraction=1.0", "batch=4", "model=resnet8"]
    done = train("data=folder", *keys)
    assert done.status == 0, done.err
    assert done.out.count("data.cache=") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_cache_is_made_anew(root, tmp_path, read):
    expected, _, said = read(root, tmp_path / "cache")
    assert not said
    files = sorted((tmp_path / "cache").iterdir())
    assert [stat.S_ISREG(f.stat().st_mode) for f in files] == [True, True]
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    for content in (b"", b"damaged", array.read_bytes(), files[0].read_bytes()[:-30]):
        for file in files:
            file.write_bytes(content)
        again, _, said = read(root, tmp_path / "cache")
        assert torch.equal(again.images, expected.images)
        assert len(said) == 2
        assert all("cannot be read" in line for line in said)
        assert not read(root, tmp_path / "cache")[2]
    shutil.copy(files[0], files[1])  # of the other part
    assert len(read(root, tmp_path / "cache")[0]) == 12


def test_several_write_the_cache_at_once(root, tmp_path, monkeypatch, read):
    """Each under a name of its own, so that none ends with the half of another."""
    seen, move = [], os.replace

    def replace(one, other):
        seen.append(Path(one).name)
        move(one, other)

    monkeypatch.setattr(memory.os, "replace", replace)
    for _ in range(2):
        read(root, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache")
    assert len(set(seen)) == 4


def break_some(root):
    for name in ("train/cat/001.png", "train/cat/002.png", "train/dog/005.png", "test/dog/000.png"):
        (root / name).write_bytes(b"")
    return ("cat/001", "cat/002", "dog/005"), ("dog/000",)


def test_an_unreadable_image_is_named_with_the_way_out(root, tmp_path, read):
    break_some(root)
    with pytest.raises(ValueError, match=r"cat/001.png \(the file is empty\); data.on_error=skip"):
        read(root, tmp_path / "cache")


def test_skipped_images_are_replaced_in_training_and_left_out_of_the_test(
    root, tmp_path, read, caplog
):
    """As from disk, so that the others keep their place in the order of batches."""
    whole, tested, _ = read(root, tmp_path / "cache")
    break_some(root)
    caplog.clear()
    own = dict(name="folder", root=str(root), size=10, cache=str(tmp_path / "other"), resize=None)
    own |= dict(workers=0, on_error="skip", train_fraction=1.0, holdout=0.0)
    recipe = OmegaConf.create(dict(crop=0, flip=False))
    cfg = OmegaConf.create(own)
    for _ in range(2):  # said again the next time
        loader = data.load(data.resolve(cfg, 4, recipe), cfg, recipe, 4, 0)
    index = [0, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 0]
    assert torch.equal(loader.images, whole.images[index])
    assert torch.equal(loader.labels, whole.labels[index])
    assert torch.equal(loader.test_images, tested.images[[0, 1, 3]])
    assert loader.unreadable == {"train": 3, "test": 1}
    said = caplog.messages
    assert said[:2] == said[2:]
    assert said[0].startswith("  data.on_error=skip: 3 unreadable train images replaced by the")
    assert said[1].startswith("  data.on_error=skip: 1 unreadable test images left out: ")
    recipe.crop = "random_resized"
    there = data.load(data.resolve(cfg, 4, recipe), cfg, recipe, 4, 0)
    list(there.train(0))
    list(there.test(3))
    assert there.unreadable == loader.unreadable


def test_held_out_images_are_left_out_too(root, tmp_path):
    noise(root, train=10)
    break_some(root)
    source = folder(str(root), 10, str(tmp_path), on_error="skip")
    cfg = OmegaConf.create({"holdout": 0.5, "train_fraction": 1.0})
    train, held = data.read(source, cfg)
    assert len(train.unread) + len(held.unread) == 3
    assert len(held.drop_unread()) == 10 - len(held.unread)
    assert len(train.replace_unread()) == 10


def test_a_class_of_which_nothing_can_be_read_is_named(root, tmp_path, read):
    for file in (root / "test" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the images of test/dog can be read; the first"):
        read(root, tmp_path / "cache", on_error="skip")


def test_names_that_are_not_utf8_are_held(root, tmp_path, read):
    odd = os.fsdecode(b"\xe9.png")
    (root / "train" / "dog" / "005.png").rename(root / "train" / "dog" / odd)
    before = read(root, tmp_path / "cache")[0]
    assert len(before) == 12
    assert torch.equal(read(root, tmp_path / "cache")[0].images, before.images)
