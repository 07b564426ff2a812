import csv
import errno
import json
import os
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import data
import norms
from scripts import evaluate
from training import evaluate_run, process, restore
from training.files import write


@pytest.fixture
def call(monkeypatch, capfd):
    """`python scripts/evaluate.py ARGS…` in this process: exit status, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        capfd.readouterr()
        try:
            evaluate.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def evaluated(call, tmp_path):
    """What `--json` writes."""

    def run(*args):
        status, _, err = call(*args, "--json", tmp_path / "made.json")
        assert (status, err) == (0, "")
        return json.loads((tmp_path / "made.json").read_text())

    return run


def digits(root, swap=()):
    """The digits' images as files, so many of each part and class; two classes may change names."""
    (train, test), names = data.sources.digits().read(), {**{i: i for i in range(10)}, **dict(swap)}
    for part, split in (("train", train), ("test", test)):
        for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            if i < 100 or part == "test":
                folder = root / part / str(names[label])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("norm", ["bn", "mabn"])
def test_the_run_own_test_images_give_its_result(train, call, tmp_path, norm):
    run = train(f"norm={norm}", "batch=8", "runtime.eval_batch=100").run()
    result = json.loads((run / "result.json").read_text())
    files = ["--csv", tmp_path / "classes.csv", "--json", tmp_path / "all.json"]
    status, out, err = call(run, *files)
    assert (status, err) == (0, "")
    assert f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %" in out
    assert "over 359 test images of digits; top-1 as in result.json" in out
    found = json.loads((tmp_path / "all.json").read_text())
    assert (found["top1"], found["top5"]) == (result["top1"], result["top5"])
    assert found["loss"] == result["test_loss"]
    assert (found["images"], found["weights"], found["finished"]) == (359, "last", True)
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [str(i) for i in range(10)]
    assert 100 * sum(int(row["correct"]) for row in rows) / 359 == pytest.approx(result["top1"])

    model, _, _ = restore.load(run)  # and class by class, from the pixels
    pixels = result["pixels"]
    cfg = OmegaConf.load(run / ".hydra" / "config.yaml")
    _, test = data.read(data.resolve(cfg.data, 8, cfg.recipe), cfg.data)
    with torch.no_grad():
        answers = model((test.images / 255 - pixels["mean"][0]) / pixels["std"][0]).argmax(1)
    for i, row in enumerate(found["classes"]):
        mine = answers[test.labels == i]
        assert (row["images"], row["correct"]) == (len(mine), (mine == i).sum())
        assert row["top1"] == pytest.approx(100 * (mine == i).double().mean().item())
        wrong = mine[mine != i]
        expected = str(wrong.bincount().argmax().item()) if len(wrong) else None
        assert row["taken_for"] == expected
    shown = [line.split()[0] for line in out.split("\n")[3:13]]
    order = sorted(found["classes"], key=lambda row: row["top1"])
    assert shown == [row["name"] for row in order]


def test_folded_networks_are_really_folded(train, evaluated, monkeypatch):
    run = train("norm=mabn", "batch=8").run()
    plain = evaluated(run)
    folded = evaluated(run, "--folded")
    assert folded["folded"]
    assert folded["top1"] == pytest.approx(plain["top1"], abs=0.3)
    assert folded["loss"] == pytest.approx(plain["loss"], rel=1e-4)

    def broken(model, fold=norms.fold):
        folded = fold(model)
        torch.nn.init.zeros_(folded.fc.weight)
        return folded

    monkeypatch.setattr(norms, "fold", broken)
    assert evaluated(run, "--folded")["top1"] < 15
    assert evaluated(run)["top1"] == plain["top1"]


def test_a_run_that_is_not_over(train, call, evaluated, monkeypatch):
    run = train("batch=8").run()
    finished = evaluated(run)
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    found = evaluated(run)
    for key in ("top1", "top5", "loss", "classes"):
        assert found[key] == finished[key]
    assert not found["finished"]
    assert f"not over, after update {finished['update']}" in call(run)[1]

    checkpoint = torch.load(run / "last.pt", weights_only=True)
    average = {k: v.clone() for k, v in checkpoint["model"].items() if k.startswith("fc")}
    average["fc.bias"][3] = 1e6  # everything is a 3
    torch.save(checkpoint | {"ema": average}, run / "last.pt")
    (run / "result.json").write_bytes(result)
    found = evaluated(run)
    assert found["weights"] == "average"
    assert [row["top1"] for row in found["classes"]] == [100 * (i == 3) for i in range(10)]
    assert found["as_in_result"] is False
    assert "another top-1 than in result.json" in call(run)[1]
    assert evaluated(run, "--last")["top1"] == finished["top1"]


