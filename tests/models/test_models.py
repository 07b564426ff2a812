import pytest
import torch
import torchvision
from torch import nn

import models
import norms
from models.resnet import Block

PUBLISHED = {  # parameters: He et al. (CIFAR, 10 classes) and torchvision (ImageNet)
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
}
IMAGENET = [n for n in PUBLISHED if not n.endswith("cifar") and PUBLISHED[n] > 5e6]


def build(name, scheme="bn", classes=10, **options):
    return models.build(
        name, scheme=norms.build(scheme, batch_size=2), num_classes=classes, **options
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    model = build(name, classes=1000 if name in IMAGENET else 10)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_equals_torchvision(name):
    theirs = torchvision.models.get_model(name)
    ours = models.build(name, scheme=norms.build("bn"), num_classes=1000)
    ours.load_state_dict({k.replace("bn", "norm"): v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["resnet8", "resnet18_cifar", "resnet50"])
@pytest.mark.parametrize("scheme", norms.names())
def test_names_are_the_same_under_every_scheme(name, scheme):
    with torch.device("meta"):
        model, reference = build(name, scheme), build(name, "bn")

    def weights(m):
        return [n for n, p in m.named_parameters() if "conv" in n and n.endswith("weight")]

    assert weights(model) == weights(reference)
    assert [n for n, m in model.named_modules() if isinstance(m, Block)] == [
        n for n, m in reference.named_modules() if isinstance(m, Block)
    ]
    skeleton = ("conv1", "norm1", "pool", "norm", "fc")
    assert all(hasattr(model, n) for n in skeleton)


@pytest.mark.parametrize("scheme", norms.names())
@pytest.mark.parametrize(
    ("name", "block"),
    [
        *((name, block) for name in ("resnet8", "resnet50") for block in ("post", "pws", "pws_tf")),
        ("resnet18", "pws"),
        ("resnet18_cifar", "pws"),
    ],
)
def test_trains_under_every_scheme(name, scheme, block):
    images = 2 if scheme == "sync_bn" else 4  # which takes one batch at a time
    with torch.device("meta"):
        model = build(name, scheme, block=block)
    models.dry_run(model, (images, 3, 64, 64), 10)


def test_pws_keeps_a_norm_at_both_ends():
    model = build("resnet50", "pws")
    kept = [n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    assert kept == ["norm1", "norm"]
    assert all(m.num_groups == 1 for m in model.modules() if isinstance(m, nn.GroupNorm))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, norms.PWSConv2d) and m.bias is not None for m in convolutions)
    inner = [n for n, m in model.named_modules() if getattr(m, "inner", False)]
    assert all(n.endswith(("conv2", "conv3")) for n in inner)
    assert len(inner) == 2 * 16


def test_block_orders(as_default):
    """The orders by hand, with and without a shortcut that convolves."""
    x = torch.randn(2, 64, 8, 8)
    relu = torch.relu
    for order in ("post", "pws", "pws_tf"):
        model = models.build("resnet18_cifar", scheme=norms.build("bn"), num_classes=3, block=order)
        plain, down = model.layer1[0], model.layer2[0]

        def branch(b, x):
            return b.norm2(b.conv2(relu(b.norm1(b.conv1(x)))))

        if order == "post":
            expected = relu(branch(plain, x) + x), relu(branch(down, x) + down.downsample(x))
        else:
            r = relu(x / 2**0.5) if order == "pws_tf" else relu(x)
            expected = branch(plain, r) + x, branch(down, r) + down.downsample(r)
        torch.testing.assert_close(plain(x), expected[0])
        torch.testing.assert_close(down(x), expected[1])


@pytest.mark.parametrize("network", ["resnet18_cifar", "resnet18"])
@pytest.mark.parametrize("scheme", ["bn", "pws"])
@pytest.mark.parametrize("order", ["post", "pws", "pws_tf"])
def test_order_of_the_stem(order, scheme, network, as_default):
    """Convolution, norm, ReLU, pooling; the TensorFlow form alone has no ReLU there."""
    scheme = norms.build(scheme)
    model = models.build(network, scheme=scheme, num_classes=3, block=order)
    seen = []
    model.layer1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 16, 16)
    model(x)
    y = model.norm1(model.conv1(x))
    expected = y if order == "pws_tf" else torch.relu(y)
    if network == "resnet18":
        expected = torch.nn.functional.max_pool2d(expected, 3, 2, 1)
    torch.testing.assert_close(seen[0], expected)


