"""ImageNet's tree and the stream of photographs from it, on small JPEGs made here."""

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from PIL import Image, ImageOps

import data
from data import decoding, imagenet, stream, transforms
from data.decoding import decode
from data.splits import Files
from data.stream import Photographs, Stream

ROOT = Path(__file__).parent.parent.parent
CLASSES = ["n01440764", "n01443537", "n02099601"]


def photograph(rng, width, height):
    """Smooth colours, as in a photograph: JPEG keeps them, and so does scaling."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def tree(tmp_path):
    """45 training and 18 validation images of three classes, all shapes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 15), ("val", 6)):
        for name in CLASSES:
            place = tmp_path / "tree" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                width, height = rng.integers(40, 90, 2).tolist()
                photograph(rng, width, height).save(place / f"{name}_{i}.JPEG", quality=95)
    return tmp_path / "tree"


def opened(tree, sgd_batch=4, seed=0, workers=0, **keys):
    train, test = imagenet.tree(str(tree), 32, verify_counts=False).read()
    return Stream(train, test, sgd_batch, seed, 32, 36, workers=workers, **keys)


def everything(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- the tree


def test_a_tree_is_found_and_numbered_by_class(tree):
    (tree / "train" / CLASSES[0] / "._hidden.JPEG").write_bytes(b"")
    (tree / "train" / CLASSES[0] / "notes.txt").write_text("")
    source = imagenet.tree(str(tree), 32, verify_counts=False)
    assert (source.num_classes, source.channels, source.size) == (3, 3, 32)
    train, test = source.read()
    assert (len(train), len(test)) == (45, 18) == (source.train_images, 18)
    assert train.labels.tolist() == [0] * 15 + [1] * 15 + [2] * 15
    assert train.path(0) == tree / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    assert test.path(17).parent.name == CLASSES[2]


def flat(tree):
    for folder in (tree / "val").iterdir():
        for file in folder.iterdir():
            file.rename(tree / "val" / file.name)
        folder.rmdir()


TREES = [
    (lambda tree: (tree / "val").rename(tree / "test"), "has no folder val/; expected train/<wn"),
    (lambda tree: (tree / "train").rename(tree / "t"), "has no folder train/; expected train/<wn"),
    (flat, "not sorted by class; python scripts/prepare_imagenet.py"),
    (
        lambda tree: (tree / "val" / CLASSES[1]).rename(tree / CLASSES[1]),
        f"train/{CLASSES[1]} has no val/{CLASSES[1]} .1 of 3 classes.; expected the same",
    ),
    (
        lambda tree: (tree / "train" / CLASSES[1]).rename(tree / CLASSES[1]),
        f"val/{CLASSES[1]} has no train/{CLASSES[1]} .1 of 3 classes.; expected the same",
    ),
    (lambda tree: [f.unlink() for f in (tree / "val" / CLASSES[2]).iterdir()], "holds no images"),
    (
        lambda tree: [(tree / p / c).rename(tree / (p + c)) for p in ("train", "val")
                      for c in CLASSES[1:]],
        "1 classes; expected at least 2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), TREES, ids=[m[:20] for _, m in TREES])
def test_what_is_wrong_with_a_tree_is_said_in_one_line(tree, spoil, message):
    spoil(tree)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        imagenet.tree(str(tree), 32, verify_counts=False)
    assert "data.root" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_numbers_than_imagenets_must_be_said(tree, monkeypatch):
    with pytest.raises(ValueError, match=r"3 classes, 45 training and 18 validation .*1,281,167 and"
                                         r" 50,000; data.verify_counts=false takes"):  # fmt: skip
        imagenet.tree(str(tree), 32)
    for name, number in (("CLASSES", 3), ("TRAIN", 45), ("VAL", 18)):
        monkeypatch.setattr(imagenet, name, number)
    assert imagenet.tree(str(tree), 32).train_images == 45


def test_kaggles_layout_is_pointed_to(tree):
    place = tree / "ILSVRC" / "Data" / "CLS-LOC"
    place.mkdir(parents=True)
    (tree / "train").rename(place / "train")
    with pytest.raises(FileNotFoundError, match=f"did you mean data.root={place}"):
        imagenet.tree(str(tree), 32)


# --- order and augmentation


@pytest.mark.parametrize("crop", ["random_resized", "random_square"])
def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(tree, crop):
    """Not on the workers, nor on the SGD batch, nor on where an epoch is entered or left."""
    keys = dict(crop=crop, lighting=0.1)
    here, there = opened(tree, **keys), opened(tree, workers=2, **keys)
    images, labels = everything(here.train(3))
    assert images.shape == (44, 3, 32, 32)
    assert images.dtype == torch.float32
    for part in (there.train(3), opened(tree, 2, **keys).train(3)):
        again, same = everything(part)
        assert torch.equal(again[:44], images)
        assert torch.equal(same[:44], labels)
    for batch, _ in there.train(5):  # left after one batch, while workers read ahead
        assert len(batch) == 4
        break
    for start in (1, 7, 10):
        later, _ = everything(there.train(3, start))
        assert torch.equal(later, images[4 * start :])
    assert not torch.equal(everything(here.train(4))[0], images)
    assert not torch.equal(everything(opened(tree, seed=1, **keys).train(3))[0], images)


def test_processes_share_batches_and_test_images(tree):
    whole = opened(tree, sgd_batch=4)
    shares = [opened(tree, sgd_batch=4, rank=part, world_size=2) for part in (0, 1)]
    pieces = zip(*(share.train(1, 1) for share in shares), strict=True)
    for (images, labels), ours in zip(whole.train(1, 1), pieces, strict=True):
        assert torch.equal(images, torch.cat([x for x, _ in ours]))
        assert torch.equal(labels, torch.cat([y for _, y in ours]))
    tested = [y for share in shares for _, y in share.test(2)]
    assert torch.equal(torch.cat(tested), whole.test_labels)


def test_nothing_of_what_is_skipped_is_read(tree, monkeypatch):
    read = []
    monkeypatch.setattr(stream, "decode", lambda file, _: read.append(file) or decode(file))
    one = opened(tree)
    list(one.train(0))
    whole, read[:] = read.copy(), []
    list(one.train(0, start=8))
    assert read == whole[32:]
    assert len(whole) == len(set(whole)) == 44


def test_an_epoch_mirrors_half_and_cuts_all_kinds_of_windows(tree):
    files = imagenet.tree(str(tree), 32, verify_counts=False).read()[0]
    keys = dict(size=24, resize=24, crop="random_resized", lighting=0.0, skip=False)
    plain = Photographs({"train": files}, 0, flip=False, **keys)
    mirrored = Photographs({"train": files}, 0, flip=True, **keys)
    pairs = [
        (plain["train", 0, index][0][0], mirrored["train", 0, index][0][0])
        for index in np.arange(45)[:, None]
    ]
    same = sum(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in pairs)
    assert 12 <= same <= 33


@pytest.mark.parametrize(("width", "height"), [(500, 375), (90, 400), (400, 90), (1, 1), (2, 900)])
def test_random_resized_windows(width, height):
    boxes = [transforms.random_resized(width, height, np.random.default_rng(i)) for i in range(300)]
    for x, y, w, h in boxes:
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        if min(width, height) >= 90:
            assert 0.73 <= w / h <= 1.37
            assert w * h >= 0.077 * width * height or w == width or h == height
    if (width, height) == (500, 375):
        parts = [w * h / (width * height) for _, _, w, h in boxes]
        assert min(parts) < 0.12
        assert max(parts) > 0.9
        assert np.mean(parts) == pytest.approx(0.5, abs=0.05)


def test_the_middle_where_no_window_fits():
    """As torchvision: the largest window of an allowed shape."""

    class Never(np.random.Generator):
        def uniform(self, low, high):
            return high

    rng = Never(np.random.PCG64(0))
    assert transforms.random_resized(300, 100, rng) == (83, 0, 133, 100)
    assert transforms.random_resized(100, 300, rng) == (0, 83, 100, 133)


def test_random_squares_may_leave_the_image():
    """In the tallest images no square of the area's upper part fits; the rest is black."""
    assert all(
        w == h and 0 <= x <= 500 - w and 0 <= y <= 375 - h
        for x, y, w, h in (
            transforms.random_square(500, 375, np.random.default_rng(i)) for i in range(200)
        )
    )
    boxes = [transforms.random_square(20, 400, np.random.default_rng(i)) for i in range(200)]
    x, y, edge, _ = next(b for b in boxes if b[2] > 20)
    assert 20 - edge <= x <= 0
    assert 0 <= y <= 400 - edge
    image = torch.full((3, 400, 20), 9, dtype=torch.uint8)
    window = transforms.cut(image, (x, y, edge, edge))
    assert window.shape == (3, edge, edge)
    assert (window == 9).sum() == 3 * 20 * edge
    assert (window[:, :, -x : 20 - x] == 9).all()


def test_batches_of_an_earlier_pass_are_refused(tree):
    one = opened(tree)
    first = one.train(0)
    next(first)
    list(one.test(5))
    with pytest.raises(RuntimeError, match="earlier"):
        list(first)


@pytest.mark.parametrize("size", [1, 3, 5, 8, 100])
def test_regroup(size):
    blocks = [
        (torch.arange(a, b), torch.arange(a, b)) for a, b in ((0, 4), (4, 5), (5, 5), (5, 17))
    ]
    parts = [x.tolist() for x, _ in stream.regroup(blocks, size)]
    assert [i for part in parts for i in part] == list(range(17))
    assert all(len(x) == size for x in parts[:-1])


# --- pixels


def reference(file, size, resize):
    """torchvision's evaluation: PIL, Resize, CenterCrop."""
    from torchvision.transforms import functional

    image = functional.resize(Image.open(file).convert("RGB"), resize)
    return functional.pil_to_tensor(functional.center_crop(image, size))


def test_evaluation_is_torchvisions_to_one_grey_level(tree):
    """Both decode to equal pixels; they round differently where they scale: on average by less
    than a tenth of a grey level."""
    one = opened(tree)
    images, labels = everything(one.test(5))
    assert labels.tolist() == one.test_labels.tolist()
    mean, std = (torch.tensor(x)[:, None, None] for x in (one.mean, one.std))
    for i, image in enumerate(images):
        file = one.photographs.splits["test"].path(i)
        expected = reference(file, 32, 36).float()
        deviation = ((image * std + mean) * 255 - expected).abs()
        assert deviation.max() < 1.01
        assert deviation.mean() < 0.1


def test_every_test_image_once_and_the_rest_last(tree):
    for workers, size in ((0, 5), (2, 7), (0, 100)):
        one = opened(tree, workers=workers)
        batches = list(one.test(size))
        assert [len(y) for _, y in batches[:-1]] == [size] * (18 // size)
        images = torch.cat([x for x, _ in batches])
        assert len(images) == len(images.flatten(1).unique(dim=0)) == 18
        assert torch.equal(images, everything(one.test(1))[0])


def test_sample_is_the_same_at_every_batch_size(tree):
    a, b = opened(tree, 2), opened(tree, 10, flip=False, crop="random_square")
    assert torch.equal(a.sample(8), b.sample(8))
    assert len(a.sample(128)) == 45


def test_lighting_is_alexnets(tree):
    """One colour for a whole image, along the principal components, rounded down in bytes."""
    plain, lit = (opened(tree, pixels="bgr_255", lighting=x) for x in (0.0, 0.1))
    before, after = (everything(one.train(0))[0] for one in (plain, lit))
    assert (after == after.floor()).all()
    assert after.min() >= 0
    assert after.max() <= 255
    free = (before > 70) & (before < 185)
    shifts = torch.stack(
        [
            torch.stack([(a - b)[c][f[c]].float().median() for c in range(3)])
            for a, b, f in zip(after, before, free, strict=True)
            if f.flatten(1).sum(1).min() > 50
        ]
    )
    assert len(shifts) > 30
    vectors = torch.tensor(transforms.COLOURS / np.linalg.norm(transforms.COLOURS, axis=0)).float()
    along = (shifts.flip(1) + 0.5) @ vectors  # RGB again; half a grey level was cut off
    assert along.std(0).tolist() == pytest.approx([0.1 * 255 * x for x in (0.2175, 0.0188, 0.0045)],
                                                  rel=0.4, abs=0.3)  # fmt: skip
    tested = [everything(one.test(9))[0] for one in (plain, lit)]
    assert torch.equal(*tested)


def test_bgr_255_is_the_bytes_in_reverse(tree):
    plain, bgr = opened(tree), opened(tree, pixels="bgr_255")
    one, other = (everything(x.train(0))[0] for x in (plain, bgr))
    mean, std = (torch.tensor(x)[:, None, None] for x in (plain.mean, plain.std))
    torch.testing.assert_close(other.flip(1), (one * std + mean) * 255, rtol=0, atol=1e-3)
    assert (other == other.round()).all()
    assert (bgr.mean, bgr.reversed, plain.reversed) == ([0.0] * 3, True, False)
    assert other.max() > 200


# --- files of all kinds


def test_other_modes_and_formats_become_rgb_as_stored(tmp_path):
    rng = np.random.default_rng(1)
    image = photograph(rng, 60, 40)
    rotated = Image.Exif()
    rotated[0x112] = 6  # to be shown turned by 90 degrees, which ImageNet's users do not
    kinds = {
        "grey.JPEG": (image.convert("L"), dict(format="JPEG")),
        "cmyk.JPEG": (image.convert("CMYK"), dict(format="JPEG")),
        "progressive.JPEG": (image, dict(format="JPEG", progressive=True)),
        "rotated.JPEG": (image, dict(format="JPEG", exif=rotated)),
        "png.JPEG": (image, dict(format="PNG")),
        "palette.JPEG": (image.convert("P"), dict(format="PNG", transparency=b"\x00\x80")),
        "webp.JPEG": (image, dict(format="WEBP")),
    }
    for name, (picture, how) in kinds.items():
        file = tmp_path / name
        picture.save(file, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of transparent palettes
            expected = np.asarray(Image.open(file).convert("RGB"))
        decoded = decode(file)
        assert decoded.shape == (3, 40, 60)
        assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected), name


@pytest.mark.parametrize("decoder", [True, False])
def test_upright_is_as_exif_says(tmp_path, monkeypatch, decoder):
    if not decoder:
        monkeypatch.setattr(decoding, "_jpeg_decoder", lambda: None)
    image = photograph(np.random.default_rng(2), 60, 40)
    for orientation in range(1, 9):
        turned = Image.Exif()
        turned[0x112] = orientation
        for kind in ("JPEG", "PNG"):
            file = tmp_path / f"{orientation}.{kind}"
            image.save(file, kind, exif=turned)
            with Image.open(file) as opened:
                expected = np.array(ImageOps.exif_transpose(opened))
            found = decode(file, apply_exif=True).permute(1, 2, 0).numpy()
            assert np.array_equal(found, expected), (orientation, kind)
            assert decode(file).shape == (3, 40, 60)


def test_without_torchvisions_decoder_the_pixels_are_the_same(tree, monkeypatch):
    images, _ = everything(opened(tree).train(0))
    monkeypatch.setattr(decoding, "_jpeg_decoder", lambda: None)
    assert torch.equal(everything(opened(tree).train(0))[0], images)


BROKEN = {
    "empty": (lambda whole: b"", "the file is empty"),
    "text": (lambda whole: b"nothing", "not an image"),
    "half": (lambda whole: whole[: len(whole) // 2], "truncated"),
    "header": (lambda whole: whole[:100], ""),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_file_is_named(tree, part, kind):
    spoil, what = BROKEN[kind]
    file = tree / part / CLASSES[1] / f"{CLASSES[1]}_3.JPEG"
    file.write_bytes(spoil(file.read_bytes()))
    one = opened(tree, 1)
    with pytest.raises(ValueError, match=rf"cannot read the image {file} \(.*{what}") as error:
        list(one.train(0) if part == "train" else one.test(8))
    assert "data.on_error=skip" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_and_told(tree, workers, caplog):
    names = [f"{CLASSES[c]}_{i}.JPEG" for c, i in ((0, 9), (1, 0), (2, 3), (2, 4), (2, 5))]
    good = opened(tree, 1)
    order = [y.item() for _, y in good.train(0)]
    for name in names:
        (tree / "train" / name[:9] / name).write_bytes(b"")
    (tree / "val" / CLASSES[0] / f"{CLASSES[0]}_2.JPEG").write_bytes(b"nothing")
    one = opened(tree, 1, workers=workers, on_error="skip")
    images, labels = everything(one.train(0))
    assert len(images) == 45
    moved = sum(a != b for a, b in zip(order, labels.tolist(), strict=True))
    assert moved == 1  # the last of the first class became one of the second
    (skipped,) = caplog.messages
    assert "unreadable train images replaced by the next ones" in skipped
    assert "data.on_error=skip: 9 " in skipped  # 9 and 0; 0; 3, 4 and 5; 4 and 5; 5
    assert "and 6 more" in skipped
    images, labels = everything(one.test(4))
    assert labels.tolist() == [0] * 5 + [1] * 6 + [2] * 6
    assert "1 unreadable test images left out" in caplog.messages[1]
    assert len(one.sample(45)) == 40


def test_nothing_but_broken_files(tree):
    for file in tree.rglob("*.JPEG"):
        file.write_bytes(b"")
    one = opened(tree, on_error="skip")
    for batches in (one.train(0), one.test(8)):
        with pytest.raises(ValueError, match=r"can be read|cannot be read; the first: .*empty"):
            list(batches)
    with pytest.raises(ValueError, match=r"cannot be read; the first: .*empty"):
        one.sample(8)


def test_a_killed_worker_is_told_in_one_line(tree):
    one = opened(tree, workers=1)
    next(one.train(0))
    for process in one.blocks._iterator._workers:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with pytest.raises(ChildProcessError, match=r"data.workers=1: one was killed") as error:
        list(one.train(1))
    assert "\n" not in str(error.value)


# --- parts


def config(tree, **keys):
    own = dict(name="imagenet", root=str(tree), verify_counts=False, size=32, resize=36, workers=0)
    own |= dict(on_error="raise", train_fraction=1.0, holdout=0.0)
    return OmegaConf.create(own | keys)


RECIPE = OmegaConf.create(dict(crop="random_resized", flip=True, lighting=0.0))


def test_fraction_and_holdout_are_stratified_and_disjoint(tree):
    cfg = config(tree, train_fraction=0.5, holdout=0.2)
    source = data.resolve(cfg, 4, RECIPE)
    part, held = data.read(source, cfg)
    assert isinstance(part, Files)
    assert torch.bincount(held.labels).tolist() == [3, 3, 3]
    assert torch.bincount(part.labels).tolist() == [6, 6, 6]
    assert not set(held.names) & set(part.names)
    for files in (part, held):
        for i, label in enumerate(files.labels.tolist()):
            assert files.path(i).parent == tree / "train" / CLASSES[label]
    one = data.load(source, cfg, RECIPE, 4, 0)
    assert (len(one), one.dropped, len(one.labels), len(one.test_labels)) == (4, 2, 18, 9)
    assert everything(one.test(4))[1].tolist() == held.labels.tolist()


def test_a_folder_of_photographs_stays_on_disk(tree):
    """Nested, upright, called test/ or val/; the recipe's crop says that it is not held."""
    inner = tree / "train" / CLASSES[0] / "inner"
    inner.mkdir()
    turned = Image.Exif()
    turned[0x112] = 6
    photograph(np.random.default_rng(3), 80, 40).save(inner / "1.jpg", exif=turned)
    (tree / "train" / CLASSES[0] / "._1.jpg").write_bytes(b"hidden")
    own = dict(name="folder", root=str(tree), cache=str(tree / "cache"), size=32, resize=None)
    own |= dict(workers=0, on_error="raise", train_fraction=1.0, holdout=0.0)
    cfg = OmegaConf.create(own)
    source = data.resolve(cfg, 4, RECIPE)
    assert (source.train_images, source.num_classes, source.size) == (46, 3, 32)
    one = data.load(source, cfg, RECIPE, 4, 0)
    assert isinstance(one, Stream)
    assert one.photographs.resize == 37  # eight sevenths
    assert everything(one.train(0))[0].shape == (44, 3, 32, 32)
    files = one.photographs.splits["train"]
    index = [files.path(i) for i in range(46)].index(inner / "1.jpg")
    assert files.apply_exif
    assert files.labels[index] == 0
    taken = files.take(torch.tensor([index]))
    assert decode(taken.path(0), taken.apply_exif).shape == (3, 80, 40)
    assert not (tree / "cache").exists()
    with pytest.raises(ValueError, match=r"data.resize=30: expected at least data.size=32"):
        data.resolve(OmegaConf.create(own | {"resize": 30}), 4, RECIPE)
    small = OmegaConf.create(dict(crop=4, flip=True, lighting=0.1))
    with pytest.raises(ValueError, match=r"recipe.lighting=0.1: is for photographs .*data=folder"):
        data.resolve(cfg, 4, small)
    held = data.load(
        data.resolve(cfg, 4, OmegaConf.create(dict(crop=4, flip=True))), cfg, small, 4, 0
    )
    assert isinstance(held, data.Loader)


def test_more_images_in_a_batch_than_there_are(tree):
    with pytest.raises(ValueError, match=r"sgd_batch=99 .* larger than the data set"):
        data.resolve(config(tree), 99, RECIPE)


# --- the whole program

SMALL = ["data=imagenet", "data.verify_counts=false", "data.size=32", "data.resize=36"]
KEYS = [*SMALL, "model=resnet8", "norm=gn", "batch=2", "recipe.epochs=1", "runtime.threads=1"]


def test_a_tree_that_is_not_complete_makes_no_run(train, tree):
    made = train("data=imagenet", f"data.root={tree}", "data.size=32", quick=False)
    assert made.status == 1
    assert made.err.startswith(f"error: data.root={tree}: 3 classes, 45 training and 18 valid")
    assert made.err.count("\n") == 1
    assert not made.runs.exists()


def test_an_unreadable_image_ends_a_run_in_one_line_and_it_goes_on_without(train, tree):
    bad = tree / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    bad.write_bytes(b"")
    keys = [*KEYS, f"data.root={tree}", "data.workers=0"]
    made = train(*keys, quick=False)
    assert made.status == 1
    assert f"cannot read the image {bad} (the file is empty); data.on_error=skip" in made.err
    assert made.err.count("\n") == 1
    again = train(*keys, "data.on_error=skip", quick=False)
    assert again.status == 0, again.err
    assert "data.on_error=skip: 1 unreadable train images replaced" in again.out
    assert len(list(again.runs.glob("*/*"))) == 1


def test_a_run_on_a_folder_of_photographs(train, tree):
    keys = [k.replace("data=imagenet", "data=folder") for k in KEYS if "verify_counts" not in k]
    made = train(*keys, "recipe=imagenet", f"data.root={tree}", "data.workers=0", quick=False)
    assert made.status == 0, made.err
    assert made.run()


def same_end(a, b):
    one, two = (torch.load(f / "last.pt", weights_only=True) for f in (a, b))
    assert one["progress"]["update"] == two["progress"]["update"] == 22
    assert torch.equal(one["rng"][0], two["rng"][0])
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key
    rows = []
    for folder in (a, b):
        with open(folder / "metrics.csv") as file:
            rows.append([r["train_loss"] + r["test_loss"] for r in csv.DictReader(file)])
    assert rows[0] == rows[1]


def children(pid):
    """All processes below `pid`."""
    found, parents = [], {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone just now
            continue
    for one in parents:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and one != pid:
            found.append(one)
    return found


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_killed_in_an_epoch_with_workers_it_ends_as_if_it_had_not_been(train, tree, tmp_path):
    """Its workers end with it, its folder is free at once, and without workers it goes on to the
    weights, bit for bit, of a run that was not killed."""
    whole = train(
        *KEYS, f"data.root={tree}", "data.workers=0", quick=False, runs=tmp_path / "whole"
    )
    assert whole.status == 0, whole.err

    own = [f"runtime.runs={tmp_path / 'killed'}", f"data.root={tree}", "data.workers=2"]
    command = [sys.executable, "train.py", *KEYS, *own, "checkpoint.every_updates=5"]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folders = (tmp_path / "killed").glob
    assert wait_for(lambda: list(folders("*/*/last.pt")) or killed.poll() is not None)
    os.kill(killed.pid, signal.SIGSTOP)  # so that it has not ended when we look
    below = children(killed.pid)
    killed.kill()
    killed.communicate()
    FileLock(next(folders("*/*/.lock"))).acquire(blocking=False).lock.release()
    assert len(below) >= 3  # two workers and the server that forked them
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))

    again = train(
        *KEYS, f"data.root={tree}", "data.workers=0", quick=False, runs=tmp_path / "killed"
    )
    assert again.status == 0, again.err
    assert "goes on after update" in again.out
    same_end(whole.run(), again.run())
