"""Each layer equals its literal float64 form: forward, gradients and state over several steps."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from norms import (
    BatchChannelNorm2d,
    BatchRenorm2d,
    CenteredConv2d,
    EstimatedBatchNorm2d,
    GhostBatchNorm2d,
    MABN2d,
    OnlineNorm2d,
    PowerNorm2d,
    PWSConv2d,
    WSConv2d,
    build,
    fold,
    names,
)
from norms.gn import fit_groups
from norms.moments import moving_average
from norms.nf import ScaledWSConv2d
from tests.norms import literal

pytestmark = pytest.mark.usefixtures("as_default")


CUSTOM = ("mabn", "online", "powernorm")  # whose gradient is their own


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def randomize(layer: nn.Module) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + 1)


def compare(layer, reference, groups, size, channels, steps, maps=(3, 5), tolerance=1e-9):
    """`steps` training steps of `groups` batches at once against the literal form, one by one."""

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    randomize(layer)
    for _ in range(steps):
        x = torch.randn(groups * size, channels, *maps) * 2 + 0.5
        dy = torch.randn_like(x)
        x1 = x.clone().requires_grad_()
        layer.zero_grad()
        y1 = layer(x1)
        y1.backward(dy)
        parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        x2 = x.clone().requires_grad_()
        y2 = torch.cat([reference(part, *parameters) for part in x2.split(size)])
        y2.backward(dy)
        close(y1, y2)
        close(x1.grad, x2.grad)
        for p1, p2 in zip(layer.parameters(), parameters, strict=True):
            if p1.requires_grad:
                close(p1.grad, p2.grad)


def test_the_average_of_one_group_is_one_operation():
    """And two views: at batch = batch size a GPU waits for small operations."""
    operations = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function)
            return function(*args, **kwargs or {})

    start, values, count = torch.randn(3), torch.randn(1, 3), torch.tensor(7)
    with Count():
        before, after = moving_average(1, 0.1, count)(start, values)
    assert len(operations) <= 3
    close(before[0], start)
    close(after, 0.9 * start + 0.1 * values)


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 5), size=st.integers(1, 4), channels=st.integers(1, 5))
def test_bn(groups, size, channels):
    layer = GhostBatchNorm2d(channels, size)
    reference = literal.BN(channels)
    compare(layer, reference, groups, size, channels, steps=3)
    close(layer.running_mean, reference.mean)
    close(layer.running_var, reference.var)
    assert layer.num_batches_tracked == 3 * groups
    x = torch.randn(3, channels, 2, 2)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


def test_bn_of_one_batch_is_pytorchs():
    ours, theirs = GhostBatchNorm2d(6), nn.BatchNorm2d(6)
    x = torch.randn(4, 6, 3, 3)
    assert torch.equal(ours(x), theirs(x))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 3),
    channel_groups=st.integers(1, 3),
    width=st.integers(1, 3),
    rate=st.sampled_from([None, 0.0, 0.01, 1.0]),
)
def test_bcn(groups, size, channel_groups, width, rate):
    channels = channel_groups * width
    layer = BatchChannelNorm2d(channels, channel_groups, size, rate=rate)
    bn = literal.BN(channels) if rate is None else literal.EstBN(channels, rate)

    def reference(x, weight, bias, bn_weight, bn_bias):
        return literal.channel_norm(bn(x, bn_weight, bn_bias), channel_groups, weight, bias)

    compare(layer, reference, groups, size, channels, steps=3)
    close(layer.bn.running_mean, bn.mean)
    close(layer.bn.running_var, bn.var)
    x = torch.randn(2, channels, 3, 3)
    z = bn.evaluate(x, layer.bn.weight, layer.bn.bias)
    close(layer.eval()(x), literal.channel_norm(z, channel_groups, layer.weight, layer.bias))


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 5), size=st.integers(1, 4), rate=st.floats(0.0, 1.0))
def test_estimated_bn(groups, size, rate):
    layer = EstimatedBatchNorm2d(4, rate, size)
    reference = literal.EstBN(4, rate)
    compare(layer, reference, groups, size, 4, steps=3)
    close(layer.running_mean, reference.mean)
    close(layer.running_var, reference.var)
    x = torch.randn(3, 4, 2, 2)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 4),
    per_step=st.integers(1, 6),
    fixed=st.booleans(),
    start=st.integers(0, 4),
)
def test_brn(groups, size, per_step, fixed, start):
    bounds = dict(r_max=1.5, d_max=0.5, start=start, r_until=start + 9, d_until=start + 4)
    layer = BatchRenorm2d(3, size, per_step, **bounds, fixed_weight=fixed, momentum=0.2)
    reference = literal.BRN(3, **bounds, momentum=0.2)
    reference.batches_per_step = per_step
    compare(layer, reference, groups, size, 3, steps=5)
    close(layer.moving_mean, reference.mean)
    close(layer.moving_std, reference.std)
    assert layer.num_batches_renormalized == reference.batches == 5 * groups
    x = torch.randn(3, 3, 2, 2)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


def test_brn_is_batch_norm_before_its_schedule_starts():
    ours, theirs = BatchRenorm2d(4, 2, fixed_weight=False), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3)
    close(ours(x), theirs(x))


@settings(max_examples=20, deadline=None)
@given(
    groups=st.integers(1, 5),
    size=st.integers(1, 5),
    real=st.sampled_from([1, 4, 7, 16]),
    warmup=st.integers(0, 12),
)
def test_mabn_windows(groups, size, real, warmup):
    check_mabn(groups, size, real, warmup, steps=6, start=0)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_mabn_clipping_starts_after_a_thousand_batches(groups):
    check_mabn(groups, 2, 16, 100, steps=6, start=1000 - 2 * groups - 1)


@pytest.mark.parametrize("start", [92, 97])
def test_mabn_leaves_its_warmup(start):
    check_mabn(4, 2, 8, 100, steps=4, start=start)


def check_mabn(groups, size, real, warmup, steps, start):
    channels = 3
    window = max(1, -(-real // size))
    layer = MABN2d(channels, size, real, momentum=0.9, warmup=warmup)
    assert layer.window_square.shape[0] == window
    reference = literal.MABN(channels, window, momentum=0.9, warmup=warmup)
    randomize(layer)
    layer.num_batches_averaged.fill_(start)
    reference.iteration = start
    for _ in range(steps):
        x = torch.randn(groups * size, channels, 3, 2) * torch.rand(groups * size, 1, 1, 1) * 9
        dy = torch.randn_like(x)
        x1 = x.clone().requires_grad_()
        layer.zero_grad()
        y1 = layer(x1)
        y1.backward(dy)
        forward, backward = [], []
        with torch.no_grad():
            for part, grad in zip(x.split(size), dy.split(size), strict=True):
                forward.append(reference.forward(part, layer.weight, layer.bias))
                backward.append(reference.backward(grad))
        dx, dweight, dbias = zip(*backward, strict=True)
        close(y1, torch.cat(forward))
        close(x1.grad, torch.cat(dx))
        close(layer.weight.grad, sum(dweight))
        close(layer.bias.grad, sum(dbias))
    close(layer.running_square, reference.running)
    assert layer.num_batches_averaged == start + steps * groups
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


@settings(max_examples=30, deadline=None)
@given(
    passes=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 3),
    real=st.sampled_from([1, 4, 7, 16]),
    warmup=st.integers(0, 5),
)
def test_mabn_imagenet_version(passes, groups, size, real, warmup):
    """A step in one forward pass or in several, against the authors' step by step form."""
    check_mabn_imagenet(passes, groups, size, real, warmup)


