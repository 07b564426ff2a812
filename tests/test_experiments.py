"""The presets of configs/experiment: what follows from them for every cell of their sweeps against
the papers, and their opening comments against results/published.yaml."""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import norms
from reporting import published
from reporting.published import scheme
from scripts.docs import methods
from training import config, protocol
from training.optimizer import learning_rate

ROOT = Path(__file__).parent.parent
PRESETS = sorted(p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml"))
# Ours, whose comments have no such form.
EARLIER = {"cifar10_cpu", "cifar10_small", "cifar10_table", "family", "quickstart"}
PAPERS = [p for p in PRESETS if p not in EARLIER and not p.endswith("_table")]
IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000}


@functools.cache
def composed(*words):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", list(words), return_hydra_config=True)


def sweep(preset):
    """The cells that `python train.py -m experiment=PRESET` runs."""
    parts = dict(composed(f"experiment={preset}").hydra.sweeper.params)
    for values in itertools.product(*(str(v).split(",") for v in parts.values())):
        yield [f"{key}={value}" for key, value in zip(parts, values, strict=True)]


# --- what follows from a preset


# Read in the papers and their code: see docs/methods and the presets' comments. `drops`: epochs
# after which the learning rate falls, or updates where the length is given in updates.
ALWAYS = dict(momentum=0.9, weight_decay=1e-4, weight_decay_norms=True, smoothing=0.0)
GN = dict(model="resnet50", data="imagenet", epochs=100, drops=[30, 60, 90])
CELLS = {
    # preset: [(words of a cell, sgd_batch, lr, what else is said)]
    "gn_imagenet": [
        (f"norm={norm} batch={n}", 8 * n, 0.1 * n / 32, dict(GN, zero_init=True, block="post"))
        for norm in ("bn", "gn")
        for n in (32, 16, 8, 4, 2)
    ],
    "mabn_imagenet": [
        (
            f"norm={norm} batch={n}",
            256,
            0.1,
            dict(model="resnet50", data="imagenet", updates=600_000, smoothing=0.1, block="post")
            | dict(drops=[150_000, 300_000, 450_000], zero_init=False),
        )
        for norm in ("bn", "brn", "mabn_imagenet")
        for n in (2, 4, 8, 16, 32)
    ],
    "ws_imagenet": [
        (
            f"norm={norm}",
            256,
            0.1,
            dict(GN, epochs=90, drops=[30, 60], zero_init=False, block="post", batch=64),
        )
        for norm in ("bn", "gn", "ws_gn")
    ],
    "bcn_imagenet": [
        (
            f"norm={norm}",
            256,
            0.1,
            dict(GN, epochs=90, drops=[30, 60], zero_init=True, block="post", batch=64),
        )
        for norm in ("bn", "ws_gn", "bcn")
    ],
    "pws_imagenet": [
        (f"norm={norm}", 64, 0.025, dict(GN, zero_init=False, block="pws", batch=64))
        for norm in ("bn", "gn", "pws_imagenet", "pws_equiv")
    ],
    "pws_cifar10": [
        (
            f"norm={norm}",
            128,
            0.1,
            dict(model="resnet34_cifar", data="cifar10", epochs=200, drops=[100, 150], batch=128)
            | dict(weight_decay=5e-4, zero_init=True, block="pws"),
        )
        for norm in ("bn", "gn", "pws_cifar")
    ],
    "bcn_cifar": [
        (
            f"norm={norm} data={data}",
            128,
            0.1,
            dict(model="resnet110", data=data, epochs=164, drops=[81, 122], batch=128)
            | dict(zero_init=norm == "bcn", block="post"),
        )
        for norm in ("bn", "bcn")
        for data in ("cifar10", "cifar100")
    ],
    "gn_cifar10": [
        (
            f"norm={norm}",
            256,
            0.1,
            dict(model="resnet110", data="cifar10", updates=400 * 390, batch=128, block="post")
            | dict(drops=[390 * 82, 390 * 123, 390 * 300], zero_init=False)
            | dict(weight_decay=2e-4, weight_decay_norms=False),
        )
        for norm in ("bn", "gn_cifar")
    ],
}


