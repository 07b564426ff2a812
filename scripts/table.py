"""The table and the figures of one or several studies, with the published numbers beside ours.

    python scripts/table.py runs/STUDY                      # accuracy by scheme and batch size
    python scripts/table.py runs/STUDY --rule best --errors --baseline bn
    python scripts/table.py runs/STUDY --rows norm.groups --split protocol.name
    python scripts/table.py runs/STUDY_lr runs/STUDY --select recipe.lr

Reads the files of the runs, nothing else; writes table.md, table.csv, table.tex (for LaTeX with
\\usepackage{booktabs}) and the figures, PNG and SVG, into the folder of the last study whose runs
are shown, and all of them into its TensorBoard; or the files into `--out`.
KEY is any key of the runs' configuration, or `norm`, the scheme.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table as Rich

from reporting.cells import label
from reporting.measure import RULES
from reporting.output import Shown, show
from reporting.table import Options, Table
from training.process import run_script


def screen(table: Table, console: Console) -> None:
    lines = table.shown()
    left = lines.shape[1] - len(table.columns)
    shown = Rich(title=table.caption, title_justify="left", title_style="")
    for i, name in enumerate(lines):
        shown.add_column(name, justify="right" if i >= left else "left")
    for line in lines.itertuples(index=False):
        shown.add_row(*line)
    console.print(shown)
    for note in table.notes():
        console.print(note)
    if table.selection and table.selection.commands:
        console.print("The final study:")
        for command in table.selection.commands:
            console.print(f"  {command}")


def tensorboard(shown: Shown) -> None:
    """The same for TensorBoard, beside the runs."""
    from training.tensorboard import summarize

    curves = {}
    for part, table in shown.tables.items():
        if table.axes == ("norm", "batch"):
            measure = table.measure
            kind = f"{'error' if measure.errors else 'accuracy'} (%)"
            kind = kind if measure.accuracy else measure.metric
            cells = table.cells[table.cells["n"] > 0].fillna({"std": 0.0})
            lines: dict[str, dict[int, tuple[float, float]]] = {
                label(row): {} for row in table.rows
            }
            for (row, batch), cell in cells.iterrows():
                lines[label(row)][batch] = (cell["mean"], cell["std"])
            curves[f"{kind} against batch size{f', {part}' if part else ''}"] = lines
    pictures = {file.stem: file for file in shown.pictures}
    summarize(shown.folder, shown.markdown, pictures, curves)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("studies", type=Path, nargs="+", metavar="STUDY", help="folder with the runs of a study")
    add("--rows", default="norm", metavar="KEY", help="default: norm, the scheme")
    add("--columns", default="batch", metavar="KEY", help="default: batch, the batch size")
    add("--split", action="append", default=[], metavar="KEY", help="a table per value")
    add("--rule", choices=RULES, help="which epoch's accuracy (default: the paper's, else last)")
    add(
        "--metric", metavar="NUMBER", help="of result.json instead: test_loss, top5, wall_seconds …"
    )
    add("--errors", action="store_true", help="100 - accuracy")
    add(
        "--published",
        action="append",
        metavar='"PAPER, TABLE"',
        help="of results/published.yaml (default: the experiment's)",
    )
    add("--baseline", metavar="ROW", help="mark what differs from this row, such as bn")
    add("--select", metavar="KEY", help="choose its value for each scheme on held-out images")
    add("--out", type=Path, metavar="FOLDER", help="for the files (default: the study's)")
    args = vars(parser.parse_args())
    width = None if sys.stdout.isatty() else 160  # a file or a pipe has no width of its own
    console = Console(highlight=False, markup=False, soft_wrap=True, width=width)
    try:
        if args["rule"] and args["metric"]:
            raise ValueError(f"--metric {args['metric']}: --rule has no meaning for it")
        shown = show(args.pop("studies"), Options(**args))
        if not args["out"]:
            tensorboard(shown)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for table in shown.tables.values():
        screen(table, console)
    for line in shown.lost:
        console.print(line)
    minutes = shown.runs["wall_seconds"].astype(float).sum() / 60
    pictures = ", ".join(str(file) for file in shown.pictures) or "nothing to draw"
    console.print(f"figures: {pictures}")
    table_md = shown.folder / "table.md"
    console.print(f"tables: {table_md}, .csv and .tex ({minutes:.1f} minutes of training)")


if __name__ == "__main__":
    run_script(main)
