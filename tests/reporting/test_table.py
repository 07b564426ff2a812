import csv
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import ttest_ind

from reporting.cells import check, split
from reporting.measure import Measure
from reporting.output import TEX, markdown, show
from reporting.read import load
from reporting.table import Options, make, text
from tests.reporting.studies import put, squeezed

ROOT = Path(__file__).parent.parent.parent
ERRORS = {2: 34.9, 4: 27.3, 32: 23.5}  # of a batch norm on ImageNet


def table(*studies, **options):
    runs = load(*studies)
    return make(runs[runs["config"].map(bool)], "", Options(**options))


def cells(*studies, **options):
    made = table(*studies, **options)
    shown = made.cells.apply(text, axis=1)
    return {row: {column: shown[row, column] for column in made.columns} for row in made.rows}


def beside(*studies, **options):
    """The published line of every row."""
    lines = table(*studies, **options).shown().to_numpy().tolist()
    pairs = zip(lines, [*lines[1:], [""]], strict=True)
    return {one[0]: two[1:] for one, two in pairs if two[0] == "– published"}


def refused(*studies, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        show(studies, Options(**options))
    assert "\n" not in str(error.value)
    return str(error.value)


def imagenet(study, norm, batch, seed, top1=None, **other):
    model = {"model__name": "resnet50", "data__name": "imagenet"}
    return put(study, norm, batch, seed, top1, **{"sgd": 256, **model, **other})


@pytest.fixture
def study(tmp_path):
    return tmp_path / "study"


# The cells.


def test_mean_deviation_and_number_of_seeds(study):
    for seed, top1 in enumerate((90.0, 91.0, 92.0)):
        put(study, "bn", 2, seed, top1)
    put(study, "bn", 8, 0, 95.0)
    assert cells(study) == {"bn": {2: "91.00 ± 1.00 (3)", 8: "95.00 (1)"}}


def test_what_is_not_finished_stays_visible(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 1, status="diverged")
    put(study, "bn", 8, 0)
    put(study, "mabn", 2, 0, 80.0, error="of an attempt before")
    put(study, "mabn", 2, 1, error="out of memory:\na smaller batch")
    assert cells(study) == {
        "bn": {2: "90.00 (1), 1 diverged", 8: "1 unfinished"},
        "mabn": {2: "80.00 (1), 1 failed", 8: "missing"},
    }
    assert table(study).notes() == ["mabn-b2-s1 failed: out of memory: a smaller batch"]
    early = study / "gn-b2-s0-0a1b2c"  # before it had a configuration, so it has no cell
    early.mkdir()
    (early / "error.txt").write_text("norm.groups=7: fits no layer\n")
    markdown = show([study]).markdown
    assert "mabn-b2-s1 failed: out of memory" in markdown
    assert "gn-b2-s0-0a1b2c failed: norm.groups=7: fits no layer" in markdown


def test_a_folder_that_holds_no_run_is_no_run(study):
    put(study, "bn", 2, 0, 90.0)
    (study / "gn-b2-s0").mkdir()
    (study / "gn-b2-s0" / "error.txt").write_text("recipe.lr=0: expected a number above 0\n")
    assert list(cells(study)) == ["bn"]


def test_one_run_fills_the_row_of_a_batch_independent_scheme(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 8, 0, 95.0)
    put(study, "gn", 8, 0, 93.0, free=True)
    assert cells(study)["gn"] == {2: "93.00† (1)", 8: "93.00 (1)"}
    assert cells(study, rows="batch", columns="norm")[2]["gn"] == "93.00† (1)"
    assert "† not run" in table(study).notes()[0]


def test_but_not_where_the_sgd_batch_follows_the_batch(study):
    put(study / "direct", "bn", 2, 0, 90.0, sgd=None)
    put(study / "direct", "gn", 8, 0, 93.0, free=True, sgd=None)
    assert cells(study / "direct")["gn"] == {2: "missing", 8: "93.00 (1)"}
    put(study / "times8", "bn", 2, 0, 90.0, sgd=16)
    put(study / "times8", "gn", 8, 0, 93.0, free=True, sgd=64)
    assert cells(study / "times8")["gn"] == {2: "missing", 8: "93.00 (1)"}
    assert "SGD batch 8 x the batch size" in table(study / "times8").caption
    assert "SGD batch equal to the batch size" in table(study / "direct").caption


def test_a_batch_independent_scheme_that_diverged_did_so_at_every_batch_size(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "gn", 8, 0, status="diverged", free=True)
    assert cells(study)["gn"] == {2: "1 diverged", 8: "1 diverged"}


def test_schemes_in_the_usual_order_numbers_by_size(study):
    for norm in ("mabn", "ln", "bn", "brn"):
        for batch in (16, 2):
            put(study, norm, batch, 0, 90.0)
    assert list(cells(study)) == ["bn", "mabn", "brn", "ln"]
    assert list(cells(study)["bn"]) == [2, 16]


# Rows, columns and what may differ.


def test_rows_and_columns_by_any_key(study):
    for lr in (0.3, 0.03):
        put(study, "bn", 2, 0, 90 + lr, recipe__lr=lr)
        put(study, "gn", 2, 0, 80 + lr, recipe__lr=lr)
    assert cells(study, rows="recipe.lr", columns="norm") == {
        0.03: {"bn": "90.03 (1)", "gn": "80.03 (1)"},
        0.3: {"bn": "90.30 (1)", "gn": "80.30 (1)"},
    }
    assert table(study, columns="recipe.lr").shown().columns.to_list() == [
        "scheme \\ recipe.lr",
        "0.03",
        "0.3",
    ]


def test_options_of_a_scheme_as_rows(study):
    put(study, "gn", 2, 0, 90.0, norm__groups=32)
    put(study, "gn", 2, 0, 91.0, norm__groups=8)
    assert list(cells(study, rows="norm.groups")) == [8, 32]
    put(study, "bn", 2, 0, 92.0)
    assert "differ in norm" in refused(study, rows="norm.groups")


def test_the_model_brings_its_own_keys(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 0, 91.0, model__name="resnet20", model__library="timm")
    assert list(cells(study, rows="model.name")) == ["resnet20", "resnet8"]


def test_runs_that_differ_in_more_are_not_mixed(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 1, 80.0, recipe__lr=0.3)
    assert re.search(r"differ in recipe.lr \(.*--split recipe.lr", refused(study))
    parts = split(load(study), ["recipe.lr"])
    assert {k: len(v) for k, v in parts.items()} == {"recipe.lr=0.1": 1, "recipe.lr=0.3": 1}


def test_nor_is_it_hidden_between_two_cells(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "gn", 8, 0, 80.0, recipe__lr=0.3)
    assert "differ in recipe.lr" in refused(study)


def test_options_of_a_scheme_are_not_mixed_either_but_differ_between_schemes(study):
    put(study, "bn", 2, 0, 90.0)
    put(study, "gn", 2, 0, 90.0, norm__groups=32)
    check(load(study), ["norm", "batch"])
    put(study, "gn", 2, 1, 90.0, norm__groups=8)
    assert "differ in norm.groups" in refused(study)


def test_the_same_run_twice(study, tmp_path):
    put(study, "bn", 2, 0, 90.0)
    put(tmp_path / "other", "bn", 2, 0, 91.0)
    assert "are the same run twice" in refused(study, tmp_path / "other")


def test_several_studies_make_one_table(study, tmp_path):
    put(study, "bn", 2, 0, 90.0)
    put(tmp_path / "other", "bn", 2, 1, 91.0)
    put(tmp_path / "other", "gn", 2, 0, 92.0)
    shown = show([study, tmp_path / "other"])
    assert shown.tables[""].rows == ["bn", "gn"]
    assert shown.markdown.startswith("study + other: top-1 accuracy (%), last epoch")
    assert (tmp_path / "other" / "table.md").exists()
    assert not (study / "table.md").exists()


def test_a_table_for_each_value(study, drawn_figures):
    put(study, "bn", 2, 0, 90.0)
    put(study, "bn", 2, 1, 80.0, recipe__lr=0.3)
    shown = show([study], Options(split=["recipe.lr"]))
    assert list(shown.tables) == ["recipe.lr=0.1", "recipe.lr=0.3"]
    assert (study / "table.md").read_text().count("| scheme") == 2
    assert (study / "table.tex").read_text().count(r"\begin{table}") == 2
    assert (study / "accuracy_vs_batch_recipe.lr_0.3.png").exists()
    assert "study (recipe.lr=0.3): " in shown.markdown


def test_mistakes_are_named_in_one_line(study):
    put(study, "bn", 2, 0, 90.0)
    assert refused(study, split=["recipe.lrr"]) == (
        "--split recipe.lrr: no run has this key (did you mean recipe.lr or recipe.name?)"
    )
    assert refused(study, rows="momentum").startswith("--rows momentum: no run has this key")
    assert refused(study, columns="norm").startswith("--columns norm: is --rows too")
    assert refused(study, metric="top7").startswith(
        "--metric top7: bn-b2-s0 has no such number; expected one of batch_size, "
    )
    assert refused(study, baseline="gn") == "--baseline gn: no such row; expected one of bn"
    assert "no runs in it" in refused(study / "nowhere")


# The rules.


def test_rules(study):
    put(study, "bn", 2, 0, 90.0, curve=[10.0, 95.0, 91.0, 93.0, 92.0])
    assert cells(study) == {"bn": {2: "90.00 (1)"}}
    assert cells(study, rule="best") == {"bn": {2: "95.00 (1)"}}
    assert cells(study, rule="median5") == {"bn": {2: "92.00 (1)"}}
    assert cells(study, rule="best", errors=True) == {"bn": {2: "5.00 (1)"}}
    for rule, said in [("last", "last epoch"), ("median5", "median of the last 5 epochs")]:
        assert f"top-1 accuracy (%), {said}" in table(study, rule=rule).caption
    assert "top-1 error (%), best epoch" in table(study, rule="best", errors=True).caption


def test_five_evaluations_for_a_median_of_five(study):
    put(study, "bn", 2, 0, 90.0, curve=[80.0, 85.0, 86.0])
    assert re.search("--rule median5: .*bn-b2-s0 was evaluated", refused(study, rule="median5"))


def test_other_numbers_of_the_result(study):
    put(study, "bn", 2, 0, 90.0, result={"peak_memory_bytes": 123456789})
    assert cells(study, metric="wall_seconds") == {"bn": {2: "60.00 (1)"}}
    assert cells(study, metric="peak_memory_bytes") == {"bn": {2: "123,456,789 (1)"}}
    assert cells(study, metric="top5", errors=True) == {"bn": {2: "1.00 (1)"}}
    assert "study: peak memory bytes, mean" in table(study, metric="peak_memory_bytes").caption
    assert "is no accuracy" in refused(study, metric="wall_seconds", errors=True)


def test_the_default_rule_is_that_of_the_paper(study):
    for seed in (0, 1):
        imagenet(study, "bn", 2, seed, 65.0, experiment="gn_imagenet", curve=[65.5] * 4)
    assert table(study).measure == Measure(rule="median5")
    assert "median of the last 5 epochs (as GN 1803.08494 reports)" in table(study).caption
    assert cells(study)["bn"][2] == "65.50 ± 0.00 (2)"
    last = table(study, rule="last").caption
    assert "last epoch (GN 1803.08494 reports the median of the last 5 epochs)" in last


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, None),
        ({"evaluation__statistics": "running", "recipe__freeze_statistics": 0}, None),
        ({"evaluation__statistics": "precise"}, "statistics of up to 9 training batches of 50"),
        ({"evaluation__statistics": "batch"}, "the statistics of test batches of 50"),
        ({"evaluation__alpha": 0.25}, "running statistics, 0.25 of each image's own"),
        ({"recipe__freeze_statistics": 3}, "running statistics, frozen in the last 3 epochs"),
    ],
)
def test_a_caption_tells_the_statistics_that_were_evaluated(study, keys, told):
    sizes = {"evaluation__batches": 9, "evaluation__batch_size": 50}
    put(study, "bn", 2, 0, 90.0, **sizes, **keys)
    made = table(study)
    assert ("batch norms by" in made.caption) == (told is not None)
    for where in (made.caption, made.title):  # of the figures
        assert told is None or f"batch norms by {told}" in where


