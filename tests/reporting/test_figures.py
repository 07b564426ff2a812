import xml.etree.ElementTree as ET

import matplotlib.figure
import pytest
from matplotlib.colors import to_hex

from reporting import figures as figure
from reporting.figures import SCHEMES, spread_out, style
from reporting.read import load
from reporting.table import Options, make
from tests.reporting.studies import put


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they are saved, by the name of their file."""
    found = {}
    save = matplotlib.figure.Figure.savefig

    def keep(self, *args, **options):
        found[options["format"]] = self
        return save(self, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return found


@pytest.fixture
def study(tmp_path):
    return tmp_path / "study"


def table(study, **options):
    return make(load(study), "", Options(**options))


def lines(axes):
    """Colour, marker, linestyle and points of the lines that have any."""
    return [
        (
            to_hex(x.get_color()).upper(),
            x.get_marker(),
            x.get_linestyle(),
            list(x.get_xdata()),
            list(x.get_ydata()),
        )
        for x in axes.get_lines()
        if len(x.get_xdata())
    ]


def fill(study, schemes=("bn", "mabn"), batches=(2, 8, 32), **other):
    for norm in schemes:
        for batch in batches:
            for seed in (0, 1):
                put(study, norm, batch, seed, 90.0 + batch / 8 + seed, curve=[50.0, 80.0], **other)


def test_accuracy_against_batch_size(study, drawn):
    fill(study)
    file = figure.numbers(table(study), study / "x.png")
    assert file == study / "x.png"
    axes = drawn["png"].axes[0]
    assert lines(axes) == [
        ("#000000", "o", "-", [2, 8, 32], [90.75, 91.5, 94.5]),
        ("#CC79A7", "P", "-", [2, 8, 32], [90.75, 91.5, 94.5]),
    ]
    assert [t.get_text() for t in axes.texts] == ["bn", "mabn"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "8", "32"]
    assert axes.get_ylabel() == "top-1 accuracy (%), last epoch"
    assert drawn["png"].legends == []


def test_published_curves_are_dashed_in_the_same_colour(study, drawn):
    run = {"experiment": "mabn_imagenet", "model__name": "resnet50", "data__name": "imagenet"}
    put(study, "mabn", 2, 0, 76.0, sgd=256, **run)
    put(study, "bn", 2, 0, sgd=256, **run)
    figure.numbers(table(study, errors=True), study / "x.png")
    axes = drawn["png"].axes[0]
    batches = [1, 2, 4, 8, 16, 32]
    assert lines(axes) == [
        ("#000000", "o", "--", batches[1:], [35.22, 27.9, 25.45, 24.27, 23.41]),
        ("#CC79A7", "P", "--", batches, [23.71, 23.67, 23.71, 23.61, 23.71, 23.52]),
        ("#CC79A7", "P", "-", [2], [24.0]),
    ]
    (legend,) = drawn["png"].legends
    assert legend.get_texts()[0].get_text().startswith("dashed: MABN 2001.06838, README ImageNet")
    assert sorted(t.get_text() for t in axes.texts) == ["bn", "mabn"]


def test_training_curves(study, drawn):
    fill(study)
    put(study, "gn", 32, 0, 93.0, curve=[60.0], free=True)
    figure.training_curves(table(study), study / "x.png")
    panels = drawn["png"].axes
    shown = [a for a in panels if a.get_visible()]
    assert [a.get_title(loc="left") for a in shown] == [f"batch size {b}" for b in (2, 8, 32)]
    assert lines(shown[0])[0][3:] == ([1, 2, 3], [50.0, 80.0, 90.75])
    assert lines(shown[0])[1][3:] == ([1, 2], [60.0, 93.0])  # the same at every batch size
    (legend,) = drawn["png"].legends
    assert [t.get_text() for t in legend.get_texts()] == ["bn", "gn", "mabn"]


def test_at_most_four_panels_from_the_smallest_to_the_largest(study, drawn):
    fill(study, ("bn",), (1, 2, 4, 8, 16, 32))
    figure.training_curves(table(study, errors=True), study / "x.png")
    titles = [a.get_title(loc="left") for a in drawn["png"].axes]
    assert titles == [f"batch size {b}" for b in (1, 4, 8, 32)]
    assert lines(drawn["png"].axes[0])[0][4][:2] == [50.0, 20.0]


def test_no_curve_of_a_single_evaluation(study):
    put(study, "bn", 2, 0, 90.0)
    assert figure.training_curves(table(study), study / "x.png") is None


def test_costs(study, drawn):
    """40 updates of 32 images at 640 + batch images per second."""
    fill(study, result={"peak_memory_bytes": 3 * 2**30, "device": "NVIDIA H200"})
    put(study, "gn", 32, 0, 93.0, free=True, result={"device": "NVIDIA H200"})
    figure.costs(table(study), study / "x.png")
    time, memory = drawn["png"].axes
    seconds = [pytest.approx(40 * 32 / (640 + batch)) for batch in (2, 8, 32)]
    assert lines(time)[0][3:] == ([2, 8, 32], seconds)
    assert lines(time)[1][3:] == ([32], seconds[2:])  # where it was run, nowhere else
    assert lines(memory)[0][4] == [3.0, 3.0, 3.0]
    assert memory.get_ylabel() == "peak memory (GiB)"


def test_no_memory_where_none_was_measured_and_no_costs_of_two_machines(study, drawn):
    fill(study)
    figure.costs(table(study), study / "x.png")
    assert len(drawn["png"].axes) == 1
    put(study, "gn", 32, 0, 93.0, result={"device": "NVIDIA H200"})
    assert figure.costs(table(study), study / "y.png") is None


def test_columns_that_are_no_numbers(study, drawn):
    fill(study, batches=(2,))
    figure.numbers(table(study, rows="batch", columns="norm"), study / "x.png")
    axes = drawn["png"].axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["bn", "mabn"]
    assert [t.get_text() for t in axes.texts] == ["2"]


def test_the_same_files_every_time(study, tmp_path, drawn_figures):
    fill(study)
    made = table(study)
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        names = [file.name for file in figure.draw(made, folder, "_a")]
    assert names == [
        f"{x}_a.png" for x in ("accuracy_vs_batch", "training_curves", "cost_vs_batch")
    ]
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()
        if file.suffix == ".svg":
            assert "dc:date" not in file.read_text()
            ET.parse(file)
    assert len(list(first.iterdir())) == 6


def test_a_scheme_keeps_its_colour(study, drawn):
    looks = []
    for i, schemes in enumerate((("bn", "mabn"), ("frn", "mabn", "brn"))):
        fill(study / str(i), schemes, (2,))
        figure.numbers(table(study / str(i)), study / "x.png")
        looks.append(next(x[:2] for x in lines(drawn["png"].axes[0]) if x[1] == "P"))
    assert looks == [("#CC79A7", "P")] * 2


def test_styles_tell_schemes_apart():
    assert len(set(SCHEMES.values())) == len(SCHEMES)
    assert style("pws_imagenet")[0] == style("pws")[0]
    assert style("pws_imagenet") != style("pws")
    assert style("ws_bn_mine")[0] == style("ws_bn")[0]
    assert style("mine") == style("mine")


def test_labels_do_not_overlap():
    heights = spread_out([50.0, 50.1, 49.9, 80.0], 2.0)
    assert sorted(heights)[1] - sorted(heights)[0] >= 1.99
    assert heights[2] < heights[0] < heights[1] < heights[3] == 80.0
    low = spread_out([0.0, 0.01, 0.02], 0.1, 0.0, 1.0)
    assert low == pytest.approx([0.0, 0.1, 0.2], abs=0.01)