def test_mabn_imagenet_version_as_its_authors_ran_it():
    """Batches of 2, 32 images a step and a window of 16: after the first step it is always full."""
    check_mabn_imagenet(passes=1, groups=16, size=2, real=32, warmup=3)


def check_mabn_imagenet(passes, groups, size, real, warmup):
    channels, window = 3, max(1, -(-real // size))
    options = dict(momentum=0.9, warmup=warmup)
    layer = MABN2d(
        channels, size, real, **options, version="imagenet", batches_per_step=passes * groups
    )
    reference = literal.MABNImageNet(channels, window, **options)
    randomize(layer)
    for _ in range(6):
        x = torch.randn(passes * groups * size, channels, 3, 2) * torch.rand(1) * 4
        dy = torch.randn_like(x)
        layer.zero_grad()
        ys, dxs = [], []
        for part, grad in zip(x.split(groups * size), dy.split(groups * size), strict=True):
            part = part.clone().requires_grad_()
            y = layer(part)
            y.backward(grad)
            ys.append(y)
            dxs.append(part.grad)
        with torch.no_grad():
            expected = reference.step(x.split(size), dy.split(size), layer.weight, layer.bias)
            y, dx, dweight, dbias = expected
        close(torch.cat(ys), torch.cat(y))
        close(torch.cat(dxs), torch.cat(dx))
        close(layer.weight.grad, sum(dweight))
        close(layer.bias.grad, sum(dbias))
        close(layer.running_square, reference.running)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


def test_mabn_imagenet_version_takes_each_pass_for_a_step_where_nothing_else_is_said():
    free, told = (
        MABN2d(2, 2, 4, version="imagenet", batches_per_step=b).eval().train() for b in (None, 3)
    )
    for _ in range(3):
        x = torch.randn(6, 2, 2, 2)
        close(free(x), told(x))


def test_mabn_imagenet_version_goes_on_after_an_incomplete_step():
    """As when a loader does not drop its last images."""
    for per_step in (None, 4):
        layer = MABN2d(2, 2, 4, version="imagenet", batches_per_step=per_step)
        for images in (8, 4, 8, 8, 8):
            before = layer.running_square.clone()
            layer(torch.randn(images, 2, 2, 2))
        assert not torch.equal(layer.running_square, before)
        assert layer.num_steps == (5 if per_step is None else 4)


def test_mabn_clips_its_renormalization():
    layer = MABN2d(1, 2, 2, warmup=0)
    layer.num_batches_averaged.fill_(5000)
    layer.running_square.fill_(1e-4)
    y = layer(torch.full((2, 1, 4, 4), 3.0))
    close(y, torch.full_like(y, 5.0) * 3 / (9 + 1e-5) ** 0.5)


def by_hand(layer, reference, batches, size, maps=(3, 2)):
    """A training step of several batches at once against a literal form that takes them one by one,
    both directions by hand; `batches` of `size` images."""
    x = torch.randn(batches * size, layer.num_features, *maps) * torch.rand(1) * 4 + 1
    dy = torch.randn_like(x)
    x1 = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x1)
    y.backward(dy)
    results = []
    with torch.no_grad():
        for part, grad in zip(x.split(size), dy.split(size), strict=True):
            forward = reference.forward(part, layer.weight, layer.bias)
            results.append((forward, *reference.backward(grad)))
    ys, dxs, dweights, dbiases = zip(*results, strict=True)
    close(y, torch.cat(ys))
    close(x1.grad, torch.cat(dxs))
    close(layer.weight.grad, sum(dweights))
    close(layer.bias.grad, sum(dbiases))


@settings(max_examples=25, deadline=None)
@given(
    batches=st.integers(1, 3),
    size=st.integers(1, 4),
    maps=st.sampled_from([(3, 2), (1, 1)]),
    a=st.sampled_from([0.5, 0.9, 0.999]),
    b=st.sampled_from([0.5, 0.99]),
)
def test_online(batches, size, maps, a, b):
    layer, reference = OnlineNorm2d(3, a, b, compensation="none"), literal.Online(3, a, b)
    randomize(layer)
    for _ in range(4):
        by_hand(layer, reference, batches, size, maps)
    close(layer.running_mean, reference.mean)
    close(layer.running_var, reference.var)
    close(layer.gradient_mean, reference.u)
    close(layer.gradient_product, reference.w)
    x = torch.randn(3, 3, 2, 2)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


@pytest.mark.parametrize("compensation", ["layer_scaling", "clamp"])
def test_online_compensation(compensation):
    """The function behind the norm, whose gradient goes into the norm's; the clamp has none where
    it clamps."""
    norm, plain = (OnlineNorm2d(3, 0.9, 0.8, compensation=c) for c in (compensation, "none"))
    x = (torch.randn(5, 3, 4, 4) * 4).requires_grad_()
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(norm(x), x, dy)
    y = plain(x)
    exact = literal.layer_scaling(y) if compensation == "layer_scaling" else y.clamp(-5, 5)
    close(
        norm.eval()(x),
        (literal.layer_scaling if compensation == "layer_scaling" else (lambda y: y.clamp(-5, 5)))(
            plain.eval()(x)
        ),
    )
    (expected,) = torch.autograd.grad(exact, x, dy)
    close(dx, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("compensation", ["layer_scaling", "clamp", "none"])
def test_online_in_pytorchs_own_tools(compensation):
    """Its compensation is not lost in a convolution; a folded network is scripted."""
    made = build("online", compensation=compensation)
    net, x = nn.Sequential(made.conv(4, 6, 3), made.norm(6)), torch.randn(2, 4, 5, 5)
    net(x)
    expected = net.eval()(x)
    close(torch.jit.script(fold(net))(x), expected)
    if compensation == "none":
        close(fuse_conv_bn_eval(*net)(x), expected)
    else:
        with pytest.raises(ValueError, match=r"^OnlineNorm2d: a convolution cannot take its"):
            fuse_conv_bn_eval(*net)


def test_online_is_a_stream():
    """Passes of any number of images give what single images give."""
    one, many = OnlineNorm2d(3), OnlineNorm2d(3)
    x, dy = torch.randn(2, 6, 3, 4, 4)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    many(x1).backward(dy)
    for t in range(6):
        one(x2[t : t + 1]).backward(dy[t : t + 1])
    close(x1.grad, x2.grad)
    for a, b in zip(one.buffers(), many.buffers(), strict=True):
        close(a, b)


@settings(max_examples=25, deadline=None)
@given(batches=st.integers(1, 4), size=st.integers(1, 3), warmup=st.integers(0, 9))
def test_powernorm(batches, size, warmup):
    layer = PowerNorm2d(3, size, 0.8, 0.7, warmup)
    reference = literal.PowerNorm(3, 0.8, 0.7, warmup)
    randomize(layer)
    for _ in range(4):
        by_hand(layer, reference, batches, size)
    close(layer.running_square, reference.running)
    close(layer.gradient_product, reference.gamma)
    x = torch.randn(3, 3, 2, 2)
    close(layer.eval()(x), reference.evaluate(x, layer.weight, layer.bias))


@settings(max_examples=25, deadline=None)
@given(
    batches=st.integers(1, 4),
    size=st.integers(1, 3),
    window=st.integers(1, 5),
    burn_in=st.integers(0, 4),
    groups=st.sampled_from([1, 2]),
)
def test_cbn(batches, size, window, burn_in, groups):
    """With the convolution ahead of it, whose weights change after every pass."""
    options = dict(stride=2, padding=1, groups=groups)
    made = build("cbn", batch_size=size, window=window, burn_in=burn_in)
    net = nn.Sequential(made.conv(4, 6, 3, **options), made.norm(6))
    made.finish(net)
    reference = literal.CBN(6, window, burn_in)
    randomize(net)
    for _ in range(4):
        x = torch.randn(batches * size, 4, 7, 6)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        net.zero_grad()
        y1 = net(x1)
        dy = torch.randn_like(y1)
        y1.backward(dy)
        parameters = [p.detach().clone().requires_grad_() for p in net.parameters()]
        y2 = torch.cat([reference(part, *parameters, **options) for part in x2.split(size)])
        y2.backward(dy)
        close(y1, y2)
        close(x1.grad, x2.grad)
        for p, q in zip(net.parameters(), parameters, strict=True):
            close(p.grad, q.grad)
        with torch.no_grad():
            net[0].weight.add_(torch.randn_like(net[0].weight) / 10)
    close(net[1].running_mean, reference.mean)
    close(net[1].running_var, reference.var)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(padding=1, padding_mode="circular", stride=2),
        dict(padding=2, padding_mode="reflect", dilation=2),
        dict(padding=1, padding_mode="replicate", groups=2),
        dict(padding="same", padding_mode="circular"),
        dict(padding="same", dilation=2),
        dict(padding="valid"),
    ],
)
def test_cbn_sees_what_its_convolution_saw(options, dim):
    """However that pads: of the same image the compensated mean is exact."""
    made = build("cbn", batch_size=2, window=2, burn_in=0)
    net = nn.Sequential(made.conv(4, 6, 3, dim=dim, **options), made.norm(6))
    made.finish(net)
    x = torch.randn(2, 4, *(7, 6)[:dim]) + 1
    net(x)
    with torch.no_grad():
        net[0].weight.add_(torch.randn_like(net[0].weight))
    y = net[0](x)
    mean = y.transpose(0, 1).flatten(1).mean(1)
    close(net[1].look_back(y, mean[None], torch.ones(1, 6))[0][0, 0], mean)


