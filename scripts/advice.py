"""The README's "Which one should I use?", from the results.

    python scripts/advice.py            # fill it
    python scripts/advice.py --check    # exit 1 if it is out of date

For each situation the scheme with the best mean accuracy at one batch size is named, of those that
come into question; and with it each that cannot be told from it: fewer than two runs of either, a
difference below their pooled standard deviation, or the other ahead in a published ImageNet table
that has both at that batch size. A scheme with a run that diverged or failed is not named.
"""

import argparse
import csv
import json
import math
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import norms
from scripts import docs, published
from training.files import write

README = docs.ROOT / "README.md"
RESULTS = docs.RESULTS
STUDY = "cifar10-small"  # the folder in results whose accuracies count
SMALL, LARGE = 2, 32  # batch sizes
MARKS = ("<!-- advice -->\n", "<!-- /advice -->\n")


class Evidence:
    """What the files say of each scheme; "–" for what they do not have.

    Raises `ValueError` for more than one table of accuracies, `OSError` without a file.
    """

    def __init__(self) -> None:
        folder = RESULTS / STUDY
        rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
        self.caption = (folder / "table.md").read_text().split("\n")[0].partition(": ")[2]
        self.cells = {(r["scheme"], int(r["batch_size"])): r for r in rows}
        if len(self.cells) < len(rows) or "error" in self.caption.split(";")[0]:
            raise ValueError(f"{folder / 'table.csv'}: expected one table, of accuracies")
        training, inference = (
            json.loads((RESULTS / k / f"{k}.json").read_text()) for k in ("training", "inference")
        )
        self.images = training["setting"]["forward"]
        self.costs: dict[str, dict[str, Any]] = {}
        for row in [*training["rows"], *inference["rows"]]:
            self.costs.setdefault(row["norm"], {}).update(row)
        measured = [*(r["scheme"] for r in rows), *(r["norm"] for r in training["rows"])]
        self.schemes = list(dict.fromkeys(measured))

    def accuracy(self, scheme: str, batch: int) -> str:
        row = self.cells.get((scheme, batch))
        return docs.cell(row) if row else "–"

    def cost(self, scheme: str, key: str) -> str:
        value = self.costs.get(scheme, {}).get(key)
        if value is None:
            return "–"
        return f"{value / 2**30:.1f} GiB" if key == "memory_bytes" else f"{value:.2f}"

    def mean(self, scheme: str, batch: int) -> float:
        """Accuracy; NaN if it was not measured or a run diverged or failed."""
        row = self.cells.get((scheme, batch), {})
        bad = any(row.get(key, "0") != "0" for key in ("diverged", "failed"))
        return math.nan if bad else float(row.get("mean") or "nan")

    def tied(self, one: str, other: str, batch: int) -> bool:
        """Whether our runs cannot tell their accuracies apart."""
        rows = [self.cells[scheme, batch] for scheme in (one, other)]
        counts = [int(row["n"]) for row in rows]
        if min(counts) < 2:
            return True
        squares = [(n - 1) * float(row["std"]) ** 2 for n, row in zip(counts, rows, strict=True)]
        pooled = math.sqrt(sum(squares) / (sum(counts) - 2))
        return abs(self.mean(one, batch) - self.mean(other, batch)) < pooled

    def choose(self, may: Collection[str], batch: int) -> tuple[list[str], list[str]]:
        """The schemes to name and the others, the best first."""
        known = [s for s in self.schemes if s in may and not math.isnan(self.mean(s, batch))]
        order = sorted(known, key=lambda s: -self.mean(s, batch))

        def level(scheme: str, best: str) -> bool:
            theirs = pair(scheme, best, batch)
            ahead = theirs is not None and theirs[0] > theirs[1]
            return scheme == best or ahead or self.tied(scheme, best, batch)

        picks = [s for s in order if level(s, order[0])]
        return picks, [s for s in order if s not in picks]


def pair(one: str, other: str, batch: int) -> tuple[Decimal, Decimal, str] | None:
    """Published ImageNet accuracies of both in one table, with the key of its source."""
    tables: dict[tuple[str, ...], dict[str, Decimal]] = {}
    for row in published.load()["rows"]:
        top1 = published.number(row, "top1", errors=False)
        own = row["dataset"] == "ImageNet" and "(" not in row["norm"]  # there stand variants
        if own and row.get("norm_batch") == batch and top1 is not None:
            tables.setdefault(published.source(row), {})[published.scheme(row["norm"])] = top1
    both = [(t[one], t[other], key[-1]) for key, t in tables.items() if {one, other} <= t.keys()]
    return both[0] if both else None


def table(e: Evidence) -> str:
    steps = {f"step, batch {b}": f"ratio_to_bn_batch_{b}" for b in (SMALL, e.images)}
    inference = {"inference": "ratio_to_bn_unfolded", "folded": "ratio_to_bn_folded"}
    costs = {**steps, "memory": "memory_bytes", **inference}
    header = ["`norm=`", f"batch {SMALL}", f"batch {LARGE}", *costs]
    body = []
    for s in e.schemes:
        accuracies = [e.accuracy(s, batch) for batch in (SMALL, LARGE)]
        body.append([f"`{s}`", *accuracies, *(e.cost(s, key) for key in costs.values())])
    notes = "\n\n† not run: the same computation at every batch size"
    text = docs.table(header, body)
    return text + notes if "†" in text else text


