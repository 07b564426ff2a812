"""The command line as a person uses it: what runs leave behind, and what mistakes are told."""

import csv
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from PIL import Image

import data
import reporting
from tests.processes import Forked
from training import cli, loop, report
from training.process import StoppedError

ROOT = Path(__file__).parent.parent
PROMISED = [
    *("status", "top1", "top5", "best_top1", "norm", "batch_size", "sgd_batch_size", "protocol"),
    *("model", "data", "recipe", "seed", "epochs", "updates", "parameters", "images_per_second"),
    *("wall_seconds", "peak_memory_bytes", "threads", "device", "versions"),
]


def test_a_run_and_what_it_leaves(train):
    done = train("norm=pws", "batch=2")
    assert done.status == 0, done.err
    folder = done.runs / "digits-resnet8-direct"
    folder = next(folder.iterdir())
    assert folder.name.startswith("pws-b2-s0")
    result = json.loads((folder / "result.json").read_text())
    assert set(PROMISED) <= set(result)
    assert result["status"] == "finished"
    assert (result["norm"], result["batch_size"], result["sgd_batch_size"]) == ("pws", 2, 2)
    assert result["updates"] == 143 // 2 == 71
    assert result["peak_memory_bytes"] is None
    assert result["threads"] == 1
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        assert (folder / ".hydra" / name).exists()
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["epoch"] for r in rows] == ["1"]
    assert float(rows[0]["test_top1"]) == result["top1"] == result["best_top1"]
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["progress"]["update"] == 71
    assert list(folder.glob("events.out.tfevents.*"))
    assert not list(folder.glob("*.tmp"))
    for told in (
        "batch size 2 (images that share statistics), SGD batch 2",
        "learning rate 0.00625 = 0.1 x 2 / 32",
        "of 71 updates, leaving out 1 image",
        "75,162 parameters",
        str(folder),
    ):
        assert told in done.out


def test_the_defaults_get_the_plain_name(train):
    done = train("batch=143", quick=False)
    assert [p.name for p in (done.runs / "digits-resnet8-direct").iterdir()] == ["bn-b143-s0"]
    assert "10 epochs of 10 updates" in done.out


def test_names_of_runs_follow_from_their_configuration(train):
    """Keys that change no result change no name; the others make the same hash in any order."""
    first = train("recipe.lr=0.2", "recipe.momentum=0.5").run()
    again = train("recipe.momentum=0.5", "recipe.lr=0.2", "device=cpu", "runtime.log_every=7")
    assert "already, skipped" in again.out
    assert again.run() == first
    other = train("recipe.lr=0.3", "recipe.momentum=0.5")
    assert len(list((other.runs / "digits-resnet8-direct").iterdir())) == 2


def test_the_same_command_again_skips(train):
    assert train().status == 0
    again = train()
    assert again.status == 0
    assert "finished already, skipped" in again.out
    assert "epoch" not in again.out


def test_a_finished_run_on_a_disk_that_cannot_be_written(train, monkeypatch):
    folder = train("name=mine", "recipe.updates=1").run()

    def refuse(*args, **keys):
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(FileLock, "acquire", refuse)
    again = train("name=mine", "recipe.updates=1")
    assert (again.status, again.err) == (0, "")
    assert "finished already, skipped" in again.out
    assert "another configuration" in train("name=mine", "recipe.updates=2").err
    assert "cannot write" in train("name=mine", "recipe.updates=1", "overwrite=true").err


def test_another_configuration_is_refused_and_overwritten_on_request(train):
    folder = train("name=mine").run()
    stamp = (folder / "result.json").stat().st_mtime_ns
    refused = train("name=mine", "recipe.lr=0.5", "batch=8")
    assert refused.status == 1
    assert one_line(refused.err, "another configuration", "batch is 32 there and 8 here")
    assert "recipe.lr is 0.1 there and 0.5 here" in refused.err
    assert (folder / "result.json").stat().st_mtime_ns == stamp
    (folder / "notes.txt").write_text("mine")
    accepted = train("name=mine", "recipe.lr=0.5", "batch=8", "overwrite=true")
    assert accepted.status == 0, accepted.err
    assert json.loads((folder / "result.json").read_text())["batch_size"] == 8
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_locked_folder_is_refused(train):
    folder = train().run()
    with FileLock(folder / ".lock"):
        refused = train("overwrite=true")
    assert one_line(refused.err, "another process is training this run")
    assert (folder / "result.json").exists()


# --- all options