def test_cbn_knows_no_bias_of_its_convolution():
    """One that moves is in no statistic, as in batch norm's."""
    made = build("cbn", batch_size=2, window=3, burn_in=0)
    net, other = (nn.Sequential(made.conv(4, 6, 3), made.norm(6)) for _ in range(2))
    other.load_state_dict(net.state_dict())
    for part in (net, other):
        made.finish(part)
    net[0].bias = nn.Parameter(torch.randn(6))
    for _ in range(4):
        x = torch.randn(4, 4, 7, 6)
        close(net(x), other(x))
        net[0].bias.data += torch.randn(6)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_cbn_sees_old_images_with_the_weights_of_today(size):
    """Of the same image the compensated mean is exact, the mean square to second order."""
    made = build("cbn", batch_size=2, window=2, burn_in=0)
    net = nn.Sequential(made.conv(4, 6, 3), made.norm(6))
    made.finish(net)
    x = torch.randn(2, 4, 7, 6)
    net(x)
    with torch.no_grad():
        net[0].weight.add_(torch.randn_like(net[0].weight) * size)
    y = net[0](x)
    past, var, _ = net[1].look_back(y, y.mean((0, 2, 3))[None], y.var((0, 2, 3))[None])
    close(past[0, 0], y.mean((0, 2, 3)))
    square = var[0, 0] + past[0, 0] ** 2
    assert (square - y.square().mean((0, 2, 3))).abs().max() < 200 * size**2


