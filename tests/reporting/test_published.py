"""results/published.yaml: that what it says of names and experiments can be used as it is."""

import pytest

import norms
from models import NETWORKS
from reporting.measure import RULES
from reporting.published import choose, load, number, scheme, table, variant

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
        alone = row.get("norm_batch") == 1  # where batch statistics fail
        assert (0 if alone else 50) < row.get("top1_acc", 100 - row.get("top1_error", 0)) < 100


def published(table_name, model="ResNet-50"):
    """Norm, batch size: top-1 error of a table, as printed."""
    rows = table()[(table()["name"] == table_name) & (table()["model"] == model)]
    batches = [None if batch != batch else batch for batch in rows["norm_batch"]]
    numbers = [str(number(row, "top1", True)) for _, row in rows.iterrows()]
    return dict(zip(zip(rows["norm"], batches, strict=True), numbers, strict=True))


def test_weight_standardization_as_printed():
    assert published("WS 1903.10520, Table 1") == {
        ("LN", None): "27.22",
        ("LN+WS", None): "24.6",
        ("IN", None): "29.49",
        ("IN+WS", None): "28.24",
        ("GN", None): "24.81",
        ("GN+WS", None): "23.72",
        ("BN", 64): "24.3",
        ("BN+WS", 64): "23.76",
    }


def test_batch_channel_norm_as_printed():
    name = "BCN 1911.09738, Table 6 (of 1903.10520)"
    rows = {("GN", None): "24.81", ("GN+WS", None): "23.72", ("BCN+WS", None): "23.09"}
    assert published(name) == rows
    rows = {("GN", None): "22.87", ("GN+WS", None): "22.1", ("BCN+WS", None): "21.29"}
    assert published(name, "ResNet-101") == rows
    best = table()[(table()["name"] == name) & (table()["norm"] == "BCN+WS")]
    assert [str(number(row, "top5", True)) for _, row in best.iterrows()] == ["6.55", "5.6"]


def test_the_statistics_that_were_evaluated_are_told():
    evaluated = published("Rethinking Batch 2105.07576, Table 2")
    assert evaluated["BN", 2] == "35.5"
    assert evaluated["BN (statistics=precise, B=1000)", 2] == "32.0"
    assert (
        published("Rethinking Batch 2105.07576, Fig. 6")["BN (freeze_statistics=20)", 2] == "25.2"
    )
    precise = {"evaluation.statistics": "precise", "evaluation.batch_size": 1000}
    assert variant("BN", {}, False)
    assert not variant("BN", precise, False)
    assert variant("GN", precise, True)
    assert variant("BN (statistics=precise, B=1000)", precise, False)
    assert not variant("BN (statistics=precise, B=10)", precise, False)
    assert not variant("BN (statistics=precise, B=1000)", {}, False)
    assert not variant("BN", {"recipe.freeze_statistics": 20}, False)
