"""What changes an optimizer step, against plain formulas, and debug runs."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

import data
import models
import norms
from data.mixing import Mixed
from training import device
from training.protocol import Plan
from training.step import Step

ROOT = Path(__file__).parents[2]
RECIPE = {
    **dict(optimizer="sgd", betas=[0.9, 0.999], clip=0.0, ema=0.0, mixup=0.0, cutmix=0.0),
    **dict(momentum=0.9, nesterov=False, weight_decay=0.01, weight_decay_norms=True),
    **dict(precision="float32", label_smoothing=0.0),
}
PLAN = Plan(batch=4, sgd_batch=8, devices=1, micro_batch=4, lr=0.1)


def recipe(**values):
    return OmegaConf.create({**RECIPE, **values})


def network(scheme="bn", **sizes):
    torch.manual_seed(1)
    scheme = norms.build(scheme, batch_size=4, sgd_batch_size=8)
    return models.build("resnet8", scheme=scheme, num_classes=3, in_channels=1).train()


def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def batches(count, classes=3):
    rng = torch.Generator().manual_seed(2)
    images = torch.randn((count, 8, 1, 8, 8), generator=rng)
    return list(zip(images, torch.randint(0, classes, (count, 8), generator=rng), strict=True))


def test_clipping_by_the_norm_of_all_gradients():
    """One step of plain gradient descent: the weights move by lr * clip, in the gradient's
    direction; a gradient that is short enough is left alone."""
    images, labels = batches(1)[0]
    moves = []
    for clip in (0.0, 0.05, 1e6):
        model = linear()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        Step(model, PLAN, recipe(clip=clip, momentum=0.0, weight_decay=0.0))(images, labels, 0.5)
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    free, clipped, long = moves
    assert free.norm() > 0.5 * 0.05
    assert torch.equal(free, long)
    torch.testing.assert_close(clipped, free / free.norm() * 0.5 * 0.05, rtol=1e-4, atol=1e-7)


def test_adamw_is_its_formula():
    model = linear()
    step = Step(model, PLAN, recipe(optimizer="adamw", betas=[0.8, 0.95]))
    weight = next(model.parameters()).detach().clone().double()
    first = second = torch.zeros_like(weight)
    for t, (images, labels) in enumerate(batches(3), 1):
        step(images, labels, 0.1)
        gradient = next(model.parameters()).grad.double()
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        weight *= 1 - 0.1 * 0.01
        move = first / (1 - 0.8**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        weight -= 0.1 * move
    torch.testing.assert_close(next(model.parameters()).detach().double(), weight)


@pytest.mark.parametrize("scheme", ["bn", "mabn"])
def test_the_moving_average_is_its_formula(scheme):
    """Of every number; what only counts is taken over. Training does not notice it."""
    model, alone = network(scheme), network(scheme)
    step, plain = Step(model, PLAN, recipe(ema=0.75)), Step(alone, PLAN, recipe())
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for images, labels in batches(3):
        step(images, labels, 0.1)
        plain(images, labels, 0.1)
        for key, value in model.state_dict().items():
            average = value.is_floating_point()
            expected[key] = 0.75 * expected[key] + 0.25 * value if average else value.clone()
    assert plain.eval_model is alone
    assert step.eval_model is not model
    assert not step.eval_model.training
    for key, value in step.eval_model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
        assert torch.equal(model.state_dict()[key], alone.state_dict()[key])
    assert list(step.state_dict()["ema"]) == list(model.state_dict())
    assert "ema" not in plain.state_dict()


@pytest.mark.parametrize("ema", [0.0, 0.75])
@pytest.mark.parametrize("last", [False, True])
def test_a_state_goes_into_either_memory_format(ema, last):
    """A run that goes on elsewhere: the optimizer's state takes the layout of the weights."""
    seen = batches(4)
    ends = []
    for formats in ([False, False], [last, not last]):
        state = None
        for half, there in zip((seen[:2], seen[2:]), formats, strict=True):
            layout = torch.channels_last if there else torch.contiguous_format
            step = Step(network().to(memory_format=layout), PLAN, recipe(ema=ema))
            if state:
                step.load_state_dict(state)
            for images, labels in half:
                step(images, labels, 0.1)
            state = step.state_dict()
        ends.append(state)
    for key, value in ends[0]["model"].items():
        torch.testing.assert_close(ends[1]["model"][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", norms.names())
def test_channels_last_changes_nothing(scheme):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network(scheme).to(memory_format=layout)
        kept = []
        model.layer3.register_forward_hook(
            lambda m, x, y, kept=kept: kept.append(
                x[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        forward = 4 if scheme == "sync_bn" else 8
        plan = Plan(batch=4, sgd_batch=8, devices=1, micro_batch=forward, lr=0.1)
        step = Step(model, plan, recipe())
        losses = [step(*batch, 0.05)[0].item() for batch in batches(3)]
        assert all(kept) or layout != torch.channels_last  # as PWS's are in either
        ends.append((losses, model.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)
    for key, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][key], value, rtol=2e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize(
    ("wish", "gains", "last"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_the_memory_format_is_the_schemes(wish, gains, last):
    found = device.memory_format(wish, gains)
    assert found == (torch.channels_last if last else torch.contiguous_format)


# --- mixed images


class Plain:
    """A loader of two SGD batches."""

    dropped = 5

    def __len__(self):
        return 2

    def train(self, epoch, start=0):
        for images, labels in batches(2)[start:]:
            yield images.clone(), labels


def test_mixup_is_its_formula():
    for (images, labels), (mixed, shares) in zip(
        batches(2), Mixed(Plain(), 0.4, 0.0, 3, seed=5).train(1), strict=True
    ):
        first = F.one_hot(labels, 3).float()
        part = (images[0] - images[7]).flatten()
        share = ((mixed[0] - images[7]).flatten() @ part / (part @ part)).item()
        assert 0 < share < 1
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
        torch.testing.assert_close(shares, share * first + (1 - share) * first.flip(0))


def test_cutmix_is_its_formula():
    for (images, labels), (mixed, shares) in zip(
        batches(2), Mixed(Plain(), 0.0, 1.0, 3, seed=6).train(0), strict=True
    ):
        other = mixed != images
        rows, columns = (other[0, 0].any(d).nonzero() for d in (1, 0))
        box = torch.zeros(8, 8, dtype=torch.bool)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        torch.testing.assert_close(mixed, torch.where(box, images.flip(0), images))
        first, share = F.one_hot(labels, 3).float(), 1 - box.float().mean()
        torch.testing.assert_close(shares, share * first + (1 - share) * first.flip(0))


def test_what_is_mixed_is_a_function_of_seed_epoch_number_and_rank():
    """And NumPy's own generator stays as it is."""

    def mixed(epoch=0, start=0, **numbers):
        loader = Mixed(Plain(), 9.0, 0.0, 3, **{"seed": 5, **numbers})
        assert len(loader) == 2
        assert loader.dropped == 5
        return [images for images, _ in loader.train(epoch, start)]

    np.random.seed(3)  # noqa: NPY002
    whole = mixed()
    after = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert after == np.random.random()  # noqa: NPY002
    assert torch.equal(mixed(start=1)[0], whole[1])
    for other in (dict(epoch=1), dict(seed=6), dict(rank=1)):
        assert not torch.equal(mixed(**other)[0], whole[0])


def test_the_loss_of_mixed_images_and_their_right_answers():
    model = linear()
    images, labels = batches(1)[0]
    shares = 0.7 * F.one_hot(labels, 3) + 0.3 * F.one_hot(labels.flip(0), 3)
    logits = model(images).detach()
    loss, correct = Step(model, PLAN, recipe(label_smoothing=0.1))(images, shares, 0.1)
    target = 0.9 * shares + 0.1 / 3
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item())
    assert correct.item() == (logits.argmax(1) == labels).sum().item()


# --- through the command line


MODERN = {
    "adamw": ["recipe.optimizer=adamw", "recipe.betas=[0.8,0.9]", "recipe.lr=0.001"],
    "clip": ["recipe.clip=0.5", "recipe.precision=float16"],
    "all": ["recipe.mixup=0.2", "recipe.cutmix=1", "recipe.ema=0.9", "recipe.label_smoothing=0.1"],
    "contiguous": ["runtime.channels_last=false"],
}


@pytest.mark.parametrize("name", MODERN)
def test_runs(train, name):
    done = train("batch=16", *MODERN[name])
    assert done.status == 0, done.err
    result = json.loads((done.run() / "result.json").read_text())
    assert result["ema"] == (0.9 if name == "all" else 0.0)
    assert result["channels_last"] == (name != "contiguous")
    assert result["compiled"] == "false"
    assert result["debug"] is None
    told = {
        "adamw": "  adamw, chan",
        "clip": "  clip 0.5, chan",
        "all": "  mixup 0.2, cutmix 1, eval",
    }
    assert told.get(name, "") in done.out
    assert ("channels last in memory" in done.out) == (name != "contiguous")


def test_killed_and_restarted_with_mixing_and_average(train, tmp_path):
    keys = ["batch=8", "recipe.epochs=4", "recipe.mixup=0.2", "recipe.cutmix=1", "recipe.ema=0.9",
            "recipe.optimizer=adamw", "recipe.lr=0.001", "checkpoint.every_updates=5"]  # fmt: skip
    whole = train(*keys, runs=tmp_path / "whole").run()
    own = ["data.train_fraction=0.1", f"runtime.runs={tmp_path / 'runs'}", "runtime.threads=1"]
    command = [sys.executable, "train.py", *keys, *own]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/*/*/last.pt")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9
    done = train(*keys)
    assert "goes on after update" in done.out
    states = [torch.load(f / "last.pt", weights_only=True) for f in (whole, done.run())]
    for part in ("model", "ema"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), key
    rows = [
        [{k: v for k, v in row.items() if "second" not in k} for row in s["progress"]["rows"]]
        for s in states
    ]
    assert rows[0] == rows[1]
    differ = [not torch.equal(v, states[0]["ema"][k]) for k, v in states[0]["model"].items()]
    assert any(differ)


MISTAKES = {
    "recipe.optimizer=adam": "recipe.optimizer=adam: expected sgd, adamw",
    "recipe.betas=[0.9,1]": "recipe.betas=[0.9, 1]: expected two numbers from 0, below 1",
    "recipe.ema=1": "recipe.ema=1: expected a number from 0, below 1",
    "recipe.clip=-1": "recipe.clip=-1: expected a number from 0",
    "recipe.mixup=-1": "recipe.mixup=-1: expected a number from 0",
    "batch=3 recipe.cutmix=1": "recipe.cutmix=1: mixes the images of an optimizer",
    "runtime.channels_last=yes": "runtime.channels_last=yes: expected auto, true, false",
    "runtime.compile=true": "runtime.compile=true: expected auto, network, layers, false",
    "debug=overfit batch=128": "debug.images=64: expected at least the SGD batch of 128",
    "debug=profile debug.updates=8": "debug.updates=8: expected less than recipe.updates=8",
    "debug=overfitt": "debug=overfitt: unknown (did you mean overfit",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_line(train, arguments):
    made = train(*arguments.split())
    assert made.err.startswith(f"error: {MISTAKES[arguments]}"), made.err
    assert len(made.err.splitlines()) == 1
    assert not list(made.runs.glob("*/*"))


# --- debug runs


def test_one_batch(train):
    done = train("debug=one_batch", "batch=8", "runtime.eval_batch=20")
    assert done.status == 0, done.err
    result = json.loads((done.run() / "result.json").read_text())
    assert (result["updates"], result["test_images"]) == (1, 20)
    assert (result["study"], result["debug"]) == ("debug-one_batch", "one_batch")
    assert "top-1" in train("debug=one_batch", "batch=8", "runtime.eval_batch=20").out  # anew
    refused = train("debug=one_batch", "batch=8", "name=mine", "study=mine")
    assert refused.status == 0
    assert "another configuration" in train("batch=8", "name=mine", "study=mine").err


def test_overfit(train):
    keys = ["debug=overfit", "norm=gn", "batch=8", "recipe.epochs=60", "recipe.mixup=1"]
    done = train(*keys, "recipe.eval_every=60")
    assert done.status == 0, done.err
    assert "64 training, 64 test images" in done.out
    result = json.loads((done.run() / "result.json").read_text())
    assert result["top1"] == 100
    assert result["study"] == "debug-overfit"


def test_overfit_shows_the_same_images_as_they_are():
    cfg = OmegaConf.create({"name": "digits", "train_fraction": 1.0, "holdout": 0.0})
    plain = recipe(crop=2, flip=False, mixup=0.5)
    loader = data.load(
        data.resolve(cfg, 8, plain), cfg, plain, 8, 0, debug=OmegaConf.create({"images": 24})
    )
    seen = [torch.cat([x for x, _ in loader.train(epoch)]) for epoch in (0, 1)]
    shown = torch.cat([x for x, _ in loader.test(10)])
    for images in seen:
        distances = (images[:, None] - shown[None]).flatten(2).abs().amax(2)
        assert (distances == 0).any(0).all()


def test_profile(train):
    done = train("debug=profile", "batch=8", "recipe.updates=4", "debug.updates=2")
    assert done.status == 0, done.err
    assert "aten::convolution_backward" in done.out
    trace = json.loads((done.run() / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert sum(name == "aten::_fused_sgd_" for name in names) == 2


# --- what a scheme asks of the step


@pytest.mark.parametrize("name", ["mbn", "mimicnorm"])
def test_hooks_of_a_scheme(name):
    """The second pass sees the weights behind the update, and moves the memory once per batch; the
    projection holds after every step. Going on from a checkpoint is going on."""
    scheme = norms.build(name, batch_size=4, sgd_batch_size=8)
    model, again = network(name), network(name)
    steps = [Step(m, PLAN, recipe(), scheme=scheme) for m in (model, again)]
    first, second = batches(2)
    steps[0](*first, 0.1)
    if name == "mbn":
        assert model.norm1.num_batches_memorized == 2
        y = model.conv1(first[0][4:])
        torch.testing.assert_close(model.norm1.moving_means[-1], y.mean((0, 2, 3)))
    else:
        weight = model.layer1[0].conv1.weight
        assert weight.mean((1, 2, 3)).abs().max() < 1e-7
    steps[1].load_state_dict(copy.deepcopy(steps[0].state_dict()))
    for step in steps:
        step(*second, 0.1)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_gains_may_learn_slower():
    """bn_init: the learning rate of the gains alone is divided, and they have no weight decay."""
    torch.manual_seed(1)
    scheme = norms.build("bn", batch_size=4, lr_divisor=100.0)
    model = models.build("resnet8", scheme=scheme, num_classes=3, in_channels=1)
    step = Step(model, PLAN, recipe(momentum=0.0))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    step(*batches(1)[0], 0.5)
    for key, p in model.named_parameters():
        decay = 0.0 if "norm" in key else 0.01 * before[key]
        lr = 0.5 / 100 if "norm" in key and key.endswith("weight") else 0.5
        torch.testing.assert_close(before[key] - p, lr * (p.grad + decay), atol=1e-6, rtol=1e-3)


def test_adaptive_gradient_clipping():
    """timm's, of all but the head."""
    model = network("nf")
    step = Step(model, PLAN, recipe(clip="agc", clip_factor=0.01, momentum=0.0, weight_decay=0.0))
    step(*batches(1)[0], 0.5)
    for key, p in model.named_parameters():
        if p.ndim == 4:
            length, most = p.grad.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1)
            assert (length <= 0.011 * most.clamp(min=1e-3)).all(), key
    assert model.fc.weight.grad.norm() > 0.011 * model.fc.weight.norm()