def options(group):
    return sorted(p.stem for p in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize("norm", options("norm"))
@pytest.mark.parametrize("protocol", options("protocol"))
def test_every_scheme_under_every_protocol(train, norm, protocol):
    sgd = [] if protocol == "direct" else ["protocol.sgd_batch=8"]
    done = train(f"norm={norm}", f"protocol={protocol}", "batch=4", *sgd)
    if (norm, protocol) == ("sync_bn", "ghost"):
        assert "norm=sync_bn: a forward pass of 8 images with batch=4" in done.err
        return
    assert done.status == 0, done.err
    result = json.loads((done.run() / "result.json").read_text())
    assert (result["norm"], result["protocol"]) == (norm, protocol)
    assert result["sgd_batch_size"] == (4 if protocol == "direct" else 8)
    assert result["micro_batch"] == (8 if protocol == "ghost" else 4)


@pytest.mark.parametrize(
    "model", [m for m in options("model") if m not in ("timm", "torchvision", "resnet101")]
)
def test_every_model(train, model):
    small = ["data.train_images=4", "data.test_images=2", "data.size=32", "batch=2"]
    done = train("data=synthetic", f"model={model}", "norm=gn", *small, "data.train_fraction=1.0")
    assert done.status == 0, done.err
    assert json.loads((done.run() / "result.json").read_text())["model"] == model


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_models_of_libraries(train, library):
    small = ["data.train_images=4", "data.test_images=2", "batch=2", "data.train_fraction=1.0"]
    done = train("data=synthetic", f"model={library}", "model.name=resnet18", "norm=pws", *small)
    assert done.status == 0, done.err
    result = json.loads((done.run() / "result.json").read_text())
    assert result["model"] == f"{library}/resnet18"


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("data", [None, *options("data")])
def test_every_experiment_and_data_set_composes(experiment, data):
    from hydra import compose, initialize_config_dir

    from training.config import flatten

    chosen = [f"experiment={experiment}"] if data is None else [f"data={data}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", chosen)
    keys = flatten(cfg, resolve=True)
    assert keys["recipe.lr"] > 0
    if data is None:
        assert keys["study"] == experiment
    else:
        own = {"digits": ("resnet8", "digits"), "imagenet": ("resnet50", "imagenet")}
        follows = own.get(data, ("resnet20", "cifar"))
        assert (keys["model.name"], keys["recipe.name"]) == follows


def test_what_is_given_wins_over_the_data_sets_choice():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", ["data=cifar10", "model=resnet56", "recipe=digits"])
    assert (cfg.model.name, cfg.recipe.name) == ("resnet56", "digits")


def test_every_key_has_a_comment():
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = file.read_text().splitlines()
        assert any(line.startswith("# ") for line in lines[:2]), file
        if file.parent.name == "experiment":
            continue
        for line in lines[: lines.index("hydra:") if "hydra:" in lines else None]:
            key = re.match(r" *([a-z_0-9]+):", line)
            plain = ("name", "defaults", "library", "_target_")
            if key and key[1] not in plain and "- " not in line:
                assert "#" in line, f"{file}: {line}"


def test_help_is_a_page(train):
    shown = train("--help", quick=False)
    assert shown.status == 0
    for told in ("norm: bcn, bn, bn_init, brn, brn_short, cbn", "python train.py -m", "batch: 32"):
        assert told in shown.out
    assert len(shown.out.splitlines()) < 110


def test_durations_in_updates_and_rare_evaluations(train):
    done = train("recipe.updates=10", "recipe.eval_every=2", "batch=32")
    assert done.status == 0, done.err
    with open(done.run() / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["epoch"], r["update"]) for r in rows] == [("1", "4"), ("2", "8"), ("3", "10")]
    assert [bool(r["test_top1"]) for r in rows] == [False, True, True]
    assert json.loads((done.run() / "result.json").read_text())["updates"] == 10


@pytest.mark.parametrize(("precision", "norm"), [("bfloat16", "mabn"), ("float16", "gn")])
def test_half_precision(train, precision, norm):
    done = train(f"recipe.precision={precision}", f"norm={norm}", "batch=4")
    assert done.status == 0, done.err
    state = torch.load(done.run() / "last.pt", weights_only=True)
    assert bool(state["scaler"]) == (precision == "float16")


def test_data_dependent_start_is_the_same_at_every_batch_size(train):
    states = []
    for batch in (2, 8):
        done = train("norm=pws", "norm.initalpha=true", f"batch={batch}", "recipe.lr=1e-30",
                     "recipe.weight_decay=0.0")  # fmt: skip
        assert done.status == 0, done.err
        states.append(
            torch.load(done.run(f"pws-b{batch}-") / "last.pt", weights_only=True)["model"]
        )
    alphas = [k for k in states[0] if k.endswith("alpha")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in alphas)
    assert any((states[0][k] != 1).any() for k in alphas)


def test_divergence_is_a_result(train):
    done = train("recipe.lr=1e30", "norm=gn", "recipe.warmup=0.0", "batch=8")
    assert done.status == 0, done.err
    result = json.loads((done.run() / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["diverged_at_update"] >= 2
    assert result["top1"] is None
    assert result["best_top1"] is None
    assert result["updates"] == result["diverged_at_update"]
    assert (done.run() / "metrics.csv").read_text().startswith("epoch,update,")
    assert f"diverged: the loss of update {result['diverged_at_update']}" in done.out
    assert (
        "diverged already, skipped"
        in train("recipe.lr=1e30", "norm=gn", "recipe.warmup=0.0", "batch=8").out
    )


def test_weights_lost_in_the_last_update_are_divergence_too(train):
    done = train("recipe.updates=1", "recipe.lr=1e30", "recipe.warmup=0.0")
    result = json.loads((done.run() / "result.json").read_text())
    assert (result["status"], result["diverged_at_update"]) == ("diverged", 1)


@pytest.mark.parametrize("norm", ["bn", "mabn", "bcn"])
@pytest.mark.usefixtures("as_default")
def test_ghost_and_accumulate_end_alike(train, norm, monkeypatch):
    """The loop's part of their being the same mathematics: the weighting of the parts. In float64:
    in float32 rounding sooner or later turns a ReLU."""
    forward = torch.nn.Conv2d._conv_forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "_conv_forward", lambda self, x, *rest: forward(self, x.double(), *rest)
    )
    ends = []
    for protocol, images in (("ghost", 16), ("ghost", 8), ("accumulate", 4)):
        keys = [f"protocol.micro_batch={images}", "protocol.sgd_batch=16", "batch=4"]
        done = train(
            *(f"norm={norm}", f"protocol={protocol}", "recipe.updates=6"), *keys, f"study=f{images}"
        )
        assert done.status == 0, done.err
        [folder] = done.runs.glob(f"f{images}/*")
        ends.append(torch.load(folder / "last.pt", weights_only=True))
    for state in ends[1:]:
        for key, value in state["model"].items():
            torch.testing.assert_close(value, ends[0]["model"][key], rtol=1e-10, atol=1e-10)
        loss = state["progress"]["rows"][-1]["train_loss"]
        assert loss == pytest.approx(ends[0]["progress"]["rows"][-1]["train_loss"], rel=1e-6)


def test_networks_of_two_libraries_are_two_runs(train):
    small = ["data.train_images=4", "data.test_images=2", "batch=2", "data.train_fraction=1.0"]
    for library in ("timm", "torchvision"):
        done = train("data=synthetic", f"model={library}", "model.name=resnet18", *small)
        assert done.status == 0, done.err
    assert len(list(done.runs.glob("*/*/result.json"))) == 2


def test_folders_of_images_are_told_apart_by_name(train, tmp_path):
    for name in ("one", "two"):
        for place in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / name / place).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / place / "x.png")
        where = [f"data.root={tmp_path / name}", f"data.cache={tmp_path}", "data.size=8"]
        done = train("data=folder", "model=resnet8", *where, "batch=2", "data.train_fraction=1.0")
        assert done.status == 0, done.err
        assert "already" not in done.out