def test_other_statistics_are_not_mixed(study):
    put(study, "bn", 2, 0, 90.0, evaluation__statistics="running")
    put(study, "bn", 2, 1, 95.0, evaluation__statistics="precise")
    assert "evaluation.statistics" in refused(study)


def test_a_published_number_stands_beside_the_same_statistics(study):
    chosen = {"published": ["Rethinking Batch 2105.07576, Table 2"], "errors": True}
    imagenet(study / "run", "bn", 2, 0, 64.0)
    assert beside(study / "run", **chosen) == {"bn": ["35.5 [1] +0.50"]}
    precise = {"evaluation__statistics": "precise", "evaluation__batch_size": 10}
    imagenet(study / "other", "bn", 2, 0, 68.0, **precise)
    assert beside(study / "other", **chosen) == {"bn": ["32.3 [1] −0.30"]}


# The published numbers.


def test_the_number_beside_its_source_and_the_difference(study):
    for batch, error in ERRORS.items():
        imagenet(study, "bn", batch, 0, 100 - error, experiment="gn_imagenet", curve=[0.0] * 4)
    imagenet(study, "bn", 1, 0, experiment="gn_imagenet")
    theirs = beside(study, errors=True, rule="last")
    assert theirs == {"bn": ["", "34.7 [1] +0.20", "27.3 [1] +0.00", "23.6 [1] −0.10"]}
    assert beside(study, rule="last")["bn"][1] == "65.3 [1] −0.20"
    notes = table(study, errors=True, rule="last").notes()
    assert notes[0] == "published: their number, [its source], ours minus theirs"
    assert notes[1].startswith("[1] GN 1803.08494, Table 2: ResNet-50 on ImageNet, SGD batch 16 to")
    assert "(primary-text: arXiv 1803.08494, full text)" in notes[1]