def test_other_data_has_the_pixels_of_the_runs_training(train, evaluated, call, tmp_path):
    """The same images from a folder, for a run that was trained on a part: its mean, not theirs."""
    words = ["data=folder", f"data.root={digits(tmp_path / 'a')}", "data.size=8"]
    words += [f"data.cache={tmp_path}", "recipe=digits", "model=resnet8", "data.train_fraction=0.5"]
    run = train(*words, "batch=8", quick=False, runs=tmp_path / "r").run()
    own = evaluated(run)
    assert own["as_in_result"]
    other = digits(tmp_path / "b")
    found = evaluated(run, f"data.root={other}", "data.train_fraction=1.0")
    for key in ("top1", "loss", "classes"):
        assert found[key] == (pytest.approx(own[key], rel=1e-5) if key == "loss" else own[key])
    assert (found["as_in_result"], found["root"]) == (None, str(other))
    (run / "result.json").unlink()  # from its own images now
    again = evaluated(run, "data=folder", f"data.root={other}", "data.size=8",
                      f"data.cache={tmp_path}")  # fmt: skip
    assert (again["top1"], again["loss"]) == (found["top1"], found["loss"])

    held = evaluated(run, "data.holdout=0.2")
    assert held["images"] == 20

    (other / "test" / "9").rename(other / "test" / "nine")
    (other / "train" / "9").rename(other / "train" / "nine")
    status, _, err = call(run, f"data.root={other}")
    assert (status, err.count("\n")) == (1, 1)
    assert "data=folder: class 9 is nine, the run's is 9; expected the classes of the run" in err

    (tmp_path / "a" / "test" / "9").rename(tmp_path / "a" / "test" / "X")  # before 0 now
    (tmp_path / "a" / "train" / "9").rename(tmp_path / "a" / "train" / "X")
    for more in ([], ["data.holdout=0.2"], [f"data.root={other}"]):
        status, _, err = call(run, *more)
        assert (status, err.count("\n")) == (1, 1)
        assert f"data.root={tmp_path / 'a'}: not the data of {run} any more (classes +X -9)" in err


def photographs(root):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8)
                image = Image.fromarray(pixels.numpy()).resize((40, 36))
                image.save(root / part / name / f"{i}.JPEG")
    return root


