"""Other people's figures beside ours: which rows of results/published.yaml belong to a cell."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.runs import Record

FILE = Path(__file__).resolve().parent.parent / "results" / "published.yaml"
VARIANTS = {"G": "norm.groups"}  # as in "GN (G=16)"
Row = dict[str, Any]


@functools.cache
def load() -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    return content


def scheme(norm: str) -> str:
    """Our name of a norm as a paper calls it; variants, "BN (…)", are of their norm."""
    base = norm.split(" (")[0]
    return str(load()["names"]["norms"].get(base, base.lower()))


def table_name(row: Row) -> str:
    return f"{row['paper']}, {row['table']}"


def number(row: Row, metric: str, errors: bool) -> Decimal | None:
    """top1 or top5 in %, with the decimals that are printed; None if the row does not have it."""
    for kind in ("acc", "error"):
        if f"{metric}_{kind}" in row:
            value = Decimal(str(row[f"{metric}_{kind}"]))
            return value if errors == (kind == "error") else 100 - value
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

    def all(self) -> list[Row]:
        return [r for name in self.tables for r in load()["rows"] if table_name(r) == name]

    def rows(self, run: Record, metric: str, batch: int, sgd_batch: int | None) -> list[Row]:
        """Those that stand beside runs like `run` at this batch size: several if the source has
        several, none if it has none or they are of another network or data set."""
        fit = [
            r
            for r in self.all()
            if same(r, run) and fits(r, batch, sgd_batch) and number(r, metric, False) is not None
        ]
        return [r for r in fit if source(r) == source(fit[0])]

    def unplaced(self, run: Record) -> list[Row]:
        """Those of the run's method, network and data set whose batch size nobody says."""
        return [r for r in self.all() if "norm_batch" not in r and same(r, run) and not free(r)]

    def lost(self, run: Record) -> str | None:
        """What it is that the paper has of this scheme, network and data, and we have not."""
        for part in self.not_found:
            if any(same(part | {"norm": norm}, run) for norm in part["norms"]):
                return str(part["what"])
        return None

    def batches(self) -> set[int]:
        return {r["norm_batch"] for r in self.all() if "norm_batch" in r}


def same(row: Row, run: Record) -> bool:
    """Whether it is the run's method, network and data set. "GN (G=16)" has 16 groups."""
    names = load()["names"]
    for key, value in re.findall(r"([\w/]+)=(\d+)", row["norm"]):
        if str(run.value(VARIANTS.get(key, key))) != value:
            return False
    return (
        scheme(row["norm"]) == run.value("norm.name")
        and run.model in names["models"].get(row["model"], [])
        and run.data.lower() in names["data"].get(row["dataset"], [])
    )


def free(row: Row) -> bool:
    """Whether its method uses no batch statistics."""
    return row["norm"].split(" (")[0] in load()["names"]["batch_free"]


def fits(row: Row, batch: int, sgd_batch: int | None) -> bool:
    """Whether it was measured at this batch size. A row that names none holds for every one if the
    method uses no batch statistics and its SGD batch is the same."""
    if "norm_batch" in row:
        return bool(row["norm_batch"] == batch)
    return free(row) and row.get("sgd_batch", sgd_batch) == sgd_batch


def choose(experiments: Iterable[str | None], tables: list[str] | None = None) -> Reference:
    """What these experiments reproduce, or the `tables` that the user names, each as
    "PAPER, TABLE". Raises `ValueError` for one that is not there."""
    known = list(dict.fromkeys(table_name(r) for r in load()["rows"]))
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


def source(row: Row) -> tuple[str, ...]:
    return (row["paper"], row["table"], row["model"], row["dataset"], row["source"])


def describe(rows: list[Row]) -> str:
    """Where rows of one `source` are from, and how they were made, in one line."""
    paper, table, model, dataset, name = source(rows[0])
    evidence = load()["sources"][name]

    parts = [f"{paper}, {table}: {model} on {dataset}"]
    for key, text in (("sgd_batch", "SGD batch {}"), ("epochs", "{} epochs")):
        if values := sorted({r[key] for r in rows if key in r}):
            parts.append(text.format(" to ".join(map(str, dict.fromkeys((values[0], values[-1]))))))
    of = "reading" if evidence["evidence"] == "figure-digitized" else "their runs"
    parts += dict.fromkeys(f"± {r['plus_minus']} in {of}" for r in rows if "plus_minus" in r)
    notes = dict.fromkeys(r["note"] for r in rows if "note" in r)
    return "; ".join([", ".join(parts), *notes]) + f" ({evidence['evidence']}: {evidence['where']})"
