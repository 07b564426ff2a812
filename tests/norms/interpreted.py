"""The GPU's kernels on the CPU, through Triton's interpreter: each against float64, and all layers
that use them against what they compute without. Run by test_kernels.py."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import norms
from norms import cpu_kernels, kernels, number_kernels, numbers
from norms import moments as m
from tests.norms.test_layers import randomize

kernels.TILE, kernels.PROGRAMS, number_kernels.TILE = 256, 8, 64  # interpreting takes long


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Kernels for the passes, PyTorch for the arithmetic between."""
    monkeypatch.setattr(cpu_kernels, "take", lambda *tensors: False)
    monkeypatch.setattr(m, "_kernels", lambda x: kernels)
    monkeypatch.setattr(numbers, "TYPES", set())


def images(shape, dtype=torch.float64, last=False):
    x = torch.randn(shape, dtype=dtype) * 2 + 3
    return x.to(memory_format=torch.channels_last) if last else x


SHAPES = [(1, 2, 20, 33), (2, 70, 3, 5), (4, 5, 1, 1)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_kernel(shape, dtype, last):
    """Against float64, in one pass of its own type: bfloat16 only rounds what it writes."""
    x, dy = images(shape, dtype, last), images(shape, dtype)
    wide, wide_dy = x.double(), dy.double()
    close = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=3e-5, atol=3e-5)
    written = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else close
    number = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        mean, var = m.moments(x)
        assert mean.dtype == number
        flat = wide.flatten(2)
        torch.testing.assert_close(mean.double(), flat.mean(2), **close)
        torch.testing.assert_close(var.double(), flat.var(2, correction=0), **close)
        torch.testing.assert_close(m.mean_square(x).double(), flat.square().mean(2), **close)
        for rows in (1, shape[0]):
            center, a, b, c = torch.randn((4, rows, shape[1]), dtype=number)
            maps = [v.double()[:, :, None, None] for v in (center, a, b, c)]
            dims = (2, 3) if rows == shape[0] and rows > 1 else (0, 2, 3)
            for ours, theirs in zip(
                m.sums(dy, x, center), (wide_dy, wide_dy * (wide - maps[0])), strict=True
            ):
                of_all = wide_dy.abs().sum(dims).max() * 10
                assert ours.shape == center.shape
                error = (ours.double().squeeze(0) - theirs.sum(dims).squeeze(0)).abs().max()
                assert error <= of_all * close["rtol"]
            for ours, theirs in (
                (m.affine(x, b, c), maps[2] * wide + maps[3]),
                (m.combine(dy, a, x, b), maps[1] * wide_dy + maps[2] * wide),
                (m.combine(dy, a, x, b, c), maps[1] * wide_dy + maps[2] * wide + maps[3]),
            ):
                assert ours.dtype == dtype
                assert ours.stride() == x.stride()
                torch.testing.assert_close(ours.double(), theirs, **written)


def test_maps_are_cut_where_there_are_few():
    few = images((2, 2, 32, 32), torch.float32)
    assert kernels.grid(few)[0] == (2, 2, 2)
    assert kernels.moments(few, centered=False)[1].shape == (2, 2, 2)
    assert kernels.moments(few)[1].shape == (2, 2)
    assert kernels.parts(112 * 112, 1024, 2) == 4
    assert kernels.parts(112 * 112, 1024, 1) == 8  # and not 16, which would be too small
    assert kernels.parts(112 * 112, 1024, 16) == 1
    assert kernels.parts(7 * 7, 64, 2) == 1
    assert kernels.parts(4099, 64, 1) == 1  # a prime number


def both_ways(net, x, dy):
    """Output, gradients and state."""
    x = x.detach().requires_grad_()
    y = net(x)
    y.backward(dy)
    gradients = [p.grad for p in net.parameters() if p.requires_grad]
    found = [y, x.grad, *gradients, *net.buffers()]
    net.zero_grad()
    return found


