"""The picture of a probe: its statistics layer by layer, one line per run.

    python scripts/probe.py runs/STUDY/RUN… [--out probe.png] [--epoch N]

The runs are those of one probe (`probe=batch_statistics` or `probe=gradient_shift`) on one network.
Reads their metrics.csv and nothing else.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.figure import STYLES

TITLES = {  # of the statistics that are drawn, and a line to compare with
    "mean_spread": ("batch mean / its layer's deviation", None),
    "var_spread": ("batch variance / its average", None),
    "phi_spread": ("backward: mean of g / rms of g", None),
    "psi_spread": ("backward: mean of g z / rms of g", None),
    "gradient_shift": ("mean of a filter's gradient (chance: 1)", 1.0),
    "weight_shift": ("mean of a filter's weights (chance: 1)", 1.0),
    "output_variance": ("variance of the convolution's output", None),
}
Curves = dict[str, dict[str, float]]  # statistic: {layer: value}


def read(run: Path, epoch: int | None) -> Curves:
    """A run's statistics in its last epoch, or in `epoch`. Raises `ValueError` if it has none."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if epoch is None or r["epoch"] == str(epoch)]
    curves: Curves = {}
    for column, value in rows[-1].items() if rows else ():
        if column.startswith("probe/") and value:
            _, statistic, layer = column.split("/")
            curves.setdefault(statistic, {})[layer] = float(value)
    if not set(curves) & set(TITLES):
        when = "" if epoch is None else f" in epoch {epoch}"
        raise ValueError(f"{run}: metrics.csv has no column of a probe{when}; train with probe=…")
    return curves


def name(run: Path, runs: list[Path]) -> str:
    """Of a run's folder, without the hash where that is enough to tell the runs apart."""
    short = [r.name.rsplit("-", r.name.count("-") - 2)[0] for r in runs]
    return short[runs.index(run)] if len(set(short)) == len(runs) else run.name


def draw(runs: dict[str, Curves], file: Path) -> None:
    """A panel per statistic; raises `ValueError` if the runs do not have the same ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    first, *others = runs.values()
    statistics = [s for s in TITLES if s in first]
    layers = list(first[statistics[0]])
    if any([s for s in TITLES if s in o] != statistics for o in others):
        raise ValueError("the runs have different probes; expected runs of one probe")
    if any(list(o[statistics[0]]) != layers for o in others):
        raise ValueError("the runs have different layers; expected runs of one network")
    figure, grid = plt.subplots(
        1, len(statistics), figsize=(3.2 * len(statistics), 3.9), dpi=150, layout="constrained"
    )
    for axes, statistic in zip(grid, statistics, strict=True):
        title, reference = TITLES[statistic]
        for (name, curves), (colour, marker) in zip(runs.items(), STYLES * 9, strict=False):
            values = list(curves[statistic].values())
            axes.plot(values, color=colour, marker=marker, markersize=4, linewidth=1.3, label=name)
        if reference is not None:
            axes.axhline(reference, color="grey", linewidth=0.8, linestyle=":")
        shown = [v for curves in runs.values() for v in curves[statistic].values()]
        if 5 < max(shown) / max(min(shown), 1e-30) < 1000:  # 0, but for rounding, is no power of 10
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=0)
        axes.tick_params("y", labelsize=7)
        axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
        axes.set_title(title, fontsize=8, loc="left")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False
    )
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with a probe")
    parser.add_argument("--out", type=Path, default=Path("probe.png"), help="the picture to write")
    parser.add_argument("--epoch", type=int, help="which epoch (default: the last)")
    args = parser.parse_args()
    try:
        draw({name(run, args.runs): read(run, args.epoch) for run in args.runs}, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
