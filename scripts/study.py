"""How far a study is: the state of every run that its commands asked for.

    python scripts/study.py runs/STUDY             # once
    python scripts/study.py runs/STUDY --watch     # live, until everything is over or Ctrl-C

finished and diverged runs are over; running ones show their progress and the time left; failed
ones the reason; interrupted ones, which were killed, and waiting ones are for the same command to
do. Reads files and looks at locks only, so it never disturbs a study.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from training.process import run_script
from training.study import COMMANDS, State, requested, state

MARKS = (".lock", ".hydra", "result.json", "error.txt")  # of a run's folder

COLOURS = {
    "failed": "red",
    "damaged": "red",
    "diverged": "magenta",
    "running": "cyan",
    "interrupted": "yellow",
    "waiting": "dim",
    "finished": "green",
}
EVERY = 2.0  # seconds between two looks


def asked(study: Path) -> tuple[dict[Path, str], list[str]]:
    """The folders of the runs, in the order of the commands, with what tells them apart beside
    scheme, batch size and seed; then others that lie there. And why a command has no runs here.

    Raises `ValueError` for a folder that is no study, and where there is no run at all.
    """
    there = sorted({mark.parent for name in MARKS for mark in study.glob(f"*/{name}")})
    if not (study / COMMANDS).exists() and not there:
        raise ValueError(f"{study}: no study; expected a folder such as runs/quickstart")
    runs, lost = requested(study)
    if lost and not runs and not there:
        raise ValueError(lost[0])
    found = {cell.folder.name: cell.overrides for cell in runs}
    common = set.intersection(*(set(overrides) for overrides in found.values())) if found else set()
    plain = re.compile("(norm|batch|seed)=")
    shown = {
        study / name: " ".join(o for o in overrides if o not in common and not plain.match(o))
        for name, overrides in found.items()
    }
    return shown | {folder: "" for folder in there if folder not in shown}, lost


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{rest:02d}"


def summary(states: list[State]) -> str:
    """How many are in which state, and the time left if as many go on at once as now."""
    counts = Counter(s.name for s in states)
    text = ", ".join(f"{counts[name]} {name}" for name in COLOURS if counts[name])
    over = [s.seconds for s in states if s.name == "finished"]
    running = [s for s in states if s.name == "running"]
    if running and over:
        each = sum(over) / len(over)
        todo = each * (counts["waiting"] + counts["interrupted"])
        todo += sum(each if s.left is None else s.left for s in running)
        text += f"; about {duration(todo / len(running))} left with {len(running)} at a time"
    return f"{len(states)} runs: {text}"


def board(
    study: Path, runs: dict[Path, str], lost: Sequence[str] = (), height: int | None = None
) -> tuple[Group, bool]:
    """The table, with what was `lost` below it, and whether everything is over. In `height` lines
    the runs that are over give way first, then those that wait."""
    rows = [(f"{folder.name} {own}", state(folder)) for folder, own in runs.items()]
    states = [s for _, s in rows]
    lines = [Text(f"{study}: {summary(states)}")]
    if height is not None:
        order = list(COLOURS)
        kept = sorted(range(len(rows)), key=lambda i: order.index(rows[i][1].name))[:height]
        if len(kept) < len(rows):
            lines.append(Text(f"{len(rows) - len(kept)} lines left out", "dim"))
        rows = [rows[i] for i in sorted(kept)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "state", "updates", "left", ""):  # where it is narrow, the ends give way
        table.add_column(column, no_wrap=column not in ("run", ""), justify="left")
    cut = height is not None  # a line is then one line
    for name, now in rows:
        going = now.updates and now.name in ("running", "interrupted")
        updates = f"{now.update}/{now.updates}" if going else ""
        left = duration(now.left) if now.name == "running" else ""
        run, text = (
            Text(x, no_wrap=cut, overflow="ellipsis" if cut else "fold") for x in (name, now.text)
        )
        table.add_row(run, Text(now.name, COLOURS[now.name]), updates, left, text)
    over = not {"running", "waiting", "interrupted"} & {s.name for s in states}
    notes = [Text(f"{line}; its runs are shown once they have begun", "yellow") for line in lost]
    return Group(*lines, table, *notes), over


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="folder with the runs of a study")
    parser.add_argument("--watch", action="store_true", help="live")
    args = parser.parse_args()
    # A file or a pipe has no width of its own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        runs, lost = asked(args.study)
        if not args.watch:
            console.print(board(args.study, runs, lost)[0])
            return
        with Live(console=console, auto_refresh=False) as live:
            over = False
            while not over:
                shown, over = board(args.study, runs, lost, max(5, console.height - 4))
                live.update(shown, refresh=True)
                time.sleep(0 if over else EVERY)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    run_script(main)
