import functools
import gc
import hashlib
import http.server
import pickle
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

import data
from data import Loader, Split
from data.sources import cifar, digits, folder, synthetic


def numbered(count, size=6, channels=3):
    """Images whose every pixel tells which image it is and where it was."""
    pixels = torch.arange(count * channels * size * size) % 251
    images = pixels.to(torch.uint8).view(count, channels, size, size)
    return Split(images, torch.arange(count) % 3)


def loader(sgd_batch=4, count=30, **options):
    return Loader(numbered(count), numbered(7), sgd_batch, **({"seed": 0} | options))


def test_an_epoch_has_every_image_once():
    batches = list(loader(5).train(0))
    assert len(batches) == 6
    seen = torch.cat([x for x, _ in batches]).flatten(1)
    assert len(seen.unique(dim=0)) == 30
    assert loader(4).dropped == 2
    assert len(list(loader(4).train(0))) == len(loader(4)) == 7


@pytest.mark.parametrize("count", [30, 1500])
def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(count):
    """Not on the SGD batch, nor on where an epoch is entered."""
    options = dict(crop=2, flip=True, count=count)
    fine = [x for x, _ in loader(2, **options).train(3)]
    coarse = torch.cat([x for x, _ in loader(10, **options).train(3)])
    assert torch.equal(torch.cat(fine), coarse)
    later = [x for x, _ in loader(2, **options).train(3, start=4)]
    assert all(torch.equal(a, b) for a, b in zip(fine[4:], later, strict=True))
    other_epoch = torch.cat([x for x, _ in loader(10, **options).train(4)])
    other_seed = torch.cat([x for x, _ in loader(10, **options | {"seed": 1}).train(3)])
    assert not torch.equal(coarse, other_epoch)
    assert not torch.equal(coarse, other_seed)


@pytest.mark.parametrize("parts", [2, 3])
def test_processes_share_batches_and_test_images(parts):
    """Together, in order, they have what one alone has."""
    options = dict(crop=2, flip=True, count=30)
    whole = loader(6, **options)
    shares = [loader(6, **options, rank=part, world_size=parts) for part in range(parts)]
    assert all(len(share) == len(whole) for share in shares)
    for start in (0, 2):
        pieces = zip(*(share.train(1, start) for share in shares), strict=True)
        for (images, labels), ours in zip(whole.train(1, start), pieces, strict=True):
            assert torch.equal(images, torch.cat([x for x, _ in ours]))
            assert torch.equal(labels, torch.cat([y for _, y in ours]))
    tested = [y for share in shares for _, y in share.test(2)]
    assert torch.equal(torch.cat(tested), whole.test_labels)


def test_crop_and_flip_by_hand():
    one = loader(1, crop=2, flip=True)
    images = numbered(30).images
    padded = F.pad(images, (2,) * 4)
    index, y, x = torch.tensor([4, 9]), torch.tensor([0, 3]), torch.tensor([4, 1])
    cut, labels = one.augment(index, y, x, torch.tensor([0, 1]))
    first = padded[4, :, 0:6, 4:10]
    second = padded[9, :, 3:9, 1:7].flip(2)
    assert torch.equal(cut, one.normalize(torch.stack([first, second])))
    assert labels.tolist() == [1, 0]


