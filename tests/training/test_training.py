import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import models
import norms
from training import optimizer, protocol
from training.evaluation import evaluate
from training.files import write
from training.optimizer import learning_rate

RECIPE = OmegaConf.create(
    {
        "lr": 0.1,
        "lr_batch": 32,
        "mixup": 0.0,
        "cutmix": 0.0,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "weight_decay_norms": True,
        "schedule": "cosine",
        "warmup": 0.0,
        "milestones": [0.3, 0.6, 0.9],
        "lr_decay": 0.1,
    }
)


def recipe(**values):
    return OmegaConf.merge(RECIPE, values)


def rates(updates=100, **values):
    return [learning_rate(u, updates, 0.5, recipe(**values)) for u in range(updates)]


def test_step_schedule():
    lr = rates(schedule="step")
    expected = [0.5] * 30 + [0.05] * 30 + [0.005] * 30 + [0.0005] * 10
    assert lr == pytest.approx(expected)


def test_cosine_schedule():
    lr = rates()
    assert lr[0] == 0.5
    assert lr[50] == pytest.approx(0.25)
    assert lr[99] == pytest.approx(0.25 * (1 + math.cos(0.99 * math.pi)))


def test_linear_schedule():
    assert rates(schedule="linear") == pytest.approx([0.5 * (1 - u / 100) for u in range(100)])


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear"])
def test_warmup_rises_linearly_to_the_peak(schedule):
    lr = rates(schedule=schedule, warmup=0.1)
    assert lr[:10] == pytest.approx([0.5 * (u + 1) / 11 for u in range(10)])
    assert lr[10] == pytest.approx(0.5)
    assert max(lr) == pytest.approx(0.5)


def decayed(name, **values):
    model = models.build("resnet8", scheme=norms.build(name), num_classes=3)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = optimizer.parameter_groups(model, recipe(**values))
    found = {names[id(p)]: g["weight_decay"] > 0 for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(g["params"]) for g in groups)
    return found


@pytest.mark.parametrize("name", norms.names())
def test_weight_decay_by_type_of_module(name):
    everything = decayed(name)
    weights = decayed(name, weight_decay_norms=False)
    for key in everything:
        nf = name == "nf" and (key.endswith("gain") or ("conv" in key and key.endswith("bias")))
        exempt = nf or key.endswith("alpha")
        assert everything[key] == (not exempt)
        assert weights[key] == (key.endswith("weight") and ("conv" in key or key == "fc.weight"))


# --- protocols


def plan(batch, devices=1, **numbers):
    cfg = {"batch": batch, "recipe": RECIPE, "protocol": {"sgd_batch": None, "micro_batch": batch}}
    numbers["name"] = "ghost" if numbers else "direct"
    return protocol.plan(OmegaConf.merge(cfg, {"protocol": numbers, "devices": devices}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(batch=2), (2, 2, 2, 0.1 / 16)),
        (dict(batch=2, devices=8), (2, 16, 2, 0.05)),  # GN's table 2: 0.1 * N / 32 on 8 devices
        (dict(batch=2, sgd_batch=16), (2, 16, 2, 0.05)),
        (dict(batch=4, sgd_batch=64, micro_batch=64), (4, 64, 64, 0.2)),
        (dict(batch=4, sgd_batch=64, micro_batch=16), (4, 64, 16, 0.2)),
        (dict(batch=4, devices=2, sgd_batch=64, micro_batch=64), (4, 64, 32, 0.2)),
    ],
)
def test_protocols(arguments, expected):
    made = plan(**arguments)
    assert (made.batch, made.sgd_batch, made.micro_batch) == expected[:3]
    assert made.lr == pytest.approx(expected[3])


@pytest.mark.parametrize(
    "arguments",
    [
        dict(batch=3, sgd_batch=64),
        dict(batch=128, sgd_batch=64),
        dict(batch=4, sgd_batch=64, micro_batch=6),
        dict(batch=4, sgd_batch=64, micro_batch=48),
        dict(batch=4, sgd_batch=64, micro_batch=2),
        dict(batch=32, devices=4, sgd_batch=64),
    ],
)
def test_protocols_that_do_not_fit(arguments):
    with pytest.raises(
        ValueError, match=r"protocol\.(sgd_batch|micro_batch)=\d+: expected a multiple"
    ):
        plan(**arguments)


# --- parts of the loop


def test_evaluation_counts_every_image_once():
    """Against numbers by hand, with a last batch that is smaller."""
    torch.manual_seed(3)
    images, labels = torch.randn(23, 7), torch.randint(0, 7, (23,))
    found = evaluate(nn.Identity(), zip(images.split(5), labels.split(5), strict=True))
    p = images.softmax(1)[torch.arange(23), labels]
    assert found["test_loss"] == pytest.approx(-p.log().mean().item(), rel=1e-5)
    rank = (images > images[torch.arange(23), labels][:, None]).sum(1)
    assert found["test_top1"] == pytest.approx(100 * (rank < 1).float().mean().item(), rel=1e-5)
    assert found["test_top5"] == pytest.approx(100 * (rank < 5).float().mean().item(), rel=1e-5)


def test_two_classes_have_no_fifth():
    images, labels = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    assert evaluate(nn.Identity(), [(images, labels)])["test_top5"] == 100


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    import os

    file = tmp_path / "result.json"
    write(file, "first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(file, "second")
    assert file.read_text() == "first"
