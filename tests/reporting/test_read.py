"""reporting.runs and reporting.history, whatever the files of the runs are like."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reporting
from reporting.output import show
from reporting.table import Options
from tests.processes import Forked
from tests.reporting.studies import put, squeezed
from training.files import RESULT, read_result, write

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def study(tmp_path):
    study = tmp_path / "study"
    for seed in (0, 1):
        put(study, "bn", 2, seed, 90.0 + seed, curve=[50.0])
        put(study, "gn", 32, seed, 93.0 + seed, free=True, recipe__lr=0.3)
    return study


def change(folder, *gone, **result):
    """result.json with other values, and without some keys."""
    file = folder / "result.json"
    content = json.loads(file.read_text()) | result
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in gone}))


def test_a_run_of_the_command_line_is_a_row_with_all_its_keys(train):
    done = train(
        "-m", "norm=bn,gn", "batch=8", "protocol=ghost", "protocol.sgd_batch=16", "study=a"
    )
    study = done.runs / "a"
    runs = reporting.runs(study)
    assert list(runs["norm"]) == ["bn", "gn"]
    for _, run in runs.iterrows():
        result = json.loads((study / run["run"] / "result.json").read_text())
        assert set(RESULT) - {"versions"} <= set(runs)
        for key in set(RESULT) - {"versions", "peak_memory_bytes"}:
            assert run[key] == result[key], key
        assert run["versions.torch"] == result["versions"]["torch"]
        assert (run["recipe.lr"], run["protocol.micro_batch"]) == (
            0.1,
            16,
        )  # interpolations followed
        assert (run["status"], run["study"]) == ("finished", study.name)
    history = reporting.history(study)
    assert list(history["run"]) == list(runs["run"])  # an epoch each
    assert list(history["test_top1"]) == list(runs["top1"])


def test_kinds_of_numbers(study):
    put(study, "mabn", 2, 0)  # not finished, so it has no result
    runs = reporting.runs(study).set_index("norm")
    assert runs["batch_size"].dtype == "int64"
    assert runs["updates"].dtype == "Int64"
    assert runs["top1"].dtype == "float64"
    assert math.isnan(runs.loc["mabn", "top1"])
    assert runs.loc["mabn", "status"] == "unfinished"
    assert runs.loc["mabn", "sgd_batch_size"] == 32
    history = reporting.history(study)
    assert len(history) == 2 * 2 + 2
    assert history["epoch"].dtype == "int64"
    assert set(history["seed"]) == {0, 1}


def test_nothing_but_the_files_of_a_run_is_needed(study, tmp_path):
    """In a repository: `.hydra`, result.json and metrics.csv, in a folder of any name."""
    moved = tmp_path / "results" / "runs"
    shutil.copytree(study, moved)
    before, after = reporting.runs(study), reporting.runs(moved)
    assert before.drop(columns="folder").equals(after.drop(columns="folder"))
    shown = show([moved], Options(split=["recipe.lr"]))
    assert shown.markdown.startswith("study (recipe.lr=0.1): top-1 accuracy")


def test_results_of_an_older_version(study):
    one, *_ = study.glob("bn-b2-s0")
    change(one, "sgd_batch_size", "batch_independent", sgd_batch=32, batch_free=False)
    assert (reporting.runs(study)["status"] == "finished").all()
    assert read_result(one)["sgd_batch_size"] == 32


DAMAGE = {
    "result.json": ["", "{", "[]", "null", '{"status": "finished"}', '{"status": "done"}', "\0"],
    "metrics.csv": [
        "",
        "epoch,update\n1,",
        "epoch,update,test_top1\n1,40,ninety\n",
        "epoch,update,test_top1\n1,40,nan\n2,80,90.0\n",
        "epoch,update,test_top1\n1,40,50.0\n",  # an epoch is gone
        "epoch,update,test_top1\n1,40\n",
        "test_top1\n90.0\n",
    ],
    ".hydra/config.yaml": ["", "[", "a", "batch: two\nseed: 0\nnorm: {}\nprotocol: {}", "\0"],
    ".hydra/hydra.yaml": ["", "hydra: 1", "hydra: {runtime: {choices: {}}}"],
}


@pytest.mark.parametrize(("name", "content"), [(k, x) for k, v in DAMAGE.items() for x in v])
def test_a_damaged_file_is_named_and_hides_no_other_run(study, name, content):
    file = study / "bn-b2-s0" / name
    file.write_text(content)
    runs = reporting.runs(study).set_index("run")
    assert runs.loc["bn-b2-s0", "status"] == "damaged"
    assert f"{file}: cannot be read (" in runs.loc["bn-b2-s0", "error"]
    assert (runs.drop("bn-b2-s0")["status"] == "finished").all()
    text = squeezed(show([study], Options(split=["recipe.lr"])).markdown)
    assert "bn-b2-s0 damaged: " in text
    assert "cannot be read" in text
    if ".hydra" not in name:
        assert "| bn | 91.00 (1), 1 damaged |" in text
    assert "| gn | 93.50 ± 0.71 (2) |" in text


@pytest.mark.parametrize("key", RESULT)
def test_a_key_that_is_gone_or_of_another_type(study, key):
    one = study / "bn-b2-s0"
    before = (one / "result.json").read_text()
    change(one, key)
    assert "damaged" in set(reporting.runs(study)["status"]), key
    (one / "result.json").write_text(before)
    change(one, **{key: [1]})
    runs = reporting.runs(study).set_index("run")
    assert f"{key} is [1]; expected " in runs.loc["bn-b2-s0", "error"]


def test_files_of_another_run(study):
    """Copied into a folder, or what an editor made of one of two files."""
    shutil.copy(study / "bn-b2-s1" / "result.json", study / "bn-b2-s0")
    shutil.copy(study / "bn-b2-s0" / "metrics.csv", study / "bn-b2-s1")
    runs = reporting.runs(study).set_index("run")
    assert "seed is 1 there and 0 here" in runs.loc["bn-b2-s0", "error"]
    told = "metrics.csv: cannot be read (it ends with test_top1 90.0, result.json says 91.0)"
    assert told in runs.loc["bn-b2-s1", "error"]


def test_no_number(study):
    file = study / "bn-b2-s0" / "result.json"
    file.write_text(file.read_text().replace('"top1": 90.0', '"top1": NaN'))
    error = reporting.runs(study).set_index("run").loc["bn-b2-s0", "error"]
    assert f"{file}: cannot be read (NaN is no JSON)" in error
    change(study / "bn-b2-s1", top1=191.0)
    error = reporting.runs(study).set_index("run").loc["bn-b2-s1", "error"]
    assert "top1 is 191.0; expected 0 to 100" in error
    for options in (Options(metric="top1"), Options(baseline="gn"), Options(errors=True)):
        options.split = ["recipe.lr"]
        if not options.baseline:
            assert "2 damaged" in show([study], options).markdown


def test_a_table_where_every_run_is_damaged(study):
    for folder in study.iterdir():
        (folder / ".hydra" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no run that could stand in a table \(bn-b2-s0 damaged"):
        show([study])
    assert (reporting.runs(study)["status"] == "damaged").all()
    assert reporting.history(study).empty


def test_files_are_whole_and_leave_nothing_behind(tmp_path, monkeypatch):
    file = tmp_path / "table.md"
    write(file, "before")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write(file, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
    assert file.read_text() == "before"


def test_several_tables_of_one_study_at_once(study, drawn_figures):
    script = ROOT / "scripts" / "table.py"
    several = [Forked([str(study), "--split", "recipe.lr"], script) for _ in range(3)]
    assert [process.communicate()[1] for process in several] == [""] * 3
    assert (study / "table.md").read_text().count("| scheme") == 2
    assert not list(study.glob("*.tmp"))
    events = list((study / "table").glob("*.table"))
    assert len(events) == 1


def test_no_torch_and_no_training_loop():
    code = (
        "import sys; import reporting.output; "
        "assert not {'torch', 'training.loop', 'training.run'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("field", "what"),
    [({"classes": True}, "classes is True; expected int"), ({"threads": -1}, "threads is -1; exp")],
)
def test_every_field_of_a_result_is_checked(study, field, what):
    file = study / "bn-b2-s0" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    runs = reporting.runs(study).set_index("run")
    assert what in runs.loc["bn-b2-s0", "error"]
