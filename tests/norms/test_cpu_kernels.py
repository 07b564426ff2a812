"""The layers' C: each function against float64, whole layers in both memory formats and by any
number of threads; and what happens where it cannot be compiled."""

import copy
import shutil

import pytest
import torch
from torch import nn

from norms import (
    BatchChannelNorm2d,
    BatchRenorm2d,
    EstimatedBatchNorm2d,
    GhostBatchNorm2d,
    MABN2d,
    WSConv2d,
    cpu_kernels,
)
from norms import moments as m

compiled = pytest.mark.skipif(not cpu_kernels.compiler(), reason="no C compiler")

SHAPES = [(1, 2, 40, 33), (2, 40, 7, 7), (3, 5, 1, 2), (2, 17, 64, 17)]


def images(shape, last=False, dtype=torch.float32):
    x = torch.randn(shape, dtype=dtype) * 2 + 3
    return x.to(memory_format=torch.channels_last) if last else x


@compiled
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_pass(shape, last, dtype, monkeypatch):
    """Against float64; sums, of values that may cancel, to what their terms add up to."""
    x, dy = images(shape, last, dtype), images(shape, not last, dtype) - 3
    assert m._kernels(x) is cpu_kernels
    wide, wide_dy = x.double(), dy.double()
    close = 1e-13 if dtype == torch.float64 else 2e-6

    def check(ours, theirs, terms=1.0):
        ours = torch.as_tensor(ours)
        assert ours.dtype == dtype
        assert ((ours.double() - theirs).abs() <= close * (theirs.abs() + terms)).all()

    with torch.no_grad():
        mean, var = m.moments(x)
        flat = wide.flatten(2)
        check(mean, flat.mean(2))
        check(var, flat.var(2, correction=0))
        check(m.mean_square(x), flat.square().mean(2))
        for rows in (1, shape[0]):
            numbers = torch.randn((4, rows, shape[1]), dtype=dtype)
            maps = [v.double()[:, :, None, None] for v in numbers]
            center, a, b, c = numbers
            for middle, around in ((center, wide - maps[0]), (None, wide)):
                total, product = m.sums(dy, x, middle, rows=rows)
                dims = (2, 3) if rows > 1 else (0, 2, 3)
                for ours, terms in ((total, wide_dy), (product, wide_dy * around)):
                    check(ours, terms.sum(dims).reshape(rows, -1), terms.abs().sum())
            for ours, theirs in (
                (m.affine(x, b, c), maps[2] * wide + maps[3]),
                (m.combine(dy, a, x, b), maps[1] * wide_dy + maps[2] * wide),
                (m.combine(dy, a, x, b, c), maps[1] * wide_dy + maps[2] * wide + maps[3]),
            ):
                assert ours.stride() == x.stride()
                check(ours, theirs, 10.0)


def late_mabn(channels):
    """To where r is free: cut off at either end, but not where it is NaN."""
    layer = MABN2d(channels, 2, 6)
    layer.num_batches_tracked.fill_(997)
    layer.running_square[:3] = torch.tensor([1e6, 1e-6, torch.nan])
    return layer


LAYERS = {
    "mabn": lambda c: MABN2d(c, 2, 6, warmup=3),
    "mabn late": late_mabn,
    "mabn of one batch": lambda c: MABN2d(c, warmup=0),
    "mabn imagenet": lambda c: MABN2d(c, 2, version="imagenet"),
    "bcn": lambda c: BatchChannelNorm2d(c, 4, 2),
    "bcn of one group": lambda c: BatchChannelNorm2d(c, 1),
    "bcn estimated": lambda c: BatchChannelNorm2d(c, c, 2, rate=0.1),
    "estimated bn": lambda c: EstimatedBatchNorm2d(c, 0.1, 2),
    "bn": lambda c: GhostBatchNorm2d(c, 2),
    "brn": lambda c: BatchRenorm2d(c, 2),
    "ws_gn": lambda c: WSConv2d(c, 64, 3),
}


def steps(layer, last=False, maps=(9, 5), dtype=torch.float32):
    """Outputs, gradients and state of three training steps of four images."""
    torch.manual_seed(3)
    channels, found = next(layer.parameters()).shape[0], []
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else channels
    if isinstance(layer, BatchChannelNorm2d):
        channels = layer.num_channels
    for _ in range(3):
        x = images((4, channels, *maps), last, dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(y.shape, dtype=dtype))
        found += [y.detach(), x.grad]
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    return found + gradients + list(layer.buffers())


