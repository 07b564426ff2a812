"""Which files of a folder are images, what is said of the others, and how data sets are told
apart."""

import os
import shutil

import pytest
from PIL import Image

from data import listing
from data.listing import describe_ignored, differences, list_images
from tests.data.folders import noise


@pytest.fixture
def root(tmp_path):
    return noise(tmp_path / "tree")


def listed(root, test="test"):
    return list_images(root, root, test, apply_exif=True)


def names(files):
    return [os.fsdecode(name) for name in files.names]


def test_images_in_the_order_of_their_paths_parts(root):
    cat = root / "train" / "cat"
    for place in ("in/1.JPG", "in-ner/2.png", "in/deep/3.webp", "UPPER.PNG"):
        (cat / place).parent.mkdir(parents=True, exist_ok=True)
        (cat / place).write_bytes(b"")
    found = listed(root)
    expected = [p.relative_to(root / "train") for p in sorted(cat.rglob("*")) if p.is_file()]
    assert names(found.train)[:10] == [str(p) for p in expected]
    assert found.classes == ["cat", "dog"]
    assert found.train.labels.tolist() == [0] * 10 + [1] * 6
    assert found.train.path(0).parent == cat
    assert found.ignored == {}


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", ".hidden", "__MACOSX", "@eaDir", "__macosx"]
)
def test_what_systems_leave_behind_is_passed_over(root, name):
    before = listed(root)
    for place in (root / "train", root / "test", root / "train" / "cat"):
        (place / name).mkdir()
        shutil.copy(root / "train" / "cat" / "000.png", place / name)
        for file in ("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png"):
            (place / file).write_bytes(b"")
    after = listed(root)
    assert after.classes == before.classes
    assert names(after.train) == names(before.train)
    assert after.fingerprint == before.fingerprint
    assert after.ignored == {}


def test_other_files_are_counted_by_kind(root):
    train = root / "train"
    for i in range(3):
        (train / "dog" / f"00{i}.png").rename(train / "dog" / f"00{i}.JFIF")
    (train / "cat" / "000.png").rename(train / "cat" / "000.heic")
    (train / "cat" / "README").write_text("")
    (train / "labels.csv").write_text("")
    shutil.copy(train / "dog" / "003.png", train)
    (root / "test" / "cat" / "gone.png").symlink_to("nowhere.png")
    (root / "test" / "cat" / "itself.png").symlink_to("itself.png")
    os.mkfifo(train / "cat" / "pipe.png")
    found = listed(root)
    assert found.ignored == {
        ".jfif": (3, "train/dog/000.JFIF"),
        ".heic": (1, "train/cat/000.heic"),
        "file without a suffix": (1, "train/cat/README"),
        ".csv": (1, "train/labels.csv"),
        "image outside of class folders": (1, "train/003.png"),
        "dangling link": (2, "test/cat/gone.png"),
        "special file": (1, "train/cat/pipe.png"),
    }
    assert describe_ignored(found.ignored).startswith("not read: 3 .jfif (train/dog/000.JFIF), 2 d")
    assert "1 more kinds" in describe_ignored(found.ignored)
    assert len(found.train) == 8


def test_links_are_followed_once(root, tmp_path):
    """To images, to folders, to a whole class; not in a circle."""
    before = names(listed(root).train)
    away = tmp_path / "away"
    (root / "train" / "cat").rename(away)
    (root / "train" / "cat").symlink_to(away)
    assert names(listed(root).train) == before
    (away / "000.png").rename(tmp_path / "real")
    (away / "000.png").symlink_to(tmp_path / "real")
    (away / "more").mkdir()
    shutil.copy(tmp_path / "real", away / "more" / "x.png")
    (away / "more" / "up").symlink_to(away)
    (away / "twice").symlink_to(away / "more")
    (away / "y.png").symlink_to("000.png")
    found = listed(root)
    assert names(found.train) == [*before[:6], "cat/more/x.png", "cat/y.png", *before[6:]]
    assert found.ignored == {"link to a folder listed already": (2, "train/cat/more/up")}


