"""The folded network computes the same, and what can be folded is gone."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import models
import norms
from models.resnet import Bottleneck, ResNet

OPTIONS = {"gn": {"min_channels": 1}, "ws_gn": {"min_channels": 1}, "bcn": {"min_channels": 1}}
OPTIONS["evonorm_s0"] = {"min_channels": 1}
# Of the image itself: nothing to fold. (EvoNorms without activation are a scale and a shift.)
STAY = {"gn", "ln", "in", "ws_gn", "frn", "evonorm_s0", "evonorm_b0", "none"}


def trained(name, network, library=None, size=32, batch=2, **options):
    """A network whose running statistics and affine parameters are not those of its start."""
    scheme = norms.build(name, batch_size=batch, **OPTIONS.get(name, {}), **options)
    if network == "bottleneck" and name == "xbn":
        options["groups"] = 8
        scheme = norms.build(name, batch_size=batch, **options)
    if network == "bottleneck":
        model = ResNet(
            scheme, 5, 3, Bottleneck, (8, 16), (2, 1), "imagenet", False, scheme.block, False
        )
    else:
        model = models.build(network, scheme=scheme, num_classes=5, library=library)
    for layer in model.modules():  # the statistics of the last batches
        if hasattr(layer, "momentum") and not isinstance(layer, norms.MABN2d):
            layer.momentum = 0.5
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * (1 + p.abs())
        for _ in range(4):
            model(torch.randn(batch, 3, size, size))
    return model


def same(model, folded, size=32, tolerance=1e-9):
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected, y = model.eval()(x), folded(x)
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", norms.names())
@pytest.mark.parametrize("network", ["resnet8", "bottleneck"])
def test_fold(name, network, as_default):
    size = 64 if name == "in" else 32  # no maps of 1x1
    model = trained(name, network, size=size)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = norms.fold(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    same(model, folded, size, tolerance=1e-5 if "norm" in name or name == "frn" else 1e-9)
    layers = list(folded.modules())
    assert {type(m) for m in layers if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layers)
    left = [m for m in layers if type(m).__name__.endswith(("Norm", "Norm2d", "S0", "B0"))]
    if name not in STAY:
        groups = [type(m) for m in left]
        count = {"xbn": sum(type(m) is nn.GroupNorm for m in model.modules())}
        count |= {"pws": 2, "bcn": len([m for m in model.modules() if hasattr(m, "bn")])}
        assert groups == [nn.GroupNorm] * count.get(name, 0)


@pytest.mark.parametrize("name", ["bn", "brn", "mabn", "pws", "bcn", "ws_gn"])
@pytest.mark.parametrize(
    ("library", "network"),
    [
        ("torchvision", "mobilenet_v2"),
        ("timm", "efficientnet_lite0"),
        ("timm", "regnetx_002"),
    ],
)
def test_fold_converted(name, library, network):
    model = trained(name, network, library, 64)
    same(model, norms.fold(model), 64, tolerance=2e-3)  # float32: depthwise float64 is slow


def test_a_norm_ahead_of_its_convolution_becomes_a_batch_norm():
    model = trained("mabn", "densenet121", "torchvision")
    folded = norms.fold(model)
    block = folded.features.denseblock1.denselayer1
    assert type(block.norm1) is nn.BatchNorm2d  # of the input, which other layers use too
    assert type(block.norm2) is nn.Identity


def test_a_convolution_with_two_users_is_not_merged(as_default):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), norms.MABN2d(4, 2, warmup=0)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    model = Net()
    model(torch.randn(4, 3, 8, 8))
    folded = norms.fold(model)
    assert type(folded.norm) is nn.BatchNorm2d
    same(model, folded, 8)


def test_a_network_that_cannot_be_traced_is_told(as_default):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = norms.CenteredConv2d(3, 4, 3), norms.MABN2d(4, 2)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return x if x.sum() > 0 else -x

    model = Net()
    with pytest.warns(UserWarning, match="Net cannot be traced"):
        folded = norms.fold(model)
    assert type(folded.conv) is nn.Conv2d
    assert type(folded.norm) is nn.BatchNorm2d
    same(model, folded, 8)


def test_fold_plain_and_single_layers(as_default):
    plain = torchvision.models.resnet18()
    plain(torch.randn(2, 3, 32, 32))
    folded = norms.fold(plain)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    same(plain, folded)
    layer = norms.build("brn", batch_size=2).norm(3)
    layer(torch.randn(2, 3, 4, 4))
    assert type(norms.fold(layer)) is nn.BatchNorm2d
    same(layer, norms.fold(layer), 4)
    assert type(norms.fold(norms.PWSConv2d(3, 4, 3))) is nn.Conv2d
    half = norms.fold(trained("mabn", "resnet8").to(torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_what_somebody_added_to_a_layer_is_not_lost(as_default):
    def doubled(module, inputs, output):
        return 2 * output

    hooked = nn.Sequential(nn.Conv2d(3, 4, 3), norms.MABN2d(4, 2, warmup=0))
    hooked[0].register_forward_hook(doubled)
    weights = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    shared = nn.Conv2d(4, 4, 3, padding=1)
    norm = norms.MABN2d(4, 2, warmup=0)
    for model in (hooked, nn.Sequential(weights, nn.BatchNorm2d(4)),
                  nn.Sequential(nn.Conv2d(3, 4, 3), shared, norm, shared, norm)):  # fmt: skip
        for _ in range(3):
            model(torch.randn(4, 3, 8, 8))
        same(model, norms.fold(model), 8)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", ["mabn", "brn", "bn", "bcn", "sync_bn"])
def test_a_layer_of_ones_own_network_folds_by_its_number_of_dimensions(name, dim):
    """Not put there by `convert`, and without a convolution to go into."""
    norm, conv = norms.build(name, batch_size=4).norm(6), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    net = nn.Sequential(norm, nn.ReLU(), conv(6, 6, 1))
    x = torch.randn(4, 6, *(4 for _ in range(dim)))
    net(x)
    with torch.no_grad():
        torch.testing.assert_close(norms.fold(net)(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_features_behind_a_linear_layer(as_default):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net(torch.randn(8, 3) + 2)
    folded, x = norms.fold(net), torch.randn(8, 3)
    torch.testing.assert_close(folded(x), net.eval()(x))


# --- What cannot be shown to compute the same


class Pair(nn.Module):
    """A convolution and the norm behind it, in evaluation, with statistics that are not 0 and 1."""

    def __init__(self, conv=None, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.norm(torch.randn(4, 4, 5, 5) * 3 + 2)
        self.eval()

    def forward(self, x):
        return self.norm(self.conv(x))


class WeightsRead(Pair):
    def forward(self, x):
        return super().forward(x) + nn.functional.conv2d(x, self.conv.weight, padding=1)


class Elsewhere(nn.Module):
    """Without children, and yet with another module's convolution."""

    def __init__(self, conv):
        super().__init__()
        self.held = (conv,)

    def forward(self, x):
        return self.held[0](x)