@pytest.mark.parametrize(("kept", "asked"), [(3, 5), (5, 3), (4, 1)])
def test_a_window_of_cbn_of_another_length(kept, asked):
    def network(window):
        made = build("cbn", batch_size=2, window=window, burn_in=0)
        net = nn.Sequential(made.conv(4, 6, 3), made.norm(6))
        made.finish(net)
        return net

    net, other = network(kept), network(asked)
    for _ in range(6):
        net(torch.randn(2, 4, 7, 6))
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    old, new = net[1].past_mean, other[1].past_mean
    same = min(kept, asked) - 1
    close(new[len(new) - same :], old[len(old) - same :])
    assert (new[: len(new) - same] == old[:1]).all()
    assert other(torch.randn(2, 4, 7, 6)).isfinite().all()


def test_cbn_needs_its_convolution():
    made = build("cbn", batch_size=2)
    with pytest.raises(ValueError, match=r"^norm=cbn: no convolution of 6 channels ahead of it"):
        made.finish(nn.Sequential(nn.Conv2d(4, 6, 3), made.norm(6)))
    net = nn.Sequential(made.conv(4, 6, 3), nn.MaxPool2d(2), made.norm(6))
    made.finish(net)
    with pytest.raises(ValueError, match=r"^norm=cbn: .* another layer stands between"):
        net(torch.randn(2, 4, 7, 6))


