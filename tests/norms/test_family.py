"""Methods that are more than a layer: what they ask of steps, of blocks and of the classifier."""

from functools import partial

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from norms import build, convert
from norms.blocks import BranchScale
from norms.mbn import MemorizedBatchNorm2d, recording
from norms.mimicnorm import center
from tests.norms import literal
from tests.norms.test_layers import close, compare, randomize

pytestmark = pytest.mark.usefixtures("as_default")


@settings(max_examples=25, deadline=None)
@given(
    batches=st.integers(1, 4),
    size=st.integers(1, 3),
    memory=st.integers(1, 5),
    lam=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_mbn(batches, size, memory, lam):
    """A step and its second pass, in which every batch joins the memory in its turn."""
    layer = MemorizedBatchNorm2d(3, size, memory, lam=[lam])
    reference = literal.MBN(memory, 0.9)
    randomize(layer)
    for _ in range(4):
        compare(layer, partial(reference, lam=lam), batches, size, 3, steps=1)
        x = torch.randn(batches * size, 3, 3, 5) + 1
        with torch.no_grad(), recording(layer):
            y = layer(x)
        with torch.no_grad():
            parts = [reference(p, layer.weight, layer.bias, lam, True) for p in x.split(size)]
        close(y, torch.cat(parts))
    x = torch.randn(3, 3, 2, 2)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


def test_mbn_is_batch_norm_without_lambda():
    ours, theirs = MemorizedBatchNorm2d(4, 2, lam=[0.0]), nn.BatchNorm2d(4)
    for _ in range(2):
        x = torch.randn(2, 4, 3, 3)
        with recording(ours):
            ours(x)
        close(ours(x), theirs(x))


def test_mbn_changes_lambda_at_its_steps():
    """Counted in optimizer steps, of two batches here."""
    layer = MemorizedBatchNorm2d(4, 2, lam=[0.1, 0.5, 0.9], lam_until=[2, 3], batches_per_step=2)
    seen = []
    for _ in range(5):
        seen.append(layer.lambdas(1).item())
        with recording(layer):
            layer(torch.randn(4, 4, 3, 3))
    assert seen == [0.1, 0.1, 0.5, 0.9, 0.9]
    for wrong in ([], [0.1, 0.5], [-1.0]):
        with pytest.raises(
            ValueError, match=r"^norm.lam=\[.*expected numbers from 0, one more than"
        ):
            build("mbn", lam=wrong)


def test_nf_sets_the_variance_of_every_block():
    model = models.build("resnet50", scheme=build("nf"), num_classes=3)
    blocks = [b for b in model.modules() if isinstance(b, models.resnet.Block)]
    found = [b.input_scale**-2 for b in blocks]
    assert found[:5] == pytest.approx([1, 1.04, 1.08, 1.12, 1.04])
    skips = [x for x in model.modules() if isinstance(x, BranchScale)]
    assert len(skips) == len(found) == 16
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        for p in model.layer1[1].conv1.parameters():
            p.add_(torch.randn_like(p))
    close(model(x), before)  # branches start at zero
    assert not torch.allclose(model.layer1[1].conv1(torch.randn(1, 256, 2, 2)), before.sum())
    with pytest.raises(ValueError, match=r"^norm=nf: is an order of blocks too, which ResNet does"):
        convert(torchvision.models.resnet18(), build("nf"))


def test_mimicnorm_centres_what_it_says():
    """Filters of more than 50 weights, to the last bit, and nothing else; once is enough."""
    scheme = build("mimicnorm", batch_size=2)
    model = models.build("resnet8", scheme=scheme, num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scheme.after_step(model)
    state = model.state_dict()
    for key, value in state.items():
        if "conv" in key and key.endswith("weight") and key != "conv1.weight":
            assert value.mean((1, 2, 3)).abs().max() < 1e-15
            close(value, literal.center(before[key]))
        else:
            assert torch.equal(value, before[key]), key
    once = {k: v.clone() for k, v in state.items()}
    scheme.after_step(model)
    for key, value in model.state_dict().items():
        close(value, once[key], 1e-15)
    scales = [x.gain.item() for x in model.modules() if isinstance(x, BranchScale)]
    assert scales == pytest.approx([1.44, 1.44 / 2, 1.44 / 3])


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_mimicnorm_may_project_gradients_instead(decay):
    """With plain SGD, momentum and weight decay the weights come out the same."""
    conv, other = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)
    center(conv)
    other.load_state_dict(conv.state_dict())
    how = dict(lr=0.1, momentum=0.9, weight_decay=decay)
    steps = [torch.optim.SGD(c.parameters(), **how) for c in (conv, other)]
    for _ in range(20):
        x = torch.randn(2, 8, 5, 5)
        for layer, step in zip((conv, other), steps, strict=True):
            step.zero_grad()
            layer(x).square().mean().backward()
            if layer is other:
                with torch.no_grad():
                    layer.weight.grad.copy_(literal.center(layer.weight.grad))
            step.step()
        center(conv)
    close(conv.weight, other.weight, 1e-12)


def test_mimicnorm_normalizes_logits():
    """At a batch of two each logit is the opposite of the other image's."""
    scheme = build("mimicnorm", batch_size=2)
    model = models.build("resnet8", scheme=scheme, num_classes=3)
    y = model(torch.randn(4, 3, 8, 8))
    close(y[::2], -y[1::2])
    assert (y.abs() > 0.5).all()
    assert (y.abs() < 1).all()
    with pytest.raises(ValueError, match=r"^norm=mimicnorm: normalizes logits, .* no linear layer"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), scheme)


def test_bn_init():
    layer = build("bn", batch_size=2, init_scale=0.25, lr_divisor=100.0).norm(4)
    assert layer.weight.tolist() == [0.25] * 4
    with torch.no_grad():
        layer.weight.fill_(7)
    layer.reset_parameters()
    assert layer.weight.tolist() == [0.25] * 4
    with pytest.raises(ValueError, match=r"^norm.lr_divisor=0: expected a number above 0"):
        build("bn", lr_divisor=0)
