"""The files of a table: Markdown, CSV, LaTeX and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock

from reporting import figures
from reporting.cells import require, split
from reporting.read import STATES, load
from reporting.table import Options, Table, axis, make, reasons
from training.files import write


@dataclass
class Shown:
    """What `show` has made."""

    markdown: str
    pictures: list[Path]
    """PNG; each has an SVG of the same name beside it."""
    tables: dict[str, Table]
    """By split; "" without one."""
    runs: pd.DataFrame
    folder: Path
    """Where the files are."""
    lost: list[str]
    """Why runs are in no cell: they failed before they had a configuration, or it is damaged."""


def show(studies: Sequence[str | Path], options: Options | None = None) -> Shown:
    """Write table.md, table.csv, table.tex and the figures of the studies. Raises `ValueError`, in
    one line, for what cannot be a table."""
    options = options or Options()
    every = load(*studies)
    known = every["config"].map(bool)
    runs, lost = every[known], reasons(every[~known])
    if runs.empty:
        raise ValueError(f"{studies[0]}: no run that could stand in a table ({'; '.join(lost)})")
    for option, keys in [
        ("--rows", [options.rows]),
        ("--columns", [options.columns]),
        ("--split", options.split),
        ("--select", [options.select] if options.select else []),
    ]:
        for key in keys:
            require(runs, option, key)
    if options.rows == options.columns:
        raise ValueError(f"--columns {options.columns}: is --rows too; expected another key")
    tables = {
        part: make(members, part, options) for part, members in split(runs, options.split).items()
    }
    own = {Path(folder).parent for table in tables.values() for folder in table.runs["folder"]}
    folder = options.out or [Path(s) for s in studies if Path(s) in own][-1]
    if folder.is_file():
        raise ValueError(f"--out {folder}: is a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    shown = Shown("", [], tables, runs, folder, lost)
    parts = []
    with FileLock(folder / ".table.lock"):  # several may write here
        for part, table in tables.items():
            suffix = "".join(
                c if c.isalnum() or c in ".-" else "_" for c in f"_{part}" * bool(part)
            )
            made = figures.draw(table, folder, suffix)
            images = [f"![{file.stem.replace('_', ' ')}]({file.name})" for file in made]
            notes = [f"{note}\n" for note in [*table.notes(), *lost]]
            parts += [f"{table.caption}\n", markdown(table), *notes, "\n".join(images) + "\n"]
            shown.pictures += made
        shown.markdown = "\n".join(parts)
        write(folder / "table.md", shown.markdown)
        write(folder / "table.csv", tidy(tables).to_csv(index=False, lineterminator="\n"))
        write(folder / "table.tex", "\n".join(latex(table, lost) for table in tables.values()))
    return shown


def markdown(table: Table) -> str:
    shown = table.shown().map(lambda cell: cell.replace("|", "\\|"))
    align = ["left"] * (shown.shape[1] - len(table.columns)) + ["right"] * len(table.columns)
    lines = shown.to_markdown(index=False, disable_numparse=True, colalign=align)
    return f"{lines}\n"


TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "†": r"$\dagger$", "–": "--", "…": r"\ldots{}", "×": r"$\times$", "−": "$-$"}
    | {"<": "$<$", ">": "$>$", "*": r"$^{*}$"}
)


def latex(table: Table, lost: Sequence[str] = ()) -> str:
    """A `table` environment that wants the package booktabs."""
    shown = table.shown().map(lambda cell: cell.translate(TEX))
    left = shown.shape[1] - len(table.columns)
    _, *head = (column.translate(TEX) for column in shown)
    over = [*[""] * left, *[axis(table.axes[1]).translate(TEX)] * len(table.columns)]
    shown.columns = pd.MultiIndex.from_arrays([over, [axis(table.axes[0]).translate(TEX), *head]])
    made = shown.style.hide(axis="index").to_latex(
        hrules=True,
        caption=f"{table.caption.translate(TEX)}.",
        position_float="centering",
        column_format="l" * left + "r" * len(table.columns),
        multicol_align="c",
    )
    notes = (note.translate(TEX) for note in [*table.notes(), *lost])
    below = "".join(f"\\par\\smallskip{{\\footnotesize {note}}}\n" for note in notes)
    return made.replace(r"\end{table}", below + r"\end{table}")


def tidy(tables: dict[str, Table]) -> pd.DataFrame:
    """A row per cell."""
    parts = []
    for part, table in tables.items():
        found = table.cells.reset_index()
        names = {
            key: axis(own).replace(" ", "_")
            for key, own in zip(("row", "column"), table.axes, strict=True)
        }
        if table.selection:  # by scheme, which is either axis
            schemes = found["row" if table.axes[0] == "norm" else "column"]
            found[table.selection.key] = [table.selection.values.get(s) for s in schemes]
        found["split"] = part
        found["metric"] = ", ".join(x for x in (table.measure.name, table.measure.when) if x)
        found["published"] = found["theirs"].where(found["absent"].isna(), "n/a")
        found["source"] = [source and source[-1] for source in found["source"]]
        keys = ["split", "row", "column"]
        keys += [table.selection.key] if table.selection else []
        keys += ["metric", "mean", "std", "n", *STATES, "filled"]
        keys += ["published", "difference", "source", "p"]
        parts.append(
            found[keys].rename(columns=names).astype(dict.fromkeys(names.values(), object))
        )
    return pd.concat(parts, ignore_index=True)
