"""A table as Markdown, LaTeX, CSV and on screen."""

import csv
import io
from typing import TYPE_CHECKING, Any

from scripts import published
from scripts.cells import STATES, axis

if TYPE_CHECKING:
    from scripts.table import Table


def markdown(table: "Table") -> str:
    lines = table.lines()
    left = len(lines[0]) - len(table.columns)
    text = ["| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * left + "---:|" * len(table.columns), *text[1:]])


TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "†": r"$\dagger$", "–": "--", "…": r"\ldots{}", "×": r"$\times$", "−": "$-$"},
    **{"<": "$<$", ">": "$>$", "*": r"$^{*}$"},
}


def escape(text: str) -> str:
    """For LaTeX."""
    return "".join(TEX.get(c, c) for c in text)


def latex(table: "Table") -> str:
    """A `table` environment that wants the package booktabs."""
    head, *body = table.lines()
    left = len(head) - len(table.columns)
    first, *_ = head[0].split(" \\ ")
    over = axis(table.axes[1])
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape(table.caption)}.}}",
        f"  \\begin{{tabular}}{{{'l' * left}{'r' * len(table.columns)}}}",
        r"    \toprule",
        f"    {'& ' * left}\\multicolumn{{{len(table.columns)}}}{{c}}{{{escape(over)}}} \\\\",
        f"    \\cmidrule(l){{{left + 1}-{len(head)}}}",
        f"    {' & '.join(map(escape, [first, *head[1:]]))} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(map(escape, line))} \\\\" for line in body),
        r"    \bottomrule",
        r"  \end{tabular}",
        *(f"  \\par\\smallskip{{\\footnotesize {escape(note)}}}" for note in table.notes()),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def tidy(tables: dict[str, "Table"]) -> str:
    """CSV, a line per cell."""
    lines: list[dict[str, Any]] = []
    for split, table in tables.items():
        keys = [axis(key).replace(" ", "_") for key in table.axes]
        what = ", ".join(x for x in (table.measure.name, table.measure.when) if x)
        for row, cells in table.cells.items():
            for column, cell in cells.items():
                line = {"split": split, keys[0]: row, keys[1]: column}
                if table.selection:
                    values = table.selection.values
                    line[table.selection.key] = values.get(row, values.get(column))
                line |= {"metric": what, "mean": cell.mean, "std": cell.std, "n": len(cell.values)}
                line |= {state: cell.count(state) for state in STATES} | {"filled": cell.filled}
                theirs = " / ".join(map(str, table.numbers(cell)))
                line["published"] = theirs or ("n/a" if cell.absent else None)
                line["difference"] = cell.difference
                line["source"] = published.source(cell.rows[0])[-1] if cell.rows else None
                lines.append(line | {"p": cell.p})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def screen(table: "Table", console: Any) -> None:
    from rich.table import Table as Rich

    head, *body = table.lines()
    shown = Rich(title=table.caption, title_justify="left", title_style="")
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i >= len(head) - len(table.columns) else "left")
    for line in body:
        shown.add_row(*line)
    console.print(shown)
    for note in table.notes():
        console.print(note)
    if table.selection and table.selection.commands:
        console.print("The final study:")
        for command in table.selection.commands:
            console.print(f"  {command}")
