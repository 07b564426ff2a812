import re
import subprocess
import sys

import pandas as pd
import pytest
from torch import nn

import norms
from reporting.published import load, scheme
from scripts import docs

SCRIPT = docs.ROOT / "scripts" / "docs.py"
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
PAGES = {page.stem: page.read_text() for page in docs.PAGES.glob("*.md")}


def test_a_page_for_every_method_and_its_line_in_the_index():
    assert set(PAGES) == {*norms.names(), "README"}
    for name in norms.names():
        assert f"| [{name}]({name}.md) |" in PAGES["README"]


def test_every_option_is_on_the_page_of_its_method():
    own = docs.methods()
    assert own["brn_short"] == "brn"
    for option, name in own.items():
        assert f"norm={option}`" in PAGES[name]
        for key, value, meaning in docs.keys(option):
            assert meaning, f"{option}.{key} has no comment"
            assert f"`{key}={value}`" in PAGES[name] or f"| `{key}` | `{value}` |" in PAGES[name]


def test_the_pages_of_this_repository_are_up_to_date_and_the_check_writes_nothing():
    made = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    assert {page.stem: page.read_text() for page in docs.PAGES.glob("*.md")} == PAGES


def test_every_page_leads_to_the_numbers_that_there_are():
    rows = load()["rows"]
    methods = docs.methods()
    for name in norms.names():
        own = PAGES[name].partition("## Published figures")[2]
        has = any(scheme(row["norm"]) == name for row in rows)
        assert ("results/published.yaml" in own) == has, name
        assert ("None that we could read in a source." in own) != has, name
        for table in docs.ROOT.glob("results/*/table.csv"):
            found = pd.read_csv(table)
            has = "scheme" in found and name in found["scheme"].map(methods).tolist()
            assert (f"results/{table.parent.name}/README.md" in own) == has, (name, table)


def test_links_lead_somewhere():
    for text in PAGES.values():
        for target in re.findall(r"\]\((?!https?:)([^)#]*)", text):
            assert (docs.PAGES / target).exists(), target


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["docs.py", *args])
    with pytest.raises(SystemExit) as stop:
        docs.main()
    return stop.value.code


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A copy of the pages, which the script takes for its own."""
    for name, text in PAGES.items():
        (tmp_path / f"{name}.md").write_text(text)
    monkeypatch.setattr(docs, "PAGES", tmp_path)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    return tmp_path


def test_a_changed_table_is_named_and_then_made_anew(pages, monkeypatch, capsys):
    page = pages / "gn.md"
    page.write_text(PAGES["gn"].replace("| `groups` | `32` |", "| `groups` | `16` |"))
    assert run(monkeypatch, "--check") == 1
    assert capsys.readouterr().out == "gn.md: out of date\n"
    assert "`16`" in page.read_text()
    assert run(monkeypatch) == 0
    assert page.read_text() == PAGES["gn"]


def test_a_page_without_a_place_for_a_table_or_none_at_all(pages, monkeypatch):
    (pages / "gn.md").write_text(PAGES["gn"].replace("<!-- /options -->", ""))
    assert "gn.md: expected <!-- options --> and <!-- /options --> once" in run(
        monkeypatch, "--check"
    )
    (pages / "gn.md").unlink()
    assert "gn.md" in run(monkeypatch, "--check")


def test_a_comment_over_two_lines():
    rows = {key: meaning for key, _, meaning in docs.keys("gn")}
    assert rows["groups"].endswith("leave this many channels in each (`min_channels`)")
    assert rows["min_channels"] == "see `groups`"


def test_what_the_pws_page_says_of_a_converted_network():
    def host():
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))

    network = norms.convert(host(), norms.build("pws"))
    assert [type(network[i]) for i in (1, 4, 7)] == [nn.GroupNorm, nn.Identity, nn.GroupNorm]
    found = network.load_state_dict(host().state_dict(), strict=False)
    assert set(found.missing_keys) == {f"{i}.{k}" for i in (0, 3, 6) for k in ("alpha", "bias")}
    running = {f"{i}.{k}" for i in (1, 4, 7) for k in RUNNING}
    assert set(found.unexpected_keys) == {"4.weight", "4.bias"} | running
