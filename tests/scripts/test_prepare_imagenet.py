import io
import sys
import tarfile

import numpy as np
import pytest

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


@pytest.mark.parametrize("labels", [csv, lines, devkit])
def test_images_are_sorted_and_counted(root, call, labels):
    """Also where it was interrupted before."""
    done = root / "val" / WNIDS[TRUTH[3]]
    done.mkdir()
    (root / "val" / "ILSVRC2012_val_00000004.JPEG").rename(done / "ILSVRC2012_val_00000004.JPEG")
    status, out, err = call(root, *labels(root))
    assert (status, err) == (0, "")
    assert "5 validation images sorted\n  complete: 3 classes, 6 training images" in out
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