def compare(make, steps, monkeypatch):
    """What two networks that are alike compute in `steps`, (x, dy), with kernels and without;
    returns the names of the kernels for numbers that were called."""
    plain, ours = make(), make()
    called, passes = [], []
    for name in ("mabn_forward", "mabn_backward", "bcn_forward", "bcn_backward"):
        kernel = getattr(number_kernels, name)
        spy = partial(
            lambda name, kernel, *args: called.append(name) or kernel(*args), name, kernel
        )
        monkeypatch.setattr(number_kernels, name, spy)
    for x, dy in steps:
        monkeypatch.setattr(m, "_kernels", lambda x: None)
        expected = both_ways(plain, x, dy)
        monkeypatch.setattr(m, "_kernels", lambda x: passes.append(x) or kernels)
        for a, b in zip(both_ways(ours, x, dy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert passes
    return called


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("bn", {}),
        ("mabn", {"version": "imagenet"}),
        ("mabn", {}),
        ("bcn", {"statistics": "batch"}),
        ("bcn", {"statistics": "estimated"}),
        ("brn", {}),
        ("ws_gn", {}),
    ],
)
@pytest.mark.usefixtures("as_default")
def test_layers_in_groups(scheme, options, last, monkeypatch):
    """Convolution and norm, groups of two images."""
    built = norms.build(scheme, batch_size=2, sgd_batch_size=4, **options)
    layout = torch.channels_last if last else torch.contiguous_format

    def make():
        torch.manual_seed(1)
        net = torch.nn.Sequential(built.conv(3, 8, 3), built.norm(8))
        randomize(net)
        return net.to(memory_format=layout)

    steps = [
        (images((4, 3, 7, 7)).to(memory_format=layout), torch.randn(4, 8, 5, 5)) for _ in range(2)
    ]
    assert not compare(make, steps, monkeypatch)


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda: norms.MABN2d(20, 3, 7, warmup=3), "mabn"),
        (lambda: norms.MABN2d(5, 3, 2, warmup=1), "mabn"),
        (lambda: norms.BatchChannelNorm2d(12, 4, 3), "bcn"),
        (lambda: norms.BatchChannelNorm2d(6, 1), "bcn"),
        (lambda: norms.BatchChannelNorm2d(6, 6, 3, rate=0.1), "bcn"),
    ],
)
@pytest.mark.parametrize("start", [0, 997])
@pytest.mark.usefixtures("as_default")
def test_numbers_of_one_group(make, kernel, start, monkeypatch):
    """Through MABN's warm-up, and to where r is free."""

    def at_start():
        torch.manual_seed(1)
        layer = make()
        randomize(layer)
        for name, buffer in layer.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(start)
            elif name.startswith("running"):
                buffer.uniform_(0.1, 30)
                if kernel == "mabn":  # r is cut off at either end, and NaN is not
                    buffer[:3] = torch.tensor([1e6, 1e-6, torch.nan])
        return layer

    layer = make()
    channels = layer.num_features if kernel == "mabn" else layer.num_channels
    shape = (3, channels, 2, 3)
    steps = [(images(shape), torch.randn(shape)) for _ in range(5)]
    called = compare(at_start, steps, monkeypatch)
    assert called == [f"{kernel}_forward", f"{kernel}_backward"] * 5


FREE = {  # views and allocations
    *("view", "_unsafe_view", "detach", "unbind", "slice", "select", "unsqueeze", "squeeze"),
    *("expand", "permute", "empty", "new_empty", "empty_like", "promote_types"),
}


class Launches(TorchDispatchMode):
    """The kernels that a GPU would be given: ours, and PyTorch's operations but for views and
    allocations."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.interpreting = [], False
        for module in (kernels, number_kernels):
            for name, function in vars(module).copy().items():
                if hasattr(function, "run") and name.startswith("_"):
                    monkeypatch.setattr(module, name, self.spy(function, name))

    def spy(self, function, name):
        def launch(grid):
            def call(*args, **kwargs):
                self.names.append(name)
                self.interpreting = True
                function[grid](*args, **kwargs)
                self.interpreting = False

            return call

        return type(
            "Kernel", (), {"__getitem__": staticmethod(launch), "__call__": staticmethod(function)}
        )()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (self.interpreting or name in FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: norms.MABN2d(8, 2), 8),
        (lambda: norms.BatchChannelNorm2d(8, 4, 2), 7),
        (lambda: norms.BatchChannelNorm2d(8, 4, 2, rate=0.1), 6),
        (lambda: norms.BatchRenorm2d(8, 2), 47),
    ],
)
def test_launches(make, expected, monkeypatch):
    """Forward and backward of a batch; see results/layers."""
    layer = make()
    x, dy = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    layer(x).backward(dy)
    x.grad = None
    layer.zero_grad()
    with Launches(monkeypatch) as launches:
        layer(x).backward(dy)
    assert len(launches.names) == expected, " ".join(launches.names)


def test_many_images_of_many_channels_are_left_to_pytorch():
    assert number_kernels.fits(4, 16)
    assert not number_kernels.fits(5, 16)