@pytest.mark.parametrize("preset", PAPERS)
def test_a_sweep_is_the_papers_rows_and_columns(preset):
    assert [" ".join(cell) for cell in sweep(preset)] == [words for words, *_ in CELLS[preset]]


@pytest.mark.parametrize("preset", PAPERS)
def test_the_numbers_of_every_cell_are_the_papers(preset):
    for words, sgd_batch, lr, also in CELLS[preset]:
        cfg = composed(f"experiment={preset}", *words.split())
        said = ALWAYS | also
        plan, recipe = protocol.plan(cfg), cfg.recipe
        assert type(plan.sgd_batch) is int
        assert plan.sgd_batch == sgd_batch, words
        assert plan.micro_batch == sgd_batch, words
        assert plan.lr == pytest.approx(lr), words
        assert plan.batch == said.get("batch", cfg.batch), words
        assert (cfg.model.name, cfg.data.name) == (said["model"], said["data"])
        scheme = norms.build(batch_size=plan.batch, sgd_batch_size=sgd_batch, **cfg.norm)
        zero, block = cfg.model.zero_init, cfg.model.block
        assert (scheme.zero_init if zero == "auto" else zero) == said["zero_init"], words
        assert (scheme.block if block == "auto" else block) == said["block"], words
        assert (recipe.momentum, recipe.nesterov) == (said["momentum"], False)
        assert recipe.weight_decay == said["weight_decay"]
        assert recipe.weight_decay_norms == said["weight_decay_norms"]
        assert recipe.label_smoothing == said["smoothing"]

        per_epoch = 1 if "updates" in said else IMAGES[cfg.data.name] // sgd_batch
        assert (recipe.updates, recipe.epochs) == (said.get("updates"), said.get("epochs"))
        updates = said.get("updates") or said["epochs"] * per_epoch
        warmup = round(recipe.warmup * updates)
        assert warmup == (390 if preset == "gn_cifar10" else 0)
        for i, drop in enumerate(said["drops"]):
            at = drop * per_epoch
            before, after = (learning_rate(u, updates, plan.lr, recipe) for u in (at - 1, at))
            assert before == pytest.approx(lr * 0.1**i), (words, drop)
            assert after == pytest.approx(lr * 0.1 ** (i + 1)), (words, drop)
        last = learning_rate(updates - 1, updates, plan.lr, recipe)
        assert last == pytest.approx(lr * 0.1 ** len(said["drops"]))


def test_what_mabns_recipe_does_to_images():
    recipe = composed("experiment=mabn_imagenet").recipe
    assert (recipe.crop, recipe.lighting, recipe.pixels) == ("random_square", 0.1, "bgr_255")
    for preset in ("gn_imagenet", "ws_imagenet", "bcn_imagenet", "pws_imagenet"):
        recipe = composed(f"experiment={preset}").recipe
        assert (recipe.crop, recipe.lighting) == ("random_resized", 0.0)
        assert recipe.pixels == "standardized"


def test_settings_of_schemes_are_those_of_the_papers_code():
    def options(norm):
        return composed(f"norm={norm}").norm

    assert options("mabn_imagenet").version == "imagenet"
    assert options("gn_cifar").groups == 8
    layer = norms.build(**options("gn_cifar")).norm
    assert [layer(width).num_groups for width in (16, 32, 64)] == [8, 8, 8]
    paper, code = options("ws_gn_paper"), options("ws_gn")
    assert (paper.unbiased, paper.eps_inside) == (False, True)
    assert (code.unbiased, code.eps_inside) == (True, False)
    pws = options("pws_cifar")
    assert (pws.gamma, pws.equiv, pws.mode, pws.initalpha) == (1e-3, False, "fan_out", False)
    pws = options("pws_imagenet")
    assert (pws.gamma, pws.equiv, pws.mode, pws.initalpha) == (1e-4, False, "fan_in", True)
    pws = options("pws_equiv")
    assert (pws.gamma, pws.equiv, pws.mode, pws.initalpha) == (0.1, True, "fan_in", True)


