"""The table and the figures of one or several studies, with the published numbers beside ours.

    python scripts/table.py runs/STUDY                      # accuracy by scheme and batch size
    python scripts/table.py runs/STUDY --rule best --errors --baseline bn
    python scripts/table.py runs/STUDY --rows norm.groups --split protocol.name
    python scripts/table.py runs/STUDY_lr runs/STUDY --select recipe.lr

Reads the files of the runs, nothing else; writes table.md, table.csv, table.tex (for LaTeX with
\\usepackage{booktabs}) and the figures, PNG and SVG, into the last study's folder, and all of them
into its TensorBoard; or the files into `--out`.
KEY is any key of the runs' configuration, or `norm`, the scheme.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import formats, published, runs
from scripts.cells import LEVEL, Cell, Cells, axis, tabulate, welch
from scripts.runs import RULES, Measure, Record, label
from scripts.selection import Selection, select
from training.files import write


@dataclass
class Table:
    title: str
    """What the runs are, in a line: for figures."""
    caption: str
    """All that a reader of the numbers needs, in a line."""
    axes: tuple[str, str]
    """The keys of rows and columns."""
    measure: Measure
    cells: Cells
    selection: Selection | None = None
    sources: list[tuple[str, ...]] = field(default_factory=list)
    """Of the published numbers; their place in the list is their number in the table."""
    curves: dict[Any, dict[int, float]] = field(default_factory=dict)
    """Row: the published numbers by batch size."""
    elsewhere: list[published.Row] = field(default_factory=list)
    """Published, of rows of the table, at no batch size that is known."""
    early: dict[str, str] = field(default_factory=dict)
    """Runs that failed before they had a configuration, and so a cell: why."""

    @property
    def columns(self) -> list[Any]:
        return list(next(iter(self.cells.values())))

    def lines(self) -> list[list[str]]:
        """What is printed: the header, a line per row, and a line below it with the published
        numbers where there are any."""
        corner = " \\ ".join(map(axis, self.axes))
        chosen = self.selection if self.selection and self.axes[0] == "norm" else None
        lines = [[corner, *([chosen.key] if chosen else []), *map(label, self.columns)]]
        for row, cells in self.cells.items():
            extra = [label(chosen.values[row])] if chosen else []
            lines.append([label(row), *extra, *(cell.text() for cell in cells.values())])
            theirs = [self.published(cell) for cell in cells.values()]
            if any(theirs):
                lines.append(["– published", *([""] if chosen else []), *theirs])
        return lines

    def published(self, cell: Cell) -> str:
        numbers = self.numbers(cell)
        if not numbers:
            return "n/a" if cell.absent else ""
        source = self.sources.index(published.source(cell.rows[0])) + 1
        apart = ""
        if cell.difference is not None:
            apart = f" {round(cell.difference, 2) + 0.0:+.2f}".replace("-", "−")  # and no -0.00
        return f"{' / '.join(map(str, numbers))} [{source}]{apart}"

    def numbers(self, cell: Cell) -> list[Decimal]:
        kind = self.measure.accuracy or "top1"
        found = (published.number(row, kind, self.measure.errors) for row in cell.rows)
        return [x for x in found if x is not None]

    def notes(self) -> list[str]:
        """What stands below the table, a line each."""
        every = [cell for row in self.cells.values() for cell in row.values()]
        notes = []
        if any(cell.filled for cell in every):
            notes.append(
                "† not run: without batch statistics every batch size is the same computation here"
            )
        if self.sources:
            notes.append("published: their number, [its source], ours minus theirs")
        rows = defaultdict(list)
        for row in (row for cell in every for row in cell.rows):
            rows[published.source(row)].append(row)
        notes += [f"[{i}] {published.describe(rows[s])}" for i, s in enumerate(self.sources, 1)]
        for row in self.elsewhere:
            found = self.numbers(Cell(rows=[row]))
            where = published.describe([row])
            notes += [f"at no batch size that is named: {row['norm']} {x}, {where}" for x in found]
        lost = dict.fromkeys(cell.absent for cell in every if cell.absent)
        if lost:
            notes.append(f"n/a: theirs, but in no source that we could read: {'; '.join(lost)}")
        failed = {r.folder.name: r.error for c in every for r in c.runs if r.state == "failed"}
        failed |= self.early
        notes += [f"{name} failed: {error or 'no reason given'}" for name, error in failed.items()]
        notes += self.selection.notes() if self.selection else []
        return notes


def compare(table: Table, records: list[Record], reference: published.Reference) -> None:
    """Put the published numbers into the cells and the curves."""
    metric = table.measure.accuracy
    if not metric:
        return
    by_batch = table.axes.index("batch") if "batch" in table.axes else None

    def find(run: Record, batch: int) -> Cell:
        """Of a run like this one at that batch size."""
        sizes = {r.sgd_batch for r in records if r.batch == batch} or {r.sgd_batch for r in records}
        sgd_batch = sizes.pop() if len(sizes) == 1 else None
        found = Cell(rows=reference.rows(run, metric, batch, sgd_batch))
        numbers = set(table.numbers(found))
        found.theirs = numbers.pop() if len(numbers) == 1 else None
        return found

    for row, cells in table.cells.items():
        for column, cell in cells.items():
            at, kin = (row, column), cell.runs
            if not kin and by_batch is not None:
                other = 1 - by_batch
                kin = [r for r in records if r.value(table.axes[other]) == at[other]]
            if not kin:
                continue
            found = find(kin[0], kin[0].batch if by_batch is None else at[by_batch])
            cell.rows, cell.theirs = found.rows, found.theirs
            if not found.rows:
                cell.absent = reference.lost(kin[0])
            elif published.source(found.rows[0]) not in table.sources:
                table.sources.append(published.source(found.rows[0]))
        kin = [r for r in records if r.value(table.axes[0]) == row]
        if kin and by_batch == 1:
            for batch in sorted({*table.columns, *reference.batches()}):
                if (theirs := find(kin[0], batch).theirs) is not None:
                    table.curves.setdefault(row, {})[batch] = float(theirs)
            table.elsewhere += reference.unplaced(kin[0])


def listed(values: Any) -> str:
    return ", ".join(label(x) for x in dict.fromkeys(values))


def setting(records: list[Record]) -> str:
    """What the runs are: model, data, recipe, length, protocol, hardware."""
    results = [r.result for r in records if r.result]
    data = listed(r.data for r in records)
    for part in dict.fromkeys(r.config.get("data.train_fraction", 1) for r in records):
        data += f" ({100 * part:g} % of its training images)" if part < 1 else ""
    if any(r.config.get("data.holdout") for r in records):
        data += ", evaluated on held-out training images"
    lengths = sorted({r["epochs"] for r in results if r["status"] == "finished"})
    sizes = sorted({r.sgd_batch for r in records})
    ratios = {r.sgd_batch / r.batch for r in records}
    sgd_batch = listed(sizes)
    if len(sizes) > 1 and len(ratios) == 1:
        times = f"{ratios.pop():g}"
        sgd_batch = "equal to the batch size" if times == "1" else f"{times} x the batch size"
    parts = [
        f"{listed(r.model for r in records)} on {data}",
        f"recipe {listed(r.value('recipe.name') for r in records)}",
        *([f"{listed(lengths)} epochs"] if lengths else []),
        f"protocol {listed(r.value('protocol.name') for r in records)}",
        f"SGD batch {sgd_batch}",
    ]
    devices = listed(r["device"] for r in results)
    threads = listed(r["threads"] for r in results if r["device"] == "cpu")
    if results:
        parts.append(devices + (f" ({threads} thread{'s' * (threads != '1')})" if threads else ""))
        parts.append(f"torch {listed(r['versions']['torch'] for r in results)}")
    return ", ".join(parts)


def what(table_measure: Measure, reference: published.Reference) -> str:
    """What the numbers are, and by whose rule."""
    text = table_measure.name + (f", {table_measure.when}" if table_measure.when else "")
    for paper, rule in reference.papers.items():
        if rule and table_measure.rule:
            same = rule == table_measure.rule
            text += f" (as {paper} reports)" if same else f" ({paper} reports the {RULES[rule]})"
    return text


def tested(cells: Cells, baseline: str) -> str:
    """What the caption says of the significance marks."""
    others = [c for row, line in cells.items() if label(row) != baseline for c in line.values()]
    done = [cell.p is not None for cell in others if cell.values]
    need = "3 runs or more in both cells, all finished"
    if not any(done):
        return f"not tested against {baseline}, which takes {need}"
    rest = "" if all(done) else f"; tested where there are {need}"
    return (
        f"* differs from {baseline} in the same column (Welch's t-test, two-sided p < {LEVEL}, not "
        f"corrected for the number of tests{rest})"
    )


def seeds(cells: Cells) -> str:
    sizes = sorted(len(c.values) for row in cells.values() for c in row.values() if c.values)
    return "n = " + " to ".join(map(str, dict.fromkeys(sizes[:1] + sizes[-1:] or [0])))


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
    """Folder for the files; None: the last study's."""