WRONG = {
    "empty": (lambda r: [f.unlink() for f in (r / "train" / "dog").iterdir()],
              r"train/dog holds no images; expected files that end in \.bmp, "),
    "empty in test": (lambda r: [f.unlink() for f in (r / "test" / "cat").iterdir()],
                      "test/cat holds no images"),
    "unknown alone": (lambda r: [f.rename(f.with_suffix(".heic"))
                                 for f in (r / "test" / "dog").iterdir()],
                      r"test/dog holds no images \(not read: 2 \.heic \(000.heic\)\)"),
    "only in train": (lambda r: shutil.rmtree(r / "test" / "dog"),
                      r"train/dog has no test/dog \(1 of 2 classes\); expected the same"),
    "only in test": (lambda r: (r / "test" / "owl").mkdir(),
                     r"test/owl has no train/owl \(1 of 3 classes\)"),
    "renamed": (lambda r: (r / "test" / "dog").rename(r / "test" / "Dog"),
                "train/dog has no test/Dog|train/dog has no test/dog"),
    "one class": (lambda r: [shutil.rmtree(r / p / "dog") for p in ("train", "test")],
                  "1 classes; expected at least 2"),
    "no class": (lambda r: [shutil.rmtree(r / p / c) for p in ("train", "test")
                            for c in ("cat", "dog")],
                 "0 classes; expected at least 2"),
    "not UTF-8": (lambda r: [(r / p / "dog").rename(r / p / os.fsdecode(b"chi\xean"))
                             for p in ("train", "test")],
                  r"the class folder chi\\xean has a name that is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_classes_that_cannot_be_are_named_in_one_line(root, kind):
    spoil, message = WRONG[kind]
    spoil(root)
    with pytest.raises(ValueError, match=message) as error:
        listed(root)
    assert str(error.value).startswith(f"data.root={root}: ")
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_files_whose_names_are_not_utf8_are_read(root):
    odd = os.fsdecode(b"\xe9t\xe9.png")
    shutil.copy(root / "train" / "cat" / "000.png", root / "train" / "cat" / odd)
    (root / "train" / "cat" / os.fsdecode(b"\xe9.\xe9")).write_bytes(b"")
    found = listed(root)
    assert found.train.path(6) == root / "train" / "cat" / odd
    assert found.ignored == {r".\xe9": (1, r"train/cat/\xe9.\xe9")}
    describe_ignored(found.ignored).encode()


# --- the fingerprint


def test_data_that_moved_or_were_copied_are_the_same(root, tmp_path):
    there = listed(root).fingerprint
    assert there["train"]["cat"][0] == 6
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy" / "test").rename(tmp_path / "copy" / "val")
    os.utime(tmp_path / "copy" / "train" / "cat" / "000.png", (0, 0))
    assert differences(there, listed(tmp_path / "copy", "val").fingerprint) == []


def other_pixels(root):
    file = root / "train" / "cat" / "003.png"
    Image.new("RGB", (10, 10)).save(file)


CHANGES = {
    "grew": (lambda r: shutil.copy(r / "train" / "cat" / "000.png", r / "train" / "cat" / "x.png"),
             ["12 training images there, 13 here", "other files in train/cat"]),
    "shrank": (lambda r: (r / "test" / "dog" / "001.png").unlink(),
               ["4 test images there, 3 here", "other files in test/dog"]),
    "a class more": (lambda r: noise(r, "owl"),
                     ["12 training images there, 18 here", "4 test images there, 6 here",
                      "classes +owl"]),
    "a class renamed": (lambda r: [(r / p / "dog").rename(r / p / "wolf")
                                   for p in ("train", "test")],
                        ["classes +wolf -dog"]),
    "a file renamed": (lambda r: (r / "train" / "dog" / "000.png").rename(
                           r / "train" / "dog" / "00.png"),
                       ["other files in train/dog"]),
    "swapped between classes": (lambda r: [(r / "train" / "dog" / "005.png").rename(
                                               r / "train" / "cat" / "006.png")],
                                ["other files in train/cat, train/dog"]),
    "other pixels": (other_pixels, ["other files in train/cat"]),
    "another set": (lambda r: noise(r, seed=1),
                    ["other files in train/cat, train/dog, test/cat and 1 more"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_what_differs_is_said(root, kind):
    there = listed(root).fingerprint
    change, expected = CHANGES[kind]
    change(root)
    assert differences(there, listed(root).fingerprint) == expected


def test_the_content_of_a_few_files_is_looked_at(root, monkeypatch):
    opened = []
    monkeypatch.setattr(listing, "SAMPLES", 4)
    monkeypatch.setattr(listing, "_head", lambda file: opened.append(file.name) or b"")
    assert listed(root).fingerprint["test"].keys() == {"cat", "dog"}
    assert opened == ["000.png", "003.png"] * 2 + ["000.png", "001.png"] * 2


def test_a_file_that_cannot_be_opened_has_a_fingerprint_too(root):
    whole, gone = listed(root), listed(root)
    assert whole.fingerprint == gone.fingerprint
    gone = listed(root)
    (root / "train" / "cat" / "000.png").unlink()
    assert differences(whole.fingerprint, gone.fingerprint) == ["other files in train/cat"]
