"""`norms.convert` on networks of timm and torchvision."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

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
    models.dry_run(model, (4, 3, 64, 64), 7)
    kinds = {type(m) for m in model.modules()}
    assert nn.BatchNorm2d not in kinds
    assert {type(scheme.conv(8, 8, 3)), type(scheme.norm(32))} <= kinds
    assert any(isinstance(m, nn.Linear) and m.out_features == 7 for m in model.modules())


@pytest.mark.parametrize("name", sorted(set(norms.names()) - {"in", "nf", "sync_bn", "xbn"}))
def test_every_scheme_goes_into_norm_activation_layers(name):
    options = {"min_channels": 1} if name in ("gn", "ws_gn", "bcn", "evonorm_s0") else {}
    scheme = norms.build(name, batch_size=2, **options)
    model = build("timm", "regnety_002", scheme)
    models.dry_run(model, (4, 3, 64, 64), 7)
    if scheme.norm_act:
        acts = [m for m in model.modules() if getattr(m, "apply_act", False)]
        assert acts
        assert all(isinstance(m.act, nn.Identity) for m in acts)


@pytest.mark.parametrize(
    ("network", "library", "name", "message"),
    [
        (
            "convnext_tiny",
            "torchvision",
            "bn",
            r"ConvNeXt has no batch norm of maps, so .* LayerNorm$",
        ),
        ("vit_tiny_patch16_224", "timm", "gn", "VisionTransformer has no batch norm"),
        ("tf_efficientnet_b0", "timm", "pws", r"conv_stem: has a forward pass of its own\), where"),
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
    with pytest.raises(ValueError, match=r"1 of 2 norms of Sequential .*\(2: padding_mode=reflect"):
        norms.convert(net, norms.build("mabn", batch_size=2))
    assert list(net) == layers
    for name in ("ws_gn", "bcn", "evonorm_s0", "evonorm_b0"):  # by the scheme's own check
        net = nn.Sequential(*layers[:2])
        with pytest.raises(
            ValueError, match=rf"norm\.groups=32: fits no layer|norm={name}: is norm"
        ):
            norms.convert(net, norms.build(name, batch_size=2))
        assert list(net) == layers[:2]
    norms.convert(net, norms.build("gn", groups=2))


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
        if not key.startswith("moving"):  # what BRN knows of a batch norm: see below
            assert torch.equal(value, fresh.get_buffer(key)), key


# --- everything of the host


def pair(dim=2, bias=False, **options):
    conv, batch_norm = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8, 3, bias=bias), batch_norm(8, **options), nn.ReLU(),
        conv(8, 8, 3, bias=bias), batch_norm(8, **options), nn.ReLU(),
    )  # fmt: skip


def scheme(name, batch_size=2, **options):
    if name in ("gn", "ws_gn", "bcn", "evonorm_s0"):
        options = {"groups": 4} | options
    return norms.build(name, batch_size=batch_size, **options)


BLOCKS = {"mimicnorm", "nf", "xbn"}  # which need blocks or a classifier
EVERY = sorted(set(norms.names()) - {"evonorm_b0", "evonorm_s0"} - BLOCKS)  # need an activation
OWN_CONV = ["bcn", "cbn", "mabn", "pws", "ws_bn", "ws_gn"]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(set(EVERY) - {"frn"}))
def test_every_scheme_in_every_number_of_dimensions(name, dim):
    network = norms.convert(pair(dim), scheme(name))
    assert not any(type(m).__name__.startswith("BatchNorm") for m in network)
    x = torch.randn(2, 3, *(7 for _ in range(dim)))
    y = network(x)
    y.sum().backward()
    with torch.no_grad():
        folded, expected = norms.fold(network)(x), network.eval()(x)
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_an_optimizer_made_before_goes_on(name):
    """Parameters are the host's own objects, with their gradients and whether they are trained."""
    host = pair(bias=True)
    host[0].weight.requires_grad_(False)
    host[3].weight.grad = torch.ones_like(host[3].weight)
    before = dict(host.named_parameters())
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1, momentum=0.9)
    network = norms.convert(host, scheme(name))
    after = dict(network.named_parameters())
    shared = {k for k in after if k in before and after[k] is before[k]}
    assert {"0.weight", "0.bias", "3.weight", "3.bias"} <= shared
    if name == "brn":  # its gain is fixed
        assert {"1.bias", "4.bias"} <= shared
    elif name == "bcn":
        assert network[1].bn.weight is before["1.weight"]
    elif name != "none":
        assert {"1.weight", "1.bias", "4.weight"} <= shared
    assert not network[0].weight.requires_grad
    assert network[3].weight.grad is not None
    optimizer.zero_grad()
    old = {k: p.clone() for k, p in before.items()}
    network(torch.randn(2, 3, 7, 7)).square().sum().backward()
    optimizer.step()
    assert torch.equal(old["0.weight"], after["0.weight"])
    assert not torch.equal(old["3.weight"], after["3.weight"])