@compiled
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [4, 20, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, channels, last, monkeypatch):
    """As they are without a compiler, to rounding: in float64, in both memory formats."""
    torch.manual_seed(1)
    ours = LAYERS[name](channels).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) / 4)
    theirs = copy.deepcopy(ours)
    layout = torch.channels_last if last else torch.contiguous_format
    found = steps(ours.to(memory_format=layout), last, dtype=torch.float64)
    monkeypatch.setattr(cpu_kernels, "take", lambda *tensors: False)
    expected = steps(theirs.to(memory_format=layout), last, dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


@compiled
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_no_bit(name, last):
    """Large enough for PyTorch, and so for these functions, to use two."""
    torch.manual_seed(1)
    one = LAYERS[name](64 if name == "ws_gn" else 16)
    two, threads = copy.deepcopy(one), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = steps(one, last, maps=(33, 31))
        torch.set_num_threads(2)
        found = steps(two, last, maps=(33, 31))
    finally:
        torch.set_num_threads(threads)
    if isinstance(one, WSConv2d):  # what the convolution itself adds up is PyTorch's affair
        assert torch.equal(one.standardized(), two.standardized())
        return
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_is_left_to_pytorch():
    def take(x, *numbers):
        return cpu_kernels.take(x, *numbers)

    x, number = images((2, 4, 3, 3)), torch.ones(4)
    assert take(x, number, torch.tensor(1)) == bool(cpu_kernels.compiler())
    assert not take(x.half(), number.half())
    assert not take(x[:, ::2], number)
    assert not take(x, number.double())
    assert not take(x, torch.ones(8)[::2])
    assert not take(x.to("meta"))
    assert not take(x, torch.tensor(1, dtype=torch.int32))
    assert not take(x[:0], number)
    assert not take(torch._neg_view(x), number)


@compiled
@pytest.mark.parametrize("channels", [2, 4000])
@pytest.mark.parametrize("name", ["mabn", "bcn", "bcn estimated"])
def test_another_number_of_channels_is_an_error(name, channels):
    with pytest.raises(ValueError, match=f"expected 8 channels, got images of {channels}"):
        LAYERS[name](8)(images((2, channels, 8, 8)))


@compiled
def test_a_transposed_filter():
    """1x1 weights that lie in memory the other way round are PyTorch's."""
    weight = torch.randn(6, 8).t()[:, :, None, None]
    layer, same = WSConv2d(6, 8, 1), WSConv2d(6, 8, 1)
    layer.weight.data, same.weight.data = weight, weight.contiguous()
    torch.testing.assert_close(layer.standardized(), same.standardized())


@compiled
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["mabn", "bcn", "ws_gn"])
def test_what_is_saved_may_be_laid_out_anew(name, last):
    """By a hook that packs it, in the other memory format or with gaps."""

    def unpack(v):
        if v.dim() == 4:
            return v.contiguous(memory_format=torch.channels_last)
        return v.repeat_interleave(2, -1)[..., ::2]

    torch.manual_seed(1)
    one = LAYERS[name](8).double()
    two = copy.deepcopy(one)
    expected = steps(one, last, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, unpack):
        found = steps(two, last, dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@compiled
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_whose_sign_is_only_noted(name):
    """What PyTorch makes of the imaginary part of a conjugate: its memory has the other sign."""
    torch.manual_seed(1)
    one = LAYERS[name](8)
    two, x = copy.deepcopy(one), images((4, 8, 5, 5))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = one(x1), two(x2)
    dy = torch.randn_like(y1)
    y1.backward(torch._neg_view(dy))
    y2.backward(-dy)
    torch.testing.assert_close(x1.grad, x2.grad, equal_nan=True)


@compiled
def test_what_is_not_finite_stays_where_it_is():
    """Estimated statistics have no gradient: one image's does not reach the other."""
    layer, x = BatchChannelNorm2d(8, 4, 2, rate=0.1), images((2, 8, 3, 3)).requires_grad_()
    dy = torch.ones(2, 8, 3, 3)
    dy[0, 0, 0, 0] = torch.inf
    layer(x).backward(dy)
    assert x.grad[1].isfinite().all()
    mabn = MABN2d(8, 2)
    mabn(images((2, 8, 3, 3)) * 1e30)
    assert (mabn.running_square == torch.inf).all()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As if nothing had been compiled on this machine yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_kernels.library.cache_clear()
    yield tmp_path
    cpu_kernels.library.cache_clear()


@compiled
def test_it_is_compiled_once(fresh, monkeypatch):
    assert cpu_kernels.library(torch.float32) is not None
    [built] = (fresh / "cache" / "smallbatch" / "kernels").iterdir()

    def run(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(cpu_kernels.subprocess, "run", run)
    assert cpu_kernels.build("float") == built
    with pytest.raises(AssertionError, match="compiled again"):
        cpu_kernels.build("double")


@pytest.mark.parametrize("command", ["", "no-such-compiler", "-O3"])
def test_no_compiler(command, fresh, monkeypatch):
    """Nothing to complain of: the layers work, and nothing is written."""
    monkeypatch.setenv("CC", command)
    assert cpu_kernels.library(torch.float32) is None
    assert MABN2d(4, 2)(images((2, 4, 3, 3))).isfinite().all()
    assert not (fresh / "cache").exists()


@compiled
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'x.c:1: error: no OpenMP here' >&2; exit 1", r"\(x.c:1: error: no OpenMP here\)"),
        ('for made; do :; done; echo no library > "$made"', "file too short|invalid ELF header"),
    ],
)
def test_a_compiler_that_fails(script, said, fresh, monkeypatch):
    """One line says so, once, and the layers work."""
    cc = fresh / "cc"
    cc.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    layer = nn.Sequential(MABN2d(4, 2), MABN2d(4, 2))
    with pytest.warns(UserWarning, match=said) as warned:
        y = layer(images((2, 4, 3, 3)))
    assert y.isfinite().all()
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)


@compiled
def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    with pytest.warns(UserWarning, match="Not a directory"):
        assert cpu_kernels.library(torch.float32) is None
