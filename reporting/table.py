"""The table of one or several studies: its cells, its caption, its notes, and its files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from reporting import published
from reporting.cells import (
    LEVEL,
    cells,
    check,
    label,
    members,
    values,
    welch,
)
from reporting.measure import RULES, Measure
from reporting.read import STATES
from reporting.selection import SHORTER, Selection, held_out, select


def axis(key: str) -> str:
    """What a table calls its rows or columns."""
    return {"norm": "scheme", "batch": "batch size"}.get(key, key)


@dataclass
class Options:
    """Of the command line."""

    rows: str = "norm"
    columns: str = "batch"
    split: Sequence[str] = ()
    rule: str | None = None
    """None: of the experiment's paper, else the last epoch's."""
    metric: str | None = None
    """A number of result.json, instead of a rule."""
    errors: bool = False
    published: list[str] | None = None
    """Tables of published.yaml; None: the experiment's."""
    baseline: str | None = None
    select: str | None = None
    out: Path | None = None
    """Folder for the files; None: the last study's of those whose runs are shown."""


@dataclass
class Table:
    name: str
    setting: str
    """What the runs are, in a line."""
    caption: str
    """All that a reader of the numbers needs, in a line."""
    axes: tuple[str, str]
    """The keys of rows and columns."""
    measure: Measure
    runs: pd.DataFrame
    """With the row and column of each; those that fill other cells are there for each."""
    cells: pd.DataFrame
    """By (row, column): mean, std, n, how many runs are in each other state, filled, p, and what
    was published: `theirs` as printed, source, difference."""
    selection: Selection | None = None
    curves: dict[Any, dict[int, float]] = field(default_factory=dict)
    """Row: the published numbers by batch size."""
    references: list[str] = field(default_factory=list)
    """Lines about the published numbers."""

    @property
    def rows(self) -> list[Any]:
        return list(self.runs["row"].cat.categories)

    @property
    def columns(self) -> list[Any]:
        return list(self.runs["column"].cat.categories)

    @property
    def title(self) -> str:
        return f"{self.name}: {self.setting}"

    @property
    def sources(self) -> list[tuple[str, ...]]:
        """Of the published numbers; their place in the list is their number in the table."""
        return list(self.cells["source"].dropna().unique())

    def shown(self) -> pd.DataFrame:
        """What is printed, as texts: a line per row, and one below it with the published numbers
        where there are any."""
        chosen = self.selection if self.selection and self.axes[0] == "norm" else None
        head = [" \\ ".join(map(axis, self.axes)), *([chosen.key] if chosen else [])]
        ours = self.cells.apply(text, axis=1).unstack(sort=False)
        theirs = self.cells.apply(self.beside, axis=1).unstack(sort=False)
        lines = []
        for row in self.rows:
            extra = [label(chosen.values[row])] if chosen else []
            lines.append([label(row), *extra, *ours.loc[row]])
            if any(theirs.loc[row]):
                lines.append(["– published", *([""] if chosen else []), *theirs.loc[row]])
        return pd.DataFrame(lines, columns=[*head, *map(label, self.columns)])

    def beside(self, cell: pd.Series) -> str:
        """The published number, its source, and ours minus theirs."""
        if not cell["theirs"]:
            return "n/a" if cell["absent"] else ""
        apart = ""
        if pd.notna(cell["difference"]):
            apart = f" {round(cell['difference'], 2) + 0.0:+.2f}".replace("-", "−")  # and no -0.00
        return f"{cell['theirs']} [{self.sources.index(cell['source']) + 1}]{apart}"

    def notes(self) -> list[str]:
        """What stands below the table, a line each."""
        notes = []
        if self.cells["filled"].any():
            notes.append(
                "† not run: without batch statistics every batch size is the same computation here"
            )
        notes += self.references
        absent = self.cells["absent"].dropna().unique()
        if len(absent):
            notes.append(f"n/a: theirs, but in no source that we could read: {'; '.join(absent)}")
        lost = self.runs[self.runs["status"].isin(("failed", "damaged"))].drop_duplicates("folder")
        return notes + reasons(lost) + (self.selection.notes() if self.selection else [])


def reasons(lost: pd.DataFrame) -> list[str]:
    """Why runs failed or are damaged."""
    return [
        f"{run['run']} {run['status']}: {run['error'] or 'no reason given'}"
        for _, run in lost.iterrows()
    ]


