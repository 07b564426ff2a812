"""What every layer has to stand: types, shapes, memory formats, compilers, copies, any order."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import norms
from tests.norms.test_schemes import OPTIONS, VARIANTS

CASES = norms.names() + list(VARIANTS)


class Pair(nn.Sequential):
    """A convolution of a scheme with its norm and, where it has one, its own activation."""

    def __init__(self, name, batch_size, cin=4, cout=8, kernel=3, **options):
        torch.manual_seed(0)
        known = OPTIONS.get(name, {}) | VARIANTS.get(name, {})
        self.scheme = norms.build(
            name.split()[0], batch_size=batch_size, sgd_batch_size=2 * batch_size, **known
        )
        conv = self.scheme.conv(cin, cout, kernel, **options)
        norm = (self.scheme.norm_act or self.scheme.norm)(cout)
        super().__init__(conv, norm)


def images(name, batch, size=6, **options):
    """Two batches, or one for `sync_bn`, which knows no ghost batches."""
    return torch.randn(batch * (1 if name == "sync_bn" else 2), 4, size, size, **options)


def step(layer, x):
    """Output and all gradients of one training step."""
    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape)
    (y.float() * weights).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def same(a, b, **tolerance):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, check_stride=False, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(CASES),
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 2, 3, (1, 3)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_shapes(name, batch, height, width, kernel, stride, dilation, groups):
    """Odd sizes, maps of 1x1, strides, dilation and groups: the plain convolution's shape, finite
    numbers and gradients, the same in both memory formats, in training and evaluation."""
    options = dict(stride=stride, dilation=dilation, groups=groups, padding=1)
    layer = Pair(name, batch, kernel=kernel, **options).double()
    plain = nn.Conv2d(4, 8, kernel, **options).double()
    count = batch * (1 if name == "sync_bn" else 2)
    x = torch.randn(count, 4, height, width).double()
    try:
        shape = plain(x).shape
    except RuntimeError:
        assume(False)  # the kernel is larger than the image
    if shape[2] * shape[3] * (1 if name == "in" else batch) == 1:
        refused = name in ("bn", "brn", "brn learned", "in", "sync_bn", "ws_bn", "evonorm_b0")
        assume(not refused and name != "bcn batch")  # one value: see test_layers.py
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    results = step(layer, x)
    assert results[0].shape == shape
    assert all(torch.isfinite(r).all() for r in results)
    same(results, step(other, x.to(memory_format=torch.channels_last)), rtol=1e-3, atol=1e-4)
    same([layer.eval()(x)], [other.eval()(x)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_channels_last_stays(name):
    layer = Pair(name, 2).to(memory_format=torch.channels_last)
    x = images(name, 2).to(memory_format=torch.channels_last)
    for _ in range(2):
        y, dx, *_ = step(layer, x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)
    assert layer.eval()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    """Close to float32, with state in float32; one convolution's rounding is what differs."""
    layer, exact = Pair(name, 2), Pair(name, 2)
    x = images(name, 2)
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            results = step(layer, x)
        for left, right in zip(results[1:], step(exact, x)[1:], strict=True):
            assert left.dtype == torch.float32
            assert (left - right).norm() <= 0.1 * right.norm() + 0.01
    assert all(b.dtype in (torch.float32, torch.int64) for b in layer.buffers())
    for left, right in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=0.03, atol=0.03)
    expected = exact.eval()(x)
    with torch.autocast("cpu", dtype):
        same([layer.eval()(x).float()], [expected], rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of torch 2.11, about itself
@pytest.mark.parametrize("name", CASES)
def test_compile_without_breaks(name):
    """`fullgraph=True`: no graph break, whatever counters and windows the layer keeps; the state
    that the compiled layer leaves is the eager one's."""
    torch.compiler.reset()
    eager, layer = Pair(name, 2), Pair(name, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = images(name, 2)
    for _ in range(3):
        same(step(eager, x), step(compiled, x), rtol=1e-4, atol=1e-5)
    same(eager.buffers(), layer.buffers())
    compiled.eval()
    same([eager.eval()(x)], [compiled(x)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_state_dicts_at_any_step(name):
    layer = Pair(name, 2)
    x = images(name, 2)
    for _ in range(4):
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), Pair(name, 2)]
        others[2].load_state_dict(layer.state_dict())
        expected = step(layer, x)
        for other in others:
            assert all(map(torch.equal, step(other, x), expected))
            assert all(map(torch.equal, other.buffers(), layer.buffers()))


@pytest.mark.parametrize("name", CASES)
def test_order_of_modes_and_frozen_layers(name):
    """Evaluation leaves no trace, and neither do frozen parameters on the way through."""
    x = images(name, 2)
    straight, mixed, frozen = Pair(name, 2), Pair(name, 2), Pair(name, 2).requires_grad_(False)
    mixed.eval()(x)
    for _ in range(3):
        y, dx, *_ = step(straight, x)
        same([y, dx], step(mixed.train(), x)[:2])
        state = copy.deepcopy(mixed.state_dict())
        first = mixed.eval()(x)
        assert torch.equal(first, mixed(x))
        assert all(map(torch.equal, state.values(), mixed.state_dict().values()))
        same([y, dx], step(frozen, x)[:2])
    assert all(map(torch.equal, straight.buffers(), frozen.buffers()))
    with torch.no_grad():  # statistics move without gradients too
        same([straight.train()(x)], [mixed.train()(x)])


@pytest.mark.parametrize("name", CASES)
def test_an_activation_may_change_the_output_in_place(name):
    layer, other, x = Pair(name, 2), Pair(name, 2), images(name, 2)
    same(
        step(nn.Sequential(*layer, nn.ReLU(inplace=True)), x),
        step(nn.Sequential(*other, nn.ReLU()), x),
    )


@pytest.mark.parametrize("name", CASES)
def test_meta_device(name):
    layer = Pair(name, 2).to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (True, False):
            y = layer.train(mode)(images(name, 2).to("meta"))
            assert y.device.type == "meta"
            assert y.shape[1:] == (8, 4, 4)
