"""Schemes as a whole: protocols, conversion, errors."""

import pickle

import pytest
import torch
import torch.nn.functional as F

import models
import norms

ALL = norms.names()
BATCH_INDEPENDENT = {"gn", "ws_gn", "pws", "ln", "in", "nf", "none", "frn", "evonorm_s0"}
GHOSTS = [name for name in ALL if name != "sync_bn"]  # which takes one batch at a time
# Short warm-ups and schedules, so that a few steps reach every branch.
SHORT = {"moving_average_batch_size": 8, "warmup": 6}
OPTIONS = {
    "cbn": {"burn_in": 2, "window": 3},
    "xbn": {"groups": 4},
    "mbn": {"size": 3, "lam": [0.1, 0.9], "lam_until": [2]},
    "mabn": SHORT,
    "powernorm": {"warmup": 4},
    "brn": {"start": 1, "r_until": 3, "d_until": 3},
}
VARIANTS = {
    "mabn imagenet": {"version": "imagenet", "moving_average_batch_size": 8, "warmup": 3},
    "bcn batch": {"statistics": "batch"},
    "bcn estimated": {"statistics": "estimated"},
    "pws tensorflow": {"form": "tensorflow"},
    "pws equiv": {"equiv": True, "gamma": 0.1, "mode": "fan_out"},
    "ws_gn timm": {"unbiased": False, "eps_inside": True, "ws_eps": 1e-6},
    "brn learned": {"fixed_weight": False, "start": 0, "r_until": 2, "d_until": 2},
    "gn channels": {"channels_per_group": 4},
    "cbn window": {"burn_in": 0, "window": 8},
    "xbn P1": {"position": "P1", "groups": 4},
    "xbn P3": {"position": "P3", "groups": 4},
    "online clamp": {"compensation": "clamp", "alpha_forward": 0.9, "alpha_backward": 0.8},
    "online none": {"compensation": "none", "alpha_forward": 0.9, "alpha_backward": 0.8},
}


def small(name, batch_size, seed=0, **options):
    """A network of the method, or of one of its variants above; 12 images an optimizer step."""
    torch.manual_seed(seed)
    options = OPTIONS.get(name, {}) | VARIANTS.get(name, {}) | options
    scheme = norms.build(name.split()[0], batch_size=batch_size, sgd_batch_size=12, **options)
    return models.build("resnet8", scheme=scheme, num_classes=5, in_channels=2)


def test_the_methods():
    expected = "bcn bn brn cbn evonorm_b0 evonorm_s0 frn gn in ln mabn mbn mimicnorm nf none "
    expected += "online powernorm pws sync_bn ws_bn ws_gn xbn"
    assert expected.split() == ALL


@pytest.mark.parametrize("name", GHOSTS + list(VARIANTS))
@pytest.mark.parametrize(("batch", "forward"), [(1, 2), (1, 12), (2, 6)])
def test_ghost_equals_accumulate(name, forward, batch, as_default):
    """Losses, gradients, weights and state, whatever number of images passes at once."""
    if name == "mimicnorm" and batch == 1:
        with pytest.raises(ValueError, match=r"^batch=1: norm=mimicnorm .* expected 2 or more"):
            norms.build(name, batch_size=1)
        return
    exact = 1e-5 if name.startswith(("frn", "evonorm")) else 1e-9  # timm's statistics: float32
    ghost, accumulate = small(name, batch), small(name, batch)
    scheme = norms.build(name.split()[0], batch_size=batch)
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
        assert losses[0] == pytest.approx(losses[1], rel=exact), step
        for p, q in zip(ghost.parameters(), accumulate.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, rtol=100 * exact, atol=exact)
        with torch.no_grad():
            for model in (ghost, accumulate):
                for p in model.parameters():
                    p -= 0.1 * p.grad if p.requires_grad else 0
            for model, size in ((ghost, forward), (accumulate, batch)):
                if scheme.after_step:
                    scheme.after_step(model)
                if scheme.second_pass:
                    with scheme.second_pass(model):
                        for part in x.split(size):
                            model(part)
    state = accumulate.state_dict()
    for key, value in ghost.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=100 * exact, atol=exact)


def test_sync_bn_refuses_ghost_batches():
    with pytest.raises(ValueError, match=r"a forward pass of 4 images with batch=2; .* expected"):
        small("sync_bn", 2)(torch.randn(4, 2, 8, 8))


@pytest.mark.parametrize("name", GHOSTS + list(VARIANTS))
def test_batch_independent_says_the_truth(name):
    scheme = norms.build(name.split()[0], batch_size=2)
    assert scheme.batch_independent == (name.split()[0] in BATCH_INDEPENDENT)
    x = torch.randn(4, 2, 8, 8)
    model = small(name, 2)
    together = model(x)
    if scheme.batch_independent:
        single = torch.cat([small(name, 2)(p) for p in x.split(1)])
        assert torch.allclose(together, single, atol=1e-5)
    other = torch.cat([torch.randn(3, 2, 8, 8), x[3:]])
    same = torch.allclose(small(name, 2)(other)[3], together[3], atol=1e-5)
    assert same == scheme.batch_independent


@pytest.mark.parametrize("name", ALL)
def test_schemes_pickle(name):
    scheme = pickle.loads(pickle.dumps(norms.build(name, batch_size=2)))
    assert type(scheme.norm(8)) is type(norms.build(name, batch_size=2).norm(8))


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


@pytest.mark.parametrize("name", ["gn", "ws_gn", "bcn", "xbn"])
def test_group_count_that_fits_no_layer(name):
    with pytest.raises(
        ValueError, match=r"norm.groups=7: fits no layer .*16, 32, 64.* allowed: 1,"
    ):
        small(name, 2, groups=7)
    with pytest.raises(ValueError, match=r"norm.groups=0: expected"):
        small(name, 2, groups=0)