def test_a_number_stands_beside_a_cell_that_is_not_there_yet(study):
    imagenet(study, "bn", 2, 0, experiment="mabn_imagenet")
    imagenet(study, "mabn", 1, 0, experiment="mabn_imagenet")
    theirs = beside(study, errors=True)
    assert theirs == {"bn": ["", "35.22 [1]"], "mabn": ["23.71 [2]", "23.67 [1]"]}


def test_what_no_source_has_is_not_available(study):
    imagenet(study, "gn", 2, 0, 76.0, experiment="mabn_imagenet", free=True)
    imagenet(study, "pws", 2, 0, 76.0, experiment="mabn_imagenet", free=True)
    assert beside(study) == {"gn": ["n/a"]}
    assert table(study).notes() == [
        "n/a: theirs, but in no source that we could read: the rows of GN, LN and IN"
    ]


def test_a_row_without_a_batch_size(study):
    """Of a batch-free method it holds at every one with its SGD batch, else nowhere."""
    for norm in ("bn", "gn", "ws_gn"):
        imagenet(study, norm, 2, 0, 76.0, experiment="ws_imagenet", free=norm != "bn")
    made = table(study, rule="last")
    theirs = beside(study, rule="last")
    assert theirs == {"bn": ["n/a"], "gn": ["75.19 [1] +0.81"], "ws_gn": ["76.28 [2] −0.28"]}
    assert any(n.startswith("at no batch size that is named: BN 75.7, WS 19") for n in made.notes())
    imagenet(study / "small", "ws_gn", 2, 0, 70.0, experiment="ws_imagenet", free=True, sgd=2)
    assert beside(study / "small", rule="last") == {
        "ws_gn": ["76.28 [1] −6.28"]
    }  # of an unknown SGD batch
    assert "Table 6" in table(study / "small", rule="last").notes()[1]


