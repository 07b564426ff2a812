"""Other people's figures beside ours: results/published.yaml as a DataFrame, merged with the cells
of a table."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

FILE = Path(__file__).resolve().parent.parent / "results" / "published.yaml"
VARIANTS = {  # keys of what stands in brackets, as in "GN (G=16)"
    "G": "norm.groups",
    "statistics": "evaluation.statistics",
    "B": "evaluation.batch_size",
    "freeze_statistics": "recipe.freeze_statistics",
}
USUAL = {"evaluation.statistics": "running", "recipe.freeze_statistics": "0"}  # where none is told
SOURCE = ["paper", "table", "model", "dataset", "source"]
KIN = ["method", "network", "images"]  # our names, by which a row is found


@functools.cache
def load() -> dict[str, Any]:
    content: Any = yaml.load(FILE.read_text(), Loader=yaml.CSafeLoader)
    return content


def scheme(norm: str) -> str:
    """Our name of a norm as a paper calls it; variants, "BN (…)", are of their norm."""
    base = norm.split(" (")[0]
    return str(load()["names"]["norms"].get(base, base.lower()))


@functools.cache
def table() -> pd.DataFrame:
    """A row per published figure: what the file says, `name` ("PAPER, TABLE"), `method` (our name
    of its norm) and whether it is `free` of batch statistics."""
    names = load()["names"]
    rows = pd.DataFrame(load()["rows"], dtype=object)
    return rows.assign(
        name=rows["paper"] + ", " + rows["table"],
        method=rows["norm"].map(scheme),
        network=rows["model"].map(lambda model: names["models"].get(model, [])),
        images=rows["dataset"].map(lambda data: names["data"].get(data, [])),
        free=[norm.split(" (")[0] in names["batch_independent"] for norm in rows["norm"]],
    )


def number(row: Any, metric: str, errors: bool) -> Decimal | None:
    """top1 or top5 in %, with the decimals that are printed; None if the row does not have it."""
    for kind in ("acc", "error"):
        value = row.get(f"{metric}_{kind}")
        if value is not None and value == value:
            printed = Decimal(str(value))
            return printed if errors == (kind == "error") else 100 - printed
    return None


@dataclass
class Reference:
    """What a study is compared with."""

    tables: list[str] = field(default_factory=list)
    """In this order: the first that has a cell counts."""
    papers: dict[str, str | None] = field(default_factory=dict)
    """Paper: its rule."""
    not_found: list[dict[str, Any]] = field(default_factory=list)
    """Cells of theirs without a source."""

    def rows(self, metric: str, errors: bool) -> pd.DataFrame:
        """The published rows in order, a row for each of our names, with their `number`."""
        parts = [table()[table()["name"] == name] for name in self.tables]
        found = pd.concat(parts) if parts else table().iloc[:0]
        found = found.assign(number=[number(row, metric, errors) for _, row in found.iterrows()])
        return found.dropna(subset="number").explode("network").explode("images")

    def batches(self) -> set[int]:
        own = table()[table()["name"].isin(self.tables)]
        return set(own["norm_batch"].dropna())

    def lost(self, cell: pd.Series) -> str | None:
        """What it is that the paper has of a cell's scheme, network and data, and we have not."""
        names = load()["names"]
        for part in self.not_found:
            if (
                cell["method"] in map(scheme, part["norms"])
                and cell["network"] in names["models"].get(part["model"], [])
                and cell["images"] in names["data"].get(part["dataset"], [])
            ):
                return str(part["what"])
        return None


def beside(cells: pd.DataFrame, reference: Reference, metric: str, errors: bool) -> pd.DataFrame:
    """The published rows of `cells`, which have an `at`, the columns of `KIN`, their `config`,
    `batch` and `sgd_batch` (None if it varies). Several of a cell if its source has several. A row
    that names no batch size holds for every one if its method uses no batch statistics and its SGD
    batch is the same; others of that kind have a True `unplaced`."""
    found = cells.merge(reference.rows(metric, errors), on=KIN, how="inner", suffixes=("_ours", ""))
    if found.empty:
        return found.assign(unplaced=False)
    variants = [variant(row["norm"], row["config"], row["free"]) for _, row in found.iterrows()]
    found = found[pd.Series(variants, found.index, dtype=bool)]
    named, any_sgd = found["norm_batch"].notna(), found["sgd_batch"].isna()
    same = any_sgd | (found["sgd_batch"] == found["sgd_batch_ours"])
    fits = (named & (found["norm_batch"] == found["batch"])) | (~named & found["free"] & same)
    found = found.assign(unplaced=~named & ~found["free"])[fits | (~named & ~found["free"])]
    placed = found[~found["unplaced"]]
    source = placed[SOURCE].apply(tuple, axis=1) if len(placed) else pd.Series(dtype=object)
    first = source.groupby(placed["at"]).transform("first") if len(placed) else source
    return pd.concat([placed[source == first], found[found["unplaced"]]])


def variant(norm: str, config: dict[str, Any], free: bool) -> bool:
    """Whether a configuration has the options that a published name tells, "GN (G=16)"; a method
    that is not `free` of batch statistics was evaluated by running ones unless it tells others."""
    told = {VARIANTS.get(key, key): value for key, value in re.findall(r"([\w/]+)=(\w+)", norm)}
    expected = told if free else USUAL | told
    return all(str(config.get(key, USUAL.get(key))) == value for key, value in expected.items())


def choose(experiments: Iterable[str | None], tables: list[str] | None = None) -> Reference:
    """What these experiments reproduce, or the `tables` that the user names, each as
    "PAPER, TABLE". Raises `ValueError` for one that is not there."""
    known = list(table()["name"].unique())
    found = Reference()
    for name in tables or []:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}" if near else f"such as {known[0]!r}"
            )
            raise ValueError(f"--published {name!r}: not in results/published.yaml ({hint}?)")
    for experiment in dict.fromkeys(experiments):
        entry = load()["experiments"].get(experiment, {})
        if entry:
            found.papers[entry["paper"]] = entry.get("rule")
            found.tables += entry["tables"]
            found.not_found += entry.get("not_found", [])
    if tables is not None:
        found.tables, found.not_found = list(tables), []
    return found


def describe(rows: pd.DataFrame) -> str:
    """Where rows of one source are from, and how they were made, in one line."""
    paper, name, model, dataset, source = rows.iloc[0][SOURCE]
    evidence = load()["sources"][source]
    parts = [f"{paper}, {name}: {model} on {dataset}"]
    for key, text in (("sgd_batch", "SGD batch {}"), ("epochs", "{} epochs")):
        if found := sorted(set(rows[key].dropna())):
            parts.append(text.format(" to ".join(map(str, dict.fromkeys((found[0], found[-1]))))))
    of = "reading" if evidence["evidence"] == "figure-digitized" else "their runs"
    parts += [f"± {apart} in {of}" for apart in rows["plus_minus"].dropna().unique()]
    notes = rows["note"].dropna().unique()
    return "; ".join([", ".join(parts), *notes]) + f" ({evidence['evidence']}: {evidence['where']})"