def situations(e: Evidence) -> list[str]:
    """A line each: who is recommended, and the numbers."""
    free = [s for s in e.schemes if norms.build(docs.methods()[s], batch_size=SMALL).batch_free]
    plain = [s for s, cost in e.costs.items() if cost.get("norm_layers_left") == 0]
    size = e.costs["bn"]["parameters"]
    fits = [s for s, cost in e.costs.items() if cost.get("parameters") == size]
    least = min(e.schemes, key=lambda s: e.costs.get(s, {}).get("memory_bytes", math.inf))

    def each(schemes: Iterable[str], text: Callable[[str], str]) -> str:
        return ", ".join(f"`{s}` {text(s)}" for s in dict.fromkeys(schemes))

    def line(
        title: str, may: Collection[str], batch: int, why: str, key: str = "", also: Any = ()
    ) -> str:
        picks, rest = e.choose(may, batch)
        if not picks:
            return f"- **{title}**: not measured yet."
        names = " or ".join(f"`{s}`" for s in picks)
        numbers = each([*picks, *rest[:1], "bn"], lambda s: e.accuracy(s, batch))
        why += f": {each([*picks, *also], lambda s: e.cost(s, key))}" if key else ""
        return f"- **{title}**: {names}. At batch {batch} {numbers}; {why}."

    return [
        line(
            f"Memory for {SMALL} images, statistics cannot be shared",
            *(e.schemes, SMALL, "memory", "memory_bytes", ["bn", least]),
        ),
        line(
            f"{LARGE} images or more fit",
            *(e.schemes, LARGE, "training step", f"ratio_to_bn_batch_{e.images}"),
        ),
        line(
            "The batch size varies, or must not matter",
            *(free, SMALL, "the same at every batch size, since no statistic crosses images"),
        ),
        line(
            "Inference counts, everything must fold into plain convolutions",
            *(plain, SMALL, "no norm is left; folded", "ratio_to_bn_folded"),
        ),
        line(
            "An existing network (`norms.convert`)",
            *(
                fits,
                SMALL,
                f"its weights all fit ({size:,} parameters of ResNet-50, as with `bn`), but "
                "these runs are from scratch: fine-tuning was not measured",
            ),
        ),
    ]


def agreement(e: Evidence) -> str:
    """Published results of a scheme and `bn` beside ours."""
    said = []
    for batch in (SMALL, LARGE):
        for scheme in e.schemes:
            theirs = pair(scheme, "bn", batch)
            apart = e.mean(scheme, batch) - e.mean("bn", batch)
            if scheme == "bn" or theirs is None or math.isnan(apart):
                continue
            same = apart * float(theirs[0] - theirs[1]) > 0
            verdict = "ours agree" if same else "ours disagree"
            if e.tied(scheme, "bn", batch):
                verdict = "ours cannot tell"
            numbers = f"`{scheme}` {theirs[0]}, `bn` {theirs[1]}"
            said.append(f"{numbers} at batch {batch} ({theirs[2]}; {verdict})")
    return ", ".join(said) or "none of a scheme and `bn` at these batch sizes"


def advice() -> str:
    e = Evidence()
    legend = (
        f"Accuracy: [{STUDY}](results/{STUDY}/README.md), {e.caption}. Time of a "
        f"[training step](results/training/README.md) of {e.images} images as a multiple of "
        f"`bn`'s: in groups of {SMALL} (`protocol=ghost`), and where all share statistics and `bn` "
        "is PyTorch's own layer. Memory of ResNet-50 with 32 images of 224 pixels. Time of "
        "[inference](results/inference/README.md) as a multiple of `bn`'s, as trained and folded."
    )
    evidence = (
        'Behind these lines stand a small network, short training and a CPU. "Or" stands where '
        "there are fewer than two runs, the difference is below the pooled standard deviation, or "
        "published results have the other ahead. Published on ImageNet "
        f"([sources](results/published.yaml)): {agreement(e)}."
    )
    legend, evidence = (textwrap.fill(x, 100, break_on_hyphens=False) for x in (legend, evidence))
    lines = "\n".join(situations(e))
    return f"\n{table(e)}\n\n{legend}\n\n{lines}\n\n{evidence}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args().check
    try:
        text = README.read_text()
        if [text.count(mark) for mark in MARKS] != [1, 1]:
            raise ValueError(f"README.md: expected {' and '.join(m.strip() for m in MARKS)} once")
        before, _, rest = text.partition(MARKS[0])
        new = f"{before}{MARKS[0]}{advice()}{MARKS[1]}{rest.partition(MARKS[1])[2]}"
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if new != text:
        print(f"README.md: {'out of date' if check else 'written'}")
        if not check:
            write(README, new)
    sys.exit(check and new != text)


if __name__ == "__main__":
    main()
