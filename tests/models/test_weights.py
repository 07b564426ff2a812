"""`model.weights`: what is taken over from files, runs and the libraries' pretrained networks."""

import argparse

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import models
import norms


def build(name="resnet8", norm="bn", classes=10, channels=3, **keys):
    scheme = norms.build(norm, batch_size=2)
    return models.build(name, scheme=scheme, num_classes=classes, in_channels=channels, **keys)


def stirred(model):
    """No value as at a start, statistics and counters included."""
    for i, value in enumerate(model.state_dict().values()):
        value.copy_(torch.rand(value.shape) + i if value.is_floating_point() else i + 7)
    return model


def same(model, state):
    own = model.state_dict()
    return {key for key in own if key in state and torch.equal(own[key], state[key])}


@pytest.fixture
def told():
    return []


# --- files and runs


@pytest.mark.parametrize("norm", ["bn", "mabn", "pws", "bcn"])
def test_a_file_in_every_format(tmp_path, told, norm):
    state = stirred(build(norm=norm)).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save({"model": state, "optimizer": {}}, tmp_path / "last.pt")
    save_file(state, tmp_path / "s.safetensors")
    for name in ("plain.pt", "wrapped.pth", "s.safetensors", "last.pt", ""):
        model = build(norm=norm, weights=str(tmp_path / name), log=told.append)
        assert same(model, state) == set(state)
        assert model.complete
        path = f"model.weights={tmp_path / name}"
        assert told.pop() == f"  {path}: {len(state)} of {len(state)} tensors taken over"


def test_the_moving_average_of_a_run_comes_first(tmp_path, told):
    state, average = (stirred(build()).state_dict() for _ in range(2))
    learned = {k: v for k, v in average.items() if "running" not in k and "tracked" not in k}
    torch.save({"model": state, "ema": learned}, tmp_path / "last.pt")
    model = build(weights=tmp_path, log=told.append)
    assert same(model, learned) == set(learned)
    assert same(model, state) >= state.keys() - learned.keys()


def test_a_head_of_other_classes_stays_at_its_start(tmp_path, told):
    state = stirred(build(classes=7)).state_dict()
    torch.save(state, tmp_path / "w.pt")
    torch.manual_seed(5)
    fresh = build().state_dict()
    torch.manual_seed(5)
    model = build(weights=tmp_path / "w.pt", log=told.append)
    head = {"fc.weight", "fc.bias"}
    assert same(model, state) == state.keys() - head
    assert same(model, fresh) >= head
    assert len(told) == 1
    assert "the head (fc.weight, fc.bias) is left at its start, theirs has 7 classes" in told[0]


@pytest.mark.parametrize("norm", norms.names())
def test_weights_with_batch_norms_start_every_scheme(tmp_path, told, norm):
    """What fits is what `norms.convert` takes over."""
    state = stirred(build()).state_dict()
    torch.save(state, tmp_path / "w.pt")
    torch.manual_seed(5)
    untouched = build(norm=norm)
    torch.manual_seed(5)
    model = build(norm=norm, weights=tmp_path / "w.pt", log=told.append)
    own, fresh = model.state_dict(), untouched.state_dict()
    taken = same(model, state)
    fixed = {k for k, p in untouched.named_parameters() if not p.requires_grad}
    assert taken & fixed == (fixed if model.complete else set())
    fit = {
        key
        for key, p in untouched.named_parameters()
        if key in state and key not in fixed and p.shape == state[key].shape
    }
    assert fit <= taken
    assert all("conv" not in key or key.endswith("weight") for key in taken)
    for key in own.keys() - taken:
        assert torch.equal(own[key], fresh[key]), key
    if norm == "mabn":  # whose warm-up must not be over before it began
        assert own["norm1.num_batches_averaged"] == 0
        assert "left out, as layers of the scheme have other parameters: norm1.running" in told[0]
        assert "at their start: norm1.running_square and " in told[0]
    if norm in ("bn", "ws_bn", "sync_bn"):
        assert taken == set(state)
    if norm == "gn":
        assert "at their start" not in told[0]
    assert told[0].count("\n") == 0


def drop(state, key):
    del state[key]


