"""scripts/plan.py: arithmetic that can be checked, memory against what is really kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import models
import norms
from scripts.plan import GIB, main, show
from training.cost import makespan, memory, rows
from training.study import cells, jobs

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def plan(*overrides, speed=1000.0, limit=64 * GIB):
    return rows(cells(jobs(list(overrides))), speed, CPU, limit)


def told(made, gpus=(1, 8), limit=64 * GIB):
    console = Console(width=160)
    with console.capture() as capture:
        show(made, list(gpus), limit, "a device", console)
    return capture.get()


def test_epochs_updates_and_hours():
    made = plan("data=cifar10", "protocol=ghost", "norm=bn,gn", "batch=2,32", "seed=0,1,2")
    assert [(r.scheme, r.plan.batch, r.runs, r.left) for r in made] == [
        ("bn", 2, 3, 3), ("bn", 32, 3, 3), ("gn", 2, 3, 3), ("gn", 32, 3, 3)
    ]  # fmt: skip
    assert all((r.epochs, r.updates) == (30, 30 * 390) for r in made)
    assert all(r.seconds == 0.128 for r in made)
    # 11,700 updates of 0.128 s, and 30 evaluations of 10,000 images at a third of the time
    assert made[0].hours == pytest.approx((11700 * 0.128 + 30 * 10_000 / 3 / 1000) / 3600)
    text = told(made)
    assert "12 runs, 5.3 h in all, 26.6 min the longest: 1 device 5.3 h, 8 devices 53.3 min" in text
    assert "gn: without batch statistics" in text
    assert "warning" not in text


def test_what_passes_beside_the_updates_counts():
    """Images for precise statistics, at most an epoch's, and a second pass of each batch."""
    plain, precise, frozen, twice = (
        plan("data=cifar10", "batch=100", "recipe.epochs=2", *more)[0]
        for more in (
            ["norm=bn"],
            ["norm=bn", "evaluation.statistics=precise"],
            ["norm=bn", "evaluation.statistics=precise", "recipe.freeze_statistics=1"],
            ["norm=mbn"],
        )
    )
    assert plain.forward_images == 20_000
    assert precise.forward_images == 40_000
    assert frozen.forward_images == 30_000
    assert plain.hours == pytest.approx((100_000 + 20_000 / 3) / 1000 / 3600)
    assert twice.hours - plain.hours == pytest.approx(100_000 / 3 / 1000 / 3600)


def test_options_of_your_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "mine.yaml").write_text("name: gn\ngroups: 4\nchannels_per_group: null\n")
    words = [f"--config-dir={tmp_path}", "norm=mine", f"runtime.runs={tmp_path}", "--speed", "9"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    main()
    assert "mine" in capsys.readouterr().out


def test_imagenet_need_not_be_there():
    (row,) = plan(
        "data=imagenet", "norm=bn", "batch=32", "protocol=ghost", "protocol.sgd_batch=256"
    )
    assert (row.updates, row.epochs) == (100 * 5004, 100)
    assert 15 * GIB < row.memory < 30 * GIB
    text = told([row], limit=16 * GIB)
    assert "warning: bn at batch 32 needs about" in text
    assert "the device has 16.0 GiB; protocol.micro_batch=32 needs less" in text


def test_only_the_same_computation_is_called_so():
    overrides = ["experiment=gn_imagenet", "model=resnet18", "norm=gn", "batch=2,4"]
    assert "without batch statistics" not in told(plan(*overrides))  # the SGD batch is 8 x batch
    fixed = told(plan(*overrides, "protocol.sgd_batch=32"))
    assert "gn: without batch statistics, the same computation" in fixed


def test_what_is_swept_else_is_named_and_durations_in_updates_count():
    made = plan("recipe.lr=0.1,0.2", "recipe.updates=100", "batch=32", "data.holdout=0.5")
    assert [r.scheme for r in made] == ["bn recipe.lr=0.1", "bn recipe.lr=0.2"]
    assert [r.updates for r in made] == [100, 100]


@pytest.mark.parametrize("norm", ["bn", "gn", "mabn", "pws", "bcn", "ws_gn"])
def test_memory_is_what_a_training_step_keeps(norm):
    scheme = norms.build(norm, batch_size=2)
    with torch.device("meta"):
        model = models.build("resnet8", scheme=scheme, num_classes=10)
    counted = memory(model, (8, 3, 32, 32), half=False)
    model = models.build("resnet8", scheme=scheme, num_classes=10).train()
    kept = {}
    alive = []

    def keep(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.randn(8, 3, 32, 32))
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert counted == pytest.approx(sum(kept.values()) + 3 * weights, rel=0.02)


def test_finished_runs_are_not_paid_for_and_tell_the_speed(train):
    done = train("-m", "norm=bn", "batch=4", "seed=0,1", "recipe.updates=2")
    line = (done.runs / "digits-resnet8-direct" / "commands.txt").read_text().split()
    for file in done.runs.glob("*/*-s1-*/result.json"):
        file.unlink()
    (file,) = done.runs.glob("*/*-s0-*/result.json")
    speed = json.loads(file.read_text())["images_per_second"]
    (row,) = plan(*line, speed=None)
    assert (row.runs, row.left, row.source) == (2, 1, "1 finished")
    assert row.seconds == pytest.approx(4 / speed)


def test_measured_here():
    (row,) = plan("batch=4", "recipe.updates=5", speed=None)
    assert row.source == "measured"
    assert 0 < row.seconds < 60
    (row,) = plan("batch=4", "recipe.updates=5", speed=None, limit=1000)
    assert (row.source, row.hours) == ("does not fit", 0)
    assert "does not fit" in told([row], limit=1000)


def test_makespan():
    assert makespan([3, 2, 2], 1) == 7
    assert makespan([3, 2, 2], 2) == 4
    assert makespan([3, 2, 2], 64) == 3


def test_command_line(tmp_path, monkeypatch, capsys):
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), f"runtime.runs={tmp_path}"]
    shown = subprocess.run(
        [*command, "experiment=quickstart", "--speed", "500", "--gpus", "1,2"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "24 runs" in shown.stdout
    assert "2 devices" in shown.stdout
    for wrong, why in (
        (["nrom=gn"], "error: nrom: no such key"),
        (["batch=0"], "error: batch=0"),
        (["--speed", "0"], "--speed 0: expected a number above 0"),
        (["--memory=-1"], "--memory -1: expected a number above 0"),
        (["--gpus", "two"], "--gpus two: expected whole numbers from 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["plan.py", *wrong])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (1, 2)
        assert why in capsys.readouterr().err
