"""`norms.convert` on networks of timm and torchvision."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import models
import norms

KEEPS_NAMES = ["bn", "sync_bn", "gn", "ln", "in", "ws_gn", "ws_bn"]
RUNNING = {"running_mean", "running_var", "num_batches_tracked"}


def build(library, network, scheme):
    """On the meta device: shapes only, so that large networks cost nothing."""
    with torch.device("meta"):
        return models.build(network, scheme=scheme, num_classes=7, library=library)


@pytest.mark.parametrize("name", ["bn", "gn", "ws_gn", "mabn", "pws", "brn", "frn"])
@pytest.mark.parametrize(
    ("library", "network"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "vgg11_bn"),
        ("torchvision", "densenet121"),
        ("torchvision", "mobilenet_v2"),
        ("torchvision", "mnasnet0_5"),
        ("torchvision", "shufflenet_v2_x0_5"),
        ("timm", "resnet10t"),
        ("timm", "seresnet18"),
        ("timm", "regnetx_002"),
        ("timm", "efficientnet_b0"),
        ("timm", "mobilenetv3_small_050"),
        ("timm", "ghostnet_050"),
        ("timm", "cspresnet50"),
    ],
)
def test_architectures(name, library, network):
    options = {"min_channels": 1, "groups": 16} if name in ("gn", "ws_gn") else {}
    scheme = norms.build(name, batch_size=2, **options)
    model = build(library, network, scheme)
    models.rehearse(model, (4, 3, 64, 64), 7)
    kinds = {type(m) for m in model.modules()}
    assert nn.BatchNorm2d not in kinds
    assert {type(scheme.conv(8, 8, 3)), type(scheme.norm(32))} <= kinds
    assert any(isinstance(m, nn.Linear) and m.out_features == 7 for m in model.modules())


@pytest.mark.parametrize("name", sorted(set(norms.names()) - {"in", "sync_bn"}))
def test_every_scheme_goes_into_norm_activation_layers(name):
    options = {"min_channels": 1} if name in ("gn", "ws_gn", "bcn", "evonorm_s0") else {}
    scheme = norms.build(name, batch_size=2, **options)
    model = build("timm", "regnety_002", scheme)
    models.rehearse(model, (4, 3, 64, 64), 7)
    if scheme.norm_act:
        acts = [m for m in model.modules() if getattr(m, "apply_act", False)]
        assert acts
        assert all(isinstance(m.act, nn.Identity) for m in acts)


@pytest.mark.parametrize(
    ("network", "library", "name", "message"),
    [
        ("convnext_tiny", "torchvision", "bn", "ConvNeXt has no batch norm, so there is nothing"),
        ("vit_tiny_patch16_224", "timm", "gn", "VisionTransformer has no batch norm"),
        ("tf_efficientnet_b0", "timm", "ws_gn", "only plain zero-padded convolutions"),
        ("resnet18", "torchvision", "evonorm_s0", "norm=evonorm_s0: is norm and activation in one"),
        ("resnet18", "torchvision", "evonorm_b0", "norm=evonorm_b0: is norm and activation in one"),
    ],
)
def test_where_it_makes_no_sense_it_says_so(network, library, name, message):
    with pytest.raises(ValueError, match=message):
        build(library, network, norms.build(name, batch_size=2))


@pytest.mark.parametrize("name", KEEPS_NAMES)
@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2"])
def test_a_state_dict_goes_in_and_out(name, network):
    host = torchvision.models.get_model(network)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v + 3
             for k, v in host.state_dict().items()}  # fmt: skip
    options = {"groups": 8} if name in ("gn", "ws_gn") else {}
    converted = norms.convert(host, norms.build(name, batch_size=2, **options))
    lists = converted.load_state_dict(state, strict=False)
    too_much = {key.rpartition(".")[2] for key in lists.unexpected_keys}
    assert not lists.missing_keys
    assert too_much == (set() if name.endswith("bn") else RUNNING)
    back = torchvision.models.get_model(network)
    lists = back.load_state_dict(converted.state_dict(), strict=False)
    assert not lists.unexpected_keys
    assert all(key.rpartition(".")[2] in RUNNING for key in lists.missing_keys)
    assert all(map(torch.equal, back.parameters(), converted.parameters()))


def test_what_a_state_dict_lacks_for_pws_is_listed():
    host = torchvision.models.resnet18()
    state = host.state_dict()
    converted = norms.convert(host, norms.build("pws"))
    lists = converted.load_state_dict(state, strict=False)
    convs = [n for n, m in converted.named_modules() if isinstance(m, norms.PWSConv2d)]
    assert sorted(lists.missing_keys) == sorted(
        f"{n}.{p}" for n in convs for p in ("alpha", "bias")
    )
    ends = ("bn1.", "layer4.1.bn2.")
    gone = {k for k in state if k.split(".")[-2].startswith("bn") or ".downsample.1." in k}
    kept = {k for k in gone if k.startswith(ends) and k.endswith(("weight", "bias"))}
    assert set(lists.unexpected_keys) == gone - kept


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


# --- found by using it


def test_a_fixed_gain_is_not_taken_from_the_host():
    """timm starts the last norm of a branch at 0; BRN's gain of 1 could never leave that."""
    import timm

    model = norms.convert(timm.create_model("resnet10t"), norms.build("brn", batch_size=2))
    gains = [m.weight for m in model.modules() if isinstance(m, norms.BatchRenorm2d)]
    assert all((gain == 1).all() for gain in gains)


