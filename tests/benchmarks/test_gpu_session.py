"""scripts/gpu_session.sh, rehearsed on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, study
from training.study import cells, jobs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def session(tmp_path, monkeypatch, capfd):
    """`python3 -m benchmarks.gpu PART --tiny …` in this process: what it printed, PART.json."""

    def run(part, *args, seconds=500.0, out=tmp_path / "out"):
        own = [f"--out={out}", f"--runs={tmp_path / 'runs'}", "--tiny", f"--seconds={seconds}"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", part, *own, *args])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored after the test
        capfd.readouterr()
        gpu.main()
        said = capfd.readouterr().out
        return said, json.loads((out / f"{part}.json").read_text())

    return run


def failed(result):
    return {key: cell["error"] for key, cell in result["cells"].items() if "error" in cell}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of workers that end with a test
def test_every_part_measures_and_goes_on(session, monkeypatch):
    counts = {"step": 1, "layers": 7, "together": 2, "pipeline": 3}
    monkeypatch.setattr("benchmarks.step.SCHEMES", ("mabn",))
    for part, count in counts.items():
        said, result = session(part)
        assert failed(result) == {}
        assert len(result["cells"]) == count
        assert f"{count}/{count} " in said
        assert result["sessions"][0]["environment"]["torch"]
        again, second = session(part)
        assert f"{count} of {count} cells are there already" in again
        assert second["cells"] == result["cells"]
        assert len(second["sessions"]) == 2
        assert second["sessions"][1]["command"].endswith("--tiny --seconds=500.0")
        if part == "step":
            said_of_step, steps = said, result["cells"]
    rows = steps["resnet8 batch 2 mabn"]["variants"]
    assert set(rows) == {"timm", "eager", "captured"}
    assert rows["captured"] == {"left_out": "a rehearsal: no GPU"}
    assert "resnet8 batch 2 mabn: timm " in said_of_step
    assert re.search(r"images/s, eager \d\.\d\d of it", said_of_step)
    assert rows["timm"]["speed"] == 1
    assert all(rows[name]["images_per_second"] > 0 for name in ("timm", "eager"))


MADE_UP = """
import pytest

TWICE = pytest.mark.parametrize("n", [1, 2])

@TWICE
def test_pws_a(n):
    assert n

@TWICE
def test_pws_b(n):
    n == 1 or pytest.skip("no GPU")

def test_pws_c():
    assert "pws" == "bn"
