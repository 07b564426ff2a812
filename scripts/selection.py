"""The value of a key that every scheme does best with, on held-out training images."""

import shlex
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from scripts.cells import ordered
from scripts.runs import Measure, Record, label
from training.files import read as load

OWN = ("data.holdout", "study", "name", "overwrite", "norm", "batch", "seed", "experiment")


@dataclass
class Selection:
    key: str
    values: dict[str, Any] = field(default_factory=dict)
    """Scheme: its value."""
    tried: dict[str, list[Any]] = field(default_factory=dict)
    """Scheme: what the value was chosen from, where there was a choice."""
    commands: list[str] = field(default_factory=list)
    """That train the final study."""

    def text(self) -> str:
        """What the caption says."""
        each = defaultdict(list)
        for scheme, value in self.values.items():
            each[label(value)].append(scheme)
        own = "; ".join(f"{value}: {', '.join(schemes)}" for value, schemes in each.items())
        tried = {label(v): v for values in self.tried.values() for v in values}
        how = f", chosen on held-out training images from {', '.join(tried)}" if tried else ""
        return f"{self.key} of each scheme{how} ({own})"

    def notes(self) -> list[str]:
        """What weakens the choice, a line each."""
        edges = [
            scheme
            for scheme, tried in self.tried.items()
            if all(isinstance(value, int | float) for value in tried)
            and self.values[scheme] in (min(tried), max(tried))
        ]
        notes = []
        if edges:
            notes.append(
                f"{self.key} of {', '.join(edges)}: at the end of what was tried; the best may lie "
                f"outside"
            )
        if len({tuple(tried) for tried in self.tried.values()}) > 1:
            lists = (f"{s} {', '.join(map(label, tried))}" for s, tried in self.tried.items())
            notes.append(f"{self.key} was not chosen from the same values: {'; '.join(lists)}")
        return notes


def select(records: list[Record], key: str, measure: Measure) -> tuple[list[Record], Selection]:
    """The runs to show and the values: those of the final study where there are any, else the
    held-out ones, each scheme's with its value alone.

    Raises `ValueError` where there is nothing to choose on but test images, or the runs to choose
    from are not over or not the same batch sizes.
    """
    if not measure.accuracy and measure.metric != "test_loss":
        raise ValueError(
            f"--select {key}: chosen by an accuracy or test_loss, not {measure.metric}"
        )
    if key in OWN:
        raise ValueError(f"--select {key}: is not chosen; expected a key such as recipe.lr")
    held = [r for r in records if r.config.get("data.holdout")]
    final = [r for r in records if r not in held]
    found = Selection(key)
    for scheme in ordered(r.scheme for r in records):
        tried, own = (by_value([r for r in x if r.scheme == scheme], key) for x in (held, final))
        if tried:
            found.values[scheme] = value = best(scheme, tried, key, measure)
            if len(tried) > 1:
                found.tried[scheme] = list(tried)
            if own and value not in own:
                raise ValueError(
                    f"--select {key}: {scheme} was trained with {', '.join(map(label, own))}, and "
                    f"the held-out images choose {label(value)}"
                )
        elif len(own) > 1:
            raise ValueError(
                f"--select {key}: {scheme} has runs with {' and '.join(map(label, own))} and "
                f"data.holdout=0, and choosing between them would be choosing on test images; "
                f"train the candidates with data.holdout=0.1"
            )
        else:
            found.values[scheme] = next(iter(own))
    shown = [r for r in final or held if r.value(key) == found.values[r.scheme]]
    if found.tried and not final:
        found.commands = commands(shown, key)
    return shown, found


def by_value(records: list[Record], key: str) -> dict[Any, list[Record]]:
    values: dict[Any, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: str(r.value(key))):
        values[record.value(key)].append(record)
    return dict(values)


def best(scheme: str, tried: dict[Any, list[Record]], key: str, measure: Measure) -> Any:
    """The value with the best mean over batch sizes of the mean over seeds; one that diverged
    anywhere comes behind all others."""
    if len(tried) == 1:
        return next(iter(tried))
    scores, batches = {}, {}
    for value, runs in tried.items():
        for run in runs:
            if run.state in ("failed", "unfinished"):
                raise ValueError(
                    f"--select {key}: {run.folder} is {run.state}; the choice needs all its runs"
                )
        cells: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            cells[run.batch].append(measure.of(run) if run.state == "finished" else float("nan"))
        batches[value] = {batch: len(runs) for batch, runs in cells.items()}
        score = statistics.fmean(statistics.fmean(values) for values in cells.values())
        if score == score:  # not nan: nothing diverged
            scores[value] = score
    one, *others = batches.items()
    for value, sizes in others:
        if sizes != one[1]:
            raise ValueError(
                f"--select {key}: {scheme} has other batch sizes or numbers of seeds with "
                f"{label(value)} than with {label(one[0])}; the choice needs the same"
            )
    if not scores:
        raise ValueError(f"--select {key}: {scheme} diverged with every value")
    lower = measure.errors or not measure.accuracy
    return (min if lower else max)(scores, key=scores.__getitem__)


def commands(runs: list[Record], key: str) -> list[str]:
    """What trains the final study: the selection's own overrides, grouped by the chosen value."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for run in runs:
        words = [str(word) for word in load(run.folder / ".hydra" / "overrides.yaml")]
        kept = [w for w in words if w.lstrip("+~").split("=")[0] not in (*OWN, key)]
        groups[(f"{key}={label(run.value(key))}", *kept)].append(run)
    lines = []
    for rest, members in groups.items():
        experiment = members[0].choices.get("experiment")
        start = [f"experiment={experiment}"] if experiment else []
        start.append("norm=" + ",".join(ordered(r.scheme for r in members)))
        if not experiment:  # which would bring its batch sizes and seeds
            start.append("batch=" + ",".join(str(b) for b in sorted({r.batch for r in members})))
            start.append("seed=" + ",".join(str(s) for s in sorted({r.seed for r in members})))
        lines.append("python train.py -m " + " ".join(map(shlex.quote, [*start, *rest])))
    return lines