def test_what_is_frozen_stays_frozen():
    host = torchvision.models.resnet18().requires_grad_(False)
    host.fc.requires_grad_(True)
    for name in ("mabn", "pws"):
        model = norms.convert(copy.deepcopy(host), norms.build(name, batch_size=2))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"fc.weight", "fc.bias"}


def test_the_hosts_eps_is_its_networks():
    host = torchvision.models.mobilenet_v3_small().eval()
    for m in host.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.01, 0.5)
    converted = norms.convert(copy.deepcopy(host), norms.build("bn"))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(host(x), converted(x))


def test_a_norm_without_affine_keeps_its_statistics_mode_and_type():
    host = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    host.double().eval()[1].running_mean.fill_(3.0)
    converted = norms.convert(copy.deepcopy(host), norms.build("bn"))
    x = torch.randn(2, 3, 5, 5).double()
    assert torch.equal(host(x), converted(x))


def test_shared_layers_stay_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.norm2 = self.conv, self.norm

    net = norms.convert(Net(), norms.build("mabn", batch_size=2))
    assert net.conv2 is net.conv
    assert net.norm2 is net.norm
    assert isinstance(net.norm, norms.MABN2d)


def test_a_host_on_the_meta_device():
    with torch.device("meta"):
        host = torchvision.models.resnet18()
    for name in ("bn", "mabn", "pws", "bcn"):
        model = norms.convert(copy.deepcopy(host), norms.build(name, batch_size=2))
        assert {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_an_error_leaves_the_network_as_it_was():
    reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), reflecting, nn.BatchNorm2d(4))
    layers = list(net)
    with pytest.raises(ValueError, match=r"2 of Sequential: only plain zero-padded .*reflect"):
        norms.convert(net, norms.build("mabn", batch_size=2))
    assert list(net) == layers


def test_a_classifier_without_bias_stays():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 9, 1, bias=False)
    )
    assert type(norms.convert(net, norms.build("mabn", batch_size=2))[2]) is nn.Conv2d


@pytest.mark.parametrize("name", ["mabn", "brn"])
def test_another_layers_counters_start_from_nothing(name):
    """A trained batch norm has counted its batches; a schedule or a window has not begun."""
    host = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    host[1].num_batches_tracked.fill_(100_000)
    fresh = norms.build(name, batch_size=2).norm(4)
    norm = norms.convert(host, norms.build(name, batch_size=2))[1]
    for key, value in norm.named_buffers():
        assert torch.equal(value, fresh.get_buffer(key)), key


def test_a_gain_that_the_host_did_not_have_is_trained():
    host = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    assert norms.convert(host, norms.build("gn", min_channels=1, groups=4))[1].weight.requires_grad