REPARAMETRIZED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5),
    "pruned by filter": lambda conv: prune.ln_structured(conv, "weight", 0.5, 2, 0),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("kind", REPARAMETRIZED)
@pytest.mark.parametrize("name", EVERY)
def test_a_computed_weight_is_kept_or_refused(name, kind):
    """Never replaced by fresh weights: kept as it is, said where the scheme has other convolutions,
    refused where it needs its own; and a folded network computes with it."""
    host = pair()
    REPARAMETRIZED[kind](host[0])
    for _ in range(2):  # spectral norm iterates in training
        host(torch.randn(4, 3, 7, 7))
    weight, layer, keys = host.eval()[0].weight.detach().clone(), host[0], list(host.state_dict())
    if name in ("cbn", "mabn", "pws"):
        with pytest.raises(
            ValueError, match=r"\(0: its weight is computed .*: remove that first\)"
        ):
            norms.convert(host, scheme(name))
        assert type(host[1]) is nn.BatchNorm2d
        assert list(host.state_dict()) == keys
        return
    if name in OWN_CONV:
        with pytest.warns(UserWarning, match=r"1 of 2 norms .*\(0: its weight is computed"):
            network = norms.convert(host, scheme(name))
    else:
        network = norms.convert(host, scheme(name))
    assert network[0] is layer
    assert torch.equal(network[0].weight, weight)
    network.train()(torch.randn(2, 3, 7, 7)).sum().backward()
    x = torch.randn(2, 3, 7, 7)
    expected = network.eval()(x)
    torch.testing.assert_close(norms.fold(network)(x), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bn", "mabn", "gn"])
def test_a_computed_gain_is_refused(name):
    host = pair()
    prune.l1_unstructured(host[1], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"^1 of Sequential: the gain of this BatchNorm2d is comp"):
        norms.convert(host, scheme(name))
    assert type(host[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("name", EVERY)
def test_ties_stay(name):
    """Weights that two layers share, and layers under two names."""
    host = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip
    host[3].weight, host[4].bias = host[0].weight, host[1].bias
    host.append(host[0]).append(host[1])
    network = norms.convert(host, scheme(name))
    assert network[3].weight is network[0].weight
    assert network[6] is network[0]
    assert network[7] is network[1]
    if name not in ("none", "pws", "bcn"):
        assert network[4].bias is network[1].bias
    for _ in range(2):
        network(torch.randn(2, 8, 7, 7)).square().mean().backward()
    folded, x = norms.fold(network), torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=1e-3, atol=1e-4)
    assert folded[6] is folded[0]
    assert folded[7] is folded[1]


@pytest.mark.parametrize("name", EVERY)
def test_hooks_stay(name):
    calls = []
    host = pair()
    for i in (0, 1):
        host[i].register_forward_pre_hook(lambda m, x: calls.append("before"))
        host[i].register_forward_hook(lambda m, x, k, y: calls.append("after"), with_kwargs=True)
        host[i].register_full_backward_hook(lambda m, dx, dy: calls.append("back"))
        host[i].register_state_dict_pre_hook(lambda *args: calls.append("saved"))
        host[i].register_load_state_dict_post_hook(lambda *args: calls.append("loaded"))
    network = norms.convert(host, scheme(name))
    network(torch.randn(2, 3, 7, 7, requires_grad=True)).sum().backward()
    network.load_state_dict(network.state_dict())
    expected = dict.fromkeys(("before", "after", "back", "saved", "loaded"), 2)
    assert {call: calls.count(call) for call in calls} == expected


@pytest.mark.parametrize("name", EVERY)
def test_type_and_mode_stay(name):
    host = pair().to(torch.bfloat16).eval()
    host[4].train()
    network = norms.convert(host, scheme(name))
    floats = [v for v in network.state_dict().values() if v.is_floating_point()]
    assert {v.dtype for v in floats} == {torch.bfloat16}
    assert [network[i].training for i in (0, 1, 3, 4)] == [False, False, False, True]


@pytest.mark.parametrize("name", EVERY)
def test_a_norm_without_affine_stays_without(name):
    network = norms.convert(pair(affine=False), scheme(name))
    assert not {k for k, p in network.named_parameters() if k[0] in "14" and p.requires_grad}
    network(torch.randn(2, 3, 7, 7)).sum().backward()
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(norms.fold(network)(x), network.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_a_norm_without_running_statistics(name):
    """A batch norm stays without, in evaluation too; other methods have their own state."""
    host = pair(track_running_stats=False)
    plain = copy.deepcopy(host)
    network = norms.convert(host, scheme(name, None))
    x = torch.randn(4, 3, 7, 7)
    if name == "bn":
        assert not list(network.buffers())
        for mode in (True, False):
            torch.testing.assert_close(network.train(mode)(x), plain.train(mode)(x))
    network.train()(x)
    torch.testing.assert_close(norms.fold(network)(x), network.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bn", "ws_bn", "brn", "bcn", "sync_bn"])
def test_statistics_go_to_what_means_the_same(name):
    host = pair()
    for _ in range(20):
        host(torch.randn(8, 3, 7, 7) * 2 + 1)
    plain = copy.deepcopy(host).eval()
    norm = norms.convert(host.eval(), scheme(name))[1]
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(getattr(norm, "bn", norm)(x), plain[1](x), rtol=1e-4, atol=1e-4)


def test_the_report():
    host = nn.Sequential(
        *pair(), nn.ConvTranspose2d(8, 8, 2), nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 1),
        torchvision.ops.FrozenBatchNorm2d(5), nn.Flatten(), nn.Linear(5, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    report = norms.conversion(host, scheme("mabn"))
    assert type(host[1]) is nn.BatchNorm2d  # nothing has been done yet
    assert list(report.swapped) == ["0", "1", "3", "4"]
    expected = """Sequential to mabn: swapped
  2 x Conv2d -> CenteredConv2d
  2 x BatchNorm2d -> MABN2d
left
  6 (ConvTranspose2d): no norm follows it
  7 (GroupNorm): is no batch norm
  8 (Conv2d): no norm follows it
  9 (FrozenBatchNorm2d): frozen: it has no statistics of batches
  12 (BatchNorm1d): no maps: it follows no 1-d convolution of as many channels"""
    assert sorted(str(report).splitlines()) == sorted(expected.splitlines())
    assert report.apply() is host
    assert sorted(str(report).splitlines()) == sorted(expected.splitlines())
    assert type(host[1]) is norms.MABN2d
    with pytest.raises(ValueError, match=r"0: has been converted already"):
        norms.conversion(host, scheme("mabn"))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), "does not know its cha"),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d(affine=False)), "does not know its channels yet"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), r"to swap; it has no norm at all$"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"it has 1 BatchNorm1d$"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), r"1 InstanceNorm2d$"),
        (lambda: torchvision.models.swin_t(), r"SwinTransformer has no .* [0-9]+ LayerNorm$"),
    ],
)
def test_a_host_without_a_norm_to_swap(host, message):
    network = host()
    layers = list(network.modules())
    with pytest.raises(ValueError, match=message) as error:
        norms.convert(network, scheme("mabn"))
    assert "\n" not in str(error.value)
    assert list(network.modules()) == layers


