import json
import subprocess
import sys

import pytest

from scripts import advice, published

SCRIPT = advice.docs.ROOT / "scripts" / "advice.py"
SITUATIONS = ("two", "many", "varies", "folds", "existing")
CAPTION = "small: top-1 accuracy (%), last epoch, mean; resnet8"


class Files:
    """What the script reads, made up; every scheme costs the same unless it is said."""

    def __init__(self, folder):
        self.folder, self.accuracy, self.rows = folder, {}, []
        self.caption, self.state = CAPTION, {}
        self.memory, self.left, self.parameters = {}, {"gn": 5, "pws": 2}, {"pws": 11}
        self.readme = folder / "README.md"
        self.readme.write_text("before\n<!-- advice -->\nstale\n<!-- /advice -->\nafter\n")

    def put(self, name, at_2, at_32=(50, 1, 3)):
        """Mean, standard deviation and number of runs at batch 2 and 32."""
        self.accuracy[name] = {2: at_2, 32: at_32}

    def publish(self, batch, **top1):
        common = {"paper": "P", "table": "T", "model": "M", "dataset": "ImageNet", "source": "key"}
        self.rows += [
            common | {"norm": k.upper(), "norm_batch": batch, "top1_acc": v}
            for k, v in top1.items()
        ]

    def write(self):
        head = "split,scheme,batch_size,mean,std,n,diverged,failed,unfinished,filled\n"
        lines = [
            f",{name},{batch},{mean},{std or ''},{n},{self.state.get(name, 0)},0,0,False"
            for name, cells in self.accuracy.items()
            for batch, (mean, std, n) in cells.items()
        ]
        training = [
            {
                "norm": name,
                **{f"ratio_to_bn_batch_{b}": 1.25 for b in (2, 32, 64)},
                "memory_bytes": self.memory.get(name, 2 * 2**30),
            }
            for name in self.accuracy
        ]
        inference = [
            {
                "norm": name,
                "ratio_to_bn_unfolded": 1.5,
                "ratio_to_bn_folded": 0.75,
                "norm_layers_left": self.left.get(name, 0),
                "parameters": self.parameters.get(name, 10),
            }
            for name in self.accuracy
        ]
        for name in (advice.STUDY, "training", "inference"):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / advice.STUDY / "table.csv").write_text(head + "\n".join(lines))
        (self.folder / advice.STUDY / "table.md").write_text(f"{self.caption}\n\n| scheme |\n")
        made = {"training": {"setting": {"forward": 64}, "rows": training}}
        made["inference"] = {"rows": inference}
        for name, content in made.items():
            (self.folder / name / f"{name}.json").write_text(json.dumps(content))

    def named(self):
        """The schemes that are recommended, by situation."""
        self.write()
        lines = advice.situations(advice.Evidence())
        names = [line.split("**: ")[1].split(".")[0].replace("`", "") for line in lines]
        return dict(zip(SITUATIONS, names, strict=True))


@pytest.fixture
def files(tmp_path, monkeypatch):
    made = Files(tmp_path)
    real = published.load()
    monkeypatch.setattr(advice, "RESULTS", tmp_path)
    monkeypatch.setattr(advice, "README", made.readme)
    monkeypatch.setattr(published, "load", lambda: real | {"rows": made.rows})
    made.put("bn", (40, 1, 3), (60, 1, 3))
    made.put("gn", (50, 1, 3), (50, 1, 3))
    made.put("pws", (53, 1, 3), (53, 1, 3))
    made.put("mabn", (56, 1, 3), (57, 1, 3))
    return made


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["advice.py", *args])
    with pytest.raises(SystemExit) as stop:
        advice.main()
    return stop.value.code


def test_the_best_in_each_situation(files):
    assert files.named() == {
        "two": "mabn",
        "many": "bn",
        "varies": "pws",
        "folds": "mabn",
        "existing": "mabn",
    }


def test_other_numbers_another_recommendation(files):
    files.put("mabn", (45, 1, 3), (62, 1, 3))
    assert files.named() == {
        "two": "pws",
        "many": "mabn",
        "varies": "pws",
        "folds": "mabn",
        "existing": "gn",
    }
    files.put("gn", (58, 1, 3))
    files.left["mabn"] = 1
    assert files.named() == {
        "two": "gn",
        "many": "mabn",
        "varies": "gn",
        "folds": "bn",
        "existing": "gn",
    }


