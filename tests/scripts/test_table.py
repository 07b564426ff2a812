import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from scripts.figure import spread_out
from scripts.table import groups, markdown, read, show, tabulate

ROOT = Path(__file__).parent.parent.parent


def put(study, norm, batch, seed, top1=None, status="finished", free=False, sgd=32, **config):
    """A run's folder as `train.py` leaves it; unfinished without a `top1`, unless diverged."""
    folder = study / f"{norm}-b{batch}-s{seed}{'-x' if config else ''}"
    (folder / ".hydra").mkdir(parents=True)
    cfg = {
        "batch": batch,
        "seed": seed,
        "study": study.name,
        "norm": {"name": norm, "eps": 1e-5},
        "recipe": {"lr": 0.1},
        "protocol": {"sgd_batch": sgd},
        "runtime": {"threads": seed},
    }
    for key, value in config.items():
        OmegaConf.update(cfg := OmegaConf.create(cfg), key.replace("__", "."), value)
    OmegaConf.save(OmegaConf.create(cfg), folder / ".hydra" / "config.yaml")
    hydra = {"hydra": {"runtime": {"choices": {"norm": norm}}}}
    OmegaConf.save(OmegaConf.create(hydra), folder / ".hydra" / "hydra.yaml")
    if top1 is None and status == "finished":
        return
    result = {
        "status": status,
        "top1": top1,
        "best_top1": top1,
        "batch_free": free,
        "sgd_batch": sgd or batch,
        "data": "digits",
        "model": "resnet8",
        "recipe": "digits",
        "epochs": 2.0,
        "protocol": "ghost" if sgd else "direct",
        "wall_seconds": 60.0,
    }
    (folder / "result.json").write_text(json.dumps(result))


def cells(study, metric="top1"):
    table = tabulate(read(study), metric)
    return {s: {b: c.text() for b, c in row.items()} for s, row in table.items()}


@pytest.fixture
def study(tmp_path):
    return tmp_path / "study"


def test_mean_deviation_and_number_of_seeds(study):
    for seed, top1 in enumerate((90.0, 91.0, 92.0)):
        put(study, "bn", 2, seed, top1)
    put(study, "bn", 8, 0, 95.0)
    assert cells(study) == {"bn": {2: "91.00 ± 1.00 (3)", 8: "95.00 (1)"}}


def test_diverged_unfinished_and_missing_cells_are_visible(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 1, status="diverged")
    put(study, "bn", 8, 0)
    put(study, "mabn", 2, 0, 80.0)
    assert cells(study) == {
        "bn": {2: "90.00 (1), 1 diverged", 8: "1 unfinished"},
        "mabn": {2: "80.00 (1)", 8: "missing"},
    }


def test_one_run_fills_the_row_of_a_batch_free_scheme(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 8, 0, 95.0)
    put(study, "gn", 8, 0, 93.0, free=True)
    assert cells(study)["gn"] == {2: "93.00† (1)", 8: "93.00 (1)"}


def test_but_not_where_the_sgd_batch_follows_the_batch(study):
    put(study, "bn", 2, 0, 90.0, sgd=None)
    put(study, "gn", 8, 0, 93.0, free=True, sgd=None)
    assert cells(study)["gn"] == {2: "missing", 8: "93.00 (1)"}


def test_runs_that_differ_in_more_are_not_mixed(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 1, 80.0, recipe__lr=0.3)
    with pytest.raises(ValueError, match=r"differ in recipe.lr \(.*--split recipe.lr"):
        groups(read(study), [])
    parts = groups(read(study), ["recipe.lr"])
    assert {k: len(v) for k, v in parts.items()} == {"recipe.lr=0.1": 1, "recipe.lr=0.3": 1}


def test_options_of_a_scheme_are_not_mixed_either_but_differ_between_schemes(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "gn", 2, 0, 90.0, norm__groups=32)
    groups(read(study), [])
    put(study, "gn", 8, 0, 90.0, norm__groups=8)
    with pytest.raises(ValueError, match=r"differ in norm.groups"):
        groups(read(study), [])


def test_unknown_key_and_metric(study):
    put(study, "bn", 2, 0, 90.0)
    with pytest.raises(ValueError, match=r"--split recipe.momentum: no run has this key"):
        groups(read(study), ["recipe.momentum"])
    with pytest.raises(ValueError, match="--metric top7: bn-b2-s0 has no such number"):
        tabulate(read(study), "top7")
    with pytest.raises(ValueError, match="no runs in it"):
        read(study / "nowhere")


def test_files_and_screen(study, capsys):
    put(study, "gn", 2, 0, 93.0, free=True)
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 8, 0, 95.5)
    show(study, "top1", [])
    screen = capsys.readouterr().out
    text = (study / "table.md").read_text()
    assert markdown(tabulate(read(study), "top1")) in text
    assert "| bn | 90.00 (1) | 95.50 (1) |" in text
    for told in ("top-1 accuracy", "SGD batch 32", "protocol ghost", "† not run", "2 epochs"):
        assert told in text
        assert told in screen
    assert "3.0 minutes of training" in screen
    with open(study / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["scheme"], r["batch_size"], r["mean"], r["n"], r["filled"]) for r in rows] == [
        ("bn", "2", "90.0", "1", "False"),
        ("bn", "8", "95.5", "1", "False"),
        ("gn", "2", "93.0", "1", "False"),
        ("gn", "8", "93.0", "1", "True"),
    ]
    png = (study / "accuracy_vs_batch.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_a_table_for_each_value(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 1, 80.0, recipe__lr=0.3)
    show(study, "top1", ["recipe.lr"])
    text = (study / "table.md").read_text()
    assert text.count("| scheme") == 2
    assert (study / "accuracy_vs_batch_recipe.lr_0.3.png").exists()


def test_a_study_without_a_single_result(study):
    put(study, "bn", 2, 0)
    show(study, "top1", [])
    assert "1 unfinished" in (study / "table.md").read_text()


def test_command_line(study):
    command = [sys.executable, str(ROOT / "scripts" / "table.py"), str(study)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 1
    assert made.stderr.startswith(f"error: {study}: no runs in it")
    assert len(made.stderr.splitlines()) == 1


def test_labels_do_not_overlap():
    heights = spread_out([50.0, 50.1, 49.9, 80.0], 2.0)
    assert sorted(heights)[1] - sorted(heights)[0] >= 1.99
    assert heights[2] < heights[0] < heights[1] < heights[3] == 80.0
