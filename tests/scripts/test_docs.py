import re
import subprocess
import sys

import pytest
from torch import nn

import norms
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


def test_no_table_is_empty():
    for name in norms.names():
        parts = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", PAGES[name], re.DOTALL)
        assert [part for part, _ in parts] == ["options", "cost", "published", "measured"]
        assert all(text.strip() for _, text in parts)


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
    (pages / "gn.md").write_text(PAGES["gn"].replace("<!-- /cost -->", ""))
    assert "gn.md: expected <!-- cost --> and <!-- /cost --> once" in run(monkeypatch, "--check")
    (pages / "gn.md").unlink()
    assert "gn.md" in run(monkeypatch, "--check")


def test_a_comment_over_two_lines():
    rows = {key: meaning for key, _, meaning in docs.keys("gn")}
    assert rows["groups"].endswith("leave this many channels in each (`min_channels`)")
    assert rows["min_channels"] == "see `groups`"


def test_measured_cells(tmp_path, monkeypatch):
    study = tmp_path / "mine"
    study.mkdir()
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    (study / "table.csv").write_text(
        "split,scheme,batch_size,mean,std,n,diverged,unfinished,filled\n"
        ",bn,2,41.265,1.9586,2,0,0,False\n"
        ",bn,8,,,0,1,2,False\n"
        ",pws_cifar,2,50.0,,1,0,0,True\n"
        ",pws_cifar,8,50.0,,1,0,0,False\n"
        ",gone,2,1.0,,1,0,0,False\n"
    )
    (study / "table.md").write_text("mine: top-1 accuracy (%)\n\n| scheme |\n")
    assert docs.measured("bn") == (
        "[mine](../../results/mine/README.md): top-1 accuracy (%)\n\n"
        "| scheme \\ batch size | 2 | 8 |\n| --- | --- | --- |\n"
        "| bn | 41.27 ± 1.96 (2) | 1 diverged, 2 unfinished |"
    )
    assert "| pws_cifar | 50.00† (1) | 50.00 (1) |" in docs.measured("pws")
    assert docs.measured("gn") == "Not measured yet."


def test_measured_cells_of_a_newer_table_and_one_of_other_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    for study, head in (
        ("mine", "scheme,batch_size,recipe.lr,metric"),
        ("other", "recipe.lr,batch_size,x,metric"),
    ):
        (tmp_path / study).mkdir()
        (tmp_path / study / "table.csv").write_text(
            f"split,{head},mean,std,n,diverged,failed,unfinished,filled,published\n"
            ',gn,2,0.1,"top-1 accuracy (%), last epoch",50.0,,1,0,2,0,False,\n'
        )
        (tmp_path / study / "table.md").write_text(f"{study}: top-1 accuracy (%)\n")
    assert docs.measured("gn").count("| gn | 50.00 (1), 2 failed |") == 1
    assert "other" not in docs.measured("gn")


def test_cost_takes_the_numbers_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.cost("pws") == "Not measured yet."
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "inference.json").write_text(
        '{"setting": {"model": "resnet50"}, "rows": ['
        '{"norm": "pws_cifar", "folded_ms": 12.3456, "parameters": 25600000},'
        '{"norm": "bn", "folded_ms": null, "saved_bytes": 5}]}'
    )
    assert "| pws_cifar | 12.3 | 25,600,000 |" in docs.cost("pws")
    assert "| bn | – | 5 |" in docs.cost("bn")
    assert docs.cost("bn").endswith("model resnet50")
    assert docs.cost("gn") == "Not measured yet."


def test_published_rows_are_whole():
    data = docs.load(docs.RESULTS / "published.yaml")
    assert {row["source"] for row in data["rows"]} == set(data["sources"])
    known = {"paper", "table", "dataset", "model", "norm", "norm_batch", "sgd_batch", "top1_acc"}
    known |= {"top1_error", "top5_error", "plus_minus", "epochs", "lr", "source", "note"}
    for row in data["rows"]:
        assert set(row) <= known
        assert ("top1_acc" in row) != ("top1_error" in row)
        assert 50 < row.get("top1_acc", 100 - row.get("top1_error", 0)) < 100


def test_errors_are_shown_as_accuracies_with_the_decimals_that_are_printed():
    text = docs.published("ws_gn")
    assert "| GN+WS | ResNet-50 | ImageNet | – | 256 | 90 | 76.28 |" in text
    assert "- ws-readme (primary-repo): " in text
    assert docs.published("gn").count("\n| GN") > 20
    assert docs.published("ws_bn") == "None that we could read in a source."


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
