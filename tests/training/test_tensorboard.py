import json
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard import default, program
from tensorboard.backend import application
from tensorboard.context import RequestContext
from tensorboard.summary.writer import event_file_writer
from werkzeug.test import Client

from training.tensorboard import CHARTS, RESULTS, SCALARS, TensorBoard, summarize

HYPERPARAMETERS = {"norm": "bn", "batch_size": 2, "learning_rate": 0.1, "seed": 0}


@pytest.fixture(autouse=True)
def _order(monkeypatch):
    """Readers sort event files by name: second, host, process and number within the process, which
    would count to .9 and .10 here. Attempts of a run are not of one process and one second."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


class Board:
    """TensorBoard on a folder, as its pages see it; `fast`: read by the data server that users get
    by default, in a process of its own, whose rules are not those of the reader in Python."""

    def __init__(self, folder: Path, fast: bool = False):
        board = program.TensorBoard(default.get_plugins())
        once = ["--reload_interval=0", *([] if fast else ["--reload_task=blocking"])]
        load = f"--load_fast={str(fast).lower()}"
        board.configure(argv=["tensorboard", f"--logdir={folder}", load, *once])
        with warnings.catch_warnings():  # about the process that it starts and leaves alone
            warnings.simplefilter("ignore", ResourceWarning)
            data, _ = board._make_data_provider()
        self.pipe = getattr(board._ingester, "_stdin_handle", None)
        app = application.TensorBoardWSGIApp(
            board.flags, board.plugin_loaders, data, board.assets_zip_provider
        )
        self.client = Client(app)
        runs = {file.parent for file in event_files(folder)}
        while fast and len(self.started(data)) < len(runs):
            time.sleep(0.05)

    @staticmethod
    def started(data) -> list[str]:
        """The runs that are read: all of their files at once."""
        runs = data.list_runs(RequestContext(), experiment_id="")
        return [run.run_name for run in runs if run.start_time and run.start_time > 0]

    def close(self) -> None:
        if self.pipe:
            self.pipe.close()  # with which the data server ends

    def get(self, path: str, **query: str):
        answer = self.client.get(f"/data/plugin/{path}", query_string=query or None)
        assert answer.status_code == 200, answer.text
        return answer.json if answer.is_json else answer.data

    def points(self, run: str) -> dict[str, list[tuple[int, float]]]:
        tags = self.get("scalars/tags")[run]
        points = {tag: self.get("scalars/scalars", run=run, tag=tag) for tag in tags}
        return {tag: [(step, value) for _, step, value in p] for tag, p in points.items()}

    def images(self, run: str, tag: str) -> list[bytes]:
        shown = self.get("images/images", run=run, tag=tag, sample="0")
        return [self.get(f"images/individualImage?{image['query']}") for image in shown]

    def sessions(self) -> dict[str, dict]:
        """The rows of HParams: run -> session."""
        statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        request = {"allowedStatuses": statuses, "sliceSize": 100}
        answer = self.client.post("/data/plugin/hparams/session_groups", json=request)
        groups = answer.json["sessionGroups"]
        assert all(len(group["sessions"]) == 1 for group in groups)
        return {g["name"]: {**g["sessions"][0], "hparams": g["hparams"]} for g in groups}


def metrics(session: dict) -> dict[str, float]:
    return {m["name"]["tag"].removeprefix("result/"): m["value"] for m in session["metricValues"]}


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/events.out.tfevents.*"))


def attempt(folder: Path, start: int, losses: range, value: float) -> TensorBoard:
    board = TensorBoard(folder, start, HYPERPARAMETERS)
    for update in losses:
        board.loss(update, value)
    board.events.flush()
    return board


# --- hyper-parameters and results


def test_hparams_of_a_study(train, tmp_path):
    made = train("-m", "norm=bn,gn", "batch=16,32", "study=mine", "seed=1")
    assert made.status == 0, made.err
    board = Board(made.runs)
    sessions = board.sessions()
    folders = {f"mine/{f.parent.name}": f.parent for f in made.runs.glob("mine/*/result.json")}
    assert len(folders) == 4
    assert sessions.keys() == folders.keys() == board.get("scalars/tags").keys()
    for name, session in sessions.items():
        result = json.loads((folders[name] / "result.json").read_text())
        assert re.fullmatch(r"mine/(bn|gn)-b(16|32)-s1-\w+", name)
        expected = {k: result[k] for k in session["hparams"]}
        assert session["hparams"] == expected
        assert {"norm", "batch_size", "sgd_batch_size", "learning_rate", "seed"} < expected.keys()
        assert {type(v) for v in expected.values()} == {str, int, float}
        known = {k: result[k] for k in RESULTS if result[k] is not None}
        assert metrics(session) == pytest.approx(known, rel=1e-6)
        assert {"top1", "best_top1", "test_loss", "images_per_second"} <= known.keys()
        assert session["status"] == "STATUS_SUCCESS"
    columns = board.client.post("/data/plugin/hparams/experiment", json={}).json["hparamInfos"]
    assert [c["name"] for c in columns if c["differs"]] == [
        *("batch_size", "learning_rate", "norm", "seed", "sgd_batch_size")
    ]
    assert {c["name"] for c in columns} == set(sessions[name]["hparams"])


def test_a_diverged_run_failed_and_has_no_accuracy(train):
    made = train("norm=none", "batch=2", "recipe.lr=1e9")
    (session,) = Board(made.runs).sessions().values()
    assert session["status"] == "STATUS_FAILURE"
    assert session["hparams"]["norm"] == "none"
    assert metrics(session).keys() == {"images_per_second"}


def test_an_interrupted_run_has_no_end_until_it_is_over(tmp_path):
    attempt(tmp_path / "run", 0, range(1, 61), 1.0).close()
    (session,) = Board(tmp_path).sessions().values()
    assert session["status"] == "STATUS_UNKNOWN"
    assert session["hparams"] == HYPERPARAMETERS
    assert metrics(session) == {}
    second = attempt(tmp_path / "run", 40, range(41, 61), 1.0)
    second.finish(dict.fromkeys(RESULTS, 7.0) | {"status": "finished", "updates": 60})
    second.close()
    (session,) = Board(tmp_path).sessions().values()
    assert session["status"] == "STATUS_SUCCESS"
    assert metrics(session) == dict.fromkeys(RESULTS, 7.0)


# --- interruption


@pytest.fixture(params=["python", "fast"])
def reader(request):
    boards = []

    def read(folder: Path) -> Board:
        boards.append(Board(folder, request.param == "fast"))
        return boards[-1]

    yield read
    for board in boards:
        board.close()


@pytest.mark.parametrize("torn", [0, 5])
def test_no_point_of_an_interrupted_attempt_is_doubled(tmp_path, reader, torn):
    """Killed at update 65 with a checkpoint at 40; again at 50 with the same; then to the end."""
    for start, end, value in ((0, 65, 1.0), (40, 50, 2.0), (40, 100, 3.0)):
        board = attempt(tmp_path / "run", start, range(start + 1, end + 1), value)
        file = event_files(tmp_path)[-1]
        board.close()
        if torn and end < 100:  # in the middle of a record
            file.write_bytes(file.read_bytes()[:-torn])
    points = reader(tmp_path).points("run")["loss/update"]
    assert points == [(u, 1.0 if u <= 40 else 3.0) for u in range(1, 101)]


def test_a_run_that_starts_again_from_nothing(tmp_path, reader):
    attempt(tmp_path / "run", 0, range(1, 65), 1.0).close()
    attempt(tmp_path / "run", 0, range(1, 65), 2.0).close()
    assert reader(tmp_path).points("run")["loss/update"] == [(u, 2.0) for u in range(1, 65)]


def test_stopped_just_before_its_result(train, reader):
    keys = ["recipe.epochs=2", "runtime.log_every=1"]
    folder = train(*keys).run()
    whole = reader(folder.parent).points(folder.name)
    (folder / "result.json").unlink()
    assert train(*keys).status == 0
    assert len(event_files(folder)) == 2
    again = reader(folder.parent).points(folder.name)
    result = json.loads((folder / "result.json").read_text())
    for points in (whole, again):
        assert points.pop("result/images_per_second")[0][0] == result["updates"] + 1
    assert again == whole
    assert [len(again[tag]) for tag in ("loss/update", "accuracy/test", "result/top1")] == [
        *(result["updates"], 2, 1)
    ]


def test_overwritten(train):
    folder = train().run()
    assert train("overwrite=true", "runtime.log_every=1").status == 0
    assert len(event_files(folder)) == 1
    steps = [step for step, _ in Board(folder.parent).points(folder.name)["loss/update"]]
    assert steps == list(range(1, len(steps) + 1))


def test_updates_wait_for_no_disk(tmp_path, monkeypatch):
    flushes = []
    writer = event_file_writer.EventFileWriter
    flush = writer.flush
    board = attempt(tmp_path / "run", 0, range(0), 0.0)
    monkeypatch.setattr(writer, "flush", lambda file: flushes.append(1) or flush(file))
    for update in range(100):
        board.loss(update, 1.0)
    assert not flushes
    board.close()


# --- charts that overlay runs, and the study


def picture(file: Path, gray: int = 200) -> Path:
    Image.fromarray(np.full((20, 30, 3), gray, np.uint8)).save(file)
    return file


def charts(board: Board) -> dict[str, list[str]]:
    layout = board.get("custom_scalars/layout")
    titles = {c["title"]: [chart["title"] for chart in c["chart"]] for c in layout["category"]}
    assert len(titles) == len(layout["category"])
    return titles


def test_charts_are_there_once_however_many_runs_ask_for_them(tmp_path):
    for run in ("a/bn-b16-s0", "a/bn-b2-s0", "a/gn-b2-s0", "b/bn-b2-s0"):
        board = attempt(tmp_path / run, 0, range(1, 3), 1.0)
        board.epoch(dict.fromkeys(SCALARS, 1.0) | {"update": 2})
        board.close()
    board = Board(tmp_path)
    assert charts(board) == {category: list(titles) for category, titles in CHARTS.items()}
    for category in board.get("custom_scalars/layout")["category"]:
        for chart in category["chart"]:
            for tag in chart["multiline"]["tag"]:
                for run in board.get("scalars/tags"):
                    found = board.get("custom_scalars/scalars", run=run, tag=tag)["tag_to_events"]
                    assert [f"{name}$" for name in found] == [tag], (run, tag)


def test_the_table_of_a_study(tmp_path):
    study = tmp_path / "mine"
    attempt(study / "bn-b2-s0", 0, range(1, 3), 1.0).close()
    markdown = "mine: ± †\n\n| scheme | 2 |\n|---|---:|\n| bn | 90.00 |\n\n![curves](a.png)\n"
    curves = {"top-1 (%) against batch size": {"bn": {8: (2.0, 0.5), 2: (1.0, 0.0)}, "gn": {}}}
    figure = picture(tmp_path / "figure.png")
    summarize(study, markdown, {"accuracy": figure}, curves)

    board = Board(tmp_path)
    shown = board.get("text/text", run="mine/table", tag="table/text_summary")
    assert len(shown) == 1
    assert "<td>bn</td>" in shown[0]["text"]
    assert "±" in shown[0]["text"]
    assert "a.png" not in shown[0]["text"]
    assert board.images("mine/table", "accuracy") == [figure.read_bytes()]
    tag = "mine: top-1 % against batch size"
    assert board.points("mine/table/bn") == {
        f"{tag}/mean": [(2, 1.0), (8, 2.0)],
        f"{tag}/low": [(2, 1.0), (8, 1.5)],
        f"{tag}/high": [(2, 1.0), (8, 2.5)],
    }
    assert charts(board) == {**{k: list(v) for k, v in CHARTS.items()}, "mine": list(curves)}
    assert board.sessions().keys() == {"mine/bn-b2-s0"}


def test_a_new_table_replaces_the_old_one(tmp_path, reader):
    study = tmp_path / "mine"
    curve = {2: (1.0, 0.0), 8: (2.0, 0.0)}
    figures = {"one": picture(tmp_path / "1.png"), "two": picture(tmp_path / "2.png")}
    summarize(study, "| old |", figures, {"accuracy": {"bn": curve, "gn": curve}})
    first = event_files(study)
    figures = {"one": picture(tmp_path / "3.png", 100)}
    summarize(study, "| new |", figures, {"accuracy": {"bn": {2: (5.0, 0.0)}}})
    second = event_files(study)
    assert (len(first), len(second)) == (3, 2)
    assert not set(first) & set(second)
    assert not (study / "table" / "gn").exists()

    board = reader(tmp_path)
    (shown,) = board.get("text/text", run="mine/table", tag="table/text_summary")
    assert "new" in shown["text"]
    assert board.get("images/tags")["mine/table"].keys() == {"one"}
    assert board.images("mine/table", "one") == [figures["one"].read_bytes()]
    assert board.points("mine/table/bn")["mine: accuracy/mean"] == [(2, 5.0)]

    summarize(study, "| only text |", {})
    assert len(event_files(study)) == 1


def test_a_run_called_table_is_left_alone(tmp_path):
    (tmp_path / "mine" / "table" / ".hydra").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"mine/table: a run has this name"):
        summarize(tmp_path / "mine", "| new |", {})
    assert not event_files(tmp_path)