# --- sweeps


def test_a_failing_run_does_not_take_the_others_with_it(train):
    swept = train("-m", "norm=bn,gn", "norm.eps=1e-4", "batch=16,999,8")
    assert swept.status == 1
    results = sorted(p.parent.name[:6] for p in swept.runs.glob("*/*/result.json"))
    assert results == ["bn-b16", "bn-b8-", "gn-b16", "gn-b8-"]
    said = [x for x in swept.err.splitlines() if x.startswith("error:")]
    assert len(said) == 2  # the reason is the same
    assert "batch=999" in said[0]
    assert "larger than the data set" in said[0]
    assert "2 of these runs failed" in said[1]
    assert "Traceback" not in swept.err
    assert "Error executing job" not in swept.err
    in_parts = train("-m", "hydra.sweeper.max_batch_size=1", "batch=999,8", "study=parts")
    assert in_parts.status == 1
    assert len(list(in_parts.runs.glob("parts/*/result.json"))) == 1
    again = train("-m", "norm=bn,gn", "norm.eps=1e-4", "batch=16,8")
    assert again.status == 0
    assert again.out.count("finished already, skipped") == 4


def test_runs_of_a_sweep_do_not_touch_each_other(train, tmp_path):
    """A run in the middle of a sweep ends bit for bit like the same run alone."""
    assert train("-m", "norm=mabn,bn", "batch=4", "seed=0,1").status == 0
    alone = train("norm=bn", "batch=4", "seed=1", runs=tmp_path / "alone")
    swept = next((tmp_path / "runs").glob("*/bn-b4-s1*"))
    assert_same_weights(swept, alone.run())


@pytest.mark.parametrize(
    ("study", "rule"),
    [
        ("", "not empty"),
        ("..", "without a dot or space at either end"),
        ("../beside", "without slashes"),
        ("a/b", "without slashes"),
        (".try", "without a dot or space at either end"),
        ("n" * 201, "of at most 200 bytes"),
    ],
)
def test_a_refused_study_leaves_nothing_anywhere(train, tmp_path, study, rule):
    swept = train("-m", "seed=0,1", f"study={study}")
    assert swept.status == 1
    assert f"study={study}: expected the name of a folder, {rule}" in swept.err
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert left == [swept.runs / "multirun.yaml"]  # Hydra's own


# --- mistakes


def one_line(text, *parts):
    lines = [x for x in text.strip().splitlines() if x]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], text
    return True