"""


def test_right_counts_what_is_skipped(session, monkeypatch, tmp_path):
    tests = tmp_path / "test_made_up.py"
    tests.write_text(MADE_UP)
    monkeypatch.setattr("benchmarks.right.TESTS", tests)
    said, result = session("right")
    assert "3 passed, 1 skipped, 1 failed" in said
    assert "skipped 1: no GPU" in said
    assert failed(result) == {"test_pws_c": "1 tests failed: test_pws_c"}
    assert "AssertionError" in result["cells"]["test_pws_c"]["failures"]["test_pws_c"]
    again, result = session("right")
    assert "2 of 3 cells are there already" in again
    assert list(failed(result)) == ["test_pws_c"]


def test_table_trains_and_draws(session, tmp_path):
    said, result = session("table")
    assert failed(result) == {}
    runs = result["runs"]
    assert [run["status"] for run in runs.values()] == ["finished"] * 2
    assert all(len(run["test_top1"]) == 1 for run in runs.values())
    assert "2 runs finished" in said
    assert "recipe's" in result["setting"]["learning_rate"]
    assert str(tmp_path) not in json.dumps(result)
    for name in ("table.md", "table.csv"):
        assert "bn" in (tmp_path / "out" / name).read_text()
    again, second = session("table")
    assert "1 of 1 cells are there already" in again
    assert second["runs"] == runs
    # Another machine, which has nothing but the folder of results.
    place = tmp_path / "runs" / "tiny"
    shutil.rmtree(tmp_path / "runs")
    study.unpack(place, tmp_path / "out" / "table-runs.tar.gz")
    found = {run.name: study.outcome(run) for run in place.iterdir()}
    assert found == runs
    assert not list(place.rglob("*.pt"))


@pytest.mark.parametrize("polite", [True, False])
def test_a_sweep_is_interrupted_in_time(tmp_path, monkeypatch, polite):
    """As by Ctrl-C, so that the launcher ends its runs; the next call goes on."""
    ignore = "" if polite else "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    (tmp_path / "train.py").write_text(
        f"import signal, time\n{ignore}\nopen('started', 'w').close()\n"
        f"try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open('ended', 'w').close()\n"
    )
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "STOP", 15.0 if polite else 0.2)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    now = gpu.Session("table", tmp_path, time.time() + 100, tiny=True)
    monkeypatch.setattr(study, "SUMMARY", 92.0)  # of 95 seconds that are left
    found = gpu.Cells(now)
    found.run({"sweep": lambda: study.train(found, "sweep", ["batch=2"])})
    assert (tmp_path / "started").exists()
    assert (tmp_path / "ended").exists() == polite
    assert found.result["cells"] == {}
    assert list(found.result["spent"]) == ["sweep"]


@pytest.mark.parametrize("part", study.SWEEPS)
def test_what_is_planned_can_be_run(part, tmp_path):
    """The commands of the real parts, of which the first run of each is composed."""
    session = gpu.Session(part, tmp_path, 0.0, runs=tmp_path, data=tmp_path, lr=0.3)
    planned = [jobs(overrides) for overrides in study.sweeps(session).values()]
    runs = [tuple(sorted(run)) for sweep in planned for run in sweep]
    assert len(set(runs)) == len(runs) == {"table": 54, "direct": 6, "resnet34": 3}[part]
    for cell in cells([sweep[0] for sweep in planned], checked=True):
        assert cell.folder.parent == study.folder(session)
        assert cell.cfg.recipe.lr == 0.3
        assert cell.cfg.data.cache == str(tmp_path)


# --- in time, and whatever happens


@pytest.fixture
def part(monkeypatch, tmp_path):
    """A part of made-up cells: what was called, and a way to run it."""
    called: list[str] = []

    def run(seconds=500.0, **cells):
        def wrap(name, function):
            def measure():
                called.append(name)
                return function()

            return measure

        session = gpu.Session("step", tmp_path, time.time() + seconds, tiny=True)
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        found = gpu.Cells(session)
        called.clear()
        found.run({name: wrap(name, function) for name, function in cells.items()})
        return list(called), json.loads((tmp_path / "step.json").read_text())["cells"]

    return run


def fine():
    return {"number": 1}


def broken():
    raise RuntimeError("CUDA out\nof memory")


def endless():
    try:
        while True:
            time.sleep(0.01)
    except Exception:  # no library's holds the end up
        endless()


def test_a_cell_that_fails_takes_no_other_with_it_and_is_tried_again_last(part):
    called, found = part(a=fine, b=broken, c=fine)
    assert called == ["a", "b", "c"]
    assert found["b"]["error"] == "RuntimeError: CUDA out of memory"
    assert found["a"]["number"] == found["c"]["number"] == 1
    called, found = part(a=fine, b=fine, c=fine, d=fine)
    assert called == ["d", "b"]
    assert found["b"]["number"] == 1
    assert "error" not in found["b"]


def test_the_limit_stops_a_cell_and_the_next_call_goes_on(part):
    called, found = part(seconds=5.5, a=fine, b=endless, c=fine)  # 5 are kept to write
    assert called == ["a", "b"]
    assert list(found) == ["a"]
    called, found = part(seconds=0, a=fine, b=fine, c=fine)
    assert called == []
    called, found = part(a=fine, b=fine, c=fine)
    assert called == ["b", "c"]
    assert list(found) == ["a", "b", "c"]


def test_a_cell_that_kills_the_process_is_known_and_comes_last(part, monkeypatch):
    def killed():
        raise SystemExit  # no error that is caught: as if the process had gone

    with pytest.raises(SystemExit):
        part(a=killed, b=fine)
    called, found = part(a=fine, b=fine)
    assert called == ["b", "a"]
    assert all(cell["number"] == 1 for cell in found.values())


def test_a_device_that_does_not_answer_ends_the_process(part, monkeypatch):
    class Gone(BaseException):
        pass

    def leave(status):
        assert status == gpu.AGAIN
        raise Gone

    monkeypatch.setattr(gpu, "answers", lambda device: False)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Gone):
        part(a=broken, b=fine)
    monkeypatch.setattr(gpu, "answers", lambda device: True)
    assert part(a=fine, b=fine)[0] == ["b", "a"]


def script(*args, **environment):
    """Of a `python3` that says how it was called."""
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_session.sh"), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_the_script_calls_every_part_and_starts_again(tmp_path):
    python = tmp_path / "python3"
    # The first part loses its device twice, the second fails.
    python.write_text(
        f'#!/bin/sh\necho "$3 $6 $7 $8"\necho x >>{tmp_path}/calls\n'
        f"n=$(wc -l <{tmp_path}/calls)\n[ $n -lt 3 ] && exit 75\n"
        '[ "$3" = layers ] && exit 1\nexit 0\n'
    )
    python.chmod(0o755)
    made = script(
        *("step", "layers", "--tiny", "--seconds", "100", "right", "--out", "x y"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert made.returncode == 1
    tail = " --tiny --out x y"
    assert made.stdout.splitlines() == [
        p + tail for p in ("step", "step", "step", "layers", "right")
    ]


@pytest.mark.parametrize("args", [(), ("--seconds", "ten", "step"), ("step", "--seconds", "0")])
def test_the_script_wants_parts_and_seconds(args):
    made = script(*args)
    assert made.returncode == 2
    assert "expected scripts/gpu_session.sh PART" in made.stderr


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        (["steps", "--tiny"], 2, "steps: unknown; expected right, step"),
        (["step", "layers", "--tiny"], 2, "expected one PART"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, args, status, told):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *args])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == status
    assert told in capsys.readouterr().err
