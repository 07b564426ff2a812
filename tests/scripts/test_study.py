"""scripts/study.py, and what it knows: the runs that commands ask for, and their states."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from scripts.study import asked, board, duration, summary
from training.process import run_script
from training.study import COMMANDS, State, cells, jobs, requested, state

ROOT = Path(__file__).parent.parent.parent


def screen(study, height=None):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(board(study, *asked(study), height)[0])
    return [line.rstrip() for line in capture.get().splitlines()]


def test_cells_are_what_a_sweep_makes(train):
    swept = ["norm=bn,gn", "batch=8", "seed=0,1", "recipe.lr=0.1,0.2", "recipe.updates=1"]
    done = train("-m", *swept)
    assert done.status == 0, done.err
    study = done.runs / "digits-resnet8-direct"
    line = (study / COMMANDS).read_text()
    assert line.count("\n") == 1
    expected = [cell.folder for cell in cells(jobs(line.split()))]
    assert len(expected) == len(set(expected)) == 8
    assert sorted(expected) == sorted(x for x in study.iterdir() if x.is_dir())
    shown, _ = asked(study)
    assert list(shown) == expected
    assert set(shown.values()) == {"recipe.lr=0.1", "recipe.lr=0.2"}
    train("-m", *swept)
    assert (study / COMMANDS).read_text() == line


def test_the_sweep_of_an_experiment_counts():
    assert len(jobs(["experiment=quickstart"])) == 24
    found = cells(jobs(["experiment=quickstart", "norm=gn", "hydra/launcher=pool"]))
    assert [c.folder.name for c in found] == ["gn-b1-s0", "gn-b2-s0", "gn-b8-s0", "gn-b32-s0"]
    assert {c.cfg.protocol.sgd_batch for c in found} == {32}


def test_every_state(train):
    done = train("-m", "norm=bn,gn,ln,in,frn,none", "batch=4", "recipe.updates=2")
    study = done.runs / "digits-resnet8-direct"
    runs = {x.name.split("-")[0]: x for x in study.iterdir() if x.is_dir()}
    told = json.dumps({"update": 30, "updates": 90, "seconds": 10.0, "pid": 1})
    for norm in ("gn", "ln", "in"):
        (runs[norm] / "result.json").unlink()
    (runs["gn"] / "progress.json").write_text(told)
    (runs["in"] / "error.txt").write_text("out of memory\n")
    result = json.loads((runs["none"] / "result.json").read_text())
    (runs["none"] / "result.json").write_text(
        json.dumps(result | {"status": "diverged", "top1": None})
    )
    for file in sorted(runs["frn"].rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    runs["frn"].rmdir()
    with FileLock(runs["gn"] / ".lock"):
        lines = screen(study)
        assert state(runs["gn"]) == State("running", 30, 90, 10.0)
        assert "4 lines left out" in screen(study, height=2)
    assert (
        "6 runs: 1 failed, 1 diverged, 1 running, 1 interrupted, 1 waiting, 1 finished" in lines[0]
    )
    assert "about" in lines[0]
    found = {line.split("-")[0]: line.split()[1:] for line in lines[2:]}
    assert found["bn"][:2] == ["finished", "top-1"]
    assert found["gn"] == ["running", "30/90", "0:20"]
    assert found["ln"] == ["interrupted"]
    assert found["in"] == ["failed", "out", "of", "memory"]
    assert found["none"] == ["diverged"]
    assert found["frn"] == ["waiting"]
    assert state(runs["gn"]).name == "interrupted"  # the lock was all that made it run


def test_a_failure_is_kept_until_the_run_is_tried_again(train):
    failing = ["-m", "norm=bn", "batch=4,9999"]
    done = train(*failing)
    assert done.status == 1
    study = done.runs / "digits-resnet8-direct"
    assert f"python scripts/study.py {study} shows all" in done.err
    reasons = list(study.glob("bn-b9999-*/error.txt"))
    assert len(reasons) == 1
    assert (
        reasons[0].read_text().startswith("protocol.sgd_batch=9999 (of batch and protocol): larger")
    )
    assert len(reasons[0].read_text().splitlines()) == 1
    (folder,) = study.glob("bn-b4-*")
    (folder / "result.json").unlink()
    (folder / "error.txt").write_text("before\n")
    (folder / "last.pt.0a1b2c3d.tmp").write_text("of an attempt that was killed")
    train(*failing)
    assert not list(folder.glob("*.tmp"))
    assert not (folder / "error.txt").exists()
    assert not (folder / "progress.json").exists()


def test_a_mistake_in_a_single_run_leaves_no_folder(train):
    done = train("batch=9999")
    assert done.status == 1
    assert not done.runs.exists()


def test_a_run_that_another_process_trains_is_not_a_failure_of_a_sweep(train):
    done = train("-m", "batch=4,8")
    (folder,) = done.runs.glob("*/bn-b4-*")
    (folder / "result.json").unlink()
    with FileLock(folder / ".lock"):
        swept = train("-m", "batch=4,8")
    assert swept.status == 0, swept.err
    assert "another process is training this run, skipped" in swept.out
    assert not (folder / "error.txt").exists()
    assert not (folder / "result.json").exists()


def test_commands_that_are_noted_at_once_are_all_kept(tmp_path):
    code = (
        "import sys; from training.study import record\n"
        "study = ['study=s', f'runtime.runs={sys.argv[2]}']\n"
        "for i in range(4): record([f'seed={sys.argv[1]}{i}', *study])"
    )
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen([*command, str(i), str(tmp_path)], cwd=ROOT) for i in range(1, 5)]
    assert [writer.wait() for writer in writers] == [0] * 4
    lines = (tmp_path / "s" / COMMANDS).read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(
        f"seed={i}{j}" for i in range(1, 5) for j in range(4)
    )


def test_a_renamed_study_and_a_command_of_the_past(train):
    done = train("-m", "norm=gn", "batch=4,8", "recipe.updates=1", "study=before")
    study = (done.runs / "before").rename(done.runs / "after")
    with open(study / COMMANDS, "a") as file:
        file.write("norm=gone seed=0\nnorm='\n")
    runs, problems = requested(study)
    assert sorted(run.folder for run in runs) == sorted(study.glob("gn-*"))
    assert [problem.split(": ")[1:3] for problem in problems] == [
        ["norm=gone seed=0", "norm=gone"],
        ["norm='", "No closing quotation"],
    ]
    lines = screen(study)
    assert "2 runs: 2 finished" in lines[0]
    assert sum("its runs are shown once they have begun" in line for line in lines) == 2


def test_two_processes_that_meet_on_one_run(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "-m", "recipe.epochs=3", "batch=4"]
    command += ["data.train_fraction=0.1", f"runtime.runs={tmp_path}", "runtime.threads=1"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    together = "".join(out for out, _ in said)
    assert together.count("epoch 3/3") == 1
    assert together.count("skipped") == 1
    assert len(list(tmp_path.glob("*/*/events.out.tfevents.*"))) == 1


RESULT = {
    **{"status": "finished", "top1": 90.0, "top5": 99.0, "best_top1": 90.0, "norm": "bn"},
    **{"batch_size": 2, "sgd_batch_size": 2, "protocol": "direct", "model": "resnet8"},
    **{"data": "digits", "recipe": "digits", "seed": 0, "epochs": 1.0, "updates": 9},
    **{"parameters": 10, "images_per_second": 1.0, "wall_seconds": 1.0, "threads": 1},
    **{"peak_memory_bytes": None, "device": "cpu", "versions": {}},
}


def finished(folder, **result):
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "result.json").write_text(json.dumps(RESULT | result))


def test_one_damaged_file_does_not_hide_the_other_runs(tmp_path):
    finished(tmp_path / "bn-b2-s0")
    finished(tmp_path / "bn-b4-s0", status="diverged", top1=None, diverged_at_update=7)
    finished(tmp_path / "bn-b8-s0")
    (tmp_path / "bn-b8-s0" / "result.json").write_text("{")
    head, _, *lines = screen(tmp_path)
    assert "3 runs: 1 damaged, 1 diverged, 1 finished" in head
    assert lines[0].endswith("top-1 90.00 %")
    assert lines[1].endswith("at update 7")
    assert "result.json: cannot be read" in lines[2]


def test_what_a_run_says_of_its_progress_need_not_be_right(tmp_path):
    for i, told in enumerate(["{", "[]", '{"update": "1", "updates": 2, "seconds": 3}', "{}"]):
        folder = tmp_path / f"gn-b2-s{i}"
        (folder / ".hydra").mkdir(parents=True)
        (folder / "progress.json").write_text(told)
        assert state(folder) == State("interrupted")


def test_a_study_that_was_renamed_or_copied_knows_its_runs(train):
    swept = ["-m", "norm=gn", "batch=8", "seed=0,1", "recipe.updates=1", "study=before"]
    study = train(*swept).runs / "before"
    moved = study.with_name("after")
    shutil.copytree(study, moved)
    shutil.rmtree(sorted(moved.glob("gn-*"))[1])  # as if it had still to be trained
    assert "2 runs: 1 waiting, 1 finished" in screen(moved)[0]
    for part in ("*.pt", "events*", ".lock", "log.txt"):  # what is left of it in a repository
        for file in moved.glob(f"*/{part}"):
            file.unlink()
    (moved / COMMANDS).unlink()
    assert "1 runs: 1 finished" in screen(moved)[0]


def test_a_command_that_no_longer_composes_hides_no_run(train, tmp_path):
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "mine.yaml").write_text("name: gn\ngroups: 8\nmin_channels: 1\n")
    swept = ["-m", "norm=mine,bn", "recipe.updates=1", "study=a"]
    done = train(f"--config-dir={tmp_path}", *swept)
    assert done.status == 0, done.err
    study = done.runs / "a"
    (study / COMMANDS).write_text("norm=mine,bn study=a\nnorm=bn study=a 'seed=\n")
    head, *lines = screen(study)
    assert "2 runs: 2 finished" in head
    assert any("commands.txt: norm=mine,bn study=a: norm=mine: unknown" in line for line in lines)
    failing = train(*swept, "batch=9999", f"hydra.searchpath=[file://{tmp_path}]")
    assert failing.status != 0
    assert "study.py  shows" not in failing.err


def test_a_narrow_board_keeps_the_state_and_some_of_the_rest(tmp_path):
    name = "gn-b32-s0-0123ab"
    finished(tmp_path / name)
    runs = {tmp_path / name: "norm.groups=4 recipe.milestones=[a,b] recipe.lr=0.1"}

    def shown(height):
        console = Console(width=60)
        with console.capture() as capture:
            console.print(board(tmp_path, runs, (), height)[0])
        found = capture.get()
        return found[found.index("gn-b32") :].splitlines()

    (cut,) = shown(height=10)
    first, *_, last = shown(height=None)
    for line in (cut, first):
        assert name in line
        assert "finished" in line
        assert "top-1 90.00 %" in line
    assert "…" in cut
    assert "lr=0.1" in last
    assert "[a,b]" in "".join(line.split()[0] for line in shown(height=None))


def test_the_board_need_not_wait_for_torch(tmp_path):
    (tmp_path / "digits-resnet8-direct").mkdir()
    (tmp_path / "digits-resnet8-direct" / COMMANDS).write_text("norm=gn batch=2,4\n")
    code = (
        "import sys; sys.argv[1:] = ['digits-resnet8-direct'];"
        f"sys.path.insert(0, {str(ROOT)!r});"
        "from scripts.study import main; main(); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert shown.returncode == 0, shown.stderr


def test_texts():
    assert [duration(x) for x in (None, 5, 65, 3725)] == ["", "0:05", "1:05", "1 h 02 min"]
    states = [State("finished", 9, 9, 60.0), State("running", 5, 10, 30.0), State("waiting")]
    assert summary(states) == (
        "3 runs: 1 running, 1 waiting, 1 finished; about 1:30 left with 1 at a time"
    )


def test_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "study.py")]
    environment = os.environ | {"COLUMNS": "100"}
    nothing = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert nothing.returncode == 1
    assert nothing.stderr == (
        f"error: {tmp_path}: no study; expected a folder such as runs/quickstart\n"
    )
    (tmp_path / COMMANDS).write_text("norm=gn batch=2,4\n")
    study = tmp_path.with_name("digits-resnet8-direct")
    tmp_path.rename(study)
    shown = subprocess.run([*command, str(study)], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "2 runs: 2 waiting" in shown.stdout
    (study / COMMANDS).write_text("norm=gnn batch=2,4\n")
    wrong = subprocess.run([*command, str(study)], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "norm=gnn: unknown (did you mean gn" in wrong.stderr


@pytest.mark.parametrize("name", ["finished", "diverged"])
def test_watching_ends_when_all_is_over(tmp_path, name):
    study = tmp_path / "study"
    finished(study / "gn-b2-s0", status=name)
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), str(study), "--watch"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0, shown.stderr
    assert f"1 runs: 1 {name}" in shown.stdout


def test_control_c_ends_a_script_in_a_line(capsys):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_script(stopped)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