MISTAKES = [
    (["norm=pwss"], 2, ["norm=pwss: unknown (did you mean pws", "allowed: bcn, bn, bn_init, brn"]),
    (["model=resnet21"], 2, ["model=resnet21: unknown (did you mean resnet", "allowed:"]),
    (["data=cifar"], 2, ["data=cifar: unknown (did you mean cifar10"]),
    (["experiment=quick"], 2, ["experiment=quick: unknown (did you mean quickstart"]),
    (["bacth=2"], 2, ["bacth: no such key (did you mean batch"]),
    (["recipe.momentun=0.5"], 2, ["recipe.momentun: no such key (did you mean recipe.momentum"]),
    (["nrom=gn"], 2, ["nrom: no such key (did you mean norm"]),
    (["norm=pws", "norm.gama=1"], 2, ["norm.gama: no such key (did you mean norm.gamma"]),
    (["+norm.gama=1"], 1, ["norm.gama: no such key"]),
    (["+recipe.momentm=1"], 1, ["recipe.momentm: no such key"]),
    (["batch=1,2"], 2, ["batch=1,2", "several values make a study, which needs -m"]),
    (["protocol.sgd_batch=64"], 1, ["protocol.sgd_batch=64: with protocol=direct"]),
    (["study=null"], 1, ["study=null: expected a text"]),
    (["~data"], 1, ["data=null: a run needs one"]),
    (["~recipe.momentum"], 1, ["recipe.momentum: removed"]),
    (["seed=99999999999999999999999"], 1, ["seed=99999999999999999999999: expected"]),
    (["data=folder", "data.root=123"], 1, ["data.root=123: does not exist"]),
    (["norm.momentum=7"], 1, ["norm.momentum=7: expected a number from 0 to 1"]),
    (
        ["model=timm", "model.name=densenet121"],
        1,
        ["DenseNet cannot take images of 8x8"],
    ),
    (["-m", "batch=32", "runtime.runs=/proc/none"], 1, ["/proc/none", "runtime.runs"]),
    (["batch"], 2, ["batch: cannot be read; expected KEY=VALUE"]),
    (["--batch", "2"], 2, ["--batch: keys are written without dashes: batch=VALUE"]),
    (["batch=0"], 1, ["batch=0: expected a whole number from 1"]),
    (["batch=-1"], 1, ["batch=-1: expected a whole number from 1"]),
    (["batch=2.5"], 1, ["batch=2.5: expected a whole number from 1"]),
    (["batch=two"], 1, ["batch=two: expected a whole number from 1"]),
    (["batch=true"], 1, ["batch=true: expected a whole number from 1"]),
    (["batch=null"], 1, ["batch=null: expected a whole number from 1"]),
    (["seed=null"], 1, ["seed=null: expected a whole number from 0"]),
    (["seed=-1"], 1, ["seed=-1: expected a whole number from 0"]),
    (["recipe.lr=fast"], 1, ["recipe.lr=fast: expected a number above 0"]),
    (["recipe.lr=nan"], 1, ["recipe.lr=nan: expected a number above 0"]),
    (["recipe.nesterov=maybe"], 1, ["recipe.nesterov=maybe: expected true or false"]),
    (["recipe.schedule=cosin"], 1, ["recipe.schedule=cosin: expected step, cosine, linear"]),
    (["recipe.precision=half"], 1, ["recipe.precision=half: expected float32, bfloat16, float16"]),
    (
        ["recipe.precision=float16", "norm=mabn", "batch=2"],
        1,
        ["recipe.precision=float16: its loss scale", "expected float32 or bfloat16"],
    ),
    (["norm=bcn", "norm.statistics=moving"], 1, ["norm.statistics=moving: expected auto, batch"]),
    (["norm=bcn", "norm.rate=2"], 1, ["norm.rate=2: expected a number from 0 to 1"]),
    (["norm=mabn", "norm.version=det"], 1, ["norm.version=det: expected release or imagenet"]),
    (["norm=pws", "norm.form=jax"], 1, ["norm.form=jax: expected pytorch or tensorflow"]),
    (
        ["norm=pws_tensorflow", "norm.initalpha=true"],
        1,
        ["norm.initalpha=true: form=tensorflow has no such option; expected false"],
    ),
    (["norm=gn", "norm.channels_per_group=0"], 1, ["norm.channels_per_group=0: expected a whole"]),
    (["norm=sync_bn", "batch=2", "protocol=ghost"], 1, ["norm=sync_bn: a forward pass of 128"]),
    (["norm=in", "model=timm", "model.name=resnet10t"], 1, ["has no variance"]),
    (
        ["norm=evonorm_s0", "model=timm", "model.name=resnet10t"],
        1,
        ["norm=evonorm_s0: is norm and activation in one, and ResNet keeps them apart"],
    ),
    (["recipe.crop=-1"], 1, ["recipe.crop=-1: expected a whole number from 0, random_r"]),
    (["recipe.crop=centre"], 1, ["recipe.crop=centre: expected a whole number from 0, rand"]),
    (["recipe.crop=random_square"], 1, ["recipe.crop=random_square: data=digits", "zero padding"]),
    (["recipe=imagenet", "recipe.crop=1", "recipe.lighting=0.1"], 1, ["lighting=0.1: is for ph"]),
    (["recipe=imagenet", "recipe.pixels=bgr"], 1, ["recipe.pixels=bgr: expected standardized, b"]),
    (["data=imagenet", "recipe.crop=4"], 1, ["recipe.crop=4: data=imagenet", "random_resized or"]),
    (["data=imagenet"], 1, ["data.root=null: data=imagenet needs the path", "train/<wnid>/*.JPEG"]),
    (["data=imagenet", "data.root=/nowhere"], 1, ["data.root=/nowhere: does not exist"]),
    (["data=imagenet", "data.resize=200"], 1, ["data.resize=200: expected at least data.size=224"]),
    (["data=imagenet", "data.workers=-1"], 1, ["data.workers=-1: expected a whole number from 0"]),
    (["data=imagenet", "data.on_error=stop"], 1, ["data.on_error=stop: expected raise, skip"]),
    (
        ["data=imagenet", "data.verify_counts=no"],
        1,
        ["data.verify_counts=no: expected true or false"],
    ),
    (["recipe.milestones=[30,60]"], 1, ["recipe.milestones=[30, 60]: expected parts from 0 to 1"]),
    (["recipe.epochs=null"], 1, ["recipe.epochs=null: expected a number"]),
    (["recipe.flip=true"], 1, ["recipe.flip=true: a mirrored image of data=digits"]),
    (["protocol=ghost", "batch=3"], 1, ["protocol.sgd_batch=128: expected a multiple of batch=3"]),
    (["protocol=accumulate", "batch=256"], 1, ["protocol.sgd_batch=128: expected a multiple of"]),
    (
        ["protocol=ghost", "batch=4", "protocol.micro_batch=6"],
        1,
        ["protocol.micro_batch=6: expected a multiple of batch=4 that divides the 128 images"],
    ),
    (["batch=2000"], 1, ["protocol.sgd_batch=2000", "larger than the data set"]),
    (["device=cuda:9"], 1, ["device=cuda:9:", "expected auto, cpu"]),
    (["device=gpu"], 1, ["device=gpu: expected auto, cpu"]),
    (["model=timm"], 1, ["model.name=???: needs a value"]),
    (["model=timm", "model.name=resnet19"], 1, ["model.name=resnet19: unknown (did you mean"]),
    (["model.block=pre"], 1, ["model.block=pre: expected auto, post, pws, pws_tf"]),
    (["norm=gn", "norm.groups=7"], 1, ["norm.groups=7: fits no layer"]),
    (["norm=pws", "norm.mode=fan"], 1, ["norm.mode=fan: expected fan_in or fan_out"]),
    (["model=resnet18", "batch=1"], 1, ["batch=1", "no variance"]),
    (["data=folder"], 1, ["data.root=null: data=folder needs the path"]),
    (["data=folder", "data.root=/nowhere"], 1, ["data.root=/nowhere: does not exist"]),
    (["data.train_fraction=0.0"], 1, ["data.train_fraction=0.0: expected a number above 0"]),
    (["study=a/b"], 1, ["study=a/b: expected the name of a folder, without slashes"]),
    (["study="], 1, ["study=: expected the name of a folder"]),
    (["name=.."], 1, ["name=..: expected the name of a folder"]),
    (["runtime.runs=/proc/none"], 1, ["runtime.runs=/proc/none: cannot write"]),
    (["study=[a]"], 1, ["study=['a']: expected a text"]),
    (["study={a: 1}"], 1, ["study={'a': 1}: expected a single value"]),
    (["batch='2'"], 1, ["batch='2': expected a whole number from 1"]),
    (["seed=18446744073709551617"], 1, ["expected a whole number from 0 to 9007199254740991"]),
    (["runtime.threads=100000"], 1, ["expected a whole number from 1 to 1024"]),
    (["recipe=imagenet_mabn"], 1, ["recipe.epochs=1: has no effect beside recipe.updates=600000"]),
    (["recipe.milestones=[0.5]"], 1, ["has no effect beside recipe.schedule=cosine; expected rec"]),
    (["recipe.lr_decay=0.2"], 1, ["recipe.lr_decay=0.2: has no effect beside recipe.schedule=cos"]),
    (["recipe.betas=[0.9,0.99]"], 1, ["has no effect beside recipe.optimizer=sgd; expected recip"]),
    (
        ["recipe.optimizer=adamw", "recipe.momentum=0.8"],
        1,
        ["recipe.momentum=0.8: has no effect beside recipe.optimizer=adamw; expected"],
    ),
    (
        ["recipe.momentum=0.0", "recipe.nesterov=true"],
        1,
        ["beside recipe.momentum=0.0; expected r"],
    ),
    (["recipe.clip=1.0", "recipe.clip_factor=0.1"], 1, ["has no effect beside recipe.clip=1.0"]),
    (["evaluation.batches=5"], 1, ["has no effect beside evaluation.statistics=running; expected"]),
    (["data=folder", "data.root=/x", "data.resize=40"], 1, ["data.resize=40: has no effect on im"]),
    (["probe.every=5"], 1, ["probe.every=5: has no effect beside probe.name=none"]),
    (["norm=0.5"], 2, ["norm=0.5: expected the name of one of its options"]),
    (["debug=[0.1,0.2]"], 2, ["debug=[0.1,0.2]: expected the name of one of its options"]),
    (["data.root='a\nb'", "data=folder"], 2, ["data.root='a b': has a line break; expected a s"]),
    (["-m", "norm=bn,gn", "norm.groups=4"], 2, ["norm.groups: not all of norm=bn,gn have it"]),
    (["-m", "norm=bn,gn", "norm.grops=4"], 2, ["grops: no such key (did you mean norm.groups"]),
    (["hydra/launcher=[basic]"], 2, ["hydra/launcher=[basic]: expected the name of one"]),
    (["hydra/job_logging=[none]"], 2, ["hydra/job_logging=[none]: expected the name of one"]),
    (["norm=null"], 2, ["norm=null: expected the name of one of its options"]),
    (['recipe.lr="${oc.env:NO_SUCH}"'], 1, ["recipe.lr: ", "Environment variable 'NO_SUCH' not"]),
    (["hydra/job_logging=null"], 2, ["hydra/job_logging=null: expected the name of one"]),
    (["-m", "hydra.launcher=null"], 1, ["hydra.launcher=null: expected no value, but hydra/lau"]),
    (["-m", "hydra.sweeper=x"], 1, ["hydra.sweeper=x: expected no value"]),
    (
        ["data.name=mnist"],
        1,
        ["data.name=mnist: an option is chosen as data=mnist; expected digits"],
    ),
    (["norm.name=gn"], 1, ["norm.name=gn: an option is chosen as norm=gn; expected bn"]),
    (["debug=overfit", "debug.name=profile"], 1, ["debug.name=profile: an option is chosen as"]),
    (["norm=GN"], 2, ["norm=GN: unknown (did you mean gn?)"]),
    (["lr=0.1"], 2, ["lr: no such key (did you mean recipe.lr?)"]),
    (["recipe.LR=0.1"], 2, ["recipe.LR: no such key (did you mean recipe.lr?)"]),
    (["data.root=/a=b"], 2, ["""with such letters is quoted: 'data.root="/a=b"'"""]),
    (["study=Größe"], 2, ["""is quoted: 'study="Größe"'"""]),
    (["data.root=~/a"], 2, [f"""is quoted: 'data.root="{Path.home()}/a"'"""]),
    (["hydra.verbose=[0.5]"], 1, ["hydra.verbose=[0.5]: cannot be set to that"]),
    (["hydra.run.dir=x"], 1, ["hydra.run.dir=x: a run's folder is runtime.runs/study/name"]),
    (["-m", "hydra.sweep.dir=x"], 1, ["hydra.sweep.dir=x: a run's folder is"]),
    (["hydra.job.chdir=true"], 1, ["hydra.job.chdir=true: a run's folder is"]),
    (["hydra.output_subdir=.hydra"], 1, ["hydra.output_subdir=.hydra: a run's folder is"]),
    (["-m", "hydra.sweeper.params={seed: '0,1'}"], 1, ["hydra.sweeper.params: cannot be set"]),
    (["--config-name=x"], 2, ["--config-name: there is one configuration"]),
    (["--config-dir=/nowhere"], 2, ["/nowhere: no such folder, for --config-dir"]),
    (["hydra.searchpath=[file:///nowhere]"], 2, ["/nowhere: no such folder, for --config-dir"]),
    (["--cfg=jobs"], 2, ["--cfg/-c: invalid choice: 'jobs'"]),
]


