"""The tables of docs/methods, from the files that already say it: options, figures and costs.

    python scripts/docs.py            # fill them
    python scripts/docs.py --check    # exit 1 and name the pages that are out of date

Writes what stands between `<!-- options -->` and `<!-- /options -->`, and likewise `published`,
`measured` and `cost`; the rest of a page is written by hand. A page has the name of its method.
"""

import argparse
import csv
import functools
import itertools
import json
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf

from scripts.cells import STATES
from scripts.published import scheme
from training.files import write

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
OPTIONS = ROOT / "configs" / "norm"
RESULTS = ROOT / "results"


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(x).replace("|", "\\|") for x in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


@functools.cache
def load(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))


def methods() -> dict[str, str]:
    """The method of every option of `norm=`."""
    found = {}
    for file in sorted(OPTIONS.glob("*.yaml")):
        config = load(file)
        while "name" not in config:
            config = load(OPTIONS / f"{config['defaults'][0]}.yaml")
        found[file.stem] = config["name"]
    return found


def keys(option: str) -> list[list[str]]:
    """Key, value and comment of every line of an option file. A comment that ends in an ellipsis
    goes on in the next line, whose key it then names."""
    lines = (OPTIONS / f"{option}.yaml").read_text().splitlines()
    found = [re.fullmatch(r"(\w+): +(.*?)(?: +# (.*))?", line) for line in lines]
    rows = [[x or "" for x in m.groups()] for m in found if m and m[1] != "name"]
    for first, second in itertools.pairwise(rows):
        if first[2].endswith(" …"):
            first[2] = f"{first[2][:-2]} {second[2].lstrip('… ')} (`{second[0]}`)"
            second[2] = f"see `{first[0]}`"
    return rows


def options(name: str) -> str:
    own = [[f"`{key}`", f"`{value}`", text] for key, value, text in keys(name)]
    parts = [table(["key", "default", "meaning"], own) if own else "It has none."]
    derived = []
    for option in [o for o, method in methods().items() if method == name != o]:
        head = re.findall(r"^# (.*)", (OPTIONS / f"{option}.yaml").read_text(), re.MULTILINE)
        sets = ", ".join(f"`{key}={value}`" for key, value, _ in keys(option))
        derived.append([f"`norm={option}`", sets, " ".join(head)])
    if derived:
        parts.append(table(["option", "sets", "what it is"], derived))
    return "\n\n".join(parts)


def published(name: str) -> str:
    data = load(RESULTS / "published.yaml")
    header = ["norm", "model", "data", "batch", "SGD batch", "epochs", "top-1 (%)"]
    rows, sources = [], {}
    for r in data["rows"]:
        if scheme(r["norm"]) == name:
            error = Decimal(str(r.get("top1_error", 0)))  # decimals stay as they are printed
            top1 = f"{r.get('top1_acc', 100 - error)}"
            top1 += f" ± {r['plus_minus']}" if "plus_minus" in r else ""
            sizes = [r.get(k, "–") for k in ("norm_batch", "sgd_batch", "epochs")]
            where = [f"{r['paper']}, {r['table']}", r["source"], r.get("note", "")]
            rows.append([r["norm"], r["model"], r["dataset"], *sizes, top1, *where])
            source = data["sources"][r["source"]]
            sources[r["source"]] = f"- {r['source']} ({source['evidence']}): {source['where']}"
    if not rows:
        return "None that we could read in a source."
    return "\n".join([table([*header, "from", "source", "note"], rows), "", *sources.values()])


def cell(row: dict[str, str]) -> str:
    """A line of a study's table.csv as its table.md has it."""
    parts = []
    if row["mean"]:
        spread = f" ± {float(row['std']):.2f}" if row["std"] else ""
        mark = "†" if row["filled"] == "True" else ""
        parts.append(f"{float(row['mean']):.2f}{spread}{mark} ({row['n']})")
    parts += [f"{row[k]} {k}" for k in STATES if row.get(k, "0") != "0"]
    return ", ".join(parts) or "missing"


def measured(name: str) -> str:
    method, parts = methods(), []
    for file in sorted(RESULTS.glob("*/table.csv")):
        study = file.parent.name
        captions = file.with_name("table.md").read_text().splitlines()
        rows = list(csv.DictReader(file.read_text().splitlines()))
        rows = [r for r in rows if method.get(r.get("scheme", "")) == name and "batch_size" in r]
        for split in dict.fromkeys(r["split"] for r in rows):
            cells = {(r["scheme"], r["batch_size"]): cell(r) for r in rows if r["split"] == split}
            schemes, batches = (list(dict.fromkeys(x)) for x in zip(*cells, strict=True))
            title = f"{study} ({split})" if split else study
            what = [c.removeprefix(title) for c in captions if c.startswith(f"{title}: ")]
            body = [[s, *(cells.get((s, b), "missing") for b in batches)] for s in schemes]
            parts.append(f"[{title}](../../results/{study}/README.md){''.join(what)}")
            parts.append(table(["scheme \\ batch size", *batches], body))
            if "†" in parts[-1]:
                parts.append("† not run: at every batch size the same computation")
    return "\n\n".join(parts) or "Not measured yet."


def cost(name: str) -> str:
    file, method = RESULTS / "inference" / "inference.json", methods()
    data = json.loads(file.read_text()) if file.exists() else {}
    rows = [r for r in data.get("rows", []) if method.get(r.get("norm")) == name]
    columns = list(dict.fromkeys(key for r in rows for key in r))

    def text(value: Any) -> str:
        if isinstance(value, int | float):
            return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        return "–" if value is None else str(value)

    told = {**data.get("setting", {}), **data.get("environment", {})}
    where = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items())
    body = [[text(r.get(key)) for key in columns] for r in rows]
    filled = table([key.replace("_", " ") for key in columns], body)
    link = "[results/inference](../../results/inference)"
    return f"{filled}\n\n{link}: {where}" if rows else "Not measured yet."


def filled(page: Path) -> str:
    """The page with its tables made anew. Raises `ValueError` if one has no place in it."""
    text = page.read_text()
    for make in (options, published, measured, cost):
        start, end = (f"<!-- {mark}{make.__name__} -->\n" for mark in ("", "/"))
        if [text.count(start), text.count(end)] != [1, 1]:
            raise ValueError(f"{page}: expected {start.strip()} and {end.strip()} once")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{make(page.stem)}\n\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args().check
    try:
        pages = [PAGES / f"{name}.md" for name in sorted(set(methods().values()))]
        stale = [(page, new) for page in pages if (new := filled(page)) != page.read_text()]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for page, new in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if check else 'written'}")
        if not check:
            write(page, new)
    sys.exit(check and bool(stale))


if __name__ == "__main__":
    main()