def test_only_beside_the_same_network_on_all_of_the_same_data(study):
    for i, other in enumerate(
        [
            {"model__name": "resnet18"},
            {"data__name": "cifar10"},
            {"data__train_fraction": 0.2},
            {"data__holdout": 0.1},
        ]
    ):
        run = {"experiment": "gn_imagenet", "curve": [65.0] * 4, **other}
        imagenet(study / str(i), "bn", 2, 0, 65.0, **run)
        assert beside(study / str(i)) == {}
    chosen = ["GN 1803.08494, Table 2"]
    assert beside(study / "2", published=chosen)["bn"] == ["65.3 [1] −0.30"]  # as told
    run = {"model__library": "torchvision", "data__name": "folder", "data__root": "/x/ImageNet"}
    imagenet(study / "folder", "bn", 2, 0, 65.0, **run)
    assert beside(study / "folder", published=chosen)["bn"] == ["65.3 [1] −0.30"]


def test_groups_count_where_the_paper_names_them(study):
    chosen = {"published": ["GN 1803.08494, Table 3 (groups)"], "errors": True}
    for groups in (8, 3):
        imagenet(study, "gn", 32, 0, 76.0, free=True, norm__groups=groups)
    made = beside(study, rows="norm.groups", **chosen)
    assert made == {"8": ["24.4 [1] −0.40"]}


