"""Probes measure what they say, change nothing, and cost nothing when off."""

import csv
import subprocess
import sys

import pytest
import torch
from torch import nn

import models
import norms
from tests.conftest import ROOT
from tests.norms import literal
from training import probes


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_batch_statistics_are_those_of_the_backward_formula(as_default):
    """Of three batches: the columns by hand, and with them batch norm's own gradient."""
    layer = norms.GhostBatchNorm2d(5, 4)
    nn.init.normal_(layer.weight, 1)
    probe = probes.build("batch_statistics", 1, nn.Sequential(layer), batch=4)
    x = torch.randn(12, 5, 3, 2, requires_grad=True)
    dy = torch.randn_like(x)
    with probe.watch(0):
        layer(x).backward(dy)
    means, variances, phis, psis, squares = [], [], [], [], []
    for part, grad, dx in zip(x.split(4), dy.split(4), x.grad.split(4), strict=True):
        mean = part.mean((0, 2, 3))
        var = ((part - literal.per_channel(mean)) ** 2).mean((0, 2, 3))
        std = torch.sqrt(var + 1e-5)
        z = (part - literal.per_channel(mean)) / literal.per_channel(std)
        g = grad * literal.per_channel(layer.weight)
        phi, psi = g.mean((0, 2, 3)), (g * z).mean((0, 2, 3))
        by_hand = g - literal.per_channel(phi) - z * literal.per_channel(psi)
        close(by_hand / literal.per_channel(std), dx)
        for values, value in zip(
            (means, variances, phis, psis, squares),
            (mean, var, phi, psi, g.square().mean((0, 2, 3))),
            strict=True,
        ):
            values.append(value.detach())
    row = probe.pop_epoch()
    means, variances, phis, psis = map(torch.stack, (means, variances, phis, psis))
    unit = {
        "mean": variances.mean().sqrt(),
        "var": variances.mean(),
        "phi": torch.stack(squares).mean().sqrt(),
        "psi": torch.stack(squares).mean().sqrt(),
    }
    for name, values in (("mean", means), ("var", variances), ("phi", phis), ("psi", psis)):
        close(row[f"probe/{name}/0"], values.mean(0).square().mean().sqrt().item())
        spread = values.var(0, correction=0).mean().sqrt() / unit[name]
        close(row[f"probe/{name}_spread/0"], spread.item())
    assert probe.pop_epoch() == {}


def test_gradient_shift(as_default):
    conv = nn.Conv2d(3, 4, 2)
    probe = probes.build("gradient_shift", 1, nn.Sequential(conv), batch=2)
    x = torch.ones(2, 3, 2, 2)  # equal inputs: every weight of a filter gets the same gradient
    with probe.watch(0):
        y = conv(x)
        (y * torch.randn_like(y)).sum().backward()
    row = probe.pop_epoch()
    w = conv.weight.detach().flatten(1)
    close(row["probe/gradient_shift/0"], 12**0.5)
    by_hand = (w.mean(1).square().mean() / w.square().mean()).sqrt() * 12**0.5
    close(row["probe/weight_shift/0"], by_hand.item())
    close(row["probe/output_variance/0"], y.var().item())


@pytest.mark.parametrize("name", ["pws", "ws_gn", "mabn"])
def test_centred_filters_have_no_shift(name, as_default):
    conv = norms.build(name, batch_size=2).conv(3, 4, 3)
    probe = probes.build("gradient_shift", 1, nn.Sequential(conv), batch=2)
    with probe.watch(0):
        conv(torch.rand(2, 3, 5, 5)).square().sum().backward()
    assert probe.pop_epoch()["probe/gradient_shift/0"] < 1e-9


@pytest.mark.parametrize("kind", ["batch_statistics", "gradient_shift"])
@pytest.mark.parametrize("library", [None, "timm"])
def test_hooks_are_there_only_while_it_watches(kind, library):
    name = "regnetx_002" if library else "resnet8"
    scheme = norms.build("mabn", batch_size=2)
    model = models.build(name, scheme=scheme, num_classes=3, library=library)
    plain = sum(len(m._forward_hooks) for m in model.modules())
    probe = probes.build(kind, 2, model, batch=2)
    for update in (0, 1):
        with probe.watch(update):
            watched = sum(len(m._forward_hooks) for m in model.modules())
            assert (watched > plain) == (update == 0)
            model(torch.randn(4, 3, 64, 64)).sum().backward()
        assert sum(len(m._forward_hooks) for m in model.modules()) == plain
    layers = {key.split("/")[2] for key in probe.pop_epoch()}
    kinds = nn.Conv2d if kind == "gradient_shift" else norms.MABN2d
    expected = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    assert layers == expected


def metrics(folder):
    with open(folder / "metrics.csv") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("probe", ["batch_statistics", "gradient_shift"])
def test_through_the_command_line(train, tmp_path, probe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = ["norm=bn", "batch=2", "protocol=ghost", "recipe.epochs=2"]
    keys += ["protocol.sgd_batch=16", "protocol.micro_batch=8"]
    plain = train(*keys, runs=tmp_path / "plain")
    watched = train(*keys, f"probe={probe}")
    assert watched.status == 0, watched.err
    assert plain.run().name == watched.run().name
    a, b = (torch.load(x.run() / "last.pt", weights_only=True)["model"] for x in (plain, watched))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    rows = metrics(watched.run())
    columns = [c for c in rows[0] if c.startswith("probe/")]
    assert len(columns) == (7 * 8 if probe == "batch_statistics" else 7 * 3)
    assert all(float(row[c]) >= 0 for row in rows for c in columns)
    assert [{k: v for k, v in row.items() if k not in columns} for row in rows] == metrics(
        plain.run()
    )
    events = EventAccumulator(str(watched.run()))
    events.Reload()
    assert set(columns) <= set(events.Tags()["scalars"])

    picture = tmp_path / "probe.png"
    script = [sys.executable, "scripts/probe.py", "--out", str(picture)]
    subprocess.run([*script, watched.run()], cwd=ROOT, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run(
        [*script, plain.run()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "metrics.csv has no column of a probe; train with probe=" in refused.stderr


def test_a_network_without_layers_to_watch(train):
    made = train("norm=none", "probe=batch_statistics")
    assert made.status == 1
    assert "probe=batch_statistics: no norm of maps with a weight per channel" in made.err
    assert not list(made.runs.glob("*/*"))