class CalledElsewhere(Pair):
    def __init__(self):
        super().__init__()
        self.other = Elsewhere(self.conv)

    def forward(self, x):
        return super().forward(x) + self.other(x)


class InHookedBlock(Pair):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.conv, nn.ReLU())
        self.block.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x):
        return super().forward(x) + self.block(x)


class FromList(Pair):
    """Through a list of its own, which is no `nn.ModuleList`."""

    def __init__(self):
        super().__init__()
        self.layers = [self.conv]

    def forward(self, x):
        return self.norm(self.layers[0](x))


class OfTensors(Pair):
    def forward(self, x):
        y = super().forward(x)
        return y + self.conv(x) if isinstance(x, torch.Tensor) else y


class Tripled(nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


class TripledMABN(norms.MABN2d):
    def forward(self, x):
        return 3 * super().forward(x)


class Patched(Pair):
    def __init__(self):
        super().__init__()
        self.norm.forward = lambda x: 3 * x


class Folds(Pair):
    def __init__(self):
        super().__init__()
        self.fold = nn.Fold((8, 8), (1, 1))

    def forward(self, x):
        return self.fold(super().forward(x).flatten(2))


MERGED = {FromList, Folds}
SILENT = {*MERGED, CalledElsewhere, InHookedBlock, OfTensors}  # two uses of a layer are no surprise
HARD = {
    "weights of a standardized convolution": lambda: WeightsRead(
        norms.CenteredConv2d(4, 4, 3, padding=1)
    ),
    "standardized by timm": lambda: Pair(timm.layers.StdConv2d(4, 4, 3, padding=1)),
    "scaled by timm": lambda: Pair(timm.layers.ScaledStdConv2d(4, 4, 3, padding=1)),
    "a norm's subclass": lambda: Pair(norm=Tripled(4)),
    "our subclass": lambda: Pair(norm=TripledMABN(4)),
} | {
    cls.__name__: cls
    for cls in (
        WeightsRead, CalledElsewhere, InHookedBlock, FromList, OfTensors, Patched, Folds
    )
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_what_cannot_be_shown_stays(name, as_default):
    network = HARD[name]()
    if type(network) in SILENT:
        folded = norms.fold(network)
    else:
        with pytest.warns(UserWarning, match=r"^fold: not merged into convolutions: 1 \(norm: "):
            folded = norms.fold(network)
    assert isinstance(folded.norm, nn.Identity) == (type(network) in MERGED)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(folded(x), network(x))


def test_an_output_that_is_kept_is_not_merged(as_default):
    class Keeps(Pair):
        def forward(self, x):
            self.features = self.conv(x)
            return self.norm(self.features)

    network, x = Keeps(), torch.randn(2, 4, 8, 8)
    with pytest.warns(UserWarning, match="an output of the convolution that is kept"):
        folded = norms.fold(network)
    torch.testing.assert_close(folded(x), network(x))
    torch.testing.assert_close(folded.features, network.features)


def test_an_error_that_a_network_goes_on_after_is_told(as_default):
    class TriesToBranch(Pair):
        def forward(self, x):
            try:
                if x.sum() < 1e9:
                    return super().forward(x) + self.conv(x)
            except Exception:
                pass
            return super().forward(x)

    x = torch.randn(2, 4, 8, 8)
    with pytest.warns(UserWarning, match="TriesToBranch cannot be traced"):
        folded = norms.fold(TriesToBranch())
    torch.testing.assert_close(folded(x), TriesToBranch()(x))