def test_no_preset_sets_keys_of_a_scheme():
    for preset in PRESETS:
        text = yaml.safe_load((ROOT / f"configs/experiment/{preset}.yaml").read_text())
        assert "norm" not in text, preset


def test_large_batches_of_bcn_have_statistics_of_the_batch():
    cfg = composed("experiment=bcn_imagenet", "norm=bcn")
    layer = norms.build(batch_size=cfg.batch, **cfg.norm).norm(64)
    assert type(layer.bn).__name__ == "GhostBatchNorm2d"
    layer = norms.build(batch_size=2, **cfg.norm).norm(64)
    assert type(layer.bn).__name__ == "EstimatedBatchNorm2d"


# --- a value that follows the batch size


def test_eight_times_the_batch_is_one_setting_and_plain_numbers():
    """As written it is the same in every cell, so that names and tables see one study; where it is
    used it is a whole number."""
    small, large = (composed("experiment=gn_imagenet", f"batch={n}") for n in (2, 32))
    small, large = (
        OmegaConf.masked_copy(c, [k for k in c if k != "hydra"]) for c in (small, large)
    )
    keys = config.identity(small)
    differ = {k for k, v in config.identity(large).items() if keys[k] != v}
    assert differ == {"batch"}
    assert config.flatten(small, resolve=True)["protocol.sgd_batch"] == 16


@pytest.mark.parametrize("value", ["0", "2.5", "two", "true", "null"])
def test_a_batch_that_is_none_is_told_as_such(train, value):
    made = train("experiment=gn_imagenet", "data=digits", f"batch={value}", quick=False)
    assert made.status == 1
    assert made.err == f"error: batch={value}: expected a whole number from 1\n"


# --- the command line wins


def test_presets_yield_to_the_command_line():
    words = "model=resnet18 recipe=cifar data=cifar10 norm=mabn batch=4 protocol=accumulate"
    cfg = composed("experiment=gn_imagenet", *words.split(), "protocol.sgd_batch=64")
    assert (cfg.model.name, cfg.data.name, cfg.norm.name) == ("resnet18", "cifar10", "mabn")
    assert (cfg.recipe.name, cfg.recipe.epochs) == ("cifar", 30)
    assert protocol.plan(cfg) == protocol.Plan(4, 64, 1, 4, 0.05)
    cfg = composed("experiment=mabn_imagenet", "data=synthetic", "recipe.updates=10")
    assert (cfg.model.name, cfg.recipe.name) == ("resnet50", "imagenet_mabn")  # the preset's own
    cfg = composed("experiment=bcn_cifar", "data=cifar100", "recipe.lr=0.3")
    assert (cfg.model.name, cfg.recipe.name) == ("resnet110", "cifar_resnet")
    assert protocol.plan(cfg).lr == pytest.approx(0.3)


@pytest.mark.parametrize("model", ["resnet101", "resnext50_32x4d"])
def test_ws_larger_networks_by_the_commands_of_its_comment(model):
    words = command("ws_imagenet", "study=ws_imagenet_128")
    cell = [w for w in words if not w.startswith(("data.root", "model="))]
    cfg = composed(*cell, f"model={model}")
    assert (protocol.plan(cfg).sgd_batch, protocol.plan(cfg).lr) == (128, pytest.approx(0.1))
    assert (cfg.recipe.epochs, list(cfg.recipe.milestones)) == (100, [0.3, 0.6, 0.9])
    assert (cfg.model.name, cfg.model.zero_init) == (model, False)