def number(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 1000 else f"{x:,.0f}"


def text(cell: pd.Series) -> str:
    parts = []
    if cell["n"]:
        spread = f" ± {number(cell['std'])}" if cell["n"] > 1 else ""
        marks = "†" * cell["filled"] + "*" * (cell["p"] < LEVEL)
        parts.append(f"{number(cell['mean'])}{spread}{marks} ({cell['n']})")
    parts += [f"{cell[state]} {state}" for state in STATES if cell[state]]
    return ", ".join(parts) or "missing"


def listed(found: Any) -> str:
    return ", ".join(label(x) for x in dict.fromkeys(found))


def setting(runs: pd.DataFrame) -> str:
    """What the runs are: model, data, recipe, length, protocol, hardware."""
    over = runs[runs["status"].isin(("finished", "diverged"))]
    data = listed(dataset(run) for _, run in runs.iterrows())
    for part in dict.fromkeys(own.get("data.train_fraction", 1) for own in runs["identity"]):
        data += f" ({100 * part:g} % of its training images)" if part < 1 else ""
    if held_out(runs).any():
        data += ", evaluated on held-out training images"
    used = listed(map(statistics, runs["config"]))
    lengths = sorted(set(over.loc[over["status"] == "finished", "epochs"]))
    ratios = set(runs["sgd_batch_size"] / runs["batch_size"])
    sgd_batch = listed(sorted(set(runs["sgd_batch_size"])))
    if runs["sgd_batch_size"].nunique() > 1 and len(ratios) == 1:
        times = f"{ratios.pop():g}"
        sgd_batch = "equal to the batch size" if times == "1" else f"{times} x the batch size"
    parts = [
        f"{listed(runs['model'])} on {data}",
        *([f"batch norms by {used}"] if used != statistics({}) else []),
        f"recipe {listed(runs['recipe'])}",
        *([f"{listed(lengths)} epochs"] if lengths else []),
        f"protocol {listed(runs['protocol'])}",
        f"SGD batch {sgd_batch}",
    ]
    if len(over):
        threads = listed(over.loc[over["device"] == "cpu", "threads"])
        many = f" ({threads} thread{'s' * (threads != '1')})" if threads else ""
        parts.append(listed(over["device"]) + many)
        if "versions.torch" in over and over["versions.torch"].notna().any():
            parts.append(f"torch {listed(over['versions.torch'].dropna())}")
    return ", ".join(parts)


def statistics(config: dict[str, Any]) -> str:
    """By which the batch norms of a run were evaluated."""
    size, frozen = config.get("evaluation.batch_size"), config.get("recipe.freeze_statistics")
    kind = config.get("evaluation.statistics", "running")
    if kind == "batch":
        text = f"the statistics of test batches of {size}"
    elif kind == "precise":
        text = f"statistics of up to {config.get('evaluation.batches')} training batches of {size}"
    else:
        text = "running statistics"
    if frozen:
        text += f", frozen in the last {frozen} epochs"
    if alpha := config.get("evaluation.alpha"):
        text += f", {alpha:g} of each image's own"
    return text


def dataset(run: pd.Series) -> str:
    """The name of the data set: a folder's own, where it is a folder of images."""
    root = run["config"].get("data.root")
    return Path(str(root)).name if run["data"] == "folder" else str(run["data"])


def what(measure: Measure, reference: published.Reference) -> str:
    """What the numbers are, and by whose rule."""
    said = measure.name + (f", {measure.when}" if measure.when else "")
    for paper, rule in reference.papers.items():
        if rule and measure.rule:
            same = rule == measure.rule
            said += f" (as {paper} reports)" if same else f" ({paper} reports the {RULES[rule]})"
    return said


def tested(found: pd.DataFrame, baseline: str) -> str:
    """What the caption says of the significance marks."""
    others = found[(found.index.get_level_values("row").map(label) != baseline) & (found["n"] > 0)]
    need = "3 runs or more in both cells, all finished"
    if not others["p"].notna().any():
        return f"not tested against {baseline}, which takes {need}"
    rest = "" if others["p"].notna().all() else f"; tested where there are {need}"
    return (
        f"* differs from {baseline} in the same column (Welch's t-test, two-sided p < {LEVEL}, not "
        f"corrected for the number of tests{rest})"
    )


def make(runs: pd.DataFrame, part: str, options: Options) -> Table:
    """The table of these runs, which all have a configuration. Raises `ValueError`, in one line, if
    they cannot be one."""
    axes = (options.rows, options.columns)
    reference = published.choose(runs["experiment"], options.published)
    rules = set(reference.papers.values()) or {None}
    rule = options.rule or (rules.pop() if len(rules) == 1 else None) or "last"
    measure = Measure(options.metric or "top1", None if options.metric else rule, options.errors)

    free, selection = list(options.split), None
    if options.select:
        free.append(options.select)
        check(runs, axes, [*free, *SHORTER])
        for half in (runs[held_out(runs)], runs[~held_out(runs)]):
            check(half, axes, free)
        runs, selection = select(runs, options.select, measure)
    check(runs, axes, free)

    name = listed(runs["study"]).replace(", ", " + ") + (f" ({part})" if part else "")
    schemes = selection.values if selection and axes[0] == "norm" else ()
    placed = members(runs, axes, measure, schemes)
    found = cells(placed).assign(p=float("nan"))
    if options.baseline:
        found["p"] = welch(placed, found, options.baseline)
    counts = sorted(found.loc[found["n"] > 0, "n"])
    about = [
        f"{what(measure, reference)}, mean ± standard deviation (n seeds)",
        setting(runs),
        f"n = {' to '.join(map(str, dict.fromkeys(counts[:1] + counts[-1:] or [0])))}",
        *([selection.text()] if selection else []),
        *([tested(found, options.baseline)] if options.baseline else []),
    ]
    caption = f"{name}: {'; '.join(about)}"
    table = Table(name, setting(runs), caption, axes, measure, placed, found, selection)
    parts = {own.get("data.train_fraction", 1) for own in runs["identity"]} != {1}
    if (parts or held_out(runs).any()) and not options.published:
        reference.tables, reference.not_found = [], []  # theirs are of all images
    compare(table, runs, reference)
    return table


def compare(table: Table, runs: pd.DataFrame, reference: published.Reference) -> None:
    """Put the published numbers into the cells, the curves and the notes."""
    found = table.cells
    found[["theirs", "source", "absent", "difference"]] = None
    found["difference"] = found["difference"].astype(float)
    metric = table.measure.accuracy
    if not metric:
        return
    kin = relatives(table, runs, reference.batches())
    rows = published.beside(kin, reference, metric, table.measure.errors)
    unplaced, rows = rows[rows["unplaced"]], rows[~rows["unplaced"]]
    curves = table.axes[1] == "batch"
    for at, group in rows.groupby("at", sort=False):
        one = group["number"].iloc[0] if group["number"].nunique() == 1 else None
        if at in found.index:
            found.at[at, "theirs"] = " / ".join(map(str, group["number"]))
            found.at[at, "source"] = tuple(group.iloc[0][published.SOURCE])
            if one is not None and found.at[at, "n"]:
                found.at[at, "difference"] = found.at[at, "mean"] - float(one)
        if one is not None and curves:
            table.curves.setdefault(at[0], {})[at[1]] = float(one)
    for _, cell in kin.iterrows():
        if cell["at"] in found.index and not found.at[cell["at"], "theirs"]:
            found.at[cell["at"], "absent"] = reference.lost(cell)
    sources = rows[[at in found.index for at in rows["at"]]]
    if table.sources:
        table.references.append("published: their number, [its source], ours minus theirs")
    for i, source in enumerate(table.sources, 1):
        own = sources[sources[published.SOURCE].apply(tuple, axis=1) == source]
        table.references.append(f"[{i}] {published.describe(own)}")
    if curves:
        keys = [*published.SOURCE, "norm", "number"]
        for i in unplaced.drop_duplicates(keys).index:
            row = unplaced.loc[[i]].iloc[:1]
            table.references.append(
                f"at no batch size that is named: {row['norm'].iloc[0]} "
                f"{row['number'].iloc[0]}, {published.describe(row)}"
            )


def relatives(table: Table, runs: pd.DataFrame, batches: set[int]) -> pd.DataFrame:
    """For every cell, and every published batch size where columns are batch sizes, what a
    published number must be of: that of its first run, or, for a cell without, of the first in the
    same row at that batch size."""
    by_batch = table.axes.index("batch") if "batch" in table.axes else None
    columns = [*table.columns, *sorted(batches - set(table.columns))]
    places = [(r, c) for r in table.rows for c in (columns if by_batch == 1 else table.columns)]
    sizes = runs.groupby("batch_size")["sgd_batch_size"].unique()
    known = runs["sgd_batch_size"].unique()
    own = runs.assign(row=values(runs, table.axes[0]), column=values(runs, table.axes[1]))
    kin = []
    for at in places:
        same = own[(own["row"] == at[0]) & (own["column"] == at[1])]
        if same.empty and by_batch is not None:
            same = own[own["column" if by_batch == 0 else "row"] == at[1 - by_batch]]
        if same.empty:
            continue
        run = same.iloc[0]
        batch = int(run["batch_size"]) if by_batch is None else at[by_batch]
        sgd = sizes.get(batch, known)
        kin.append(
            {
                "at": at,
                "method": run["config"]["norm.name"],
                "network": run["model"],
                "images": dataset(run).lower(),
                "config": run["config"],
                "batch": batch,
                "sgd_batch": sgd[0] if len(sgd) == 1 else None,
            }
        )
    columns = ["at", *published.KIN, "config", "batch", "sgd_batch"]
    return pd.DataFrame(kin, columns=columns, dtype=object)