def test_the_tensorflow_form_of_pws_has_no_norm_at_all(as_default):
    scheme = norms.build("pws", form="tensorflow")
    model = models.build("resnet8", scheme=scheme, num_classes=3)
    assert not any(isinstance(m, nn.GroupNorm) for m in model.modules())
    weight = model.layer3[0].conv2.weight
    assert weight.abs().max() <= (6 / (64 * 9)) ** 0.5  # uniform, of variance 2 / fan_in
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    x = torch.randn(2, 3, 8, 8)
    last = torch.relu(model.layer3(model.layer2(model.layer1(model.conv1(x)))) / 2**0.5)
    torch.testing.assert_close(model(x), model.fc(last.mean((2, 3))))


def test_a_norm_with_its_own_activation_stands_for_norm_and_relu(as_default):
    """Inside a branch and after the stem; the end of a branch has none, the sum has its ReLU."""
    model = models.build("resnet18_cifar", scheme=norms.build("frn"), num_classes=3)
    acts = {n for n, m in model.named_modules() if getattr(m, "apply_act", False)}
    norm_names = {n for n, m in model.named_modules() if hasattr(m, "apply_act")}
    assert acts == {n for n in norm_names if n.endswith("norm1")}
    nn.init.constant_(model.norm1.tau, -1.0)  # a ReLU behind it would cut at 0
    block = model.layer1[0]
    x = torch.randn(2, 64, 8, 8)
    branch = block.norm2(block.conv2(block.norm1(block.conv1(x))))
    torch.testing.assert_close(block(x), torch.relu(branch + x))
    stem = model.norm1(model.conv1(torch.randn(2, 3, 8, 8)))
    assert stem.min() < 0


def test_shortcut_without_parameters():
    block = build("resnet20").layer2[0]
    x = torch.randn(1, 16, 4, 4)
    y = block.downsample(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y[:, 16:].abs().sum() == 0


@pytest.mark.parametrize(
    ("scheme", "paper"),
    [("bn", False), ("gn", True), ("ws_gn", False), ("bcn", True), ("mabn", False), ("pws", False)],
)
@pytest.mark.parametrize("choice", ["auto", True, False])
def test_zero_init(scheme, paper, choice):
    model = build("resnet50", scheme, zero_init=choice)
    lasts = [m.norm3 for m in model.modules() if isinstance(m, Block)]
    zero = paper if choice == "auto" else choice
    for last in lasts:
        if scheme == "pws":
            assert isinstance(last, nn.Identity)  # nothing to set to zero, and nothing breaks
        else:
            assert (last.weight.abs().sum() == 0) == zero
        if scheme == "bcn":
            assert last.bn.weight.min() == 1  # the group affine is zero, not the batch norm's


def test_initial_variance():
    conv = build("resnet50").layer3[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert build("resnet50").fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="resnet21"), r"model.name=resnet21: unknown \(did you mean resnet"),
        (dict(name="resnet20", block="pre"), "model.block=pre: expected auto, post, pws, pws_tf"),
        (dict(name="resnet20", zero_init="yes"), "model.zero_init=yes: expected"),
        (dict(name="resnet19", library="timm"), "model.name=resnet19: unknown .did you mean"),
        (dict(name="resnet18", library="keras"), "model.library=keras: expected"),
        (dict(name="resnet18", library="timm", block="pws"), "model.block=pws: .* keeps its own"),
        (dict(name="resnet18", library="torchvision", in_channels=1), "take 3 channels"),
        (dict(name="convnext_tiny", library="torchvision"), "no batch norm"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(scheme=norms.build("bn"), num_classes=10, **arguments)


def test_rehearsal_finds_what_training_would():
    model = models.build("resnet18", scheme=norms.build("bn", batch_size=1), num_classes=10)
    with pytest.raises(ValueError, match="no variance"):
        models.dry_run(model, (2, 3, 8, 8), 10)
    model = build("googlenet", library="torchvision")
    with pytest.raises(ValueError, match="GoogLeNet returns GoogLeNetOutputs in training"):
        models.dry_run(model, (2, 3, 64, 64), 10)
