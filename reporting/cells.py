"""From runs to the cells of a table: what may stand in one table, one row for each cell, and
Welch's test between them."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import pandas as pd

from reporting.measure import Measure
from reporting.read import ABSENT, STATES

SCHEMES = ("bn", "gn", "ws_gn", "bcn", "pws", "mabn")  # these rows first
LEVEL = 0.05  # of significance


def label(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def values(runs: pd.DataFrame, key: str) -> pd.Series:
    """Of a key of the runs' configuration, or of `norm`: their schemes. Can be hashed."""

    def of(config: dict[str, Any]) -> Any:
        value = config.get(key, ABSENT)
        if value is None:  # which pandas takes for a missing value
            return label(value)
        return value if isinstance(value, str | int | float) else str(value)

    return pd.Series([of(config) for config in runs["config"]], runs.index, dtype=object)


def require(runs: pd.DataFrame, option: str, key: str) -> None:
    """Raise `ValueError` unless a run has `key`, which the user gave with `option`."""
    known = {key for config in runs["config"] for key in config}
    if key not in known:
        near = get_close_matches(key, known, n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"{option} {key}: no run has this key{hint}")


def split(runs: pd.DataFrame, keys: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The runs by the values of `keys`, such as "recipe.lr=0.1"; "" without keys."""
    parts = [
        ", ".join(f"{k}={label(v)}" for k, v in zip(keys, row, strict=True))
        for row in zip(*(values(runs, key) for key in keys), strict=True)
    ] or [""] * len(runs)
    return {str(part): members for part, members in runs.groupby(parts, sort=False)}


def explains(axis: str, key: str) -> bool:
    """Whether `key` may follow from the value of `axis`: the options of a scheme, the sizes of a
    data set, the SGD batch where it grows with the batch size."""
    group = {"norm": "norm", "batch": "protocol"}.get(axis, axis.removesuffix(".name"))
    return key.startswith(f"{group}.")


def check(runs: pd.DataFrame, axes: Sequence[str], free: Iterable[str] = ()) -> None:
    """Raise `ValueError` where runs differ in more than the seed: those of a cell in anything, two
    cells in a key that does not follow from the values of `axes`. `free`: keys that may differ."""
    allowed = {"seed", *axes, *free}
    for key in sorted({key for identity in runs["identity"] for key in identity} - allowed):
        given = [values(runs, axis) for axis in axes if explains(axis, key)]
        for _, group in runs.groupby(given or [""] * len(runs), sort=False):
            first = group.iloc[0]
            for _, other in group.iterrows():
                one, two = (run["identity"].get(key, ABSENT) for run in (other, first))
                if one != two:
                    raise ValueError(
                        f"{other['run']} and {first['run']} differ in {key} ({label(one)} and "
                        f"{label(two)}); --split {key} makes a table for each value"
                    )
    keys = list(dict.fromkeys(("seed", *axes, *free)))
    for _, same in runs.groupby([values(runs, key) for key in keys], sort=False):
        if len(same) > 1:
            two, one = same["folder"].iloc[:2]
            raise ValueError(f"{one} and {two} are the same run twice")


def ordered(found: Iterable[Any]) -> list[Any]:
    """Schemes as in `SCHEMES`, numbers by size, everything else by name."""

    def place(value: Any) -> tuple[int, float, str]:
        if isinstance(value, str) and value in SCHEMES:
            return 0, SCHEMES.index(value), ""
        if isinstance(value, int | float):
            return 1, value, ""
        return 2, 0, str(value)

    return sorted(dict.fromkeys(found), key=place)


def members(
    runs: pd.DataFrame, axes: tuple[str, str], measure: Measure, rows: Iterable[Any] = ()
) -> pd.DataFrame:
    """The runs with the `row` and `column` where they stand, both categories in order, and their
    `value`. `rows` that no run has are categories too.

    A scheme without batch statistics at a fixed SGD batch is the same computation at every batch
    size: where it was not run its other runs stand again, `filled`, one for each seed.
    """
    down, across = (values(runs, key) for key in axes)
    placed = runs.assign(row=down, column=across, filled=False, value=measure.values(runs))
    fixed = all(config.get("protocol.sgd_batch") for config in runs["config"])
    if "batch" in axes and fixed and runs["sgd_batch_size"].nunique() == 1:
        line, place = ("row", "column") if axes[1] == "batch" else ("column", "row")
        copies = [placed]
        for _, group in placed.groupby(line, sort=False, dropna=False):
            over = group[group["status"].isin(("finished", "diverged"))]
            if len(over) and (over["batch_independent"] == True).all():  # noqa: E712 (NaN is not)
                once = over.drop_duplicates("seed").sort_values("seed")
                gone = [b for b in placed[place].unique() if b not in set(group[place])]
                copies += [once.assign(filled=True, **{place: batch}) for batch in gone]
        placed = pd.concat(copies, ignore_index=True)
    placed["row"] = pd.Categorical(placed["row"], ordered([*down, *rows]), ordered=True)
    placed["column"] = pd.Categorical(placed["column"], ordered(across), ordered=True)
    return placed


def cells(placed: pd.DataFrame) -> pd.DataFrame:
    """A row for every row and column of the table: mean, std and n of the finished runs, and how
    many runs are in each other state."""
    groups = placed.groupby(["row", "column"], observed=False)
    found = groups["value"].agg(mean="mean", std="std", n="count")
    for state in STATES:
        found[state] = groups["status"].agg(lambda status, state=state: (status == state).sum())
        found[state] = found[state].fillna(0).astype(int)
    return found.assign(filled=groups["filled"].sum() > 0)


def welch(placed: pd.DataFrame, found: pd.DataFrame, baseline: str) -> pd.Series:
    """Two-sided p of Welch's t-test of every cell against the baseline's in the same column, where
    both have three runs or more and all of them finished; NaN elsewhere. Raises `ValueError` if
    there is no such row."""
    from scipy.stats import ttest_ind

    rows = {label(row): row for row in placed["row"].cat.categories}
    if baseline not in rows:
        raise ValueError(f"--baseline {baseline}: no such row; expected one of {', '.join(rows)}")
    samples = placed.groupby(["row", "column"], observed=False)["value"].agg(list)
    tested = (found["n"] >= 3) & (found[list(STATES)].sum(axis=1) == 0)
    p = pd.Series(float("nan"), found.index)
    for row, column in found.index:
        base = (rows[baseline], column)
        if row == base[0] or not (tested[row, column] and tested[base]):
            continue
        if found.loc[(row, column), "std"] == found.loc[base, "std"] == 0:  # where it divides by 0
            p[row, column] = float(found.loc[(row, column), "mean"] == found.loc[base, "mean"])
        else:
            ours, theirs = samples[row, column], samples[base]
            p[row, column] = float(ttest_ind(ours, theirs, equal_var=False).pvalue)
    return p