def test_several_runs_of_a_source_are_all_shown(study):
    imagenet(study, "gn", 32, 0, 76.0, free=True, norm__groups=32)
    chosen = {"published": ["GN 1803.08494, reproduction"], "errors": True}
    assert beside(study, **chosen) == {"gn": ["24.0 / 24.0 / 24.1 [1]"]}


def test_options_are_beside_their_method(study):
    run = {"model__name": "resnet34_cifar", "data__name": "cifar10", "sgd": 128, "free": True}
    put(study, "pws_cifar", 2, 0, 95.0, method="pws", experiment="pws_cifar10", **run)
    assert beside(study) == {"pws_cifar": ["95.1 [1] −0.10"]}


def test_other_metrics(study):
    imagenet(study, "ws_gn", 2, 0, 76.0, experiment="ws_imagenet", free=True)
    assert beside(study, metric="top5") == {"ws_gn": ["93.01 [1] +5.99"]}
    assert beside(study, metric="test_loss") == {}
    assert "reports" not in table(study, metric="top5").caption


def test_a_table_that_nobody_published(study):
    put(study, "bn", 2, 0, 90.0)
    told = refused(study, published=["GN 1803.08494, Table 7"])
    assert "not in results/published.yaml (did you mean 'GN 1803.08494, Table 2'" in told


# Significance.


def three(study, norm, *values, batch=2, **other):
    for seed, value in enumerate(values):
        put(study, norm, batch, seed, value, **other)


def test_welch(study):
    one, two = (90.0, 91.0, 92.5), (93.5, 94.0, 95.0)
    three(study, "bn", *one)
    three(study, "gn", *two)
    three(study, "mabn", 90.0, 92.0, 91.0)
    made = table(study, baseline="bn")
    found = made.cells["p"].xs(2, level="column")
    assert math.isnan(found["bn"])
    assert found["gn"] == ttest_ind(one, two, equal_var=False).pvalue < 0.05 < found["mabn"]
    assert cells(study, baseline="bn")["gn"][2] == "94.17 ± 0.76* (3)"
    assert "*" not in cells(study, baseline="bn")["mabn"][2]
    assert made.caption.endswith(
        "* differs from bn in the same column (Welch's t-test, two-sided p < 0.05, not corrected "
        "for the number of tests)"
    )


def test_no_test_of_fewer_than_three_or_of_survivors(study):
    three(study, "bn", 90.0, 91.0, 92.0)
    three(study, "gn", 10.0, 11.0)
    three(study, "mabn", 10.0, 11.0, 12.0)
    put(study, "mabn", 2, 3, status="diverged")
    made = table(study, baseline="bn")
    assert made.cells["p"].isna().all()
    assert "not tested against bn, which takes 3 runs or more in both cells" in made.caption
    three(study, "pws", 10.0, 11.0, 12.0)
    assert "; tested where there are 3 runs or more" in table(study, baseline="bn").caption


def test_without_any_spread(study):
    three(study, "bn", 90.0, 90.0, 90.0)
    three(study, "gn", 90.0, 90.0, 90.0)
    three(study, "pws", 91.0, 91.0, 91.0)
    p = table(study, baseline="bn").cells["p"]
    assert (p["gn", 2], p["pws", 2]) == (1.0, 0.0)
    assert cells(study, baseline="bn")["pws"][2] == "91.00 ± 0.00* (3)"


# The files.


def test_files_and_screen(study, script, drawn_figures):
    put(study, "gn", 2, 0, 93.0, free=True, curve=[50.0])
    put(study, "bn", 2, 0, 90.0, curve=[50.0])
    put(study, "bn", 8, 0, 95.5, curve=[50.0])
    screen = script(study)
    shown = show([study])
    text = (study / "table.md").read_text()
    assert text == shown.markdown
    assert markdown(shown.tables[""]) in text
    assert "| bn | 90.00 (1) | 95.50 (1) |" in squeezed(text)
    for told in (
        "study: top-1 accuracy (%), last epoch, mean ± standard deviation (n seeds); resnet8 on "
        "digits, recipe digits, 2 epochs, protocol ghost, SGD batch 32, cpu (1 thread), torch "
        "2.14.1; n = 1",
        "† not run",
    ):
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
    names = ["accuracy_vs_batch.png", "training_curves.png", "cost_vs_batch.png"]
    assert [file.name for file in shown.pictures] == names
    for file in shown.pictures:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.with_suffix(".svg").read_text().startswith("<?xml")
        assert f"]({file.name})" in text