def test_every_shift_and_both_sides_occur():
    images = torch.zeros(400, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 255
    images[:, :, 2, 3] = 128
    split = Split(images, torch.zeros(400).long())
    cut = torch.cat([x for x, _ in Loader(split, split, 100, seed=0, crop=1, flip=True).train(0)])
    places = {tuple(p.tolist()) for p in (cut > cut.max() - 0.1).nonzero()[:, 2:]}
    assert places == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    assert len(cut.flatten(1).unique(dim=0)) == 18


def test_pixels_are_normalized_by_the_training_images():
    train = numbered(30)
    pixels = train.images.double() / 255
    mean = pixels.mean((0, 2, 3))[:, None, None]
    std = pixels.std((0, 2, 3), correction=0)[:, None, None]
    (images, labels), (rest, _) = loader(4).test(4)
    expected = (numbered(7).images[:4].double() / 255 - mean) / std
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(rest) == 3
    assert labels.tolist() == [0, 1, 2, 0]


def test_sample_is_the_same_at_every_batch_size():
    a, b = loader(2, crop=2, flip=True), loader(10, crop=0)
    assert torch.equal(a.sample(8), b.sample(8))
    assert len(a.sample(128)) == 30


def test_a_batch_larger_than_the_data_set():
    with pytest.raises(ValueError, match=r"sgd_batch=31 .* larger .* at most its 30 training"):
        loader(31)


def test_digits():
    source = digits()
    train, test = source.read()
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape[1:] == (source.channels, source.size, source.size)
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    together = torch.cat([train.images, test.images]).flatten(1)
    assert len(together.unique(dim=0)) == 1797
    assert torch.bincount(test.labels).min() >= 34
    pixels, labels = load_digits(return_X_y=True)
    theirs = np.column_stack([(pixels * (255 / 16)).round(), labels]).tolist()
    ours = torch.column_stack([together, torch.cat([train.labels, test.labels])]).tolist()
    assert sorted(ours) == sorted(theirs)


def config(**values):
    return OmegaConf.create({"train_fraction": 1.0, "holdout": 0.0} | values)


def test_fraction_and_holdout_are_stratified_and_disjoint():
    source = synthetic(4, 5, 1, 200, 20)
    _, test = source.read()
    part, held = data.read(source, config(train_fraction=0.5, holdout=0.2))
    assert torch.bincount(held.labels).tolist() == [8] * 5
    assert torch.bincount(part.labels).tolist() == [16] * 5
    everything = torch.cat([part.images, held.images]).flatten(1).unique(dim=0)
    assert len(everything) == 120
    assert not (everything[:, None] == test.images.flatten(1)[None]).all(2).any()
    _, unchanged = data.read(source, config(train_fraction=0.5))
    assert torch.equal(unchanged.images, test.images)
    again, _ = data.read(source, config(train_fraction=0.5, holdout=0.2))
    assert torch.equal(again.images, part.images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(train_fraction=0), "data.train_fraction=0: expected a number above 0"),
        (dict(train_fraction=1.5), "data.train_fraction=1.5"),
        (dict(holdout=1.0), "data.holdout=1.0: expected a number from 0 to 0.9"),
    ],
)
def test_fractions_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        data.resolve(config(name="digits", **values), 2, config(crop=1, flip=False))


# --- folders of images


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / "tree" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "tree"