# --- the opening comments


def comment(preset):
    lines = (ROOT / f"configs/experiment/{preset}.yaml").read_text().splitlines()
    return [x[2:] for x in itertools.takewhile(lambda x: x.startswith("#"), lines)]


def commands(preset):
    """Of the comment, a command to a line: its words behind `train.py -m` or `table.py`."""
    text = "\n".join(comment(preset)).replace("\\\n", "")
    return [line.split() for line in text.split("\n") if line.startswith("  python ")]


def command(preset, word):
    found = next(c for c in commands(preset) if word in c)
    return found[found.index("-m") + 1 :]


def section(preset, start):
    """The comment's text from `start` up to the next paragraph of another kind."""
    lines = comment(preset)
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    end = [i for i, x in enumerate(lines) if i > first and re.match("(Rule|Cost|Differs):", x)]
    return "\n".join(lines[first : end[0] if end else None])


def grid(text):
    """(row, column) -> what is printed, of a table whose first line names the columns' key."""
    lines = [x.split() for x in text.split("\n") if x.startswith("  ")]
    (axis, *columns), *rows = lines
    cells = {(r[0], c): x for r in rows for c, x in zip(columns, r[1:], strict=True)}
    return axis, cells


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in EARLIER])
def test_a_comment_has_commands_expectations_rule_and_cost(preset):
    lines = comment(preset)
    assert lines[0] == "@package _global_"
    first, *others = commands(preset)
    assert first[:4] == ["python", "train.py", "-m", f"experiment={preset}"]
    tables = [c for c in others if c[1] == "scripts/table.py"]
    assert tables[0][2].startswith(f"runs/{preset}")
    rule = section(preset, "Rule: ").split("\n")[0]
    name = next(r for r in ("median5", "best", "last") if r.replace("median5", "median") in rule)
    if preset in PAPERS:
        assert all(c[c.index("--rule") + 1] == name for c in tables)
        assert section(preset, "Differs: ")
    for words in others:
        if words[1] == "train.py":
            cfg = words[words.index("-m") + 1 :]
            composed(*(re.sub(r"(=[^,]*),.*", r"\1", w) for w in cfg))
    sources = published.load()["sources"]
    expected = section(preset, "Expected")
    assert "no source found" in expected or any(source in expected for source in sources)


KINDS = "gn|mabn|ws|bcn|pws|brn|frn|detectron|mimicnorm"


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in EARLIER])
def test_named_sources_exist(preset):
    sources = published.load()["sources"]
    text = " ".join(section(preset, "Expected").split())
    named = set(re.findall(rf"\b((?:{KINDS})-[a-z0-9-]+)\b", text))
    assert named <= set(sources)


# Which rows of results/published.yaml a preset's figures are to be found in.
BCN_TABLE = "BCN 1911.09738, Table 6 (of 1903.10520)"
TABLES = {
    "gn_imagenet": (["GN 1803.08494, Table 2"], {}),
    "mabn_imagenet": (["MABN 2001.06838, figure error against batch size"], {}),
    "ws_imagenet": (
        [
            *(f"WS 1903.10520, {x}" for x in ("Table 1", "Fig. 1", "README ImageNet")),
            *("WS 1903.10520, README, upstream baseline", BCN_TABLE),
        ],
        {"dataset": "ImageNet"},
    ),
    "bcn_imagenet": ([BCN_TABLE], {}),
    "pws_imagenet": (["PWS 2103.11590, README ImageNet"], {}),
    "pws_cifar10": (["PWS 2103.11590, README Cifar10"], {}),
    "bcn_cifar": (["WS 1903.10520, README, upstream baseline"], {"model": "ResNet-110"}),
    "gn_cifar10": (["GN 1803.08494, reproduction"], {"dataset": "CIFAR-10"}),
}


