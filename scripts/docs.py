"""The tables of options in docs/methods, from configs/norm.

    python scripts/docs.py            # fill them
    python scripts/docs.py --check    # exit 1 and name the pages that are out of date

Writes what stands between `<!-- options -->` and `<!-- /options -->`; the rest of a page is written
by hand. A page has the name of its method.
"""

import argparse
import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf

from training.files import write
from training.process import run_script

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
OPTIONS = ROOT / "configs" / "norm"


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


def filled(page: Path) -> str:
    """The page with its table made anew. Raises `ValueError` if it has no place for it."""
    text = page.read_text()
    start, end = (f"<!-- {mark}options -->\n" for mark in ("", "/"))
    if [text.count(start), text.count(end)] != [1, 1]:
        raise ValueError(f"{page}: expected {start.strip()} and {end.strip()} once")
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n{options(page.stem)}\n\n{end}{after}"


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
    run_script(main)
