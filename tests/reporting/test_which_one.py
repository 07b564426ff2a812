"""The README's "Which one should I use?" is written by hand: its numbers stand in what it cites."""

import re
from pathlib import Path

import pytest

from reporting import published

ROOT = Path(__file__).parent.parent.parent
SECTION = re.search(
    r"## Which one should I use\?\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S
)
CITED = re.findall(r"\]\((results/[^)]+)\)", SECTION[1])


def told(text):
    """(scheme, number) of every number with decimals; a scheme stands in front of its number."""
    pairs = re.findall(r"`(\w+)` (\d+\.\d+)", text)
    assert len(pairs) == len(re.findall(r"\d+\.\d+", text)), "a number without its scheme"
    return pairs


def numbers(scheme):
    """Those that the cited files have of a scheme."""
    found = set()
    for file in CITED:
        if file.endswith(".yaml"):
            rows = published.table()
            own = rows[(rows["method"] == scheme) & (rows["dataset"] == "ImageNet")]
            found |= {str(published.number(row, "top1", False)) for _, row in own.iterrows()}
        else:
            text = (ROOT / file).read_text()
            lines = re.findall(rf"^\| {scheme} +\|.*$", text, re.M)
            found |= set(re.findall(r"\d+\.\d+", " ".join(lines)))
    return found


def test_it_cites_results_that_are_there():
    assert all((ROOT / file).exists() for file in CITED)
    assert "results/cifar10-small/table.md" in CITED


@pytest.mark.parametrize(("scheme", "number"), sorted(set(told(SECTION[1]))))
def test_every_number_stands_in_the_results(scheme, number):
    assert number in numbers(scheme)


def test_a_wrong_number_would_be_noticed():
    assert "53.29" not in numbers("bcn")
    assert told("`bn` 42.81, `gn` 41.26") == [("bn", "42.81"), ("gn", "41.26")]
    with pytest.raises(AssertionError):
        told("42.81 for `bn`")
