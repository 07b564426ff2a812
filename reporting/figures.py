"""The figures of a table: accuracy, training curves and costs. One style, for paper and screen."""

import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd

from reporting.cells import label
from reporting.table import Table, axis
from training.files import read_metrics, write

# Okabe and Ito's palette, which the colour-blind can tell apart, and a marker for grey print.
STYLES = [
    ("#000000", "o"),
    ("#0072B2", "s"),
    ("#56B4E9", "D"),
    ("#009E73", "^"),
    ("#D55E00", "v"),
    ("#CC79A7", "P"),
    ("#E69F00", "X"),
]
# A scheme looks the same in every figure, whatever else is in it.
SCHEMES = dict(zip(("bn", "gn", "ws_gn", "bcn", "pws", "mabn", "brn"), STYLES, strict=True)) | {
    "sync_bn": ("#000000", "*"),
    "ws_bn": ("#777777", "h"),
    "ln": ("#777777", "<"),
    "in": ("#777777", ">"),
    "none": ("#777777", "d"),
    "frn": ("#0072B2", "p"),
    "evonorm_s0": ("#009E73", "<"),
    "evonorm_b0": ("#D55E00", ">"),
}
SPARE = ("*", "d", "<", ">", "p", "h", "8")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "smallbatch",  # the same figure is the same file
}


