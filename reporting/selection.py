"""The value of a key that every scheme does best with, on held-out training images."""

import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from reporting.cells import label, ordered, values
from reporting.measure import Measure
from reporting.read import ABSENT

OWN = ("data.holdout", "study", "name", "overwrite", "norm", "batch", "seed", "experiment")
# In which the runs that choose may differ from the others: they may be shorter.
SHORTER = ("data.holdout", "data.train_fraction", "recipe.epochs", "recipe.updates")


@dataclass
class Selection:
    key: str
    values: dict[str, Any] = field(default_factory=dict)
    """Scheme: its value."""
    tried: dict[str, list[Any]] = field(default_factory=dict)
    """Scheme: what the value was chosen from, where there was a choice."""
    shorter: dict[str, str] = field(default_factory=dict)
    """Key: what it was in the runs that chose, where the others have another value."""
    commands: list[str] = field(default_factory=list)
    """That train the final study."""

    def text(self) -> str:
        """What the caption says."""
        each = defaultdict(list)
        for scheme, value in self.values.items():
            each[label(value)].append(scheme)
        own = "; ".join(f"{value}: {', '.join(schemes)}" for value, schemes in each.items())
        tried = {label(v): v for found in self.tried.values() for v in found}
        how = f", chosen on held-out training images from {', '.join(tried)}" if tried else ""
        if self.shorter:
            how += f" with {', '.join(f'{key}={value}' for key, value in self.shorter.items())}"
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


def held_out(runs: pd.DataFrame) -> pd.Series:
    """Whether runs were evaluated on a part of the training images."""
    return pd.Series([bool(own.get("data.holdout")) for own in runs["identity"]], runs.index)


def select(runs: pd.DataFrame, key: str, measure: Measure) -> tuple[pd.DataFrame, Selection]:
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
    runs = runs.assign(tried=values(runs, key))
    held, final = runs[held_out(runs)], runs[~held_out(runs)]
    found = Selection(key)
    for scheme in ordered(runs["norm"]):
        candidates = held[held["norm"] == scheme]
        own = ordered(final.loc[final["norm"] == scheme, "tried"])
        if len(candidates):
            found.values[scheme] = value = best(scheme, candidates, key, measure)
            if candidates["tried"].nunique() > 1:
                found.tried[scheme] = ordered(candidates["tried"])
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
            found.values[scheme] = own[0]
    chosen = runs["tried"] == runs["norm"].map(found.values)
    if not len(final):
        found.commands = commands(runs[chosen], key)
        return runs[chosen], found
    for name in SHORTER[1:]:
        theirs, ours = (
            ", ".join(dict.fromkeys(label(own.get(name, ABSENT)) for own in part["identity"]))
            for part in (held, final)
        )
        if len(held) and theirs != ours:
            found.shorter[name] = theirs
    return final[chosen[final.index]], found


def best(scheme: str, candidates: pd.DataFrame, key: str, measure: Measure) -> Any:
    """The value with the best mean over batch sizes of the mean over seeds; one that diverged
    anywhere comes behind all others."""
    first, *others = ordered(candidates["tried"])
    if not others:
        return first
    waiting = candidates[~candidates["status"].isin(("finished", "diverged"))]
    for _, run in waiting.iterrows():
        raise ValueError(
            f"--select {key}: {run['folder']} is {run['status']}; the choice needs all its runs"
        )
    sizes = candidates.groupby("tried", sort=False)["batch_size"].agg(lambda x: sorted(x))
    for value in others:
        if sizes[value] != sizes[first]:
            raise ValueError(
                f"--select {key}: {scheme} has other batch sizes or numbers of seeds with "
                f"{label(value)} than with {label(first)}; the choice needs the same"
            )
    numbers = candidates.assign(value=measure.values(candidates))
    means = numbers.groupby(["tried", "batch_size"])["value"].mean(skipna=False)
    scores = means.groupby("tried").mean(skipna=False).dropna()  # without what diverged
    if scores.empty:
        raise ValueError(f"--select {key}: {scheme} diverged with every value")
    lower = measure.errors or not measure.accuracy
    return scores.idxmin() if lower else scores.idxmax()


def commands(runs: pd.DataFrame, key: str) -> list[str]:
    """What trains the final study: the selection's own overrides, grouped by the chosen value. An
    experiment has its own length and its own batch sizes and seeds."""
    groups: dict[tuple[str, ...], list[pd.Series]] = defaultdict(list)
    for _, run in runs.iterrows():
        left_out = (*OWN, key, *(SHORTER if run["experiment"] else ()))
        kept = [w for w in run["overrides"] if w.lstrip("+~").split("=")[0] not in left_out]
        groups[(f"{key}={label(run['tried'])}", *kept)].append(run)

    def listed(found: Iterable[Any]) -> str:
        return ",".join(str(x) for x in ordered(found))

    lines = []
    for rest, members in groups.items():
        experiment = members[0]["experiment"]
        start = [f"experiment={experiment}"] if experiment else []
        start.append("norm=" + listed(run["norm"] for run in members))
        if not experiment:
            start.append("batch=" + listed(int(run["batch_size"]) for run in members))
            start.append("seed=" + listed(int(run["seed"]) for run in members))
        lines.append("python train.py -m " + " ".join(map(shlex.quote, [*start, *rest])))
    return lines
