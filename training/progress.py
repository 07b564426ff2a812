"""What a person sees while a run trains: a bar on a terminal, lines elsewhere.

Everything is said through the logger `smallbatch`, which this module lets print.
"""

import logging
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from training.distributed import rank

# Names of studies and files are shown as they are, be there [brackets] or :colons: in them.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def columns(*formats: str) -> list[ProgressColumn]:
    """Of a bar: a task's name, how far it is, what the `formats` say of it, the time left."""
    texts = [TextColumn(text, markup=False) for text in ("{task.description}", *formats)]
    return [texts[0], BarColumn(), *texts[1:], TimeRemainingColumn()]


class ConsoleHandler(logging.Handler):
    """Prints messages of the first process as they are, above the bar if there is one. A warning
    of both parts of a data set, which comes twice in a row, is printed once."""

    last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        before, self.last = self.last, record.getMessage()
        return rank() == 0 and (record.levelno < logging.WARNING or self.last != before)

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage())
        sys.stdout.flush()


log = logging.getLogger("smallbatch")
log.setLevel(logging.INFO)
log.addHandler(ConsoleHandler())


class ProgressBar:
    """Shows updates as they go by and one line for each epoch. `style`: auto, bar, lines, none."""

    def __init__(self, style: str, updates: int, done: int):
        if rank() > 0:
            style = "none"
        if style == "auto":
            style = "bar" if console.is_terminal else "lines"
        self.style = style
        self.bar = Progress(
            *columns("{task.completed}/{task.total} updates {task.fields[text]}"),
            console=console,
            transient=True,
            disable=style != "bar",
        )
        self.task = self.bar.add_task("starting", total=updates, completed=done, text="")

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, epoch: int, now: Any, seen: int, sgd_batch: int) -> None:
        """After `seen` updates of an epoch, with the `Progress` of the run."""
        loss, top1 = now.loss / seen, 100 * now.correct / (seen * sgd_batch)
        speed = now.update * sgd_batch / now.train_seconds
        text = f"· loss {loss:.3f} · {top1:.1f} % · {speed:,.0f} images/s"
        self.bar.update(self.task, description=f"epoch {epoch}", completed=now.update, text=text)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        if self.style == "none":
            return
        test = f", test {row['test_top1']:.2f} %" if row["test_top1"] != "" else ""
        log.info(
            f"  epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}, "
            f"train {row['train_top1']:.2f} %{test}, {row['images_per_second']:,.0f} images/s"
        )
