"""What the benchmarks share."""

import json
import sys

import pytest

from benchmarks import harness


def test_ratios_are_taken_within_rounds():
    """A machine that is ten times slower in one round changes no ratio."""
    bn, gn = [1.0, 10.0, 1.0, 2.0], [1.5, 15.0, 1.5, 3.0]
    assert harness.ratio(gn, bn) == {"ratio": 1.5, "ratio_min": 1.5, "ratio_max": 1.5}
    assert harness.spread(gn, "ms") == {"ms": 2.25, "ms_iqr": 4.5}


def test_every_round_has_every_case_once_in_shuffled_order():
    order = []
    timers = {name: lambda name=name: order.append(name) or len(order) for name in "abcdef"}
    found = harness.interleave(timers, rounds=3, warm_up=1, quiet=True)
    rounds = [order[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(names) == list("abcdef") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert found["a"] == [1 + i for i, name in enumerate(order) if name == "a" and i >= 6]


def test_a_worker_measures_the_code_of_its_folder(tmp_path):
    """Another checkout's, whatever this process has imported."""
    (tmp_path / "norms.py").write_text(
        "import torch\n\nclass GhostBatchNorm2d(torch.nn.BatchNorm2d):\n"
        "    def __init__(self, channels, batch_size):\n        print('noise')\n"
        "        super().__init__(channels)\n        self.weight.requires_grad_(False)\n"
        "    def forward(self, x):\n        return 2 * x\n"
    )
    case = dict(what="norm", name="bn", shape=(2, 4, 3, 3))
    sizes = {}
    for folder in (harness.ROOT, tmp_path):
        with harness.Worker(folder) as worker:
            assert worker.make("it", **case) > 0
            assert worker.timer("it", 0.001)() > 0
            sizes[folder] = worker.ask(kept="it")
            with pytest.raises(ValueError, match=r"other: .*: 'nothing'"):
                worker.make("other", **case | {"name": "nothing"})
            assert worker.ask(kept="it") == sizes[folder]  # it goes on
    assert sizes[harness.ROOT] >= 4 * 2 * 4 * 3 * 3
    assert sizes[tmp_path] == 0  # nothing is saved to double x
    assert not list(tmp_path.rglob("*.pyc"))


def test_a_worker_that_ends_is_an_error(tmp_path):
    (tmp_path / "norms.py").write_text("import os\nos._exit(3)\n")
    with harness.Worker(tmp_path) as worker, pytest.raises(ValueError, match="the process ended"):
        worker.make("it", what="norm", name="bn", shape=(2, 4, 3, 3))


def test_the_words_around_the_tables_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["it.py", "--before", "/a/b", "--out=/a", "--rounds", "3"])
    parser = harness.parser("It measures.", "it", rounds=5)
    parser.add_argument("--before")
    args = parser.parse_args()
    args.out, page = tmp_path, tmp_path / "README.md"
    result = {"setting": {"rounds": 3}, "environment": {"cpu": "some"}, "rows": []}
    harness.publish(args, result, ["first"])
    page.write_text(f"before\n\n{page.read_text()}\nafter\n")
    harness.publish(args, result, ["second"])
    text = page.read_text()
    assert text.startswith("before\n\n# it\n")
    assert text.endswith("<!-- /measured -->\n\nafter\n")
    assert "first" not in text
    assert text.count("second") == text.count("rounds 3, cpu some") == 1
    command = "python -m benchmarks.it --before FOLDER --out=FOLDER --rounds 3"
    assert json.loads((tmp_path / "it.json").read_text())["command"] == command
    assert f"    {command}\n" in text


@pytest.mark.parametrize(("rounds", "status"), [("0", 2), ("3", 1)])
def test_mistakes_get_one_line(monkeypatch, capsys, rounds, status):
    def run(args):
        raise ValueError("norm=nothing: unknown")

    monkeypatch.setattr(sys, "argv", ["it.py", "--rounds", rounds])
    with pytest.raises(SystemExit) as stop:
        harness.main(harness.parser("It measures.", "it", rounds=5), run)
    assert stop.value.code == status
    told = {1: "error: norm=nothing: unknown\n", 2: "--rounds: expected whole numbers from 1\n"}
    assert capsys.readouterr().err.endswith(told[status])
