"""How good a run's network is, as a whole and class by class, on its test images or on others.

    python scripts/evaluate.py runs/STUDY/RUN
    python scripts/evaluate.py runs/STUDY/RUN data=folder data.root=PATH device=cpu
    python scripts/evaluate.py runs/STUDY/RUN evaluation.statistics=precise evaluation.alpha=0.1
    python scripts/evaluate.py runs/STUDY/RUN --folded --csv classes.csv --json evaluation.json

Evaluates the last checkpoint, also of a run that is not over, with the moving average of the
weights where it has one. Other data (`data=…`, `data.KEY=…`) must have the classes of the run's;
its pixels are normalized as the run's training images were. `evaluation.KEY=…` chooses the
statistics by which batch norms normalize, as in training: `precise` looks at the run's training
images once more, and the training data must be there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
from rich.console import Console
from rich.table import Table

from training.evaluate_run import measure
from training.files import write
from training.messages import MISTAKES, explain
from training.process import run_script
from training.run import plain

SHOWN = 10  # of the worst and of the best classes


def show(found: dict[str, Any], console: Console) -> None:
    """The figures, and the classes from the worst to the best, of many only the two ends."""
    of = "finished" if found["finished"] else f"not over, after update {found['update']}"
    what = [of, *(["moving average of the weights"] if found["weights"] == "average" else [])]
    what += ["folded"] if found["folded"] else []
    by = found["evaluation"]
    if by["statistics"] == "precise":
        what += [f"statistics of up to {by['batches']} training batches of {by['batch_size']}"]
    elif by["statistics"] == "batch":
        what += [f"the statistics of test batches of {by['batch_size']}"]
    what += [f"alpha {by['alpha']:g}"] if by["alpha"] else []
    console.print(f"{found['run']} ({', '.join(what)})", markup=False)
    on = found["data"] + (f", {found['root']}" if found["root"] else "")
    told = {True: "; top-1 as in result.json", False: "; another top-1 than in result.json"}
    console.print(
        f"  top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f} "
        f"over {found['images']:,} test images of {on}{told.get(found['as_in_result'], '')}",
        markup=False,
    )
    rows = sorted((r for r in found["classes"] if r["images"]), key=lambda r: r["top1"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("class", "images", "top-1 (%)", "most often taken for"):
        table.add_column(title, justify="right" if title in ("images", "top-1 (%)") else "left")
    for i, row in enumerate(rows):
        if SHOWN <= i < len(rows) - SHOWN:
            if i == SHOWN:
                table.add_row(f"… {len(rows) - 2 * SHOWN} more")
            continue
        table.add_row(row["name"], f"{row['images']}", f"{row['top1']:.2f}", row["taken_for"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("overrides", nargs="*", help="data=… data.KEY=… device=… and the like")
    parser.add_argument("--folded", action="store_true", help="the network that norms.fold makes")
    parser.add_argument("--last", action="store_true", help="the weights, not their moving average")
    parser.add_argument("--csv", type=Path, help="file to write the classes to")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    args = parser.parse_intermixed_args()
    try:
        for file in (args.csv, args.json):
            if file and not file.parent.is_dir():
                raise ValueError(f"{file}: its folder does not exist; expected one that does")
        found = measure(args.run, args.overrides, args.folded, not args.last)
        if args.csv:
            write(args.csv, pd.DataFrame(found["classes"]).to_csv(index=False, lineterminator="\n"))
        if args.json:
            write(args.json, json.dumps(plain(found), indent=2) + "\n")
    except MISTAKES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    show(found, Console(highlight=False, soft_wrap=True))


if __name__ == "__main__":
    run_script(main)