@pytest.mark.parametrize(
    ("pws", "named"),
    [
        ((55.1, 1, 3), "mabn or pws"),  # apart by 0.9, pooled deviation 1
        ((54.9, 1, 3), "mabn"),  # by 1.1
        ((54.9, 2, 3), "mabn or pws"),  # pooled 1.58
        ((54.9, 2, 2), "mabn or pws"),  # 1.41: the two runs count less
        ((30, None, 1), "mabn or pws"),  # one run says nothing of its spread
        (("", None, 0), "mabn"),  # not run
    ],
)
def test_what_cannot_be_told_apart_is_named_too(files, pws, named):
    files.accuracy["gn"][2] = (45, 1, 3)
    files.put("pws", pws)
    assert files.named()["two"] == named


def test_a_scheme_that_diverged_is_not_named(files):
    files.state["mabn"] = 1
    assert files.named()["two"] == "pws"
    assert "`mabn` | 56.00 ± 1.00 (3), 1 diverged |" in advice.advice()


def test_published_results_can_leave_it_open_but_only_at_the_same_batch_size(files):
    files.publish(32, bn=76.0, mabn=76.5)
    assert files.named()["many"] == "bn or mabn"
    assert files.named()["two"] == "mabn"
    files.rows.clear()
    files.publish(32, bn=76.5, mabn=76.0)
    assert files.named()["many"] == "bn"


def test_published_pairs_and_whether_ours_agree(files):
    files.publish(2, bn=64.78, mabn=76.33, gn=50)
    files.publish(32, bn=76.6, pws=76.6)
    files.rows.append(files.rows[0] | {"model": "N", "norm_batch": 32, "top1_acc": 99.0})
    files.put("gn", (40.5, 1, 3), (59.5, 1, 3))
    files.write()
    assert advice.agreement(advice.Evidence()) == (
        "`gn` 50, `bn` 64.78 at batch 2 (key; ours cannot tell), "
        "`mabn` 76.33, `bn` 64.78 at batch 2 (key; ours agree), "
        "`pws` 76.6, `bn` 76.6 at batch 32 (key; ours disagree)"
    )


def test_the_numbers_stand_behind_the_names(files):
    files.memory["pws"] = 2**30
    files.write()
    lines = advice.situations(advice.Evidence())
    assert lines[0].endswith(
        "`mabn`. At batch 2 `mabn` 56.00 ± 1.00 (3), `pws` 53.00 ± 1.00 (3), "
        "`bn` 40.00 ± 1.00 (3); memory: `mabn` 2.0 GiB, `bn` 2.0 GiB, `pws` 1.0 GiB."
    )
    assert lines[1].endswith(
        "`bn`. At batch 32 `bn` 60.00 ± 1.00 (3), `mabn` 57.00 ± 1.00 (3); "
        "training step: `bn` 1.25."
    )
    assert (
        "| `pws` | 53.00 ± 1.00 (3) | 53.00 ± 1.00 (3) | 1.25 | 1.25 | 1.0 GiB | 1.50 | 0.75 |"
        in (advice.advice())
    )


def test_no_recommendation_without_numbers(files):
    for name in files.accuracy:
        files.accuracy[name][32] = ("", None, 0)
    assert files.named()["many"] == "not measured yet"


def test_the_check_fails_when_stale_and_writes_nothing(files, monkeypatch, capsys):
    files.write()
    before = files.readme.read_text()
    assert run(monkeypatch, "--check") == 1
    assert capsys.readouterr().out == "README.md: out of date\n"
    assert files.readme.read_text() == before
    assert run(monkeypatch) == 0
    text = files.readme.read_text()
    assert text.startswith("before\n<!-- advice -->\n\n| `norm=` |")
    assert text.endswith("\n\n<!-- /advice -->\nafter\n")
    assert "stale" not in text
    assert run(monkeypatch, "--check") == 0
    files.put("mabn", (56.5, 1, 3))
    files.write()
    assert run(monkeypatch, "--check") == 1


def test_mistakes_get_one_line(files, monkeypatch):
    assert "No such file" in run(monkeypatch)
    files.caption = "small: top-1 error (%), last epoch; resnet8"
    files.write()
    assert "table.csv: expected one table, of accuracies" in run(monkeypatch)
    files.readme.write_text("no place\n")
    assert run(monkeypatch) == (
        "error: README.md: expected <!-- advice --> and <!-- /advice --> once"
    )


def test_the_readme_of_this_repository_is_up_to_date():
    made = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
