import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import imagenet
from scripts import prepare_imagenet

WNIDS = ["n01440764", "n02099601", "n03000684"]
TRUTH = [2, 0, 1, 0, 2, 1]  # class of validation image 1, 2, …


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A tree as it is unpacked, of an ImageNet with three classes."""
    for module in (imagenet, prepare_imagenet):
        for name, number in (("CLASSES", 3), ("TRAIN", 6), ("VAL", 6)):
            monkeypatch.setattr(module, name, number, raising=False)
    for wnid in WNIDS:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG").touch()
    (tmp_path / "val").mkdir()
    for i in range(1, 7):
        (tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG").write_text(str(i))
    return tmp_path


def csv(root):
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[c]} 1 2 3 4" for i, c in enumerate(TRUTH, 1)]
    file = root / "LOC_val_solution.csv"
    file.write_text("\n".join(["ImageId,PredictionString", *rows[::-1], ""]))
    return []


def lines(root):
    (root / "labels.txt").write_text("".join(f"{WNIDS[c]}\n" for c in TRUTH))
    return ["--labels", str(root / "labels.txt")]


def devkit(root):
    """Its numbers are not in the order of the wnids; meta.mat has superclasses too."""
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("num_children", float)]
    rows = [(1, WNIDS[2], 0), (2, WNIDS[0], 0), (3, WNIDS[1], 0), (4, "n00001740", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, kinds)})
    truth = "".join(f"{[2, 3, 1][c]}\n" for c in TRUTH).encode()
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, raw in (
            ("meta.mat", meta.getvalue()),
            ("ILSVRC2012_validation_ground_truth.txt", truth),
        ):
            entry = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return []


@pytest.fixture
def call(monkeypatch, capfd):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare_imagenet.py", *map(str, args)])
        try:
            prepare_imagenet.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return run


def torchvisions(root):
    classes = dict.fromkeys(WNIDS, ("name",))
    torch.save((classes, [WNIDS[c] for c in TRUTH]), root / "meta.bin")
    return []


@pytest.mark.parametrize("labels", [csv, lines, devkit, torchvisions])
def test_images_are_sorted_and_counted(root, call, labels):
    """Also where it was interrupted before."""
    done = root / "val" / WNIDS[TRUTH[3]]
    done.mkdir()
    (root / "val" / "ILSVRC2012_val_00000004.JPEG").rename(done / "ILSVRC2012_val_00000004.JPEG")
    status, out, err = call(root, *labels(root))
    assert (status, err) == (0, "")
    assert "5 validation images sorted\n  complete: 3 classes, 6 training images, 6 for" in out
    for i, c in enumerate(TRUTH, 1):
        file = root / "val" / WNIDS[c] / f"ILSVRC2012_val_{i:08d}.JPEG"
        assert file.read_text() == str(i)
    assert ": 0 validation images sorted" in call(root)[1]


def short(root):
    file = root / "labels.txt"
    file.write_text(f"{WNIDS[0]}\n" * 3)
    return ["--labels", file]


def words(root):
    file = root / "labels.txt"
    file.write_text("tench\n" * 6)
    return ["--labels", file]


def damaged(root):
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    return []


def stranger(root):
    (root / "val" / "cat.JPEG").touch()
    return csv(root)


MISTAKES = [
    (lambda root: [], "LOC_val_solution.csv: does not exist; expected --labels FILE"),
    (lambda root: ["--labels", "none.txt"], "none.txt: does not exist"),
    (short, "3 labels, of 1 wnids; expected 6 of 3"),
    (words, "6 labels, 'tench' among them; expected 6 of 3"),
    (lambda root: (root / "meta.bin").write_bytes(b"x") and [], "meta.bin: cannot be read"),
    (damaged, "ILSVRC2012_devkit_t12.tar.gz: cannot be read"),
    (stranger, "cat.JPEG: has no label; expected ILSVRC2012_val_<number>.JPEG"),
]


@pytest.mark.parametrize(("spoil", "message"), MISTAKES, ids=[m[-20:] for _, m in MISTAKES])
def test_mistakes_get_one_line_and_move_nothing(root, call, spoil, message):
    status, out, err = call(root, *spoil(root))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert len(list(root.glob("val/ILSVRC*.JPEG"))) == 6


def test_what_is_missing_is_said(root, call):
    (root / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    status, _, err = call(root, *csv(root))
    assert status == 1
    assert "3 classes, 5 training and 6 validation images; ImageNet has 3, 6 and 6" in err


# --- archives


def test_archives_are_unpacked_and_an_interruption_costs_nothing(root, call):
    def tar(folder):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for file in sorted(folder.iterdir()):
                archive.add(file, file.name)
        return buffer.getvalue()

    outer = root / "outer"
    outer.mkdir()
    for wnid in WNIDS:
        (outer / f"{wnid}.tar").write_bytes(tar(root / "train" / wnid))
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(outer))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(root / "val"))
    before = {f.relative_to(root): f.read_bytes() for f in root.glob("*/n*/*.JPEG")}
    for file in [*root.glob("train/*/*_1.JPEG"), *root.glob("val/*0[1-4].JPEG")]:
        file.unlink()
    status, out, err = call(root, *csv(root))
    assert (status, err) == (0, "")
    assert "7 images unpacked" in out
    assert "6 validation images sorted" in out
    after = {f.relative_to(root): f.read_bytes() for f in root.glob("train/n*/*.JPEG")}
    assert after == before
    assert len(list(root.glob("val/*/*.JPEG"))) == 6
    assert not list(root.rglob("*.tmp"))
    assert "images unpacked" not in call(root)[1]


def test_archives_are_pointed_to(tmp_path):
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"prepare_imagenet.py .* unpacks its archives"):
        imagenet.tree(str(tmp_path), 32)


# --- a smaller copy


@pytest.fixture
def pictures(root):
    """The tree with images in it: (name, size)."""
    files = sorted(root.rglob("*.JPEG"))
    for i, file in enumerate(files):
        colours = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
        size = [(60, 40), (30, 90), (20, 21)][i % 3]
        Image.fromarray(colours).resize(size).save(file, "PNG" if i == 3 else "JPEG", quality=95)
    return root


def test_a_copy_has_smaller_images_and_goes_on_where_it_stopped(pictures, call, tmp_path):
    to = tmp_path / "small"
    keys = (pictures, *csv(pictures), "--resize", 24, "--to", to, "--workers", 1)
    status, out, err = call(*keys)
    assert (status, err) == (0, "")
    assert f"{to}: 12 images with short sides of 24" in out
    copies = {f.relative_to(to): f for f in to.rglob("*.JPEG")}
    assert set(copies) == {f.relative_to(pictures) for f in pictures.glob("[tv]*/*/*.JPEG")}
    for name, file in copies.items():
        with Image.open(pictures / name) as opened:
            before = opened.copy()
        with Image.open(file) as after:
            short = min(before.size)
            assert min(after.size) == min(24, short)
            if short <= 24:
                assert file.read_bytes() == (pictures / name).read_bytes()
            else:
                assert after.format == "JPEG"
                assert after.size == tuple(int(24 * side / short) for side in before.size)
                expected = before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
                difference = np.asarray(after).astype(int) - np.asarray(expected)
                assert abs(difference).mean() < 3
    assert imagenet.tree(str(to), 24).train_images == 6
    one, other = sorted(copies.values())[:2]
    one.unlink()
    other.write_bytes(b"kept")
    assert call(*keys)[0] == 0
    assert one.exists()
    assert other.read_bytes() == b"kept"
    assert json.loads((to / "copy.json").read_text())["short_side"] == 24
    status, _, err = call(*keys[:2], 20, *keys[3:])
    assert status == 1
    assert "another copy is there" in err


def test_a_copy_names_what_it_cannot_read(pictures, call, tmp_path):
    bad = pictures / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    to = tmp_path / "small"
    status, _, err = call(pictures, *csv(pictures), "--resize", 24, "--to", to, "--workers", 2)
    assert status == 1
    assert f"error: {bad}: cannot be read (" in err
    assert err.count("\n") == 1
    assert len(list(to.rglob("*.JPEG"))) == 11


def test_a_part_is_not_counted(root, call):
    (root / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()
    status, out, _ = call(root, *csv(root), "--part")
    assert status == 0
    assert "found: 3 classes, 5 training images" in out


@pytest.mark.parametrize(
    "args", [("--resize", "9"), ("--to", "x"), ("--quality", "0"), ("--workers", "0")]
)
def test_options_that_make_no_sense(root, call, args):
    status, _, err = call(root, *args)
    assert status == 2
    assert "expected" in err