def test_quiet_and_elsewhere(study, tmp_path, capsys, drawn_figures):
    put(study, "bn", 2, 0, 90.0)
    before = sorted(study.rglob("*"))
    shown = show([study], Options(out=tmp_path / "a" / "b"))
    assert capsys.readouterr().out == ""
    assert sorted(study.rglob("*")) == before
    assert {file.parent for file in shown.pictures} == {tmp_path / "a" / "b"}


def test_a_line_of_csv_per_cell(study):
    for seed in range(3):
        run = {"experiment": "mabn_imagenet", "status": "finished"}
        imagenet(study, "bn", 2, seed, 64.0 + seed, **run)
        imagenet(study, "gn", 2, seed, 76.0 + seed, free=True, **run)
    put(study, "bn", 2, 3, error="boom", sgd=256, model__name="resnet50", data__name="imagenet")
    show([study], Options(errors=True, baseline="gn"))
    with open(study / "table.csv") as file:
        one, two = csv.DictReader(file)
    assert one["metric"] == "top-1 error (%), last epoch"
    assert (one["mean"], one["std"], one["n"], one["failed"]) == ("35.0", "1.0", "3", "1")
    assert (one["published"], one["source"]) == ("35.22", "mabn-readme")
    assert float(one["difference"]) == pytest.approx(-0.22)
    assert one["p"] == ""
    assert (two["published"], two["source"], two["difference"]) == ("n/a", "", "")


def test_latex(study):
    """Cells of every row, braces and environments in pairs, nothing that LaTeX would stumble on."""
    study = study / "a_b&c"
    for seed in range(3):
        imagenet(study, "bn", 2, seed, 64.0 + seed, experiment="mabn_imagenet")
        imagenet(study, "ws_gn", 2, seed, 76.0 + seed, experiment="mabn_imagenet", free=True)
    imagenet(study, "bn", 4, 0, 70.0, experiment="mabn_imagenet")
    show([study], Options(baseline="bn"))
    text = (study / "table.tex").read_text()
    for part in (
        r"\caption{a\_b\&c: top-1 accuracy (\%), last epoch",
        r"\begin{tabular}{lrr}",
        r"& \multicolumn{2}{c}{batch size} \\",
        r"scheme & 2 & 4 \\",
        r"bn & 65.00 $\pm$ 1.00 (3) & 70.00 (1) \\",
        r"ws\_gn & 77.00 $\pm$ 1.00$^{*}$ (3) & 77.00 $\pm$ 1.00$\dagger$ (3) \\",
        r"-- published & 64.78 [1] +0.22 & 72.1 [2] $-$2.10 \\",
    ):
        assert part in text
    for line in text.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == 2
    for begin, end in ((r"(?<!\\)\{", r"(?<!\\)\}"), (r"\\begin", r"\\end")):
        assert len(re.findall(begin, text)) == len(re.findall(end, text))
    assert text.isascii()
    assert r"a\b~^#{}$…×–<".translate(TEX) == (
        r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}\#\{\}\$\ldots{}$\times$--$<$"
    )


def test_a_study_without_a_single_result(study, drawn_figures):
    put(study, "bn", 2, 0)
    shown = show([study])
    assert "1 unfinished" in shown.markdown
    assert "; n = 0" in shown.markdown
    assert shown.pictures == []


def test_command_line(study):
    def call(*words):
        command = [sys.executable, str(ROOT / "scripts" / "table.py"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    made = call(study)
    assert made.returncode == 1
    assert made.stderr.startswith(f"error: {study}: no runs in it")
    assert len(made.stderr.splitlines()) == 1
    for seed, top1 in enumerate((90.0, 91.0, 92.0)):
        put(study, "bn", 2, seed, top1, curve=[93.0])
    made = call(study, "--rule", "best", "--errors", "--rows", "batch", "--columns", "norm")
    assert (made.returncode, made.stderr) == (0, "")
    assert "top-1 error (%), best epoch" in made.stdout
    assert f"{statistics.fmean((7, 7, 7)):.2f} ± 0.00 (3)" in made.stdout
    assert "batch size \\ scheme" in made.stdout
