"""results/published.yaml: that what it says of names and experiments can be used as it is."""

import pytest

import norms
from models import NETWORKS
from reporting.measure import RULES
from reporting.published import choose, load, number, scheme, table

TABLES = set(table()["name"])
EXPERIMENTS = load()["experiments"]


def test_names_are_ours():
    names = load()["names"]
    schemes = {scheme(norm) for norm in (*names["norms"], *names["batch_independent"])}
    assert schemes <= set(norms.names())
    ours = {model for models in names["models"].values() for model in models if "/" not in model}
    assert ours <= set(NETWORKS)
    assert set(names["models"]) <= {row["model"] for row in load()["rows"]}
    assert set(names["data"]) == {row["dataset"] for row in load()["rows"]}


def test_batch_independent_is_what_the_schemes_say():
    free = set(load()["names"]["batch_independent"])
    for norm in {row["norm"].split(" (")[0] for row in load()["rows"]}:
        if scheme(norm) in norms.names():
            assert norms.build(scheme(norm), batch_size=2).batch_independent == (norm in free), norm


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name):
    entry = EXPERIMENTS[name]
    assert set(entry) <= {"paper", "rule", "tables", "not_found"}
    assert set(entry["tables"]) <= TABLES
    assert entry.get("rule", "last") in RULES
    known = load()["names"]
    for part in entry.get("not_found", []):
        assert set(part) == {"norms", "model", "dataset", "what"}
        assert {scheme(norm) for norm in part["norms"]} <= set(norms.names())
        assert part["model"] in known["models"]
        assert part["dataset"] in known["data"]
    assert choose([name]).papers == {entry["paper"]: entry.get("rule")}


def test_all_published_experiments_are_there():
    assert set(EXPERIMENTS) == {
        *("gn_imagenet", "mabn_imagenet", "ws_imagenet", "bcn_imagenet", "pws_imagenet"),
        *("pws_cifar10", "bcn_cifar", "gn_cifar10"),
    }


def test_numbers_keep_their_decimals():
    row = {"top1_error": 27.9, "top5_acc": 93.01}
    assert str(number(row, "top1", False)) == "72.1"
    assert str(number(row, "top1", True)) == "27.9"
    assert str(number(row, "top5", True)) == "6.99"
    assert number(row, "top2", True) is None


def test_no_experiment_no_reference():
    reference = choose([None, "quickstart"])
    assert (reference.tables, reference.papers, reference.not_found) == ([], {}, [])


def test_published_rows_are_whole():
    data = load()
    assert {row["source"] for row in data["rows"]} == set(data["sources"])
    known = {"paper", "table", "dataset", "model", "norm", "norm_batch", "sgd_batch", "top1_acc"}
    known |= {"top1_error", "top5_error", "plus_minus", "epochs", "lr", "source", "note"}
    for row in data["rows"]:
        assert set(row) <= known
        assert ("top1_acc" in row) != ("top1_error" in row)
        assert 50 < row.get("top1_acc", 100 - row.get("top1_error", 0)) < 100
