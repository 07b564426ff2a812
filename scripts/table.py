"""The table and the figure of a study: accuracy by scheme and batch size.

    python scripts/table.py runs/STUDY [--metric best_top1] [--split recipe.lr]

Reads the files of the runs, nothing else; writes table.md, table.csv and accuracy_vs_batch.png
into the study's folder.
"""

import argparse
import csv
import io
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.config import identity
from training.files import read as load
from training.files import write

AXES = ("batch", "seed")  # with norm.*: what may differ within a table


@dataclass
class Cell:
    """The runs of one scheme at one batch size."""

    values: list[float] = field(default_factory=list)
    diverged: int = 0
    unfinished: int = 0
    filled: bool = False  # from another batch size of a batch-free scheme

    def text(self) -> str:
        parts = []
        if self.values:
            mean = statistics.fmean(self.values)
            spread = f" ± {statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
            parts.append(f"{mean:.2f}{spread}{'†' if self.filled else ''} ({len(self.values)})")
        if self.diverged:
            parts.append(f"{self.diverged} diverged")
        if self.unfinished:
            parts.append(f"{self.unfinished} unfinished")
        return ", ".join(parts) or "missing"


@dataclass
class Record:
    """What a run's folder says."""

    folder: Path
    scheme: str
    batch: int
    seed: int
    config: dict[str, Any]
    result: dict[str, Any] | None


def read(study: Path) -> list[Record]:
    """All runs of a study. Raises `ValueError` if there are none."""
    records = []
    for file in sorted(study.glob("*/.hydra/config.yaml")):
        folder = file.parent.parent
        config = identity(load(file, "batch", "seed"))
        scheme = load(file.with_name("hydra.yaml"), "hydra")["hydra"]["runtime"]["choices"]["norm"]
        done = folder / "result.json"
        result = load(done, "status", "batch_free", "sgd_batch") if done.exists() else None
        records.append(Record(folder, scheme, config["batch"], config["seed"], config, result))
    if not records:
        raise ValueError(f"{study}: no runs in it; expected a folder such as runs/quickstart")
    return records


def groups(records: list[Record], split: list[str]) -> dict[str, list[Record]]:
    """The records by the values of the keys in `split`, "" if there are none.

    Raises `ValueError` if records of one group differ in any key but scheme, batch size and seed.
    """
    parts: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        unknown = [key for key in split if key not in record.config]
        if unknown and not any(unknown[0] in r.config for r in records):
            raise ValueError(f"--split {unknown[0]}: no run has this key")
        values = [f"{key}={record.config.get(key, 'absent')}" for key in split]
        parts[", ".join(values)].append(record)
    for part in parts.values():
        first: dict[str, Record] = {}
        once: dict[tuple[str, int, int], Record] = {}
        for record in part:
            same = once.setdefault((record.scheme, record.batch, record.seed), record)
            if same is not record:
                raise ValueError(f"{record.folder} and {same.folder} are the same run twice")
        for record in part:
            for own, key in ((True, record.scheme), (False, "")):
                other = first.setdefault(key, record)
                differ = [
                    k
                    for k in sorted(record.config | other.config)
                    if k not in AXES
                    and k not in split
                    and k.startswith("norm.") == own
                    and record.config.get(k) != other.config.get(k)
                ]
                if differ:
                    raise ValueError(
                        f"{record.folder.name} and {other.folder.name} differ in {differ[0]} "
                        f"({record.config.get(differ[0])} and {other.config.get(differ[0])}); "
                        f"--split {differ[0]} makes a table for each value"
                    )
    return parts


def tabulate(records: list[Record], metric: str) -> dict[str, dict[int, Cell]]:
    """Scheme -> batch size -> cell, both in order; every scheme has every batch size."""
    order = list(dict.fromkeys(r.scheme for r in records))
    known = ("bn", "gn", "ws_gn", "bcn", "pws", "mabn")
    order.sort(key=lambda s: (known.index(s) if s in known else len(known), s))
    batches = sorted({r.batch for r in records})
    table = {scheme: {batch: Cell() for batch in batches} for scheme in order}
    for record in records:
        cell = table[record.scheme][record.batch]
        if record.result is None:
            cell.unfinished += 1
        elif record.result["status"] == "diverged":
            cell.diverged += 1
        elif type(record.result.get(metric)) not in (int, float):
            raise ValueError(f"--metric {metric}: {record.folder.name} has no such number")
        else:
            cell.values.append(record.result[metric])
    for scheme, row in table.items():
        fill(row, [r for r in records if r.scheme == scheme and r.result], metric)
    return table