@pytest.mark.parametrize(("arguments", "status", "parts"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_get_one_line(train, arguments, status, parts):
    if arguments[0].startswith("data.train_fraction"):
        made = train("recipe.epochs=1", *arguments, quick=False)
    else:
        made = train(*arguments)
    assert one_line(made.err, *parts)
    assert made.status == status
    assert made.out == ""
    assert not list(made.runs.glob("*/*"))


def test_flags_stand_anywhere_and_texts_are_as_typed(train):
    asked, words = cli.arguments(["batch=2", "-m", "study=1e3,a,true", "name=null", "seed=0,1"])
    assert asked.multirun
    typed = 'study="1e3",a,"true"'
    assert words == ["--multirun", "batch=2", typed, "name=null", "seed=0,1"]
    assert cli.as_typed("runtime.runs=2024_06_01") == 'runtime.runs="2024_06_01"'
    assert cli.as_typed("data.root=1_0") == 'data.root="1_0"'
    done = train("study=1e3", "name=2024_06_01", "recipe.updates=1")
    assert done.status == 0, done.err
    assert (done.runs / "1e3" / "2024_06_01" / "result.json").exists()


def test_cuda_where_there_is_none(train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert one_line(train("device=cuda").err, "device=cuda: torch finds no GPU here; expected auto")


def test_an_unreadable_image_in_a_folder_is_named(train, tmp_path):
    for part in ("train", "test"):
        for name in "ab":
            place = tmp_path / "tree" / part / name
            place.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / f"{i}.png")
    bad = tmp_path / "tree" / "train" / "b" / "2.png"
    bad.write_bytes(b"\x89PNG")
    where = [f"data.root={tmp_path / 'tree'}", f"data.cache={tmp_path}", "data.size=8"]
    made = train("data=folder", "model=resnet8", *where, "batch=2", "data.train_fraction=1.0")
    assert made.status == 1
    assert one_line(made.err, f"cannot read the image {bad}")


def test_a_fault_of_ours_shows_its_traceback(train, monkeypatch):
    import training.loop

    def broken(*args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(training.loop, "train", broken)
    with pytest.raises(ZeroDivisionError):
        train()


def test_a_run_loads_only_what_it_uses(tmp_path):
    """Each of these takes a second or two."""
    keys = ["recipe.updates=1", f"runtime.runs={tmp_path}", "runtime.threads=1"]
    code = (
        f"import runpy, sys; sys.argv = {['train.py', *keys]}; "
        "runpy.run_path('train.py', run_name='__main__'); "
        "print(*{'torch._dynamo', 'torchvision', 'timm', 'matplotlib', 'sklearn'} & {*sys.modules})"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "top-1" in made.stdout.splitlines()[-2]
    assert made.stdout.splitlines()[-1] == ""


def test_full_error_is_left_to_hydra(tmp_path):
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    command = [sys.executable, "train.py", "batch=0", f"runtime.runs={tmp_path}"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 1
    assert "Traceback" in made.stderr


# --- the terminal


@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        ("| head -1", "standard output: Broken pipe; going on without\n"),
        (">/dev/full", "standard output: No space left on device; going on without\n"),
        (">&- 2>&- <&-", ""),
        ("runtime.progress=bar", ""),
    ],
)
def test_output_is_never_worth_a_run(tmp_path, redirection, told):
    """Nor are Python's safe path, another folder, and markup or letters in a name."""
    words = [sys.executable, str(ROOT / "train.py"), f"runtime.runs={tmp_path}", "-m", "seed=0,1"]
    words += ["recipe.updates=3", "runtime.threads=1", 'study="[bold]x :warning: ü"']
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "ascii"}
    command = ["bash", "-c", f"{shlex.join(words)} {redirection}"]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stderr == told
    assert len(list(tmp_path.glob("*/*/result.json"))) == 2
    if "progress" in redirection:
        assert "[bold]x :warning: \\xfc/bn-b32-s0" in made.stdout


# --- interruption


def assert_same_weights(a, b):
    one, two = (torch.load(f / "last.pt", weights_only=True) for f in (a, b))
    assert one["model"].keys() == two["model"].keys()
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key
    for key, value in one["optimizer"]["state"].items():
        for name, tensor in value.items():
            assert tensor is None or torch.equal(tensor, two["optimizer"]["state"][key][name])


TIMES = {"images_per_second", "seconds", "wall_seconds", "compiled_reason"}


def metrics(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]


def points(folder):
    """What TensorBoard shows of a run: tag -> [(step, value)], times apart."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.endswith("images_per_second")]
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}


@pytest.mark.parametrize("norm", ["bn", "mabn"])
def test_killed_and_restarted_equals_uninterrupted(train, tmp_path, norm):
    """SIGKILL in the middle of an epoch, twice, through the command line."""

    def command(runs):
        own = [f"runtime.runs={runs}", "runtime.threads=1", "checkpoint.every_updates=9"]
        keys = ["batch=4", "recipe.epochs=3", "data.train_fraction=0.2", "runtime.log_every=5"]
        keys.append("recipe.eval_every=2")
        probe = {"bn": "gradient_shift", "mabn": "batch_statistics"}[norm]
        return [f"norm={norm}", f"probe={probe}", "probe.every=20", *keys, *own]

    assert train(*command(tmp_path / "whole"), quick=False, runs=tmp_path / "whole").status == 0

    for update in (9, 90):  # in the first epoch of 71 updates and in the second
        killed = Forked(command(tmp_path / "killed"))
        while not reached(tmp_path / "killed", update) and killed.poll() is None:
            time.sleep(0.05)
        killed.kill()
        killed.communicate()
        assert killed.returncode == -9
    last = Forked(command(tmp_path / "killed"))
    assert "goes on after update" in last.communicate()[0]

    a, b = (next(tmp_path.glob(f"{x}/*/{norm}-*")) for x in ("whole", "killed"))
    assert_same_weights(a, b)
    assert metrics(a) == metrics(b)
    assert points(a) == points(b)
    results = [json.loads((f / "result.json").read_text()) for f in (a, b)]
    for key in set(results[0]) - TIMES:
        assert results[0][key] == results[1][key], key


def test_a_signal_writes_a_checkpoint_first(train, tmp_path):
    """In the middle of an epoch, and far from any other checkpoint; all end as the undisturbed."""
    keys = ["batch=4", "recipe.epochs=1", "checkpoint.every_minutes=0", "runtime.log_every=5"]

    own = ["runtime.threads=1", f"runtime.runs={tmp_path / 'stopped'}"]
    assert train(*keys, quick=False, runs=tmp_path / "whole").status == 0
    before = 0
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        stopped = Forked([*keys, *own])
        while not list(tmp_path.glob("stopped/*/*/progress.json")):
            assert stopped.poll() is None, stopped.communicate()
            time.sleep(0.01)
        stopped.send_signal(number)
        _, err = stopped.communicate()
        assert stopped.returncode == 128 + number, err
        [file] = tmp_path.glob("stopped/*/*/last.pt")
        done = torch.load(file, weights_only=True)["progress"]["update"]
        assert err == f"interrupted; the same command goes on from here, after update {done}\n"
        assert before < done < 359
        before = done
        file.with_name("progress.json").unlink()
    last = Forked([*keys, *own])
    assert f"goes on after update {done}" in last.communicate()[0]
    both = [next(tmp_path.glob(f"{x}/*/*")) for x in ("whole", "stopped")]
    assert_same_weights(*both)
    assert metrics(both[0]) == metrics(both[1])
    assert points(both[0]) == points(both[1])
    assert not list(both[1].glob("*.tmp"))


def test_a_signal_before_the_command_is_read(train, monkeypatch):
    """It ends the process at once, where raised it would be a traceback."""
    seen, read = [], cli.arguments
    look = lambda words: seen.append(signal.getsignal(signal.SIGTERM)) or read(words)  # noqa: E731
    monkeypatch.setattr(cli, "arguments", look)
    assert train("recipe.updates=1").status == 0
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize("where", ["evaluation", "images"])
def test_a_signal_while_the_run_waits(train, monkeypatch, tmp_path, where):
    """For what may take minutes; on the way back nothing is missing in any file."""
    keys = ["batch=4", "recipe.updates=90", "runtime.log_every=7", "data.train_fraction=0.2"]
    assert train(*keys, runs=tmp_path / "whole").status == 0
    module, name = {"evaluation": (loop, "evaluate"), "images": (data, "load")}[where]
    original = getattr(module, name)

    def evaluate(model, batches):
        signal.raise_signal(signal.SIGHUP)
        return original(model, batches)

    def load(*args, **keys):
        loader = original(*args, **keys)
        whole = loader.train

        def train(epoch, start):
            yield from itertools.islice(whole(epoch, start), 10)
            signal.raise_signal(signal.SIGHUP)

        monkeypatch.setattr(loader, "train", train)
        return loader

    with monkeypatch.context() as patch:
        patch.setattr(module, name, evaluate if where == "evaluation" else load)
        stopped = train(*keys)
    assert stopped.status == 128 + signal.SIGHUP
    update = {"evaluation": 71, "images": 10}[where]
    assert (
        stopped.err == f"interrupted; the same command goes on from here, after update {update}\n"
    )
    monkeypatch.setattr(StoppedError, "last", -1.0)
    again = train(*keys)
    assert f"goes on after update {update}" in again.out
    both = [next(tmp_path.glob(f"{x}/*/*")) for x in ("whole", "runs")]
    assert_same_weights(*both)
    assert metrics(both[0]) == metrics(both[1])
    assert points(both[0]) == points(both[1])


@pytest.mark.parametrize(
    ("overwrite", "said"),
    [(False, "goes on from here, after update 4"), (True, "starts again, without overwrite=true")],
)
def test_a_signal_before_and_behind_the_training(train, monkeypatch, overwrite, said):
    load = data.load

    def interrupted(*args, **keys):
        signal.raise_signal(signal.SIGTERM)

    keys = ["recipe.updates=4", f"overwrite={overwrite}"]
    monkeypatch.setattr(data, "load", interrupted)
    assert (
        train(*keys).err == "interrupted; nothing is trained yet; the same command starts again\n"
    )
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(report, "result", interrupted)
    monkeypatch.setattr(StoppedError, "last", -1.0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert said in train(*keys).err


def test_a_full_disk_is_named_and_costs_the_run_nothing_before(train, monkeypatch):
    """The checkpoint before the last can be read, and no part of the last is left."""
    real = os.fsync
    done = train("recipe.epochs=2")
    (done.run() / "result.json").unlink()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused = train("recipe.epochs=2")
    assert one_line(
        refused.err, f"{done.run()}/metrics.csv: No space left on device", "runtime.runs"
    )
    assert not list(done.run().glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", real)
    assert train("recipe.epochs=2").status == 0


def test_checkpoints_by_time(train, monkeypatch):
    from training.run import Run

    seen = []
    monkeypatch.setattr(Run, "save", lambda run, state: seen.append(state["progress"]["update"]))
    assert train("recipe.updates=5", "checkpoint.every_minutes=1e-9").status == 0
    assert seen == [1, 2, 3, 4, 4, 5] or seen == [1, 2, 3, 4, 5]


def reached(runs, update):
    for file in runs.glob("*/*/last.pt"):
        try:
            return torch.load(file, weights_only=True)["progress"]["update"] >= update
        except Exception:  # being replaced just now
            return False
    return False


def test_a_truncated_checkpoint(train, tmp_path):
    keys = ["batch=8", "recipe.epochs=3"]
    whole = train(*keys, runs=tmp_path / "whole").run()
    damaged = train(*keys).run()
    (damaged / "result.json").unlink()
    data = (damaged / "last.pt").read_bytes()
    (damaged / "last.pt").write_bytes(data[: len(data) // 2])
    again = train(*keys)
    assert again.status == 0, again.err
    assert f"last.pt: damaged; going on from {damaged / 'previous.pt'}" in again.out
    assert "goes on after update 34" in again.out
    assert_same_weights(whole, damaged)
    assert metrics(whole) == metrics(damaged)


def test_a_byte_that_changed_in_a_checkpoint(train, tmp_path):
    """torch.load would take it for what was saved."""
    keys = ["batch=8", "recipe.epochs=2"]
    whole = train(*keys, runs=tmp_path / "whole").run()
    folder = train(*keys).run()
    (folder / "result.json").unlink()
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    assert "last.pt: damaged; going on from" in train(*keys).out
    assert_same_weights(whole, folder)


def test_files_of_another_run_are_not_this_ones(train):
    """A copy from the folder of another seed, which has the same layers."""
    other = train("seed=1").run("bn-b32-s1")
    folder = train("seed=0").run("bn-b32-s0")
    whole = {name: (folder / name).read_bytes() for name in ("last.pt", "result.json")}
    shutil.copy(other / "result.json", folder)
    refused = train("seed=0")
    assert one_line(refused.err, f"{folder}: holds a run of another", "seed is 1 there and 0 here")
    (folder / "result.json").unlink()
    shutil.copy(other / "last.pt", folder)
    again = train("seed=0")
    assert f"{folder / 'last.pt'}: of another run; starting again" in again.out
    before, after = (
        json.loads(x) for x in (whole["result.json"], (folder / "result.json").read_bytes())
    )
    assert (before["top1"], before["test_loss"]) == (after["top1"], after["test_loss"])


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ("norm=gn", "norm.name is gn there and bn here"),
        ("recipe.lr=0.2", "lr is 0.2 there and 0.1"),
    ],
)
def test_a_result_of_another_run_is_refused(train, keys, what):
    """By the command and by the table, whatever key it differs in."""
    ours, other = (
        train("recipe.updates=1", *own).run(name)
        for own, name in ((["name=ours"], "ours"), ([keys, "name=other"], "other"))
    )
    shutil.copy(other / "result.json", ours)
    refused = train("recipe.updates=1", "name=ours")
    assert one_line(refused.err, f"{ours}: holds a run of another", "result.json: ", what)
    table = reporting.runs(ours.parent).set_index("run")
    assert table.loc["ours", "status"] == "damaged"
    assert what in table.loc["ours", "error"]


def test_values_from_outside_are_a_runs_own(train, monkeypatch):
    """An environment variable counts as its value; a time, which is never the same, as written."""
    keys = ["recipe.updates=1", 'recipe.lr="${oc.decode:${oc.env:LR}}"']
    keys.append('recipe.warmup="${oc.decode:${now:0.%f}}"')
    for lr in ("0.1", "0.2"):
        monkeypatch.setenv("LR", lr)
        done = train(*keys)
        assert done.status == 0, done.err
        assert "already" not in done.out
    assert "already, skipped" in train(*keys).out
    files = done.runs.glob("*/*/.hydra/config.yaml")
    assert sorted(OmegaConf.load(file).recipe.lr for file in files) == [0.1, 0.2]


@pytest.mark.parametrize("file", ["result.json", ".hydra/config.yaml"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_damaged_files_are_named(train, file, content):
    folder = train().run()
    (folder / file).write_text(content)
    made = train()
    assert made.status == 1
    assert one_line(made.err, f"{folder / file}: cannot be read", "overwrite=true")
    assert train("overwrite=true").status == 0


def test_a_run_stopped_before_its_result_is_not_trained_again(train):
    folder = train().run()
    (folder / "result.json").unlink()
    again = train()
    assert again.status == 0
    assert "epoch 1/1" not in again.out
    assert (folder / "result.json").exists()


def test_other_threads_are_told(train):
    folder = train().run()
    (folder / "result.json").unlink()
    again = train("runtime.threads=2")
    assert "runtime.threads=2: the checkpoint was made with 1" in again.out


# --- adding a scheme

SCHEME = '''"""Divide by the root mean square of a map."""
import torch
from torch import nn
from functools import partial
from norms.scheme import Scheme, conv

class RMS(nn.Module):
    def __init__(self, channels, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]

def scheme(batch_size=None, eps=1e-5):
    return Scheme("rms", partial(conv, nn.Conv2d), partial(RMS, eps=eps), batch_independent=True)
'''


def test_a_new_scheme_is_one_file_and_one_yaml(tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "scratch")
    shutil.copytree(ROOT, tree, ignore=ignore)
    (tree / "norms" / "rms.py").write_text(SCHEME)
    (tree / "configs" / "norm" / "rms.yaml").write_text("name: rms\neps: 1e-5\n")
    keys = ["norm=rms", "batch=8", "recipe.epochs=2", "runtime.threads=1", "norm.eps=1e-4"]
    command = [sys.executable, "train.py", "study=new", *keys]
    made = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    result = json.loads(next(tree.glob("runs/new/rms-b8-s0*/result.json")).read_text())
    assert result["norm"] == "rms"
    assert result["top1"] > 50