@pytest.mark.parametrize("name", EVERY)
def test_synchronized_batch_norms_are_swapped(name):
    host = nn.SyncBatchNorm.convert_sync_batchnorm(pair())
    before = dict(host.named_parameters())
    network = norms.convert(host, scheme(name))
    assert not any(type(m) is nn.SyncBatchNorm for m in network)
    assert network[0].weight is before["0.weight"]


def test_a_scheme_of_weights_that_finds_no_convolution():
    host = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (8, 1, 1)), nn.BatchNorm2d(8))
    for name in OWN_CONV:
        with pytest.raises(ValueError, match="none of the 1 norms of Sequential stands behind a"):
            norms.convert(host, scheme(name))
    assert type(norms.convert(host, scheme("bn"))[2]) is norms.GhostBatchNorm2d


class Activated(nn.Sequential):
    """timm's norm-and-activation layers, with one whose second use would show."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False), timm.layers.BatchNormAct2d(8, act_layer=nn.Tanh),
            nn.Conv2d(8, 8, 3, bias=False), timm.layers.BatchNormAct2d(8, act_layer=nn.Tanh),
        )  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(norms.names()) - BLOCKS))
def test_timms_activations_are_applied_once(name):
    """In the network, in its graph, folded, and in a feature extractor."""
    network = norms.convert(Activated(), scheme(name))
    x = torch.randn(2, 3, 9, 9)
    for _ in range(2):
        network(x).sum().backward()
    calls = []

    def count(*args):
        calls.append(1)

    for act in (m for m in network.modules() if type(m) is nn.Tanh):
        act.register_forward_hook(count)
    expected = network.eval()(x)
    times = 0 if scheme(name).norm_act else 2
    assert len(calls) == times
    for other in (
        torch.fx.symbolic_trace(network),
        lambda x: create_feature_extractor(network, ["3"])(x)["3"],
        norms.fold(network),
        copy.deepcopy(network),
    ):
        calls.clear()
        torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-5)
        assert len(calls) == times


@pytest.mark.parametrize("name", ["bn", "mabn", "brn"])
def test_tools_that_would_lose_an_activation_are_refused(name):
    for tool in (nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d):
        network = norms.convert(Activated(), norms.build(name))
        with pytest.raises(ValueError, match=f"{tool.__name__} would lose the activation of"):
            tool(network)


# --- what a host may be


@pytest.mark.parametrize("name", ["bcn", "brn", "cbn", "mabn", "mbn", "online", "powernorm"])
def test_eps_stays(name):
    norm = norms.convert(pair(eps=1e-2), scheme(name))[1]
    assert getattr(norm, "bn", norm).eps == 1e-2


@pytest.mark.parametrize("name", ["bcn", "brn", "cbn", "online"])
def test_eps_is_part_of_the_statistics(name):
    host = pair(eps=1e-2)
    host(torch.randn(8, 3, 7, 7) / 9)
    plain, x = copy.deepcopy(host).eval(), torch.randn(2, 8, 5, 5) / 9
    norm = norms.convert(
        host.eval(), scheme(name, **{"online": {"compensation": "none"}}.get(name, {}))
    )[1]
    torch.testing.assert_close(getattr(norm, "bn", norm)(x), plain[1](x), rtol=1e-4, atol=1e-4)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_norm_with_a_forward_pass_of_its_own_is_refused():
    patched = pair()
    patched[1].forward = lambda x: 2 * x
    own = pair()
    own[1] = Doubled(8)
    for host, kind in ((patched, "BatchNorm2d"), (own, "Doubled")):
        layers = list(host)
        with pytest.raises(ValueError, match=rf"^1 of Sequential: this {kind} has a forward pass"):
            norms.convert(host, scheme("bn"))
        assert list(host) == layers


class ConvNorm(nn.Conv2d):
    """As detectron2's: the norm inside the convolution."""

    def __init__(self, *args, norm, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm

    def forward(self, x):
        return self.norm(super().forward(x))


def test_a_convolution_with_a_forward_pass_of_its_own_stays():
    """Patched on the layer, or with its norm inside, which is swapped."""
    patched = pair()
    patched[0].forward = patched[0].forward
    inside = nn.Sequential(ConvNorm(3, 8, 3, norm=nn.BatchNorm2d(8)), *list(pair())[3:])
    for host, kind in ((patched, nn.Conv2d), (inside, ConvNorm)):
        with pytest.raises(ValueError, match=r"1 of 2 norms .*\(0: has a forward pass of its own"):
            norms.convert(host, scheme("mabn"))
        with pytest.warns(UserWarning, match=r"\(0: has a forward pass of its own"):
            norms.convert(host, scheme("ws_gn"))
        assert type(host[0]) is kind
        assert not any(isinstance(m, nn.BatchNorm2d) for m in host.modules())


def test_handles_remove_hooks_and_loading_hooks_know_the_new_layer():
    host, calls = pair(), []
    handles = [layer.register_forward_hook(lambda *args: calls.append(1)) for layer in host]
    host[1].register_load_state_dict_pre_hook(lambda module, *args: calls.append(module))
    network = norms.convert(host, scheme("mabn"))
    network.load_state_dict(network.state_dict())
    assert calls == [network[1]]
    for handle in handles:
        handle.remove()
    network(torch.randn(2, 3, 7, 7))
    assert calls == [network[1]]


def test_hooks_of_a_norm_with_activation_see_what_it_activated():
    host, seen = Activated(), []
    host[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(2, 3, 9, 9)
    host.eval()(x)
    norms.convert(host, norms.build("bn"))(x)
    torch.testing.assert_close(*seen)


def test_a_wrapped_network_is_refused():
    """Which would not know new parameters."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(pair())
        with pytest.raises(ValueError, match=r"^DistributedDataParallel: .* before it is wrapped$"):
            norms.convert(wrapped, scheme("pws"))
    finally:
        torch.distributed.destroy_process_group()
    norms.convert(nn.DataParallel(pair()), scheme("pws"))  # which looks anew each time


def test_lists_of_layers_have_the_new_ones():
    """As detectron2's pyramids, which keep their convolutions in a list in reverse as well."""

    class Net(nn.Sequential):
        def forward(self, x):
            return self.last[0](self.ends["norm"](self.layers[0](x)))

    host = Net(*pair(bias=True))
    host.layers, host.ends, host.last = list(host), {"norm": host[1]}, (host[2],)
    with pytest.raises(ValueError, match=r"norm=evonorm_b0: is norm and activation in one"):
        norms.convert(host, norms.build("evonorm_b0"))
    assert host.layers == list(host)
    norms.convert(host, scheme("mabn"))
    assert host.layers == list(host)
    assert host.ends["norm"] is host[1]
    assert type(host[1]) is norms.MABN2d