@pytest.mark.parametrize("pixels", ["standardized", "bgr_255"])
def test_photographs(train, evaluated, tmp_path, pixels):
    """Also those of a run that saw them in another order of channels, and as a folder."""
    root = photographs(tmp_path / "tree")
    words = ["data=imagenet", f"data.root={root}", "data.verify_counts=false", "data.size=32"]
    words += ["data.resize=36", "data.workers=0", "model=resnet8", "recipe=imagenet_mabn"]
    words += ["batch=4", f"recipe.pixels={pixels}", "recipe.updates=3", "recipe.lr_batch=4"]
    done = train(*words, quick=False, runs=tmp_path / "r")
    assert done.status == 0, done.err
    found = evaluated(done.run())
    assert found["as_in_result"]
    assert [(r["name"], r["images"]) for r in found["classes"]] == [
        ("n01", 2), ("n02", 2), ("n03", 2)]  # fmt: skip

    other = evaluated(done.run(), "data=folder", f"data.root={root}", "data.size=32",
                      "data.resize=36", "data.workers=0")  # fmt: skip
    assert other["loss"] == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_images_in_memory_with_the_pixels_of_another_run(reverse):
    """Formula by hand; `mean` and `std` are of the channels as the network gets them."""
    _, split = data.sources.synthetic(4, 3, 3, 6, 6).read()
    loader = data.Loader(split, split, 1, 0)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    pixels = {"mean": mean, "std": std, "reversed": reverse}
    assert evaluate_run.normalize_as(loader, pixels) is reverse
    [(images, _)] = loader.test(6)
    found = images.flip(1) if reverse else images
    raw = split.images.flip(1) if reverse else split.images
    expected = (raw / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_debug_run_is_evaluated_on_what_it_saw(train, evaluated):
    run = train("debug=overfit", "batch=8").run()
    result = json.loads((run / "result.json").read_text())
    found = evaluated(run)
    assert (found["images"], found["top1"], found["loss"]) == (
        64, result["top1"], result["test_loss"])  # fmt: skip
    assert evaluated(run, "data.train_fraction=1.0", "data.holdout=0.1")["images"] > 64


def test_the_moving_average_is_what_a_run_was_judged_by(train, evaluated):
    run = train("recipe.ema=0.9", "batch=8").run()
    found = evaluated(run)
    assert (found["weights"], found["as_in_result"]) == ("average", True)
    assert evaluated(run, "--last")["loss"] != found["loss"]


def test_files_are_written_before_anything_is_shown(train, monkeypatch, capfd, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "show", full)
    files = [tmp_path / "a.csv", tmp_path / "a.json"]
    words = [train("batch=8").run(), "--csv", files[0], "--json", files[1]]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        process.run_script(evaluate.main)
    assert capfd.readouterr().err == "error: standard output: No space left on device\n"
    assert all(file.stat().st_size for file in files)


def test_of_many_classes_the_two_ends(capsys):
    rows = [
        {"class": i, "name": f"c{i}", "images": 4, "correct": i % 5, "top1": 25.0 * (i % 5)}
        | {"taken_for": "c0" if i % 5 < 4 else None}
        for i in range(30)
    ]
    found = dict(run="r", update=9, finished=True, weights="last", folded=False, data="imagenet")
    found |= dict(root="/p", images=120, top1=50.0, top5=50.0, loss=1.0, as_in_result=None)
    found |= {"evaluation": dict(statistics="running", alpha=0.0)}
    evaluate.show(found | {"classes": rows}, evaluate.Console(width=100))
    lines = capsys.readouterr().out.split("\n")[3:-1]
    assert len(lines) == 21
    assert lines[10].split() == ["…", "10", "more"]
    assert lines[0].split() == ["c0", "4", "0.00", "c0"]
    assert lines[-1].split() == ["c29", "4", "100.00"]


def test_mistakes_get_one_line_and_leave_nothing(train, call, tmp_path):
    run = train().run()
    result = json.loads((run / "result.json").read_text())

    def refused(*args):
        status, out, err = call(*args)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not list(tmp_path.rglob("*.csv.tmp"))
        return err

    assert "not a run" in refused(tmp_path)
    assert "norm=gn: is the run's; expected data.KEY=…, evaluation.KEY=… or one of" in refused(
        run, "norm=gn"
    )
    assert "model.weights=x: is the run's" in refused(run, "model.weights=x")
    assert "data=cifar11: unknown" in refused(run, "data=cifar11")
    assert "data.rot: no such key" in refused(run, "data.rot=/tmp")
    assert "data.holdout=2: expected a number from 0 to 0.9" in refused(run, "data.holdout=2")
    assert "device=tpu: expected" in refused(run, "device=tpu")
    assert "runtime.eval_batch=0: expected a whole" in refused(run, "runtime.eval_batch=0")
    assert "1 channels" not in (err := refused(run, "data=synthetic"))
    assert "data=synthetic: 10 classes and 3 channels; expected the run's 10 and 1" in err
    assert "data.root=/nowhere: does not exist" in refused(run, "data=folder", "data.root=/nowhere")
    assert "data.root=1_0: does not exist" in refused(run, "data=folder", "data.root=1_0")
    assert "its folder does not exist" in refused(run, "--csv", tmp_path / "no" / "c.csv")
    other = train("seed=1").run("bn-b32-s1")
    for file in ("result.json", "last.pt"):
        ours = (run / file).read_bytes()
        shutil.copy(other / file, run)
        assert f"{run / file}: of another run (seed is 1 there and 0 here" in refused(run)
        (run / file).write_bytes(ours)
    write(run / "result.json", json.dumps(result | {"status": "diverged"}))
    assert "diverged" in refused(run)
    write(run / "result.json", json.dumps(result))
    (run / "last.pt").unlink()
    assert "last.pt: cannot be read" in refused(run)