CONVS = {
    "ws": (WSConv2d, lambda w: literal.standardize(w, True, 1e-5, False)),
    "ws_inside": (
        lambda *a, **k: WSConv2d(*a, eps_inside=True, **k),
        lambda w: literal.standardize(w, True, 1e-5, True),
    ),
    "ws_paper": (
        lambda *a, **k: WSConv2d(*a, unbiased=False, eps_inside=True, **k),
        lambda w: literal.standardize(w, False, 1e-5, True),
    ),
    "ws_biased": (
        lambda *a, **k: WSConv2d(*a, unbiased=False, eps_inside=True, eps=1e-6, **k),
        lambda w: literal.standardize(w, False, 1e-6, True),
    ),
    "nf": (ScaledWSConv2d, lambda w: literal.scaled_standardize(w, torch.ones(len(w)))),
    "centered": (CenteredConv2d, literal.center),
}
SHAPES = [
    dict(in_channels=4, out_channels=6, kernel_size=3, padding=1),
    dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, dilation=2, bias=False),
    dict(in_channels=4, out_channels=8, kernel_size=(1, 3), groups=2),
    dict(in_channels=4, out_channels=4, kernel_size=3, groups=4, bias=False),
    dict(in_channels=5, out_channels=3, kernel_size=1),
]


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("shape", SHAPES)
def test_conv(kind, shape):
    make, weights = CONVS[kind]
    layer = make(**shape)
    randomize(layer)
    if kind == "nf":
        nn.init.ones_(layer.gain)
    x = torch.randn(2, shape["in_channels"], 7, 6, requires_grad=True)
    weight = layer.weight.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    options = {k: v for k, v in shape.items() if k in ("stride", "padding", "dilation", "groups")}
    close_conv(layer, x, literal.conv(x, weights(weight), bias, **options), weight, bias)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("equiv", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_pws_conv(shape, mode, equiv):
    layer = PWSConv2d(**shape, gamma=0.01, equiv=equiv, mode=mode)
    out, cin, *kernel = layer.weight.shape
    fan = (cin if mode == "fan_in" else out) * kernel[0] * kernel[1]
    gamma = 0.01 * 2 / fan if equiv else 0.01
    randomize(layer)
    x = torch.randn(2, shape["in_channels"], 7, 6, requires_grad=True)
    weight, alpha = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.alpha))
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    options = {k: v for k, v in shape.items() if k in ("stride", "padding", "dilation", "groups")}
    y = literal.conv(x, literal.pws_weight(weight, alpha, gamma, fan), bias, **options)
    close_conv(layer, x, y, weight, bias)
    close(layer.alpha.grad, alpha.grad)