@dataclass
class Shown:
    """What `show` has made."""

    markdown: str
    pictures: list[Path]
    """PNG; each has an SVG of the same name beside it."""
    tables: dict[str, Table]
    """By split; "" without one."""


def make(records: list[Record], split: str, options: Options) -> Table:
    """The table of these runs. Raises `ValueError`, in one line, if they cannot be one."""
    axes = (options.rows, options.columns)
    experiments = [r.choices.get("experiment") for r in records]
    reference = published.choose(experiments, options.published)
    rules = set(reference.papers.values()) or {None}
    rule = options.rule or (rules.pop() if len(rules) == 1 else None) or "last"
    measure = Measure(options.metric or "top1", None if options.metric else rule, options.errors)

    free, selection = list(options.split), None
    if options.select:
        runs.check(records, list(axes), [*free, options.select, "data.holdout"])
        records, selection = select(records, options.select, measure)
        free.append(options.select)
    runs.check(records, list(axes), free)
    part = {r.config.get("data.train_fraction", 1) for r in records} != {1}
    if (part or any(r.config.get("data.holdout") for r in records)) and not options.published:
        reference.tables, reference.not_found = [], []  # theirs are of all images

    name = " + ".join(dict.fromkeys(r.folder.resolve().parent.name for r in records))
    name += f" ({split})" if split else ""
    schemes = selection.values if selection and axes[0] == "norm" else ()
    cells = tabulate(records, axes, measure, schemes)
    about = [f"{what(measure, reference)}, mean ± standard deviation (n seeds)"]
    about += [setting(records), seeds(cells)]
    if selection:
        about.append(selection.text())
    if options.baseline:
        welch(cells, options.baseline)
        about.append(tested(cells, options.baseline))
    title = f"{name}: {setting(records)}"
    table = Table(title, f"{name}: {'; '.join(about)}", axes, measure, cells, selection)
    compare(table, records, reference)
    return table