def fill(row: dict[int, Cell], records: list[Record], metric: str) -> None:
    """A scheme without batch statistics at a fixed SGD batch is the same computation at every
    batch size: where it was not run, its other runs stand, one for each seed."""
    free = all(r.result and r.result["batch_free"] for r in records)
    if not records or not free or len({r.result["sgd_batch"] for r in records if r.result}) > 1:
        return
    if any(r.config["protocol.sgd_batch"] is None for r in records):
        return
    by_seed = {r.seed: r.result[metric] for r in records if r.result and r.result[metric]}
    for cell in row.values():
        if not (cell.values or cell.diverged or cell.unfinished) and by_seed:
            cell.values, cell.filled = list(by_seed.values()), True


def caption(records: list[Record], metric: str, title: str) -> str:
    """What the numbers are: one line."""
    results = [r.result for r in records if r.result]
    if not results:
        return title

    def each(key: str) -> str:
        values = dict.fromkeys(r[key] for r in results)
        return ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)

    what = {
        "top1": "top-1 accuracy (%, last epoch)",
        "best_top1": "top-1 accuracy (%, best epoch)",
    }
    data = each("data")
    lengths = sorted({r["epochs"] for r in results if r["status"] == "finished"})
    epochs = ", ".join(f"{x:g}" for x in lengths) + " epochs, " if lengths else ""
    for part in dict.fromkeys(r.config.get("data.train_fraction", 1) for r in records):
        data += f" ({100 * part:g} % of its training images)" if part < 1 else ""
    if any(r.config.get("data.holdout") for r in records):
        data += ", evaluated on held-out training images"
    direct = "direct" in {r["protocol"] for r in results}
    sgd = "equal to the batch size" if direct else each("sgd_batch")
    return (
        f"{title}: {what.get(metric, metric)} on {data}, mean ± standard deviation "
        f"(n seeds); {each('model')}, recipe {each('recipe')}, {epochs}protocol "
        f"{each('protocol')}, SGD batch {sgd}"
    )


def markdown(table: dict[str, dict[int, Cell]]) -> str:
    batches = list(next(iter(table.values())))
    lines = ["| scheme \\ batch size | " + " | ".join(map(str, batches)) + " |"]
    lines.append("|---|" + "---:|" * len(batches))
    for scheme, row in table.items():
        lines.append(f"| {scheme} | " + " | ".join(c.text() for c in row.values()) + " |")
    return "\n".join(lines)


def notes(table: dict[str, dict[int, Cell]]) -> list[str]:
    filled = any(c.filled for row in table.values() for c in row.values())
    mark = "† not run: without batch statistics every batch size is the same computation here"
    return [mark] if filled else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="folder with the runs of a study")
    parser.add_argument("--metric", default="top1", help="number of result.json (default: top1)")
    parser.add_argument(
        "--split", action="append", default=[], metavar="KEY", help="a table per value"
    )
    args = parser.parse_args()
    try:
        show(args.study, args.metric, args.split)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def show(study: Path, metric: str, split: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from scripts.figure import accuracy_vs_batch

    width = None if sys.stdout.isatty() else 160  # a file or a pipe has no width of its own
    console = Console(highlight=False, soft_wrap=True, width=width)
    records = read(study)
    text = []
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(
        ["split", "scheme", "batch_size", "mean", "std", "n", "diverged", "unfinished", "filled"]
    )
    parts = groups(records, split)
    for part, members in parts.items():
        table = tabulate(members, metric)
        line = caption(members, metric, study.name + (f" ({part})" if part else ""))
        text += [line + "\n", markdown(table) + "\n", *notes(table)]
        shown = Table(title=line, title_justify="left", title_style="")
        shown.add_column("scheme \\ batch size")
        for batch in next(iter(table.values())):
            shown.add_column(str(batch), justify="right")
        for scheme, row in table.items():
            shown.add_row(scheme, *(c.text() for c in row.values()))
            for batch, c in row.items():
                mean = statistics.fmean(c.values) if c.values else ""
                std = statistics.stdev(c.values) if len(c.values) > 1 else ""
                writer.writerow(
                    [
                        part,
                        scheme,
                        batch,
                        mean,
                        std,
                        len(c.values),
                        c.diverged,
                        c.unfinished,
                        c.filled,
                    ]
                )
        console.print(shown)
        for note in notes(table):
            console.print(note)
        suffix = "".join(x if x.isalnum() or x in ".-" else "_" for x in f"_{part}") if part else ""
        picture = study / f"accuracy_vs_batch{suffix}.png"
        accuracy_vs_batch(table, line, "accuracy (%)" if "top" in metric else metric, picture)
        text.append(f"\n![accuracy against batch size]({picture.name})\n")
        console.print(f"figure: {picture}")
    write(study / "table.md", "\n".join(text))
    write(study / "table.csv", rows.getvalue())
    seconds = sum(r.result["wall_seconds"] for r in records if r.result)
    console.print(
        f"table: {study / 'table.md'}, {study / 'table.csv'} "
        f"({seconds / 60:.1f} minutes of training)"
    )


if __name__ == "__main__":
    main()