def test_folder(tree, tmp_path):
    source = folder(str(tree), 8, str(tmp_path / "cache"))
    assert (source.num_classes, source.channels, source.size) == (2, 3, 8)
    train, test = source.read()
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    first = np.asarray(Image.open(tree / "train" / "cat" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(train.images[0].numpy(), first)
    assert len(test) == 4


def test_folder_is_cached_and_the_cache_notices_changes(tree, tmp_path, monkeypatch):
    source = folder(str(tree), 8, str(tmp_path / "cache"))
    before = source.read()[0]
    with monkeypatch.context() as patch:
        patch.setattr(data.memory, "decode", None)
        assert torch.equal(source.read()[0].images, before.images)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(source.read()[0].images, before.images)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tree / "train" / "cat" / "0.png")
    source = folder(str(tree), 8, str(tmp_path / "cache"))
    assert source.read()[0].images[0].sum() == 0


def test_images_of_other_kinds_and_sizes(tree, tmp_path):
    place = tree / "train" / "cat"
    Image.new("L", (20, 10), 7).save(place / "grey.png")
    Image.new("CMYK", (10, 20)).save(place / "cmyk.jpg")
    Image.new("RGBA", (8, 8)).save(place / "alpha.webp")
    (place / "notes.txt").write_text("not an image")
    train, _ = folder(str(tree), 8, str(tmp_path / "cache")).read()
    assert train.images.shape == (11, 3, 8, 8)


def test_images_held_in_memory_stand_upright(tree, tmp_path):
    turned = Image.Exif()
    turned[0x112] = 6  # to be shown turned to the right
    left = Image.fromarray(np.repeat(np.uint8([255, 0] * 1), 4)[None].repeat(8, 0)).convert("RGB")
    left.save(tree / "train" / "cat" / "0.png", exif=turned)
    first = folder(str(tree), 8, str(tmp_path / "cache")).read()[0].images[0]
    assert (first[:, :4] == 255).all()  # its left half is above now
    assert (first[:, 4:] == 0).all()


def test_too_many_images_for_memory(tree, tmp_path):
    with pytest.raises(ValueError, match=r"GiB of memory at data.size=900000, this .*; recipe=ima"):
        folder(str(tree), 900_000, str(tmp_path))
    assert folder(str(tree), 900_000, str(tmp_path), on_disk=True).train_images == 8


def test_val_instead_of_test(tree, tmp_path):
    (tree / "test").rename(tree / "val")
    assert len(folder(str(tree), 8, str(tmp_path / "cache")).read()[1]) == 4


def test_what_is_no_data_set(tree, tmp_path):
    cache = str(tmp_path)
    for root, message in (
        (None, "data.root=null: data=folder needs the path"),
        (str(tmp_path / "nowhere"), "does not exist; expected train/<class>/<image>"),
        (str(tree / "train"), "is not a data set; expected train/<class>/<image>"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            folder(root, 8, cache)
    (tree / "test" / "owl").mkdir()
    with pytest.raises(ValueError, match="test/owl has no train/owl"):
        folder(str(tree), 8, cache)


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_an_unreadable_image_is_named(tree, tmp_path, content):
    bad = tree / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60] if content is None else content)
    with pytest.raises(ValueError, match=f"cannot read the image {bad}"):
        folder(str(tree), 8, str(tmp_path / "cache")).read()


def test_cifar_from_a_tree_must_have_its_classes(tree, tmp_path):
    with pytest.raises(ValueError, match="2 classes; data=cifar10 has 10"):
        cifar("cifar10", str(tree), str(tmp_path))


# --- CIFAR in torchvision's own format, through its own download


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A tiny cifar-10-python.tar.gz in the format of the real one, served from this machine."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / "source" / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def put(name, content):
        raw = pickle.dumps(content)
        (base / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    def batch(count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % 10 for i in range(count)]}

    train = [[f"data_batch_{i}", put(f"data_batch_{i}", batch(20))] for i in range(1, 6)]
    test = [["test_batch", put("test_batch", batch(20))]]
    meta = put("batches.meta", {"label_names": [str(i) for i in range(10)]})
    packed = tmp_path / CIFAR10.filename
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(base, CIFAR10.base_folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
    monkeypatch.setattr(CIFAR10, "url", url)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", dict(CIFAR10.meta, md5=meta))
    yield base, packed
    server.shutdown()
    server.server_close()
    gc.collect()  # torchvision leaves its connections to the collector, which warns of them


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # torchvision 0.26
def test_cifar_is_downloaded_once(archive, tmp_path, monkeypatch):
    base, packed = archive
    cache = tmp_path / "cache"
    read = lambda _: cifar("cifar10", None, str(cache)).read()  # noqa: E731
    extract, extracting = torchvision.datasets.utils.extract_archive, []

    def slowly(*args):
        extracting.append(args)
        time.sleep(0.2)
        extract(*args)

    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", slowly)
    with ThreadPoolExecutor(3) as pool:  # as runs that start together
        train, test = list(pool.map(read, range(3)))[-1]
    assert len(extracting) == 1
    assert (len(train), len(test)) == (100, 20)
    with open(base / "data_batch_1", "rb") as file:
        first = pickle.load(file)["data"][0].reshape(3, 32, 32)
    assert np.array_equal(train.images[0].numpy(), first)
    assert train.labels[:3].tolist() == [0, 1, 2]
    packed.unlink()  # from here on there is nothing to download
    assert len(cifar("cifar10", None, str(cache)).read()[0]) == 100


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_cifar_without_network(archive, tmp_path):
    archive[1].unlink()
    with pytest.raises(FileNotFoundError) as error:
        cifar("cifar10", None, str(tmp_path / "cache")).read()
    for part in ("data=cifar10", str(tmp_path / "cache"), "cifar-10-python.tar.gz", "data=digits"):
        assert part in str(error.value)
