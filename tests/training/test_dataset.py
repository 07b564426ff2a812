"""Which data a run was trained on: the same go on wherever they are, others are refused."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from reporting.read import load
from tests.data.folders import noise
from training.study import cells, jobs


@pytest.fixture
def start(train, tmp_path):
    """`train.py` on a folder of images, three epochs."""

    def call(root, *keys, study="a", multirun=False):
        own = [f"data.root={root}", f"data.cache={tmp_path / 'cache'}", "data.size=8", "batch=4"]
        own += ["data=folder", "model=resnet8", "recipe.epochs=3", f"study={study}"]
        return train(*(["-m"] if multirun else []), *own, *keys, quick=False)

    return call


def interrupt(folder):
    (folder / "result.json").unlink()
    (folder / "last.pt").unlink()


def rows(folder):
    columns = (line.split(",")[:8] for line in (folder / "metrics.csv").read_text().splitlines())
    return list(columns)


CHANGES = {
    "grew": (lambda r: noise(r, train=10), "12 training images there, 20 here"),
    "a class more": (lambda r: noise(r, "owl"), "classes +owl"),
    "a class renamed": (
        lambda r: [(r / part / "dog").rename(r / part / "wolf") for part in ("train", "test")],
        "classes +wolf -dog",
    ),
    "other files": (lambda r: noise(r, seed=1), "other files in train/cat, train/dog, test/cat"),
    "a test of its own": (lambda r: noise(r / "x", test=3, to="val") and shutil.move(
        r / "x" / "val", r) and shutil.rmtree(r / "test"), "4 test images there, 6 here"),
}  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", CHANGES)
def test_other_data_under_the_same_path_are_refused(start, tmp_path, kind, finished):
    """Neither skipped nor gone on with, and nothing of the run is touched."""
    root = noise(tmp_path / "images")
    folder = start(root).run()
    if not finished:
        interrupt(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    change, what = CHANGES[kind]
    change(root)
    again = start(root)
    assert again.status == 1
    assert again.err.startswith(f"error: data.root={root}: not the data of {folder} (")
    assert what in again.err
    assert again.err.count("\n") == 1
    assert {f.name: f.read_bytes() for f in again.run().iterdir() if f.is_file()} == before
    anew = start(root, "overwrite=true")
    assert anew.status == 0, anew.err
    assert start(root).out.strip().endswith("skipped")


def test_data_may_change_as_long_as_nothing_was_learned_from_them(start, tmp_path):
    root = noise(tmp_path / "images")
    bad = root / "train" / "cat" / "000.png"
    bad.write_bytes(b"")
    assert "cannot read the image" in start(root).err
    bad.unlink()
    assert start(root).status == 0
    assert len(json.loads((start(root).run() / "data.json").read_text())["files"]["train"]) == 2


def test_two_data_sets_in_folders_of_one_name_are_two_runs(start, tmp_path):
    noise(tmp_path / "pets" / "images")
    noise(tmp_path / "birds" / "images", "a b c d")
    swept = start(f"{tmp_path}/pets/images,{tmp_path}/birds/images", multirun=True)
    assert swept.status == 0, swept.err
    results = sorted(swept.runs.glob("a/*/result.json"))
    assert sorted(json.loads(f.read_text())["classes"] for f in results) == [2, 4]
    told = {own["data.root"] for own in load(swept.runs / "a")["identity"]}
    assert len(told) == 2
    assert "images" in told
    assert told & {"pets/images", "birds/images"}
    again = start(f"{tmp_path}/pets/images,{tmp_path}/birds/images", multirun=True)
    assert again.out.count("already, skipped") == 2


@pytest.mark.parametrize("where", ["elsewhere", "other/images"])
def test_moved_data_go_on_bit_for_bit(start, tmp_path, where):
    root, to = noise(tmp_path / "images"), tmp_path / where
    whole = start(root, study="whole").run()
    folder = whole.rename(whole.parent / "kept") and start(root).run("bn")
    interrupt(folder)
    to.parent.mkdir(exist_ok=True)
    root.rename(to)
    again = start(to)
    assert again.status == 0, again.err
    assert f"data.root={to}: the data of {folder}, which were in {root}" in again.out
    assert "goes on after update 6" in again.out
    assert again.run("bn") == folder
    assert rows(folder) == rows(whole.parent / "kept")
    assert "already, skipped" in start(to).out
    assert {own["data.root"] for own in load(again.runs / "a")["identity"]} == {to.name}
    noise(to, train=9)
    assert "12 training images there, 18 here" in start(to).err


def test_a_copy_on_another_disk_is_the_same_data(start, tmp_path):
    """As for jobs that copy their data to a disk of the node: same name, other path."""
    root = noise(tmp_path / "images")
    start(root)
    shutil.copytree(root, tmp_path / "job" / "images")
    assert "already, skipped" in start(tmp_path / "job" / "images").out
    (tmp_path / "link").symlink_to(root)
    assert "already, skipped" in start(tmp_path / "link").out
    noise(tmp_path / "job" / "images", seed=1)
    assert "other files in train/cat" in start(tmp_path / "job" / "images").err
    noise(tmp_path / "other" / "images", seed=1)
    other = start(tmp_path / "other" / "images")
    assert other.status == 0, other.err
    assert len(list(other.runs.glob("a/*/result.json"))) == 2


def test_a_named_run_is_of_its_data_too(start, tmp_path):
    one, other = noise(tmp_path / "one"), noise(tmp_path / "two", seed=1)
    folder = start(one, "name=mine").run()
    refused = start(other, "name=mine")
    assert refused.status == 1
    assert f"data.root={other}: not the data of {folder} (other files in train/cat" in refused.err
    one.rename(tmp_path / "three")
    assert "already, skipped" in start(tmp_path / "three", "name=mine").out


def as_before(folder):
    """A run as it was left before there were fingerprints: named by the end of the path."""
    (folder / "data.json").unlink()
    return folder.rename(folder.with_name(folder.name[:-6] + "0ld0ld"))


@pytest.mark.parametrize("finished", [True, False])
def test_runs_without_a_fingerprint_stay_usable(start, tmp_path, finished):
    root = noise(tmp_path / "images")
    folder = as_before(start(root).run())
    if not finished:
        interrupt(folder)
    again = start(root)
    assert again.status == 0, again.err
    assert f"{folder}: from before runs kept a fingerprint of their data" in again.out
    assert ("skipped" if finished else "goes on after") in again.out
    assert again.run() == folder
    assert (folder / "data.json").exists() is not finished
    if finished:
        assert load(folder.parent)["identity"][0]["data.root"] == "images"
    else:
        noise(root, train=9)
        assert "12 training images there, 18 here" in start(root).err


def test_keys_that_were_renamed_are_known_in_stored_runs(train, tmp_path):
    root = noise(tmp_path / "images", to="val")
    keys = ["data=imagenet", "data.verify_counts=false", "data.size=8", "data.workers=0"]
    keys += [f"data.root={root}", "recipe.epochs=1", "model=resnet8", "batch=4", "study=a"]
    folder = train(*keys, quick=False).run()
    file = folder / ".hydra" / "config.yaml"
    stored = OmegaConf.to_container(OmegaConf.load(file))
    stored["data"]["complete"] = stored["data"].pop("verify_counts")
    OmegaConf.save(stored, file)
    assert "already, skipped" in train(*keys, quick=False).out
    folder = as_before(folder)
    again = train(*keys, quick=False)
    assert "already, skipped" in again.out
    assert again.run() == folder


def test_a_tree_instead_of_the_sets_own_images_is_other_data(start, tmp_path, train):
    root = noise(tmp_path / "images", " ".join("abcdefghij"), train=2, test=1)
    keys = ["data=cifar10", "model=resnet8", "recipe.epochs=1", "batch=4", "study=a"]
    keys += [f"data.cache={tmp_path / 'cache'}"]
    folder = train(*keys, f"data.root={root}", quick=False).run()
    (folder / "data.json").unlink()
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace(f"root: {root}", "root: null"))
    again = train(*keys, f"data.root={root}", quick=False)
    assert again.status == 1
    assert "data=cifar10's own images there, those of a folder here" in again.err


def test_what_is_not_read_is_said_and_stored(start, tmp_path):
    root = noise(tmp_path / "images")
    for i in range(2):
        (root / "train" / "cat" / f"00{i}.png").rename(root / "train" / "cat" / f"00{i}.heic")
    (root / "train" / "dog" / "000.png").write_bytes(b"")
    done = start(root, "data.on_error=skip")
    assert done.status == 0, done.err
    assert f"data.root={root}: not read: 2 .heic (train/cat/000.heic)" in done.out
    assert "data.on_error=skip: 1 unreadable train images replaced by the next ones: " in done.out
    result = json.loads((done.run() / "result.json").read_text())
    assert (result["ignored_files"], result["unreadable_images"]) == (2, 1)
    assert result["train_images"] == 10


def test_an_attempt_before_the_data_were_found_leaves_nothing(start, tmp_path):
    """Its error is not that of a run beside the one that goes on."""
    root = noise(tmp_path / "images")
    folder = start(root).run()
    interrupt(folder)
    to = tmp_path / "moved"
    swept = start(to, multirun=True)
    assert swept.status == 1
    assert len(list(folder.parent.glob("*/error.txt"))) == 1
    root.rename(to)
    assert start(to, multirun=True).status == 0
    assert [f.parent for f in folder.parent.glob("*/.hydra")] == [folder]
    assert not list(folder.parent.glob("*/error.txt"))
    lines = (folder.parent / "commands.txt").read_text().splitlines()
    assert {cell.folder for line in lines for cell in cells(jobs(line.split()))} == {folder}


def test_the_pool_compares_data_before_it_skips(start, tmp_path):
    root = noise(tmp_path / "images")
    keys = ["hydra/launcher=pool", "hydra.launcher.threads=1", "hydra.launcher.workers=1"]
    assert start(root, *keys, multirun=True).status == 0
    assert "already, skipped" in start(root, *keys, multirun=True).out
    noise(root, "owl")
    refused = start(root, *keys, multirun=True)
    assert refused.status == 1
    assert "classes +owl" in refused.err


@pytest.mark.parametrize("content", ["{}", '{"root": "a", "files": {"train": {}}}', "[", "\0"])
def test_a_damaged_fingerprint_is_named(start, tmp_path, content):
    root = noise(tmp_path / "images")
    folder = start(root).run()
    (folder / "data.json").write_text(content)
    refused = start(root)
    assert refused.status == 1
    assert refused.err.startswith(f"error: {folder / 'data.json'}: cannot be read (")
    assert refused.err.count("\n") == 1
    assert load(folder.parent)["status"].tolist() == ["damaged"]
