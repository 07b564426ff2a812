"""Schemes as a whole: protocols, conversion, errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
import norms

ALL = norms.names()
BATCH_FREE = {"gn", "ws_gn", "pws"}
# Short warm-ups, so that a few steps reach MABN's windows.
OPTIONS = {"mabn": {"moving_average_batch_size": 8, "warmup": 6}}


def small(name, batch_size, seed=0, **options):
    torch.manual_seed(seed)
    scheme = norms.build(name, batch_size=batch_size, **OPTIONS.get(name, {}), **options)
    return models.build("resnet8", scheme=scheme, num_classes=5, in_channels=2)


def test_there_are_six():
    assert {"bn", "gn", "ws_gn", "bcn", "pws", "mabn"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("forward", [2, 6, 12])
@pytest.mark.parametrize("batch", [1, 2])
def test_ghost_equals_accumulate(name, forward, batch, as_default):
    """Losses, gradients, weights and state, whatever number of images passes at once."""
    ghost, accumulate = small(name, batch), small(name, batch)
    for step in range(4):
        x = torch.randn(12, 2, 8, 8)
        y = torch.randint(0, 5, (12,))
        losses = []
        for model, size in ((ghost, forward), (accumulate, batch)):
            model.zero_grad()
            total = 0.0
            for part, labels in zip(x.split(size), y.split(size), strict=True):
                loss = F.cross_entropy(model(part), labels) * len(part) / 12
                loss.backward()
                total += loss.item()
            losses.append(total)
        assert losses[0] == pytest.approx(losses[1], rel=1e-9), step
        for p, q in zip(ghost.parameters(), accumulate.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            for model in (ghost, accumulate):
                for p in model.parameters():
                    p -= 0.1 * p.grad
    state = accumulate.state_dict()
    for key, value in ghost.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_batch_free_says_the_truth(name):
    scheme = norms.build(name, batch_size=2)
    assert scheme.batch_free == (name in BATCH_FREE)
    x = torch.randn(4, 2, 8, 8)
    model = small(name, 2)
    together, alone = model(x), torch.cat([small(name, 2)(p) for p in x.split(2)])
    if scheme.batch_free:
        single = torch.cat([small(name, 2)(p) for p in x.split(1)])
        assert torch.allclose(together, single, atol=1e-5)
    other = torch.cat([x[:1], torch.randn(3, 2, 8, 8)])
    same = torch.allclose(small(name, 2)(other)[0], together[0], atol=1e-5)
    assert same == scheme.batch_free
    assert torch.allclose(together, alone, atol=1e-4)  # the first groups meet no history yet


@pytest.mark.parametrize("name", ALL)
def test_copies_pickles_and_state_dicts(name):
    model = small(name, 2)
    for _ in range(3):
        model(torch.randn(4, 2, 8, 8)).sum().backward()
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), small(name, 2, seed=1)]
    others[2].load_state_dict(model.state_dict())
    x = torch.randn(4, 2, 8, 8)
    expected = [model(x), model.eval()(x)]
    for other in others:
        assert torch.equal(other(x), expected[0])
        assert torch.equal(other.eval()(x), expected[1])


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_autocast(name):
    model = small(name, 2)
    x = torch.randn(4, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert torch.allclose(y.float(), small(name, 2)(x), atol=0.1)
    assert all(b.dtype != torch.bfloat16 for b in model.buffers())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["batch", "mabm", "scheme", "convert"])
def test_unknown_scheme(name):
    with pytest.raises(ValueError, match=rf"^norm={name}: unknown.*allowed: .*mabn") as error:
        norms.build(name, batch_size=2)
    assert ("did you mean mabn" in str(error.value)) == (name == "mabm")


def test_unknown_option():
    with pytest.raises(ValueError, match=r"norm.gama .norm=pws.: unknown \(did you mean gamma"):
        norms.build("pws", gama=1)


@pytest.mark.parametrize("batch", [0, -1, 2.5, "two", True])
def test_batch_size_that_is_none(batch):
    with pytest.raises(ValueError, match=r"batch=.*whole number"):
        norms.build("bn", batch_size=batch)


@pytest.mark.parametrize("name", ["gn", "ws_gn", "bcn"])
def test_group_count_that_fits_no_layer(name):
    with pytest.raises(
        ValueError, match=r"norm.groups=7: fits no layer .*16, 32, 64.* allowed: 1,"
    ):
        small(name, 2, groups=7)
    with pytest.raises(ValueError, match=r"norm.groups=0: expected"):
        small(name, 2, groups=0)


# --- norms.convert


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("library", "network"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "vgg11_bn"),
        ("torchvision", "densenet121"),
        ("torchvision", "mobilenet_v2"),
        ("timm", "resnet10t"),
        ("timm", "efficientnet_b0"),
        ("timm", "regnetx_004"),
    ],
)
def test_convert(name, library, network):
    options = {"min_channels": 1, "groups": 16} if name in ("gn", "ws_gn", "bcn") else {}
    scheme = norms.build(name, batch_size=2, **options)
    model = models.build(network, scheme=scheme, num_classes=7, library=library)
    models.rehearse(model, (4, 3, 64, 64), 7)
    kinds = {type(m) for m in model.modules()}
    assert nn.BatchNorm2d not in kinds
    assert {type(scheme.conv(8, 8, 3)), type(scheme.norm(32))} <= kinds
    assert any(isinstance(m, nn.Linear) and m.out_features == 7 for m in model.modules())


@pytest.mark.parametrize("name", ["bn", "gn", "ws_gn"])
def test_convert_keeps_names_shapes_and_weights(name):
    plain = torchvision.models.resnet18()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    after = norms.convert(plain, norms.build(name, batch_size=2)).state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after)
    lost = {k.rsplit(".", 1)[1] for k in before.keys() - after.keys()}
    running = {"running_mean", "running_var", "num_batches_tracked"}
    assert lost == (set() if name == "bn" else running)


def test_convert_to_bn_changes_nothing_at_the_full_batch():
    plain = torchvision.models.resnet18().eval()
    converted = norms.convert(copy.deepcopy(plain), norms.build("bn"))
    x = torch.randn(2, 3, 64, 64)
    assert not converted.training
    assert torch.equal(plain(x), converted(x))
    assert torch.equal(plain.train()(x), converted.train()(x))


def test_convert_to_pws_leaves_two_norms():
    model = norms.convert(torchvision.models.resnet18(), norms.build("pws"))
    left = [n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    assert left == ["bn1", "layer4.1.bn2"]
    assert isinstance(model.layer1[0].bn1, nn.Identity)
    assert model.layer1[0].conv1.bias is not None


def test_convert_spares_squeeze_and_excitation():
    model = models.build(
        "efficientnet_b0", scheme=norms.build("pws"), num_classes=3, library="timm"
    )
    plain = [n for n, m in model.named_modules() if type(m) is nn.Conv2d]
    assert plain
    assert all(".se." in n for n in plain)


def test_convert_keeps_timms_activations():
    import timm

    plain = timm.create_model("efficientnet_b0").eval()
    converted = norms.convert(copy.deepcopy(plain), norms.build("bn")).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(plain(x), converted(x), atol=1e-5)
    assert list(converted.state_dict()) == list(plain.state_dict())


def test_convert_a_layer_by_itself():
    layer = norms.convert(nn.BatchNorm2d(4), norms.build("mabn", batch_size=2))
    assert isinstance(layer, norms.MABN2d)


def test_convert_without_batch_norm():
    with pytest.raises(ValueError, match="Sequential has no batch norm"):
        norms.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), norms.build("gn"))
