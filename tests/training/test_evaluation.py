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
from tests.training.test_step import recipe
from training.evaluation import RUNNING, batch_norms, with_statistics
from training.protocol import Plan
from training.step import Step

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


# Frozen statistics.


def statistics(run, part="model"):
    state = torch.load(run / "last.pt", weights_only=True)[part]
    return {key: value for key, value in state.items() if "running_" in key}


LONG = ["norm=bn", "batch=2", "recipe.epochs=4", "protocol=ghost", "protocol.sgd_batch=8"]


def test_a_frozen_tail_trains_with_the_statistics_that_it_found(train, monkeypatch, tmp_path):
    """Weights go on, statistics do not; until then it is the same training."""
    taken = []
    monkeypatch.setattr(Step, "take_buffers", lambda step, other: taken.append(
        {key: value.clone() for key, value in other.state_dict().items()}
    ))  # fmt: skip
    plain = train(*LONG, runs=tmp_path / "plain").run()
    made = train(*LONG, "recipe.freeze_statistics=2", runs=tmp_path / "frozen").run()
    [before] = taken
    for key, value in statistics(made).items():
        assert torch.equal(value, before[key])
        assert not torch.equal(value, statistics(plain)[key])
    weights = torch.load(made / "last.pt", weights_only=True)["model"]["conv1.weight"]
    assert not torch.equal(weights, before["conv1.weight"])
    one, two = (
        [row["train_loss"] for row in torch.load(run / "last.pt")["progress"]["rows"]]
        for run in (plain, made)
    )
    assert one[:2] == two[:2]
    assert one[2:] != two[2:]


def test_a_frozen_tail_is_the_training_of_plain_batch_norm_in_evaluation_mode():
    model, x = network().train(), images()
    own = plain(model)
    step = Step(model, Plan(2, 18, 1, 18, 0.1), recipe())
    step.freeze_statistics()
    before = copy.deepcopy(own)
    loss, _ = step(x, torch.arange(18) % 5, 0.1)
    expected = F.cross_entropy(own.eval()(x), torch.arange(18) % 5)
    torch.testing.assert_close(loss, expected.detach().float())
    expected.backward()
    for one, two in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    for key, value in before.state_dict().items():
        if "running_" in key:
            assert torch.equal(model.state_dict()[key], value)


def test_precise_statistics_are_frozen_and_not_estimated_again(train):
    run = train(*LONG, "recipe.freeze_statistics=2", "recipe.ema=0.9", *KEYS["precise"]).run()
    assert result(run)["evaluation"]["statistics"] == "running"
    for key, value in statistics(run).items():
        torch.testing.assert_close(statistics(run, "ema")[key], value)


@pytest.mark.parametrize("norm", [name for name in BATCH if name != "sync_bn"])
def test_the_state_of_every_method_stands_still(norm):
    model, x = network(norm).train(), images(4).float()
    model = model.float()
    scheme = norms.build(norm, batch_size=2)
    step = Step(model, Plan(2, 4, 1, 4, 0.1), recipe(), scheme=scheme)
    step.freeze_statistics()
    before = [buffer.clone() for buffer in model.buffers()]
    loss, _ = step(x, torch.arange(4), 0.1)
    assert loss.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_killed_in_its_tail_and_restarted(train, tmp_path, monkeypatch):
    keys = [*LONG, "recipe.freeze_statistics=2", *KEYS["precise"], "checkpoint.every_updates=3"]
    whole = train(*keys, runs=tmp_path / "whole").run()
    per_epoch = result(whole)["updates"] // 4
    real = Step.__call__

    class KilledError(Exception):
        pass

    for update in (2 * per_epoch, 2 * per_epoch + 4):  # as the tail begins, and within it
        left = [update - done(tmp_path / "runs")]

        def until(step, *args, left=left):
            if not left[0]:
                raise KilledError
            left[0] -= 1
            return real(step, *args)

        monkeypatch.setattr(Step, "__call__", until)
        with pytest.raises(KilledError):
            train(*keys)
        monkeypatch.setattr(Step, "__call__", real)
    made = train(*keys)
    assert "goes on after update" in made.out
    states = [torch.load(run / "last.pt", weights_only=True) for run in (whole, made.run())]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    losses = [[row["test_loss"] for row in state["progress"]["rows"]] for state in states]
    assert losses[0] == losses[1]


def done(runs):
    files = list(runs.glob("*/*/last.pt"))
    return torch.load(files[0], weights_only=True)["progress"]["update"] if files else 0


MISTAKES = {
    "evaluation.statistics=ema": "evaluation.statistics=ema: expected running, precise, batch",
    "evaluation.batches=0": "evaluation.batches=0: expected a whole number from 1",
    "evaluation.alpha=2": "evaluation.alpha=2: expected a number from 0 to 1",
    "evaluation.statistics=batch evaluation.alpha=0.5": "evaluation.alpha=0.5: weighs an image",
    "recipe.freeze_statistics=1": "recipe.freeze_statistics=1: expected less than the 1 epochs",
    "recipe.freeze_statistics=-1": "recipe.freeze_statistics=-1: expected a whole number from 0",
    "norm=evonorm_b0 evaluation.statistics=precise": "evaluation.statistics=precise: the layers of",
    "norm=evonorm_b0 evaluation.alpha=0.1": "evaluation.alpha=0.1: the layers of norm=evonorm_b0",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_get_one_line(train, words):
    made = train(*words.split())
    assert made.status == 1
    assert made.err.startswith(f"error: {MISTAKES[words]}")
    assert made.err.count("\n") == 1


def test_a_method_without_running_statistics_says_that_nothing_changes(train):
    made = train("norm=gn", "evaluation.statistics=precise", "recipe.updates=2")
    assert "norm=gn has no running statistics, nothing changes" in made.out
    assert result(made.run())["evaluation"] is None


def test_what_a_folded_network_cannot_be_asked(train, monkeypatch, capfd, tmp_path):
    from scripts import evaluate

    run = train("norm=bn", "batch=2", "recipe.updates=30").run()
    file = tmp_path / "found.json"

    def evaluated(*words):
        monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), *words, "--json", str(file)])
        evaluate.main()
        return json.loads(file.read_text())

    one, two = (evaluated(*KEYS["precise"], *fold) for fold in ([], ["--folded"]))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    with pytest.raises(SystemExit):
        evaluated("evaluation.alpha=0.1", "--folded")
    assert "evaluation.alpha=0.1: --folded leaves no batch norms; expected 0.0" in (
        capfd.readouterr().err
    )