def close_conv(layer, x, expected, weight, bias):
    dy = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(expected, x, dy, retain_graph=True)
    expected.backward(dy)
    x.grad = None
    y = layer(x)
    y.backward(dy)
    close(y, expected)
    close(x.grad, dx)
    close(layer.weight.grad, weight.grad)
    if bias is not None:
        close(layer.bias.grad, bias.grad)


@pytest.mark.parametrize("make", [WSConv2d, PWSConv2d, CenteredConv2d])
def test_conv_gradcheck(make):
    layer = make(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


GRADCHECKED = {
    "bn": {},
    "bcn": {"statistics": "batch"},
    "gn": {"groups": 2},
    "ln": {},
    "in": {},
    "sync_bn": {},
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_norm_gradcheck(name):
    """Those whose gradient is that of their forward pass; BRN, EstBN and MABN cut it on purpose."""
    layer = build(name, batch_size=4 if name == "sync_bn" else 2, **GRADCHECKED[name]).norm(4)
    x = torch.randn(4, 4, 2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("make", [WSConv2d, PWSConv2d, CenteredConv2d])
def test_weights_stay_channels_last(make):
    layer = make(4, 8, 3).to(memory_format=torch.channels_last)
    assert layer.standardized().is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [WSConv2d, PWSConv2d, CenteredConv2d])
def test_a_transposed_filter(make):
    """1x1 weights that lie in memory the other way round."""
    weight = torch.randn(6, 8).t()[:, :, None, None]
    layer, same = make(6, 8, 1), make(6, 8, 1)
    layer.weight.data, same.weight.data = weight, weight.contiguous()
    close(layer.standardized(), same.standardized())


@pytest.mark.parametrize("make", [WSConv2d, PWSConv2d])
def test_a_filter_of_one_weight_is_refused(make):
    with pytest.raises(ValueError, match="1 weight"):
        make(4, 4, 1, groups=4)


@pytest.mark.parametrize(
    ("channels", "groups", "minimum", "expected"),
    [
        *((64, 32, 2, 32), (32, 32, 2, 16), (16, 32, 2, 8), (64, 32, 1, 32), (32, 32, 1, 32)),
        *((3, 32, 2, 1), (1, 32, 2, 1), (2048, 32, 2, 32), (24, 32, 2, 12), (48, 10, 2, 8)),
    ],
)
def test_groups_in_narrow_layers(channels, groups, minimum, expected):
    assert fit_groups(channels, groups, minimum) == expected


def test_group_norm_is_contiguous_and_per_sample():
    layer = build("gn", groups=4).norm(12)
    assert layer.num_groups == 4
    one = torch.ones(4)

    def reference(x, weight, bias):
        z = literal.channel_norm(x, 4, one, one * 0)
        return z * literal.per_channel(weight) + literal.per_channel(bias)

    compare(layer, reference, 1, 2, 12, steps=1)


def test_layer_and_instance_norm():
    for name, groups in (("ln", 1), ("in", 12)):
        one = torch.ones(groups)

        def reference(x, weight, bias, groups=groups, one=one):
            z = literal.channel_norm(x, groups, one, one * 0)
            return z * literal.per_channel(weight) + literal.per_channel(bias)

        compare(build(name).norm(12), reference, 1, 3, 12, steps=1)


@pytest.mark.parametrize(
    ("channels", "per_group", "groups"),
    [(64, 16, 4), (48, 16, 3), (40, 16, 2), (8, 16, 1), (12, 1, 12)],
)
def test_channels_per_group(channels, per_group, groups):
    assert build("gn", channels_per_group=per_group).norm(channels).num_groups == groups


SINGLE = 1e-5  # timm's layers take their statistics in float32


def test_frn():
    scheme = build("frn")
    compare(scheme.norm(4), literal.frn, 1, 3, 4, steps=1, tolerance=SINGLE)
    compare(scheme.norm_act(4), literal.frn, 1, 3, 4, steps=1, tolerance=SINGLE)


def test_evonorm_s0():
    def reference(x, weight, bias, v):
        return literal.evonorm_s0(x, weight, bias, v, groups=4)

    layer = build("evonorm_s0", groups=4).norm_act(12)
    compare(layer, reference, 1, 3, 12, steps=1, tolerance=SINGLE)


@pytest.mark.parametrize("groups", [1, 3])
def test_evonorm_b0(groups):
    layer, reference = build("evonorm_b0", batch_size=2).norm_act(4), literal.EvoNormB0(4)
    compare(layer, reference, groups, 2, 4, steps=3, tolerance=SINGLE)
    close(layer.running_var, reference.var, SINGLE)
    x = torch.randn(3, 4, 2, 2)
    parameters = list(layer.parameters())
    close(layer.eval()(x), reference.formula(x, reference.var, *parameters), SINGLE)


@pytest.mark.parametrize("name", ["bn", "mabn", "bcn", "brn", "evonorm_b0"])
def test_images_that_do_not_fill_a_group_are_refused(name):
    scheme = build(name, batch_size=3)
    layer = (scheme.norm_act or scheme.norm)(4)
    with pytest.raises(ValueError, match="groups of batch size 3"):
        layer(torch.randn(4, 4, 2, 2))


@pytest.mark.parametrize("name", ["bn", "bcn", "brn", "sync_bn", "in", "evonorm_b0"])
def test_one_value_has_no_variance(name):
    options = {"statistics": "batch"} if name == "bcn" else {}
    scheme = build(name, batch_size=1, **options)
    layer = (scheme.norm_act or scheme.norm)(4)
    with pytest.raises(ValueError, match="no variance"):
        layer(torch.randn(1, 4, 1, 1))
    if name != "in":
        layer.eval()(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("rate", [None, 0.1])
def test_bcn_with_a_frozen_batch_norm(rate):
    """As is usual where a network is tuned: the batch norms inside are set to evaluation."""
    layer = BatchChannelNorm2d(6, 3, 2, rate=rate)
    randomize(layer)
    layer(torch.randn(4, 6, 3, 3))
    layer.bn.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(4, 6, 3, 3, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    close(layer(x), layer.eval()(x))


@pytest.mark.parametrize("rate", [None, 0.1])
def test_bcn_keeps_the_statistics_of_its_forward_pass(rate):
    """Between an evaluation and its backward pass the layer may be trained."""
    layer = BatchChannelNorm2d(6, 3, rate=rate)
    randomize(layer)
    x, dy = torch.randn(2, 6, 3, 3, requires_grad=True), torch.randn(2, 6, 3, 3)
    layer.eval()(x).backward(dy)
    expected, x.grad = x.grad, None
    y = layer.eval()(x)
    layer.train()(torch.randn(2, 6, 3, 3) + 5)
    y.backward(dy)
    close(x.grad, expected)


@pytest.mark.parametrize("statistics", ["batch", "estimated"])
def test_a_traced_evaluation_looks_at_each_image(statistics):
    layer = build("bcn", batch_size=2, statistics=statistics).norm(8).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is old, and shapes become constants
        traced = torch.jit.trace(layer, torch.randn(2, 8, 4, 4))
    x = torch.randn(2, 8, 4, 4) * 3 + 1
    close(traced(x), layer(x))


@pytest.mark.parametrize("name", ["bn", "bcn", "estbn", "brn", "mabn", "ws_gn"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_network_in_half_precision(name, size):
    """All of it, weights and buffers too; close to the same in float64."""
    norm = name.replace("estbn", "bcn")
    options = {"statistics": "estimated"} if name == "estbn" else {}
    built = build(norm, batch_size=size, **options)
    net = nn.Sequential(built.conv(4, 8, 3), built.norm(8)).bfloat16()
    exact = copy.deepcopy(net).double()
    x = torch.randn(4, 4, 6, 6).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = net(x), exact(wide)
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    dy = torch.randn(y.shape).bfloat16()
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", sorted(set(names()) - {"mimicnorm", "nf", "none", "pws"}))
def test_a_diverged_network_is_not_warned_of(name):
    """Warnings are errors here; NumPy has one for what PyTorch computes silently."""
    built = build(name, batch_size=None if name == "sync_bn" else 2)
    net = nn.Sequential(built.conv(4, 8, 3), built.norm(8))
    if name == "cbn":
        built.finish(net)
    x = torch.randn(4, 4, 5, 5) * 1e200
    x[0, 0, 0, 0] = torch.inf
    x.requires_grad_()
    y = net(x)
    y.sum().backward()
    assert not y.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(names()) - {"cbn", "mimicnorm", "nf", "none", "pws"}))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_are_float32(name, dtype):
    """Equal values far from zero: the mean of a map in half precision would be off by units."""
    scheme = build(name, batch_size=4 if name == "sync_bn" else 2)
    layer = (scheme.norm_act or scheme.norm)(32).float()
    offset = 100.0 if "evonorm" in name else 1000.0  # these do not remove it
    x = torch.full((4, 32, 32, 32), offset) + torch.randn(4, 32, 1, 1)
    x = x.to(dtype)
    with torch.set_grad_enabled(name not in CUSTOM or dtype != torch.float16):  # refused: see below
        expected = copy.deepcopy(layer)(x.float())
        y = layer(x)
    assert torch.allclose(y.float(), expected, rtol=0.02, atol=0.02)
    assert y.dtype == dtype
    assert all(b.dtype != dtype for b in layer.buffers())


def test_mabn_refuses_to_train_in_float16():
    """A loss scaler's factor changes, and the window would mix gradients of different factors."""
    layer, x = MABN2d(4, 2).float(), torch.randn(2, 4, 3, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"float16 needs a loss scale .*expected float32 or bfl"):
        layer(x)
    with torch.no_grad():
        assert layer(x).isfinite().all()
    assert layer.eval()(x).isfinite().all()


def test_initalpha_gives_every_outer_convolution_variance_two():
    scheme = build("pws", initalpha=True)
    net = nn.Sequential(
        scheme.conv(3, 16, 3, padding=1),
        nn.ReLU(),
        scheme.conv(16, 16, 3, padding=1, inner=True),
        nn.ReLU(),
        scheme.conv(16, 24, 1),
    )
    images = torch.randn(8, 3, 6, 6) * 7
    scheme.initialize(net, images)
    close(net[:1](images).var(), torch.tensor(2.0))
    close(net(images).var(), torch.tensor(2.0))
    assert len(set(net[0].alpha.tolist())) == 1
    assert torch.equal(net[2].alpha, torch.ones(16))
    scheme.initialize(net, images)  # starts from 1 again
    close(net(images).var(), torch.tensor(2.0))


def test_loaded_weights_are_used_after_eval():
    layer, other = PWSConv2d(3, 4, 3).eval(), PWSConv2d(3, 4, 3).eval()
    x = torch.randn(1, 3, 5, 5)
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


def test_the_table_of_deviations_has_every_formula():
    lines = (Path(__file__).parents[2] / "docs" / "deviations.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")][2:]
    of_others = {"mimicnorm", "none", "sync_bn", "ws_bn", "ws_gn", "xbn"}
    assert {row[0].strip() for row in rows} == {*names(), "ws"} - of_others
    assert all(float(row[i]) < 1e-6 for row in rows for i in (2, 3))
