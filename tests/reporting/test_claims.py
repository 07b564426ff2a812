"""docs/claims.md is written by hand: its numbers stand in what it cites; its experiments exist."""

import re
from pathlib import Path

import pytest

from reporting import published

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "claims.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| claim |")
]
CELL = r"`(\w+)` (\d+\.\d+(?: ± \d+\.\d+)? \(\d+\)) at (\d+)"
RATIO = r"`(\w+)` (\d+\.\d+) of"


def lines(cited):
    """(header, cells) of every line of every table in the cited files."""
    found = []
    for file in cited:
        header: list[str] = []
        for line in (ROOT / "docs" / file).read_text().splitlines():
            cells = [cell.strip().replace("†", "") for cell in line.strip("|").split("|")]
            if not line.startswith("|"):
                header = []
            elif not header:
                header = cells
            else:
                found.append((header, cells))
    return found


def measured(text):
    """What stands in a cell and is not in the files that it cites; and what is no such number."""
    cited = re.findall(r"\]\((\.\./results/[^)]+)\)", text)
    there, missing = lines(cited), []
    for scheme, value, batch in re.findall(CELL, text):
        if not any(c[0] == scheme and dict(zip(h, c, strict=True)).get(batch) == value
                   for h, c in there):  # fmt: skip
            missing.append((scheme, value, batch))
    for scheme, value in re.findall(RATIO, text):
        if not any(c[0] == scheme and value in c for _, c in there):
            missing.append((scheme, value, None))
    rest = re.sub(r"\]\([^)]*\)", "", re.sub(RATIO, "", re.sub(CELL, "", text)))
    prose = " ".join(" ".join((ROOT / "docs" / file).read_text() for file in cited).split())
    return missing + [x for x in re.findall(r"\d+\.\d+", rest) if x not in prose]


def test_a_line_for_every_paper():
    assert len(ROWS) == 28
    assert all(len(row) == 5 and all(row) for row in ROWS)
    papers = set(re.findall(r"^## .*arXiv (\S+)\]", PAGE, re.M))
    mine = "1803.08494 1702.03275 2001.06838 1903.10520 1911.09738 2103.11590"
    assert papers == set(mine.split())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_line(row):
    claim, _, ours, verdict, cost = row
    printed = {
        str(published.number(one, "top1", errors))
        for _, one in published.table().iterrows()
        for errors in (False, True)
    }
    assert set(re.findall(r"\d+\.\d+", claim)) <= printed
    assert measured(ours) == []
    assert verdict.startswith(("confirmed", "not confirmed", "not tested"))
    assert (ours == "–") <= verdict.startswith("not tested")
    assert (verdict.startswith("confirmed")) <= ("](../results/" in ours)
    for name in re.findall(r"experiment=(\w+)", cost):
        assert (ROOT / "configs" / "experiment" / f"{name}.yaml").exists()
        each = re.search(r"(\d+) runs, ([\d.]+) GPU-hours", cost)
        text = (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text()
        said = re.search(r"runs x ([\d.]+) GPU-hours", text)
        assert each
        assert said
        assert float(each[2]) == pytest.approx(int(each[1]) * float(said[1]), rel=0.02)


def test_a_wrong_number_would_be_noticed():
    small = "([small](../results/cifar10-small/table.md))"
    assert measured(f"`bn` 42.81 ± 0.71 (2) at 2 {small}") == []
    for wrong in ("42.91 ± 0.71 (2) at 2", "42.81 ± 0.72 (2) at 2", "42.81 ± 0.71 (2) at 4"):
        assert measured(f"`bn` {wrong} {small}") != []
    assert measured(f"`gn` 42.81 ± 0.71 (2) at 2 {small}") != []
    assert measured(f"and 17.23 {small}") == ["17.23"]
    assert measured("`mabn` 0.95 of ([15](../results/inference/README.md))") != []
