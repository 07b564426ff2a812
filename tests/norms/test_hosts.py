"""Networks that other people build, of one to three dimensions: each is converted, trained two
steps of two images, folded, and the folded one compared with it in evaluation."""

import copy
import functools
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation, video

import norms


class Twice(nn.Sequential):
    """Two convolutions, each with its norm: (N, cin, *) -> (N, cout, *)."""

    def __init__(self, conv, norm, cin, cout):
        super().__init__(
            conv(cin, cout, 3, padding=1, bias=False), norm(cout), nn.ReLU(inplace=True),
            conv(cout, cout, 3, padding=1), norm(cout), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet3d(nn.Module):
    """Two levels, a transposed convolution on the way up; (N, 1, D, H, W) to (N, 2, D, H, W)."""

    def __init__(self, norm_up=False):
        super().__init__()
        self.down = Twice(nn.Conv3d, nn.BatchNorm3d, 1, 8)
        self.bottom = Twice(nn.Conv3d, nn.BatchNorm3d, 8, 16)
        self.up = nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.norm_up = nn.BatchNorm3d(8) if norm_up else nn.Identity()
        self.join = Twice(nn.Conv3d, nn.BatchNorm3d, 16, 8)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        y = self.bottom(nn.functional.max_pool3d(skip, 2))
        return self.head(self.join(torch.cat([skip, self.norm_up(self.up(y))], 1)))


class Sound(nn.Module):
    """A waveform's classes; its last batch norm is of features, not maps: (N, 1, L) to (N, 3)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=4, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Conv1d(16, 16, 3, groups=16, padding=1), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        )  # fmt: skip
        self.embed, self.norm = nn.Linear(32, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.embed(self.features(x).flatten(1))))


def detector(make):
    """Tiny images, and batch norms instead of the frozen ones of a pretrained backbone."""
    return make(
        weights=None, weights_backbone=None, num_classes=3, norm_layer=nn.BatchNorm2d,
        min_size=64, max_size=64,
    )  # fmt: skip


def segmenter(name):
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


IMAGES, MOVIES = (3, 64, 64), (3, 4, 32, 32)
HOSTS = {  # how it is made, and its input
    "unet 3d": (UNet3d, (1, 8, 8, 8)),
    "audio 1d": (Sound, (1, 400)),
    "r3d_18": (functools.partial(video.r3d_18, weights=None, num_classes=3), MOVIES),
    "maskrcnn": (functools.partial(detector, detection.maskrcnn_resnet50_fpn), IMAGES),
    "retinanet": (functools.partial(detector, detection.retinanet_resnet50_fpn), IMAGES),
    "deeplabv3": (functools.partial(segmenter, "deeplabv3_resnet50"), IMAGES),
    "fcn": (functools.partial(segmenter, "fcn_resnet50"), IMAGES),
    "lraspp": (functools.partial(segmenter, "lraspp_mobilenet_v3_large"), IMAGES),
    "timm features": (
        functools.partial(timm.create_model, "regnetx_002", features_only=True), IMAGES,
    ),
}  # fmt: skip


@functools.cache
def host(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about what is pretrained
        return HOSTS[name][0]()


def loss(network, x):
    """Of whatever it returns; a detector wants to know what is to be seen."""
    if isinstance(network, detection.generalized_rcnn.GeneralizedRCNN | detection.RetinaNet):
        boxes, labels = torch.tensor([[5.0, 5.0, 40.0, 40.0]]), torch.tensor([1])
        masks = torch.ones(1, 64, 64, dtype=torch.uint8)
        return sum(network(list(x), [dict(boxes=boxes, labels=labels, masks=masks)] * 2).values())
    y = network(x)
    parts = y.values() if isinstance(y, dict) else y if isinstance(y, list) else [y]
    return sum(part.square().mean() for part in parts)


def outputs(network, x):
    """Of the part of a detector that has norms, before it picks boxes."""
    y = getattr(network, "backbone", network)(x)
    return list(y.values()) if isinstance(y, dict) else y if isinstance(y, list) else [y]


@pytest.mark.filterwarnings("ignore:fold. .*RCNN cannot be traced")
@pytest.mark.filterwarnings("ignore:fold. RetinaNet cannot be traced")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, scheme) for name in HOSTS for scheme in ("mabn", "bcn")]
    + [(name, "ws_gn") for name in ("unet 3d", "audio 1d", "lraspp")],  # bcn has its weights
)
def test_hosts(name, scheme):
    network = copy.deepcopy(host(name))
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)  # made before
    options = {} if scheme == "mabn" else {"groups": 8}
    built = norms.build(scheme, batch_size=2, **options)
    report = norms.conversion(network, built)
    assert report.apply() is network
    kind = type(built.norm(8))
    swapped = [m for m in network.modules() if type(m) is kind]
    assert swapped
    left = [m for m in network.modules() if type(m).__name__.startswith("BatchNorm")]
    assert len(left) == (name == "audio 1d")  # features are no maps
    assert f"{len(swapped)} x BatchNorm" in str(report)
    x = torch.rand(2, *HOSTS[name][1])
    before = [p.clone() for p in network.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(network.train(), x)
        value.backward()
        optimizer.step()
        assert value.isfinite()
    names = {n for n, p in network.named_parameters()}
    moved = {
        n for (n, p), old in zip(network.named_parameters(), before, strict=True)
        if not torch.equal(p, old)
    }  # fmt: skip
    assert any(n.endswith("weight") for n in moved)
    assert moved <= names
    folded = norms.fold(network)
    network.eval()
    with torch.no_grad():
        for ours, exact in zip(outputs(folded, x), outputs(network, x), strict=True):
            assert (ours - exact).abs().max() <= 1e-3 * exact.abs().max()
    gone = [m for m in folded.modules() if type(m).__name__.startswith(("MABN", "BatchChannel"))]
    assert not gone
    assert not any(type(m).__name__.startswith(("WSConv", "Centered")) for m in folded.modules())


def test_a_norm_behind_a_transposed_convolution():
    """Of which no scheme standardizes the filters: refused where the method would be another."""
    for scheme in ("mabn", "pws"):
        network = UNet3d(norm_up=True)
        before = list(network.modules())
        with pytest.raises(ValueError, match=r"1 of 7 norms of UNet3d .*\(up: transposed, whose"):
            norms.convert(network, norms.build(scheme, batch_size=2))
        assert list(network.modules()) == before
    for scheme in ("bcn", "ws_gn"):
        with pytest.warns(UserWarning, match=r"norm=.*: 1 of 7 norms of UNet3d .*\(up: transposed"):
            norms.convert(UNet3d(norm_up=True), norms.build(scheme, batch_size=2, groups=8))
    network = norms.convert(UNet3d(norm_up=True), norms.build("bn", batch_size=2))
    assert type(network.norm_up) is norms.GhostBatchNorm2d
    report = norms.conversion(UNet3d(), norms.build("mabn", batch_size=2))
    assert report.left == {"up": "no norm follows it", "head": "no norm follows it"}


@pytest.mark.parametrize("name", ["frn", "evonorm_b0", "evonorm_s0"])
def test_timms_norms_are_of_images(name):
    network = UNet3d()
    with pytest.raises(ValueError, match=rf"norm={name} is of two-dimensional maps, .* have 3"):
        norms.convert(network, norms.build(name, batch_size=2))
    assert type(network.down[1]) is nn.BatchNorm3d


def test_a_pretrained_backbones_frozen_norms_are_named():
    network = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    with pytest.raises(ValueError, match=r"nothing to swap; it has 20 FrozenBatchNorm2d$"):
        norms.convert(network, norms.build("mabn", batch_size=2))