SPOILED = [
    (lambda s: drop(s, "layer1.0.norm1.weight"), "layer1.0.norm1.weight is missing; expected"),
    (lambda s: drop(s, "norm1.running_mean"), "norm1.running_mean is missing; expected"),
    (
        lambda s: [drop(s, k) for k in ("fc.bias", "conv1.weight")],
        r"conv1.weight is missing \(2 keys do not fit\); expected",
    ),
    (lambda s: s.update(extra=torch.zeros(1)), "extra is unexpected; expected weights of this"),
    (
        lambda s: s.update({"conv1.weight": torch.zeros(16, 1, 3, 3)}),
        r"conv1.weight has the shape \(16, 1, 3, 3\), not \(16, 3, 3, 3\); expected",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED, ids=range(len(SPOILED)))
@pytest.mark.parametrize("norm", ["bn", "mabn"])
def test_whatever_else_does_not_fit_is_an_error(tmp_path, norm, spoil, message):
    state = stirred(build()).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message) as error:
        build(norm=norm, weights=tmp_path / "w.pt")
    assert str(error.value).startswith(f"model.weights={tmp_path / 'w.pt'}: ")
    assert "\n" not in str(error.value)


def test_files_that_hold_no_weights(tmp_path):
    def refused(name, **keys):
        with pytest.raises(ValueError, match=f"model.weights={tmp_path / name}: ") as error:
            build(weights=tmp_path / name, **keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist; expected a file (.pt, .pth, .safetensors) or a run" in refused("w.pt")
    (tmp_path / "run").mkdir()
    assert "last.pt: does not exist" in refused("run")
    (tmp_path / "w.pt").write_bytes(b"nothing")
    assert "damaged or of another format" in refused("w.pt")
    torch.save(build().state_dict(), tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[len(content) // 2] ^= 1  # which torch.load would take
    (tmp_path / "w.pt").write_bytes(content)
    assert "damaged or of another format" in refused("w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    assert "damaged or of another format" in refused("w.safetensors")
    torch.save({"model": argparse.Namespace()}, tmp_path / "w.pt")
    assert "holds more than tensors and numbers" in refused("w.pt")
    for content in ({}, [torch.ones(2)], {"epoch": 3}):
        torch.save(content, tmp_path / "w.pt")
        assert "no state dict" in refused("w.pt")


# --- pretrained networks of the libraries, from small files in place of the download


@pytest.fixture
def hub(monkeypatch):
    """torchvision's and timm's downloads deliver `state`; `asked` keeps for what."""

    class Hub:
        def __init__(self):
            self.asked = []

        def deliver(self, *where, **keys):
            self.asked.append(where)
            return dict(self.state)

    made = Hub()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", made.deliver)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", made.deliver)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", made.deliver)
    return made


@pytest.mark.parametrize(
    ("library", "weights"),
    [
        ("torchvision", "DEFAULT"),
        ("torchvision", "IMAGENET1K_V1"),
        ("timm", True),
        ("timm", "a2_in1k"),
    ],
)
@pytest.mark.parametrize("norm", ["bn", "mabn", "pws"])
def test_pretrained_networks_by_name(hub, told, library, weights, norm):
    make = torchvision.models.resnet18 if library == "torchvision" else timm.models.resnet18
    hub.state = stirred(make()).state_dict()
    keys = dict(library=library, weights=weights, log=told.append)
    model = build("resnet18", norm, **keys)
    taken = same(model, hub.state)
    convolutions = {k for k in hub.state if hub.state[k].ndim == 4}
    assert convolutions <= taken
    assert not taken & {"fc.weight", "fc.bias"}
    assert "the head (fc.weight, fc.bias) is left at its start, theirs has 1000 classes" in told[0]
    assert len(told) == len(hub.asked) == 1
    affine = {k for k in hub.state if hub.state[k].ndim == 1 and k.endswith(("weight", "bias"))}
    affine -= {"fc.bias"}
    if norm == "bn":
        assert taken == hub.state.keys() - {"fc.weight", "fc.bias"}
        assert same(build("resnet18", classes=1000, **keys), hub.state) == set(hub.state)
    elif norm == "mabn":
        assert taken == convolutions | affine
    else:  # only the first norm is left, and the last
        assert taken >= convolutions | {"bn1.weight", "bn1.bias"}


def test_timm_adapts_the_first_convolution(hub, told):
    hub.state = stirred(timm.models.resnet18()).state_dict()
    model = build("resnet18", channels=1, library="timm", weights=True, log=told.append)
    expected = hub.state["conv1.weight"].sum(1, keepdim=True)
    assert torch.allclose(model.conv1.weight, expected)


def test_names_that_a_library_does_not_have(hub, tmp_path):
    def refused(library, weights, name="resnet18"):
        with pytest.raises(ValueError, match=r"model.weights=") as error:
            build(name, library=library, weights=weights)
        assert not hub.asked
        return str(error.value)

    assert refused("torchvision", "IMAGENET1K_V3").endswith(
        "IMAGENET1K_V3: does not exist; expected a file (.pt, .pth, .safetensors) or a run's "
        "folder; torchvision has IMAGENET1K_V1, DEFAULT"
    )
    assert "torchvision has" in refused("torchvision", True)
    assert "timm has true, a1_in1k, a2_in1k" in refused("timm", "DEFAULT")
    with pytest.raises(ValueError, match=r"model.weights=DEFAULT: does not exist; expected"):
        build(weights="DEFAULT")


def test_a_download_that_fails_is_told_in_one_line(hub, monkeypatch):
    def offline(*where, **keys):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(hub.__class__, "deliver", offline)
    for name in ("torchvision.models._api.load_state_dict_from_url",
                 "timm.models._builder.load_state_dict_from_hf"):  # fmt: skip
        monkeypatch.setattr(name, offline)
    for library, weights in (("torchvision", "DEFAULT"), ("timm", "a1_in1k")):
        with pytest.raises(ValueError, match="Name or service not known") as error:
            build("resnet18", library=library, weights=weights)
        assert str(error.value).startswith(f"model.weights={weights}: {library} cannot load")


def test_a_file_into_a_librarys_network(hub, told, tmp_path):
    """Of the network as the library has it, and of a converted one."""
    plain = stirred(torchvision.models.resnet18()).state_dict()
    torch.save(plain, tmp_path / "w.pth")
    keys = dict(library="torchvision", weights=str(tmp_path / "w.pth"), log=told.append)
    model = build("resnet18", "mabn", **keys)
    assert same(model, plain) == {
        k for k in plain if k.endswith(("weight", "bias")) and not k.startswith("fc")
    }
    state = stirred(model).state_dict()
    torch.save(state, tmp_path / "w.pth")
    assert same(build("resnet18", "mabn", **keys), state) == set(state)


# --- in a run


def test_a_run_starts_from_another_ones_network(train, tmp_path):
    first = train("norm=bn", "batch=8").run()
    state = torch.load(first / "last.pt", weights_only=True)["model"]
    words = ["norm=bn", "batch=8", f"model.weights={first}", "recipe.lr=1e-30"]
    done = train(*words, "recipe.weight_decay=0", runs=tmp_path / "second")
    assert done.status == 0, done.err
    assert "44 of 44 tensors taken over" in done.out
    assert done.run().name.startswith("bn-b8-s0-")  # the weights are part of what the run is
    trained = torch.load(done.run() / "last.pt", weights_only=True)["model"]
    assert torch.equal(trained["conv1.weight"], state["conv1.weight"])
    assert (
        "finished already" in train(*words, "recipe.weight_decay=0", runs=tmp_path / "second").out
    )

    other = train("norm=bn", "batch=8", "model.weights=/nowhere", runs=tmp_path / "third")
    assert other.status == 1
    assert other.err.startswith("error: model.weights=/nowhere: does not exist; expected a file")
    assert not list(other.runs.glob("*/*"))


def test_alphas_of_a_file_are_not_made_anew(train, tmp_path):
    words = ["norm=pws_imagenet", "batch=8"]
    first = train(*words, runs=tmp_path / "first").run()
    words += ["recipe.lr=1e-30", "recipe.weight_decay=0"]
    own = train(*words, f"model.weights={first}", runs=tmp_path / "own").run()
    alphas = [torch.load(x / "last.pt", weights_only=True)["model"]["conv1.alpha"]
              for x in (first, own)]  # fmt: skip
    assert torch.equal(*alphas)
    plain = train("norm=bn", "batch=8", runs=tmp_path / "plain").run()
    done = train(*words, f"model.weights={plain}", runs=tmp_path / "others")
    assert done.status == 0, done.err
    alpha = torch.load(done.run() / "last.pt", weights_only=True)["model"]["conv1.alpha"]
    assert not torch.equal(alpha, torch.ones_like(alpha))  # made from the images
