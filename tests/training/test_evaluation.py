"""By which statistics batch norms are evaluated, against plain PyTorch."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.optim.swa_utils import update_bn

import models
import norms
from training.evaluation import RUNNING, batch_norms, with_statistics

FREE = [name for name in norms.names() if norms.build(name, batch_size=2).batch_independent]
BATCH = [name for name in norms.names() if name not in FREE and name != "evonorm_b0"]


class Loader:
    """Three SGD batches of six images."""

    def __init__(self, images):
        self.images = images

    def train(self, epoch):
        assert epoch == 0
        return ((x, None) for x in self.images.split(6))


def by(**keys):
    return OmegaConf.create(RUNNING | keys)


def network(name="bn", batch_size=2):
    """A trained one, as far as its buffers are concerned, in float64."""
    torch.manual_seed(0)
    scheme = norms.build(name, batch_size=batch_size)
    model = models.build("resnet8", scheme=scheme, num_classes=5).double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    for _ in range(9):
        model(2 * torch.randn(2, 3, 16, 16, dtype=torch.float64) + 1)
    return model.eval()


def images(count=18):
    torch.manual_seed(1)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64) - 1


def plain(model):
    """The same with PyTorch's batch norms."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for key, layer in parent.named_children():
            if type(layer).__name__ == "GhostBatchNorm2d":
                new = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum).double()
                new.load_state_dict(layer.state_dict())
                setattr(parent, key, new)
    return model.eval()


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_running_statistics_are_the_network_itself():
    model = network()
    assert with_statistics(model, None, by()) is model


@pytest.mark.parametrize(
    ("size", "count", "seen"), [(4, 3, 12), (6, 2, 12), (4, 9, 16), (50, 3, 18)]
)
def test_precise_is_update_bn_over_whole_batches(size, count, seen):
    model, x = network(), images()
    own = plain(model)
    update_bn(x[:seen].split(size), own)
    made = with_statistics(
        model, Loader(x), by(statistics="precise", batches=count, batch_size=size)
    )
    close(made.eval()(x), own.eval()(x))
    assert not torch.allclose(made(x), model(x), rtol=1e-3)


def test_batch_is_the_training_mode_of_batch_norm():
    model, x = network(), images()
    own = plain(model)
    for layer in batch_norms(own):
        layer.train()
    close(with_statistics(model, None, by(statistics="batch")).eval()(x), own(x))


def test_alpha_by_its_formula():
    model, x, alpha = network(), images(), 0.3
    own = plain(model)

    def weighed(layer, inputs, output):
        (x,) = inputs
        first, second = x.mean((2, 3)), x.square().mean((2, 3))
        e1 = (1 - alpha) * layer.running_mean + alpha * first
        e2 = (1 - alpha) * (layer.running_var + layer.running_mean**2) + alpha * second
        e1, var = e1[:, :, None, None], (e2 - e1**2)[:, :, None, None]
        y = (x - e1) / torch.sqrt(var + layer.eps)
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    for layer in batch_norms(own):
        layer.register_forward_hook(weighed)
    close(with_statistics(model, None, by(alpha=alpha)).eval()(x), own(x))


def test_alpha_with_precise_statistics_weighs_against_these():
    model, x = network(), images()
    keys = dict(statistics="precise", batches=3, batch_size=6)
    precise = with_statistics(model, Loader(x), by(**keys)).eval()
    made = with_statistics(model, Loader(x), by(**keys, alpha=0.3)).eval()
    close(made(x), with_statistics(precise, None, by(alpha=0.3))(x))


def test_a_channel_norm_sees_the_batch_norm_that_is_asked_for():
    """BCN's layer takes the statistics of the batch norm in it without calling it."""
    norm, x = norms.BatchChannelNorm2d(4, 2).double(), 3 * images()[:, :1].repeat(1, 4, 1, 1) + 1
    model = nn.Sequential(norm).eval()
    z = F.batch_norm(x, None, None, norm.bn.weight, norm.bn.bias, True, 0.0, norm.bn.eps)
    expected = norm.channel_norm(z)
    close(with_statistics(model, None, by(statistics="batch"))(x), expected)


@pytest.mark.parametrize("name", ["mabn", "powernorm"])
def test_a_norm_that_does_not_center_is_not_centred(name):
    layer = norms.build(name, batch_size=2).norm(3).double()
    x, model = images(), nn.Sequential(layer).eval()
    expected = x / torch.sqrt(x.square().mean((0, 2, 3), keepdim=True) + layer.eps)
    close(with_statistics(model, None, by(statistics="batch"))(x), expected)


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize(
    "keys", [{"statistics": "precise"}, {"statistics": "batch"}, {"alpha": 0.5}]
)
def test_every_method_is_evaluated_and_stays_as_it_is(name, keys):
    model, x = network(name), images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sizes = [getattr(layer, "batch_size", None) for layer in batch_norms(model)]
    state = torch.get_rng_state()
    made = with_statistics(model, Loader(x), by(**keys | {"batches": 3, "batch_size": 6})).eval()
    y = made(x)
    assert y.isfinite().all()
    assert not torch.equal(y, model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [getattr(layer, "batch_size", None) for layer in batch_norms(made)] == sizes
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", FREE)
def test_a_method_without_running_statistics_is_itself(name):
    model = network(name)
    assert with_statistics(model, None, by(statistics="precise")) is model


def result(run):
    return json.loads((run / "result.json").read_text())


KEYS = {
    "precise": [
        "evaluation.statistics=precise",
        "evaluation.batches=5",
        "evaluation.batch_size=20",
    ],
    "batch": ["evaluation.statistics=batch", "evaluation.batch_size=7"],
    "alpha": ["evaluation.alpha=0.2"],
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_run_and_its_later_evaluation_agree(train, monkeypatch, capfd, tmp_path, kind):
    """Also that the statistics of an evaluation change nothing of the training."""
    from scripts import evaluate

    words = ["norm=bn", "batch=2", "recipe.epochs=2", "recipe.ema=0.9", "recipe.eval_every=1"]
    usual = train(*words).run()
    made = train(*words, *KEYS[kind], "name=other").run("other")
    one, two = (torch.load(run / "last.pt", weights_only=True) for run in (usual, made))
    for part in ("model", "ema"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())
    assert result(made)["test_loss"] != result(usual)["test_loss"]
    file = tmp_path / "found.json"
    argv = ["evaluate.py", str(usual), *KEYS[kind], "--json", str(file)]
    monkeypatch.setattr("sys.argv", argv)
    evaluate.main()
    found = json.loads(file.read_text())
    assert (found["top1"], found["loss"]) == (result(made)["top1"], result(made)["test_loss"])
    assert found["evaluation"] == result(made)["evaluation"]
    assert found["as_in_result"] is None
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(made), "--json", str(file)])
    evaluate.main()
    assert json.loads(file.read_text())["as_in_result"] is True
    capfd.readouterr()
