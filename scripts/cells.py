"""The cells of a table: the runs of a row and a column, and what follows from their numbers."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from scripts import published
from scripts.runs import Measure, Record, label

ORDER = ("bn", "gn", "ws_gn", "bcn", "pws", "mabn")  # of schemes: these first
LEVEL = 0.05  # of significance
STATES = ("diverged", "failed", "unfinished")


def axis(key: str) -> str:
    """What a table calls its rows or columns."""
    return {"norm": "scheme", "batch": "batch size"}.get(key, key)


@dataclass
class Cell:
    """The runs of one row and one column."""

    runs: list[Record] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    """Of the finished ones, in the same order as these."""
    filled: bool = False
    """The runs are those of another batch size, which are the same computation."""
    rows: list[published.Row] = field(default_factory=list)
    """Published, of this cell."""
    theirs: Decimal | None = None
    """The published number, unless several stand here."""
    absent: str | None = None
    """What a paper has here and we have no source for."""
    p: float | None = None
    """Of Welch's test against the baseline's cell."""

    def count(self, state: str) -> int:
        return sum(run.state == state for run in self.runs)

    @property
    def finished(self) -> list[Record]:
        return [run for run in self.runs if run.state == "finished"]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours - published."""
        both = self.mean is not None and self.theirs is not None
        return self.mean - float(self.theirs) if both else None  # type: ignore[operator, arg-type]

    def text(self) -> str:
        parts = []
        if self.mean is not None:
            spread = f" ± {number(self.std)}" if self.std is not None else ""
            marks = "†" * self.filled + "*" * (self.p is not None and self.p < LEVEL)
            parts.append(f"{number(self.mean)}{spread}{marks} ({len(self.values)})")
        parts += [f"{self.count(state)} {state}" for state in STATES if self.count(state)]
        return ", ".join(parts) or "missing"


def number(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 1000 else f"{x:,.0f}"


Cells = dict[Any, dict[Any, Cell]]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Schemes as in `ORDER`, numbers by size, everything else by name."""

    def place(value: Any) -> tuple[int, float, str]:
        if isinstance(value, str) and value in ORDER:
            return 0, ORDER.index(value), ""
        if isinstance(value, int | float):
            return 1, value, ""
        return 2, 0, str(value)

    return sorted(dict.fromkeys(values), key=place)


def tabulate(
    records: list[Record], axes: tuple[str, str], measure: Measure, rows: Iterable[Any] = ()
) -> Cells:
    """Row -> column -> cell, both in order; every row has every column. `rows` that no run has
    are there too."""
    across = ordered(r.value(axes[1]) for r in records)
    down = ordered([*(r.value(axes[0]) for r in records), *rows])
    cells: Cells = {row: {column: Cell() for column in across} for row in down}
    for record in records:
        cells[record.value(axes[0])][record.value(axes[1])].runs.append(record)
    fixed = all(r.value("protocol.sgd_batch") for r in records)
    if "batch" in axes and fixed and len({r.sgd_batch for r in records}) == 1:
        lines = [list(row.values()) for row in cells.values()]
        for line in lines if axes[1] == "batch" else zip(*lines, strict=True):
            fill(list(line))
    for row in cells.values():
        for cell in row.values():
            cell.values = [measure.of(run) for run in cell.finished]
    return cells


def fill(line: list[Cell]) -> None:
    """A scheme without batch statistics at a fixed SGD batch is the same computation at every
    batch size: where it was not run, its other runs stand, one for each seed."""
    over = [run for cell in line for run in cell.runs if run.result]
    if over and all(run.result and run.result["batch_free"] for run in over):
        by_seed = {run.seed: run for run in reversed(over)}
        for cell in line:
            if not cell.runs:
                cell.runs, cell.filled = [by_seed[seed] for seed in sorted(by_seed)], True


def welch(cells: Cells, baseline: str) -> None:
    """Welch's t-test of every cell against the baseline's in the same column, where both have three
    runs or more and all of them finished. Raises `ValueError` if there is no such row."""
    from scipy.stats import ttest_ind

    rows = {label(row): row for row in cells}
    if baseline not in rows:
        raise ValueError(f"--baseline {baseline}: no such row; expected one of {', '.join(rows)}")
    base = cells[rows[baseline]]
    for row in cells.values():
        for column, cell in row.items():
            other = base[column]
            if cell is other or any(len(c.values) < max(3, len(c.runs)) for c in (cell, other)):
                continue
            if cell.std == other.std == 0:  # where the test divides by 0
                cell.p = float(cell.mean == other.mean)
            else:
                cell.p = float(ttest_ind(cell.values, other.values, equal_var=False).pvalue)
