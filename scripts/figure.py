"""Figures of a study."""

import statistics
import textwrap
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which the colour-blind can tell apart, and a marker for print.
STYLES = [
    ("#000000", "o"),
    ("#0072B2", "s"),
    ("#56B4E9", "D"),
    ("#009E73", "^"),
    ("#D55E00", "v"),
    ("#CC79A7", "P"),
    ("#E69F00", "X"),
]


def spread_out(values: list[float], gap: float) -> list[float]:
    """Heights for labels, close to `values` and at least `gap` apart, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = [values[i] for i in order]
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 1e-9:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
    result = [0.0] * len(values)
    for i, height in zip(order, heights, strict=True):
        result[i] = height
    return result


def accuracy_vs_batch(
    table: dict[str, dict[int, Any]], caption: str, label: str, file: Path
) -> None:
    """Mean accuracy of every scheme against the batch size, with a band of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4), dpi=150, layout="constrained")
    batches = sorted({batch for row in table.values() for batch in row})
    ends = []
    for (scheme, row), (colour, marker) in zip(table.items(), STYLES * 9, strict=False):
        points = [(b, c.values) for b, c in row.items() if c.values]
        if not points:
            continue
        x = [b for b, _ in points]
        mean = [statistics.fmean(v) for _, v in points]
        std = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
        axes.plot(x, mean, color=colour, marker=marker, markersize=5, linewidth=1.6)
        band = [[m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1)]
        axes.fill_between(x, band[0], band[1], color=colour, alpha=0.15, linewidth=0)
        ends.append((scheme, colour, x[-1], mean[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    axes.set_xlabel("batch size (images that share statistics)")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("\n".join(textwrap.wrap(caption, 100)), fontsize=7, loc="left")
    bottom, top = axes.get_ylim()
    heights = spread_out([y for *_, y in ends], 0.05 * (top - bottom))
    for (scheme, colour, end, y), height in zip(ends, heights, strict=True):
        axes.annotate(
            scheme,
            xy=(end, y),
            xytext=(1.02, height),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
            annotation_clip=False,
        )
    temporary = file.with_name(file.name + ".tmp")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(file)