@pytest.mark.parametrize("preset", PAPERS)
def test_expected_figures_are_the_published_ones(preset):
    """Every figure of the comment is in results/published.yaml, from a source that the comment
    names, and where that has one the comment has no dash."""
    text = section(preset, "Expected")
    tables, also = TABLES[preset]
    axis, cells = grid(text)
    method = methods()
    key = "top1_error" if "error" in text.split("\n")[0] else "top1_acc"
    found = {}
    for row in published.load()["rows"]:
        if f"{row['paper']}, {row['table']}" not in tables or also.items() - row.items():
            continue
        model = row["model"].lower().replace("resnet-", "resnet").replace("next-", "next")
        column = {
            "batch": str(row.get("norm_batch", row["sgd_batch"]) if axis == "batch" else ""),
            "data": row["dataset"].lower().replace("-", ""),
            "model": model.replace("-", "_"),
        }[axis]
        if (label := scheme(row["norm"])) in norms.names():
            found.setdefault((label, column), []).append(row)
    for (norm, column), printed in cells.items():
        rows = found.get((method[norm], column), [])
        if printed == "–":
            assert not rows, (norm, column)
        else:
            good = [r for r in rows if r[key] == float(printed)]
            assert any(r["source"] in text for r in good), (norm, column, printed)
    assert set(found) == {
        (method[norm], column) for norm, column in cells if cells[norm, column] != "–"
    }


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in EARLIER])
def test_costs_are_computed_from_the_rate_that_is_named(preset):
    text = " ".join(section(preset, "Cost: ").split())
    told = re.match(r"Cost: (\d+) runs x ([\d.]+) GPU-hours = ([\d.]+) at ([\d,]+) images/s", text)
    assert told, text
    runs, each, total, rate = (float(x) for x in told.groups())
    cells = list(sweep(preset))
    assert runs == len(cells)
    hours = []
    for cell in cells:
        cfg = composed(
            f"experiment={preset}", *(w for w in cell if w.startswith(("batch", "data")))
        )
        sgd_batch = protocol.plan(cfg).sgd_batch
        updates = cfg.recipe.updates or cfg.recipe.epochs * (IMAGES[cfg.data.name] // sgd_batch)
        hours.append(updates * sgd_batch / rate / 3600)
    assert each == pytest.approx(sum(hours) / len(hours), rel=0.02)
    assert total == pytest.approx(sum(hours), rel=0.02)
    assert "not measured by us" in text
    assert f"scripts/plan.py experiment={preset}" in text


# --- run

SMALL = {
    "model": "resnet8",
    "data": "synthetic",
    "data.size": "16",
    "data.test_images": "10",
    "recipe.crop": "4",
}


@pytest.mark.parametrize("preset", [*PAPERS, "cifar100_table"])
def test_a_cell_of_every_preset_runs(train, preset):
    """On random images with a small network, everything else as the preset has it."""
    cell = dict(word.split("=") for word in [*sweep(preset)][-1])
    cfg = composed(f"experiment={preset}", *(f"{k}={v}" for k, v in cell.items()))
    plan = protocol.plan(cfg)
    keys = cell | SMALL | {"data.train_images": str(plan.sgd_batch), "data.train_fraction": "1.0"}
    if "lighting" in cfg.recipe:
        keys |= {"recipe.lighting": "0.0", "recipe.pixels": "standardized"}
    length = "recipe.updates=1" if cfg.recipe.updates else "recipe.epochs=1"
    words = [f"experiment={preset}", length, *(f"{k}={v}" for k, v in keys.items())]
    done = train(*words, quick=False)
    assert done.status == 0, done.err
    assert done.run().parent.name == preset
    result = json.loads((done.run() / "result.json").read_text())
    assert (result["sgd_batch_size"], result["batch_size"]) == (plan.sgd_batch, plan.batch)
    assert (result["recipe"], result["updates"]) == (cfg.recipe.name, 1)
    assert result["protocol"] == cfg.protocol.name


def test_a_study_whose_sgd_batch_follows_the_batch(train):
    keys = [f"{k}={v}" for k, v in SMALL.items()]
    keys += ["data.train_images=32", "data.train_fraction=1.0", "recipe.lighting=0.0"]
    words = ["-m", "experiment=gn_imagenet", "norm=gn", "batch=4,2", *keys, "recipe.epochs=1"]
    done = train(*words, quick=False)
    assert done.status == 0, done.err
    sizes = {
        json.loads(f.read_text())["batch_size"]: json.loads(f.read_text())["sgd_batch_size"]
        for f in done.runs.glob("gn_imagenet/*/result.json")
    }
    assert sizes == {4: 32, 2: 16}
    assert "learning rate 0.0125 = 0.1 x 32 / 256" in done.out
    assert "learning rate 0.00625 = 0.1 x 16 / 256" in done.out
    again = train(*words, quick=False)
    assert again.out.count("finished already, skipped") == 2


def test_data_that_is_not_there_is_told_once(train):
    """Three runs, one line about them and one that counts them."""
    made = train("-m", "experiment=pws_cifar10", "data=folder", "data.root=/nowhere", quick=False)
    assert made.status == 1
    told = [line for line in made.err.split("\n") if line.startswith("error: ")]
    assert len(told) == 2, made.err
    assert "data.root=/nowhere: does not exist" in told[0]
    assert "3 of these runs failed" in told[1]
    assert not list(made.runs.glob("*/*/*.pt"))


# --- ImageNet's presets on photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A tree as ImageNet's: 256 training and 4 validation images of two classes, JPEGs of some
    sizes. The training images are few files under many names, as only their number matters."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, count in (("train", 128), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(count):
                file = place / f"{name}_{i}.JPEG"
                if i < 4:
                    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                    size = tuple(rng.integers(20, 60, 2).tolist())
                    Image.fromarray(pixels).resize(size).save(file)
                else:
                    file.hardlink_to(place / f"{name}_{i % 4}.JPEG")
    return root


# Of the tables over batch sizes three of five columns, for time: MABN's windows
# are then of 16, 4 and 1 batches (of 8 and 2 in the others). BCN has ImageNet's stem and widths.
BATCHES = ("2", "8", "32")
PHOTOGRAPHS = {
    "gn_imagenet": ["model=resnet8", "batch=" + ",".join(BATCHES)],
    "mabn_imagenet": ["model=resnet8", "batch=" + ",".join(BATCHES)],
    "ws_imagenet": ["model=resnet8"],
    "bcn_imagenet": ["model=resnet18"],
    "pws_imagenet": ["model=resnet8"],
}


@pytest.mark.parametrize("preset", PHOTOGRAPHS)
def test_imagenets_presets_run_on_photographs(train, photographs, preset):
    """The sweep as it stands but for the network and the pixels, every cell an update long."""
    words = ["-m", f"experiment={preset}", f"data.root={photographs}", "data.verify_counts=false"]
    words += ["data.size=16", "data.resize=18", "data.workers=0", "recipe.updates=1"]
    done = train(*words, *PHOTOGRAPHS[preset], quick=False)
    assert done.status == 0, done.err
    results = [json.loads(f.read_text()) for f in done.runs.glob(f"{preset}/*/result.json")]
    found = {(r["norm"], r["batch_size"], r["sgd_batch_size"], r["status"]) for r in results}
    expected = set()
    for words, sgd_batch, _, said in CELLS[preset]:
        cell = dict(word.split("=") for word in words.split())
        batch = int(cell.get("batch", said.get("batch", 0)))
        if cell.get("batch", "2") in BATCHES:
            expected.add((cell["norm"], batch, sgd_batch, "finished"))
    assert found == expected
    assert len(results) == len(expected)
    assert all(math.isfinite(r["test_loss"]) and r["test_images"] == 4 for r in results)
