import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from reporting.measure import Measure
from reporting.output import show
from reporting.read import load
from reporting.selection import select
from reporting.table import Options
from tests.reporting.studies import put, squeezed

EXPERIMENT = ("experiment=cifar10_small", "study=x_lr", "data.holdout=0.1", "runtime.threads=1")


@pytest.fixture
def held(tmp_path):
    """Three schemes, three learning rates, one batch size, on held-out images."""
    study = tmp_path / "x_lr"
    for norm, scores in {"bn": (50, 60, 55), "gn": (40, 60, 50), "mabn": (40, 50, 60)}.items():
        for lr, top1 in zip((0.03, 0.1, 0.3), scores, strict=True):
            hold(study, norm, lr, float(top1))
    return study


def hold(study, norm, lr, top1=None, batch=32, seed=0, **other):
    words = (*EXPERIMENT, f"recipe.lr={lr}")
    run = {"experiment": "cifar10_small", "overrides": words, "data__holdout": 0.1, **other}
    put(study, norm, batch, seed, top1, recipe__lr=lr, **run)


def chosen(*studies, key="recipe.lr", **measure):
    shown, found = select(load(*studies), key, Measure(**measure))
    return set(shown["study"]), found


def refused(*studies, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        show(studies, Options(select="recipe.lr", **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_best_value_of_each_scheme(held):
    shown, found = chosen(held)
    assert found.values == {"bn": 0.1, "gn": 0.1, "mabn": 0.3}
    assert found.tried["bn"] == [0.03, 0.1, 0.3]
    assert found.notes() == [
        "recipe.lr of mabn: at the end of what was tried; the best may lie outside"
    ]
    assert shown == {"x_lr"}
    assert chosen(held, errors=True)[1].values == found.values


def test_values_that_only_some_schemes_were_tried_with_are_told(held):
    hold(held, "mabn", 1.0, 55.0)
    (note,) = chosen(held)[1].notes()
    assert note == (
        "recipe.lr was not chosen from the same values: bn 0.03, 0.1, 0.3; gn 0.03, 0.1, 0.3; "
        "mabn 0.03, 0.1, 0.3, 1"
    )


def test_a_loss_is_better_when_it_is_lower(tmp_path):
    for lr, loss in ((0.1, 1.5), (0.3, 1.0)):
        hold(tmp_path / "x", "bn", lr, 50.0, result={"test_loss": loss})
    assert chosen(tmp_path / "x", metric="test_loss", rule=None)[1].values == {"bn": 0.3}
    assert "not wall_seconds" in refused(tmp_path / "x", metric="wall_seconds")


def test_the_mean_over_batch_sizes_of_the_mean_over_seeds(tmp_path):
    study = tmp_path / "x"
    for batch, seed, one, two in ((2, 0, 50, 80), (32, 0, 90, 70), (32, 1, 90, 70)):
        hold(study, "bn", 0.1, float(one), batch, seed)
        hold(study, "bn", 0.3, float(two), batch, seed)
    assert chosen(study)[1].values == {"bn": 0.3}  # 75 against 70, though it wins fewer runs


def test_a_value_that_diverges_is_behind_all_others(held):
    hold(held, "brn", 0.1, 50.0)
    hold(held, "brn", 0.3, status="diverged")
    assert chosen(held)[1].values["brn"] == 0.1
    hold(held, "frn", 0.1, status="diverged")
    hold(held, "frn", 0.3, status="diverged")
    assert refused(held) == "--select recipe.lr: frn diverged with every value"


def test_the_choice_needs_all_runs_at_the_same_batch_sizes(held):
    hold(held, "brn", 0.1, 50.0)
    hold(held, "brn", 0.3, 50.0, batch=2)
    assert "brn has other batch sizes or numbers of seeds with 0.3 than with 0.1" in refused(held)
    hold(held, "frn", 0.1, 50.0)
    hold(held, "frn", 0.3)
    hold(held, "brn", 0.1, 50.0, batch=2)
    hold(held, "brn", 0.3, 50.0)
    assert "frn-b32-s0" in refused(held)
    assert "is unfinished; the choice needs all its runs" in refused(held)


def test_never_on_test_images(tmp_path):
    for lr in (0.1, 0.3):
        put(tmp_path / "x", "bn", 2, 0, 90.0, recipe__lr=lr)
    told = refused(tmp_path / "x")
    assert told.startswith("--select recipe.lr: bn has runs with 0.1 and 0.3 and data.holdout=0")
    assert "choosing on test images" in told
    put(tmp_path / "y", "bn", 2, 0, 90.0)
    for key in ("norm", "batch", "seed", "data.holdout"):  # what a choice is made for or on
        with pytest.raises(ValueError, match=f"--select {key}: is not chosen; expected a key"):
            show([tmp_path / "y"], Options(select=key))


def test_the_table_shows_the_values_and_the_commands(held, script):
    screen = script(held, "--select", "recipe.lr")
    text = squeezed((held / "table.md").read_text())
    assert "| scheme \\ batch size | recipe.lr | 32 |\n|:-|:-|-:|\n" in text
    assert "| bn | 0.1 | 60.00 (1) |" in text
    assert "| mabn | 0.3 | 60.00 (1) |" in text
    assert "evaluated on held-out training images" in text
    assert (
        "recipe.lr of each scheme, chosen on held-out training images from 0.03, 0.1, 0.3 "
        "(0.1: bn, gn; 0.3: mabn)"
    ) in text
    assert "recipe.lr of mabn: at the end of what was tried" in text
    lines = [line.strip() for line in screen.splitlines() if "train.py" in line]
    assert lines == [
        f"python train.py -m experiment=cifar10_small norm={norms} recipe.lr={lr} runtime.threads=1"
        for norms, lr in (("bn,gn", 0.1), ("mabn", 0.3))
    ]
    for line in lines:
        OverridesParser.create().parse_overrides(shlex.split(line)[3:])
    assert ',0.3,"top-1' in (held / "table.csv").read_text()
    assert r"\begin{tabular}{llr}" in (held / "table.tex").read_text()


def test_commands_keep_what_belongs_to_some_schemes_alone(tmp_path):
    """Without an experiment they name batch sizes and seeds too."""
    study = tmp_path / "x"
    for lr in (0.1, 0.3):
        words = {"experiment": None, "overrides": (f"recipe.lr={lr}", "+norm.groups=8")}
        hold(study, "gn", lr, 50 + lr, **words, norm__groups=8)
        hold(study, "bn", lr, 50 + lr, experiment=None, overrides=("data.holdout=0.1",))
    assert chosen(study)[1].commands == [
        "python train.py -m norm=bn batch=32 seed=0 recipe.lr=0.3",
        "python train.py -m norm=gn batch=32 seed=0 recipe.lr=0.3 +norm.groups=8",
    ]


def test_the_first_chooses_and_the_second_is_shown(held, tmp_path, script):
    for norm, lr in (("bn", 0.1), ("mabn", 0.3), ("mabn", 0.1)):
        put(tmp_path / "x", norm, 2, 0, 70 + lr, recipe__lr=lr, experiment="cifar10_small")
    studies = [held, tmp_path / "x"]
    assert chosen(*studies)[0] == {"x"}
    assert "The final study" not in script(*studies, "--select", "recipe.lr")
    text = squeezed((tmp_path / "x" / "table.md").read_text())
    assert squeezed(show(studies[::-1], Options(select="recipe.lr")).markdown) == text
    assert not (held / "table.md").exists()  # whichever comes last on the command line
    assert text.startswith("x: top-1 accuracy")
    assert "held-out training images from 0.03, 0.1, 0.3" in text
    assert ", evaluated on held-out" not in text
    assert "| bn | 0.1 | 70.10 (1) |" in text
    assert "| gn | 0.1 | missing |" in text
    assert "| mabn | 0.3 | 70.30 (1) |" in text


def test_a_final_study_with_another_value_is_refused(held, tmp_path):
    put(tmp_path / "x", "bn", 2, 0, 70.0, recipe__lr=0.3)
    told = refused(held, tmp_path / "x")
    assert told.endswith("bn was trained with 0.3, and the held-out images choose 0.1")


def test_a_final_study_that_differs_in_more_is_refused(held, tmp_path):
    put(tmp_path / "x", "bn", 2, 0, 70.0, recipe__weight_decay=0.1)
    assert "differ in recipe.weight_decay" in refused(held, tmp_path / "x")


def test_the_runs_that_choose_may_be_shorter_and_the_table_says_so(held, tmp_path):
    for norm in ("bn", "gn", "mabn"):
        longer = {"recipe__epochs": 30, "recipe__lr": 0.3 if norm == "mabn" else 0.1}
        put(tmp_path / "x", norm, 32, 0, 70.0, **longer)
    text = show([held, tmp_path / "x"], Options(select="recipe.lr")).markdown
    assert "held-out training images from 0.03, 0.1, 0.3 with recipe.epochs=absent (0.1:" in text
    put(tmp_path / "x", "bn", 32, 1, 70.0, recipe__epochs=20)
    assert "differ in recipe.epochs" in refused(held, tmp_path / "x")


def test_a_final_study_by_itself_may_differ_between_schemes(tmp_path):
    for norm, lr in (("bn", 0.1), ("mabn", 0.3)):
        put(tmp_path / "x", norm, 2, 0, 70.0, recipe__lr=lr)
    shown = show([tmp_path / "x"], Options(select="recipe.lr"))
    assert "| mabn | 0.3 | 70.00 (1) |" in squeezed(shown.markdown)
    assert "recipe.lr of each scheme (0.1: bn; 0.3: mabn)" in squeezed(shown.markdown)
    assert "chosen" not in shown.markdown


def test_within_a_split(held):
    hold(held, "bn", 0.03, 90.0, protocol__name="accumulate")
    hold(held, "bn", 0.1, 80.0, protocol__name="accumulate")
    shown = show([held], Options(select="recipe.lr", split=["protocol.name"]))
    values = {part: table.selection.values["bn"] for part, table in shown.tables.items()}
    assert values == {"protocol.name=accumulate": 0.03, "protocol.name=ghost": 0.1}