def kind(measure: Measure) -> str:
    if not measure.accuracy:
        return measure.metric
    return f"{'error' if measure.errors else 'accuracy'} (%)"


def dashboard(study: Path, shown: Shown) -> None:
    """The same for TensorBoard, beside the runs."""
    from training.tensorboard import summarize

    curves = {
        f"{kind(table.measure)} against batch size{f', {part}' if part else ''}": {
            label(row): {b: (fmean(c.values), c.std or 0.0) for b, c in cells.items() if c.values}
            for row, cells in table.cells.items()
        }
        for part, table in shown.tables.items()
        if table.axes == ("norm", "batch")
    }
    summarize(study, shown.markdown, {file.stem: file for file in shown.pictures}, curves)


def show(studies: Sequence[Path], options: Options | None = None, console: Any = None) -> Shown:
    """Write table.md, table.csv, table.tex and the figures of the studies, and print to a rich
    `console` if there is one. Raises `ValueError`, in one line, for what cannot be a table."""
    from scripts.figure import draw

    options = options or Options()
    records = runs.read(*studies)
    for option, keys in [
        ("--rows", [options.rows]),
        ("--columns", [options.columns]),
        ("--split", options.split),
        ("--select", [options.select] if options.select else []),
    ]:
        for key in keys:
            runs.need(records, option, key)
    if options.rows == options.columns:
        raise ValueError(f"--columns {options.columns}: is --rows too; expected another key")
    folder = options.out or studies[-1]
    if folder.is_file():
        raise ValueError(f"--out {folder}: is a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True)

    parts = runs.split(records, options.split)
    tables = {part: make(members, part, options) for part, members in parts.items()}
    text, pictures = [], []
    early = runs.early(*studies)
    for part, table in tables.items():
        table.early = early
        suffix = "".join(x if x.isalnum() or x in ".-" else "_" for x in f"_{part}") if part else ""
        made = draw(table, folder, suffix)
        notes = [note + "\n" for note in table.notes()]
        images = [f"![{file.stem.replace('_', ' ')}]({file.name})" for file in made]
        text += [
            table.caption + "\n",
            formats.markdown(table) + "\n",
            *notes,
            "\n".join(images) + "\n",
        ]
        pictures += made
        if console:
            formats.screen(table, console)
    shown = Shown("\n".join(text), pictures, tables)
    write(folder / "table.md", shown.markdown)
    write(folder / "table.csv", formats.tidy(tables))
    write(folder / "table.tex", "\n".join(formats.latex(table) for table in tables.values()))
    if not options.out:
        dashboard(folder, shown)
    if console:
        seconds = sum(r.result["wall_seconds"] for r in records if r.result)
        console.print(f"figures: {', '.join(str(file) for file in pictures) or 'nothing to draw'}")
        console.print(
            f"tables: {folder / 'table.md'}, .csv and .tex ({seconds / 60:.1f} minutes of training)"
        )
    return shown


def main() -> None:
    from rich.console import Console

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
    add("--out", type=Path, metavar="FOLDER", help="for the files (default: the last study's)")
    args = vars(parser.parse_args())
    width = None if sys.stdout.isatty() else 160  # a file or a pipe has no width of its own
    console = Console(highlight=False, markup=False, soft_wrap=True, width=width)
    try:
        if args["rule"] and args["metric"]:
            raise ValueError(f"--metric {args['metric']}: --rule has no meaning for it")
        show(args.pop("studies"), Options(**args), console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