def style(name: str) -> tuple[str, str]:
    """Colour and marker of a scheme. An option of one, such as pws_imagenet, has its colour; any
    other name always has the same two."""
    if name in SCHEMES:
        return SCHEMES[name]
    known = [scheme for scheme in SCHEMES if name.startswith(f"{scheme}_")]
    number = crc32(name.encode())
    colour = SCHEMES[max(known, key=len)][0] if known else STYLES[number % len(STYLES)][0]
    return colour, SPARE[number // len(STYLES) % len(SPARE)]


def styles(table: Table) -> dict[Any, tuple[str, str]]:
    """Colour and marker of every row."""
    if table.axes[0] == "norm":
        return {row: style(row) for row in table.rows}
    return dict(zip(table.rows, itertools.cycle(STYLES), strict=False))


@contextmanager
def figure(
    file: Path, title: str, shape: tuple[int, int], size: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with its axes, saved as `file` (PNG) and as SVG when the `with` ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        drawn, grid = plt.subplots(
            *shape, figsize=size, layout="constrained", squeeze=False, **options
        )
        drawn.suptitle(
            "\n".join(textwrap.wrap(title, int(17.5 * size[0]))), fontsize=7.5, x=0.01, ha="left"
        )
        drawn.get_layout_engine().set(w_pad=0.08)
        try:
            yield drawn, list(grid.flat)
            for kind, own in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                content = io.BytesIO()
                drawn.savefig(content, format=kind, **own)
                write(file.with_suffix(f".{kind}"), content.getvalue())
        finally:
            plt.close(drawn)


def spread_out(
    values: list[float], gap: float, low: float = -math.inf, high: float = math.inf
) -> list[float]:
    """Heights for labels, close to `values`, at least `gap` apart where there is room between
    `low` and `high`, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = [values[i] for i in order]
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 1e-9:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
        heights = [min(max(height, low), high) for height in heights]
    result = [0.0] * len(values)
    for i, height in zip(order, heights, strict=True):
        result[i] = height
    return result


def name_lines(axes: Any, ends: list[tuple[str, str, float, float]]) -> None:
    """The names of lines at their right ends: (name, colour, x, y) each."""
    axes.get_xlim(), axes.get_ylim()  # settles the limits
    to_axes = axes.transScale + axes.transLimits
    places = [to_axes.transform((x, y))[1] for *_, x, y in ends]
    heights = spread_out(places, 0.17 / (axes.figure.get_figheight() - 1), 0.01, 1)  # 0.17 inches
    for (name, colour, x, y), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            arrowprops={
                **{"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
                **{"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0},
            },
            annotation_clip=False,
        )


def across(axes: Any, columns: list[Any], table: Table) -> dict[Any, float]:
    """Where each column stands on the x axis: by its logarithm if all are numbers above 0."""
    numbers = all(isinstance(c, int | float) and c > 0 for c in columns)
    places = {c: float(c) if numbers else float(i) for i, c in enumerate(columns)}
    if numbers:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), [label(c) for c in columns])
    axes.minorticks_off()
    share = " (images that share statistics)" if table.axes[1] == "batch" else ""
    axes.set_xlabel(axis(table.axes[1]) + share)
    return places


def line(axes: Any, points: list[tuple[float, list[float]]], colour: str, **options: Any) -> None:
    """Means with a band of one standard deviation."""
    x = [place for place, _ in points]
    mean = [statistics.fmean(values) for _, values in points]
    std = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axes.plot(x, mean, color=colour, **options)
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw(table: Table, folder: Path, suffix: str = "") -> list[Path]:
    """All figures of a table that its runs have numbers for; returns the PNG files, each of which
    has an SVG beside it."""
    accuracy = "error" if table.measure.errors else "accuracy"
    what = accuracy if table.measure.accuracy else table.measure.metric
    against = "".join(c if c.isalnum() else "_" for c in table.axes[1])
    made = [
        numbers(table, folder / f"{what}_vs_{against}{suffix}.png"),
        training_curves(table, folder / f"training_curves{suffix}.png"),
        costs(table, folder / f"cost_vs_{against}{suffix}.png"),
    ]
    return [file for file in made if file]


def numbers(table: Table, file: Path) -> Path | None:
    """The table's numbers against its columns, with a mark where a run was made, and dashed what is
    published."""
    from matplotlib.lines import Line2D

    finished = table.runs.dropna(subset="value")
    if finished.empty:
        return None
    with figure(file, table.title, (1, 1), (7, 3.4 + 0.12 * len(table.rows))) as (drawn, (axes,)):
        columns = list(table.columns)
        if table.axes[1] == "batch":
            columns = sorted({*columns, *(b for curve in table.curves.values() for b in curve)})
        place = across(axes, columns, table)
        ends = []
        for row, (colour, marker) in styles(table).items():
            groups = finished[finished["row"] == row].groupby("column", observed=True)
            ours = [(place[column], list(group["value"])) for column, group in groups]
            trained = [i for i, (_, group) in enumerate(groups) if not group["filled"].any()]
            theirs = [(place[b], [x]) for b, x in sorted(table.curves.get(row, {}).items())]
            dashed: dict[str, Any] = {
                "linestyle": (0, (4, 2)),
                "linewidth": 1.1,
                "markerfacecolor": "white",
            }
            line(axes, theirs, colour, marker=marker, **dashed)
            line(axes, ours, colour, marker=marker, markevery=trained)
            if ours or theirs:
                x, values = (ours or theirs)[-1]
                ends.append((label(row), colour, x, statistics.fmean(values)))
        when = f", {table.measure.when}" if table.measure.when else ""
        axes.set_ylabel(table.measure.name + when)
        name_lines(axes, ends)
        if table.curves:
            proxy = Line2D([], [], color="#555555", marker="o", **dashed)
            sources = dict.fromkeys(f"{paper}, {name}" for paper, name, *_ in table.sources)
            drawn.legend(
                [proxy], [f"dashed: {'; '.join(sources)}"], loc="outside lower left", fontsize=7.5
            )
    return file


def learning(runs: pd.DataFrame, errors: bool) -> list[tuple[float, list[float]]]:
    """Epoch and the test accuracies of the seeds, where all of them were evaluated."""
    curves = [
        pd.Series({e["epoch"]: e["test_top1"] for e in epochs if "test_top1" in e}, dtype=float)
        for epochs in runs["history"]
    ]
    shared = pd.concat(curves, axis=1, join="inner") if curves else pd.DataFrame()
    shared = 100 - shared if errors else shared
    return [(epoch, list(row)) for epoch, row in shared.sort_index().iterrows()]


def training_curves(table: Table, file: Path, most: int = 4) -> Path | None:
    """Test accuracy after each epoch, a panel for each of at most `most` columns."""
    finished = table.runs[table.runs["status"] == "finished"]
    points = {
        at: learning(group, table.measure.errors)
        for at, group in finished.groupby(["row", "column"], observed=True)
    }
    columns = [c for c in table.columns if any(len(points.get((r, c), ())) > 1 for r in table.rows)]
    if not columns:
        return None
    over, title = axis(table.axes[1]), table.title
    if len(columns) > most:
        shown = [columns[round(i * (len(columns) - 1) / (most - 1))] for i in range(most)]
        left = ", ".join(label(c) for c in columns if c not in shown)
        columns, title = shown, f"{title}; not drawn: {over} {left}"
    shape = (math.ceil(len(columns) / 2), min(2, len(columns)))
    size = (7 if len(columns) > 1 else 6, 0.9 + 2.5 * shape[0])
    with figure(file, title, shape, size, sharex=True, sharey=True) as (drawn, panels):
        for axes, column in zip(panels, columns, strict=False):
            for i, (row, (colour, marker)) in enumerate(styles(table).items()):
                if epochs := points.get((row, column)):
                    every = max(1, len(epochs) // 6)
                    marks = {"marker": marker, "markevery": (i % every, every)}
                    line(axes, epochs, colour, label=label(row), **marks)
            axes.set_title(f"{over} {label(column)}")
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels[len(columns) :]:
            axes.set_visible(False)
        for axes in panels:
            axes.label_outer()
        drawn.supylabel(f"test {'error' if table.measure.errors else 'accuracy'} (%)", fontsize=9)
        named = [axes.get_legend_handles_labels() for axes in panels]
        handles = {name: mark for pair in named for mark, name in zip(*pair, strict=True)}
        drawn.legend(
            *(handles.values(), handles),
            loc="outside lower center",
            ncols=min(6, len(handles)),
            fontsize=8,
            columnspacing=1.4,
        )
    return file


def epoch_seconds(run: pd.Series) -> float | None:
    """Of training an epoch, evaluation aside: the median over epochs."""
    speeds = [e["images_per_second"] for e in run["history"] if e.get("images_per_second")]
    updates = run["history"][0]["update"] if speeds else 0
    return updates * run["sgd_batch_size"] / statistics.median(speeds) if speeds else None


def gibibytes(run: pd.Series) -> float | None:
    memory = run["peak_memory_bytes"]
    return None if pd.isna(memory) else memory / 2**30


def costs(table: Table, file: Path) -> Path | None:
    """Time of an epoch and peak memory against the columns, of runs on the same hardware."""
    runs = table.runs[(table.runs["status"] == "finished") & ~table.runs["filled"]]
    if len(set(zip(runs["device"], runs["threads"], strict=True))) != 1:
        return None
    panels = {}
    for name, of in {
        "seconds per epoch (training)": epoch_seconds,
        "peak memory (GiB)": gibibytes,
    }.items():
        cost = pd.Series([of(run) for _, run in runs.iterrows()], runs.index, dtype=float)
        if cost.notna().any():
            panels[name] = runs.assign(cost=cost).dropna(subset="cost")
    if not panels:
        return None
    size = (3.2 + 3.2 * len(panels), 3.2 + 0.12 * len(table.rows))
    with figure(file, table.title, (1, len(panels)), size) as (_, grid):
        for axes, (name, measured) in zip(grid, panels.items(), strict=True):
            place = across(axes, table.columns, table)
            ends = []
            for row, (colour, marker) in styles(table).items():
                groups = measured[measured["row"] == row].groupby("column", observed=True)["cost"]
                points = [(place[column], list(group)) for column, group in groups]
                line(axes, points, colour, marker=marker)
                if points:
                    x, values = points[-1]
                    ends.append((label(row), colour, x, statistics.fmean(values)))
            low, high = measured["cost"].min(), measured["cost"].max()
            logarithmic(axes) if high > 5 * low else axes.set_ylim(0, 1.08 * high)
            axes.set_ylabel(name)
            name_lines(axes, ends)
    return file


def logarithmic(axes: Any) -> None:
    """The y axis, with plain numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


PROBES = {  # statistic: what its panel says, and a line to compare with
    "mean_spread": ("batch mean / its layer's deviation", None),
    "var_spread": ("batch variance / its average", None),
    "phi_spread": ("backward: mean of g / rms of g", None),
    "psi_spread": ("backward: mean of g z / rms of g", None),
    "gradient_shift": ("mean of a filter's gradient (chance: 1)", 1.0),
    "weight_shift": ("mean of a filter's weights (chance: 1)", 1.0),
    "output_variance": ("variance of the convolution's output", None),
}


def probed(run: Path, epoch: int | None) -> dict[str, dict[str, float]]:
    """Statistic: {layer: value}, of a run's last epoch or of `epoch`. Raises `ValueError` if it has
    none."""
    rows = [row for row in read_metrics(run) if epoch is None or row["epoch"] == epoch]
    curves: dict[str, dict[str, float]] = {}
    for column, value in rows[-1].items() if rows else ():
        if column.startswith("probe/"):
            _, statistic, layer = column.split("/")
            curves.setdefault(statistic, {})[layer] = value
    if not set(curves) & set(PROBES):
        when = "" if epoch is None else f" in epoch {epoch}"
        raise ValueError(f"{run}: metrics.csv has no column of a probe{when}; train with probe=…")
    return curves


def probes(runs: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """The picture of a probe, a panel per statistic and a line per run; raises `ValueError` if the
    runs do not have the same ones."""
    first, *others = runs.values()
    names = [name for name in PROBES if name in first]
    layers = list(first[names[0]])
    if any([name for name in PROBES if name in other] != names for other in others):
        raise ValueError("the runs have different probes; expected runs of one probe")
    if any(list(other[names[0]]) != layers for other in others):
        raise ValueError("the runs have different layers; expected runs of one network")
    with figure(file, "", (1, len(names)), (3.2 * len(names), 3.9)) as (drawn, grid):
        for axes, name in zip(grid, names, strict=True):
            title, reference = PROBES[name]
            for (run, curves), (colour, marker) in zip(
                runs.items(), itertools.cycle(STYLES), strict=False
            ):
                axes.plot(list(curves[name].values()), color=colour, marker=marker, label=run)
            if reference is not None:
                axes.axhline(reference, color="grey", linewidth=0.8, linestyle=":")
            values = [value for curves in runs.values() for value in curves[name].values()]
            wide = (
                5 < max(values) / max(min(values), 1e-30) < 1000
            )  # 0, but for rounding, has no log
            logarithmic(axes) if wide else axes.set_ylim(bottom=0)
            axes.tick_params("y", labelsize=7)
            axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
            axes.set_title(title, fontsize=8)
        handles, labels = grid[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
