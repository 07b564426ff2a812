"""What every layer has to stand, as PyTorch's own do: every condition for every scheme and variant.

A new method in `norms/` is in all of it by its name; the sets below are what sets methods apart.
"""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import timm.layers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torchvision.models.feature_extraction import create_feature_extractor

import norms
from norms.layer import BatchStatisticsNorm
from tests.norms.test_schemes import OPTIONS, VARIANTS

CASES = norms.names() + list(VARIANTS)
MODES = [True, False]
CUSTOM = {
    n for n in CASES if n.split()[0] in ("mabn", "online", "powernorm")
}  # whose gradient is their own
TIMM = {"frn", "evonorm_s0", "evonorm_b0"}  # in float32 whatever comes in, and of 2-d maps only
PYTORCH = {"sync_bn", "gn", "gn channels", "ln", "ws_gn", "ws_gn timm"}  # norms of PyTorch's own
CONV = {n for n in CASES if n.split()[0] == "cbn"}  # a norm that goes with its convolution
TWO_MAPS = {"online", "online clamp"}  # keep what their last operation began with
NO_NORM = {"mimicnorm", "nf", "none", "pws", "pws equiv", "pws tensorflow"}
OURS = sorted(set(CASES) - TIMM - PYTORCH - NO_NORM)
MOVES = ("bcn", "bn", "brn", "cbn", "mabn", "mbn", "online", "powernorm", "ws_bn", "xbn")
MOVING = [name for name in CASES if name.split()[0] in MOVES]


class Pair(nn.Sequential):
    """A convolution of a scheme with its norm and, where it has one, its own activation."""

    def __init__(self, name, batch_size, cin=4, cout=8, kernel=3, **options):
        torch.manual_seed(0)
        known = OPTIONS.get(name, {}) | VARIANTS.get(name, {})
        self.scheme = norms.build(
            name.split()[0], batch_size=batch_size, sgd_batch_size=2 * (batch_size or 2), **known
        )
        conv = self.scheme.conv(cin, cout, kernel, **options)
        norm = (self.scheme.norm_act or self.scheme.norm)(cout)
        super().__init__(conv, norm)
        if hasattr(norm, "follow"):
            self.scheme.finish(self)


def images(name, batch, size=6, **options):
    """Two batches, or one for `sync_bn`, which knows no ghost batches."""
    return torch.randn(batch * (1 if name == "sync_bn" else 2), 4, size, size, **options)


def step(layer, x, owner=None):
    """Output and all gradients of one training step; `layer` may be a function of its `owner`."""
    owner = owner or layer
    owner.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape)
    (y.float() * weights).sum().backward()
    return [y, x.grad, *(p.grad for p in owner.parameters() if p.requires_grad)]


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
        refused = name in ("brn learned", "in", "sync_bn", "ws_bn", "evonorm_b0", "bcn batch")
        assume(
            not refused and name.split()[0] not in ("bn", "brn", "cbn", "mbn", "xbn")
        )  # one value: see test_layers.py
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
            if name in CUSTOM and dtype == torch.float16:
                with pytest.raises(ValueError, match="expected float32 or bfloat16"):
                    step(layer, x)
                break
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


# --- Derivatives


def hold(layer):
    """Let BRN's r and d and the estimates, which are constants for the gradient, stay at what they
    are at first."""
    for part in layer.modules():
        if isinstance(part, BatchStatisticsNorm):
            kept = []

            def once(update, *statistics, kept=kept):
                kept[:] = kept or [update(*statistics)]
                return kept[0]

            part.once = once
    return layer


def as_function(layer):
    """layer(x), of its parameters too."""
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return function, tuple(parameters)


SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # what forward mode still is


@SCRIPTED
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, training, as_default, monkeypatch):
    """First and second, backward, forward, forward over backward and batched, by differences."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # in float64 what timm has in float32
    layer = hold(Pair(name, 2, padding=1)).train(training)
    x = images(name, 2, 3, requires_grad=True)
    function, parameters = as_function(layer)
    checks = dict(fast_mode=True, check_batched_grad=True)
    if training and name in CUSTOM:
        y = function(x, *parameters)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^\w+2d: .* no second derivative .* training"):
            torch.autograd.grad(dx.sum(), parameters[0], allow_unused=True, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"^\w+2d: .* no second derivative .* training"):
            dx.sum().backward()
        return
    assert gradcheck(function, (x, *parameters), check_forward_ad=True, **checks)
    assert gradgradcheck(function, (x, *parameters), check_fwd_over_rev=True, **checks)


@SCRIPTED
@pytest.mark.parametrize("name", sorted(CUSTOM))
def test_what_a_gradient_of_its_own_cannot_do_is_one_line(name):
    layer, x = Pair(name, 2), images(name, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^\w+2d: .* torch.vmap cannot .* evaluation mode$"):
        torch.autograd.grad(layer(x), x, torch.randn(3, 4, 8, 4, 4), is_grads_batched=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="implement the jvp"):
            layer(dual)


@SCRIPTED
@pytest.mark.parametrize("name", CASES)
def test_torch_func(name, as_default):
    """In evaluation, and in training where no statistic crosses images or moves."""
    layer, x = trained(name), images(name, 2)
    for training in MODES if layer.scheme.batch_independent else [False]:
        layer.train(training)
        parameters = {k: p.detach() for k, p in layer.named_parameters()}

        def loss(parameters, x):
            return functional_call(layer, parameters, (x[None],)).sin().sum()

        each = vmap(grad(loss), (None, 0))(parameters, x)
        for i, image in enumerate(x):
            layer.zero_grad()
            layer(image[None]).sin().sum().backward()
            for key, p in layer.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(each[key][i], p.grad)

        tangent = torch.randn_like(x)
        y, forward = jvp(layer, (x,), (tangent,))
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(
            forward.sum(),
            (vjp(layer, x)[1](torch.ones_like(y))[0] * tangent).sum(),
            rtol=1e-4,
            atol=1e-4,
        )
        one = x[:1, :, :4, :4]
        torch.testing.assert_close(jacrev(layer)(one), jacfwd(layer)(one), rtol=1e-4, atol=1e-4)

        two = [layer, copy.deepcopy(layer)]
        with torch.no_grad():
            next(two[1].parameters()).mul_(2)
        stacked = stack_module_state(two)
        together = vmap(lambda p, b: functional_call(layer, (p, b), (x,)))(*stacked)
        torch.testing.assert_close(together, torch.stack([net(x) for net in two]))


@pytest.mark.parametrize("name", sorted({*MOVING, "sync_bn", "evonorm_b0"}))
def test_vmap_over_one_state_is_one_line(name):
    layer, x = Pair(name, 2), torch.stack([images(name, 2)] * 3)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).sum()

    if name != "mbn":  # whose memory moves in the second pass alone
        for call in (lambda: vmap(layer)(x), lambda: vmap(grad(loss), (None, 0))(parameters, x)):
            with pytest.raises(
                RuntimeError, match=r"^\w+: in training its statistics .* torch.vmap"
            ):
                call()


@pytest.mark.parametrize("name", CASES)
def test_functional_call_in_training(name):
    """It moves the buffers that it is given, also inside `torch.func.grad`, as a step moves the
    layer's own; a step after it, checkpointed too, and copies are what they are without it."""
    layer, other, x = trained(name), trained(name), images(name, 2)
    layer.zero_grad()
    kept = state_of(layer)
    parameters = {k: p.detach().clone() for k, p in layer.named_parameters()}

    def loss(parameters, buffers):
        return functional_call(layer, (parameters, buffers), (x,)).sin().sum()

    for transformed in (False, True):
        given = {k: b.clone() for k, b in layer.named_buffers()}
        if transformed:
            gradients = grad(loss)(parameters, given)
        else:
            loss(dict(layer.named_parameters()), given).backward()
            gradients = {k: p.grad for k, p in layer.named_parameters()}
        assert equal(state_of(layer), kept)
        twin = copy.deepcopy(layer)
        twin.zero_grad()
        twin(x).sin().sum().backward()
        for key, p in twin.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(gradients[key], p.grad)
        same(given.values(), twin.buffers())
    y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    y.sum().backward()
    (dx,) = torch.autograd.grad(other(x).sum(), x)
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize("name", CASES)
def test_the_same_graph_twice(name):
    layer, x = Pair(name, 2), images(name, 2)
    for _ in range(8):
        step(layer, x)
    x.requires_grad_()
    y = layer(x).sin().sum()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    state = copy.deepcopy(layer.state_dict())
    assert all(map(torch.equal, first, torch.autograd.grad(y, inputs)))
    assert all(map(torch.equal, state.values(), layer.state_dict().values()))


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("name", sorted(set(CASES) - TIMM - NO_NORM - TWO_MAPS - CONV))
def test_only_the_input_is_kept_for_the_backward_pass(name, training):
    """And numbers per map."""
    layer, x = Pair(name, 2)[1].train(training), images(name, 2, 16)
    x = x.repeat(1, 2, 1, 1).requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = [t for t in kept if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert all(t.untyped_storage().nbytes() <= 4 * 4 * 8 for t in own), [t.shape for t in own]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"sync_bn"}))
def test_what_is_kept_may_be_laid_out_anew(name):
    """By a hook that packs it, in the other memory format or with gaps (which PyTorch's own batch
    norm overlooks)."""

    def unpack(v):
        if v.dim() == 4:
            return v.contiguous(memory_format=torch.channels_last)
        return v.repeat_interleave(2, -1)[..., ::2] if v.dim() else v

    layer, other, x = Pair(name, 2), Pair(name, 2), images(name, 2)
    expected = step(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, unpack):
        same(step(other, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_whose_sign_is_only_noted(name):
    """What PyTorch makes of the imaginary part of a conjugate: its memory has the other sign."""
    one, two, x = Pair(name, 2), Pair(name, 2), images(name, 2)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = one(x1), two(x2)
    dy = torch.randn_like(y1)
    y1.backward(torch._neg_view(dy))
    y2.backward(-dy)
    torch.testing.assert_close(x1.grad, x2.grad)


# --- State


def trained(name, steps=3, **options):
    """A layer whose parameters and state are not those of its start."""
    layer = Pair(name, 2, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 4)
    for _ in range(steps):
        x = images(name, 2) * 2 + 1
        step(layer, x)
        if layer.scheme.second_pass:
            with torch.no_grad(), layer.scheme.second_pass(layer):
                layer(x)
    return layer


def state_of(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_that_is_not_finite_leaves_the_state(name, bad):
    """As a loss scaler skips such a step; the good steps after it are as if it had not been."""
    layer, other, x = trained(name), trained(name), images(name, 2)
    x[0, 0, 0, 0] = bad
    before = state_of(layer)
    step(layer, x)
    assert equal(state_of(layer), before)
    for _ in range(2):
        x = images(name, 2)
        results = step(layer, x)
        assert all(r.isfinite().all() for r in results)
        assert all(map(torch.equal, results, step(other, x)))


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_that_is_not_finite_leaves_the_state(name):
    layer = trained(name)
    x = images(name, 2)
    y = layer(x)
    before = state_of(layer)
    dy = torch.ones_like(y)
    dy[0, 0, 0, 0] = torch.inf
    y.backward(dy)
    assert equal(state_of(layer), before)
    assert all(r.isfinite().all() for r in step(layer, x))


@pytest.mark.parametrize("name", CASES)
def test_statistics_that_overflow_leave_the_state(name):
    """Finite images whose squares are not."""
    layer = trained(name)
    before = state_of(layer)
    layer(images(name, 2) * 1e30)
    assert equal(state_of(layer), before)


@pytest.mark.parametrize("name", ["bcn estimated", "gn", "ws_gn", "frn", "evonorm_s0"])
def test_what_is_not_finite_stays_with_its_image(name):
    """Where statistics have no gradient or cross no images."""
    layer, x = Pair(name, 2), images(name, 2).requires_grad_()
    y = layer(x)
    dy = torch.ones_like(y)
    dy[0, 0, 0, 0] = torch.inf
    y.backward(dy)
    assert x.grad[1:].isfinite().all()


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("name", CASES)
def test_no_images(name, training):
    """Detection heads meet batches without a proposal: an empty result, and gradients of zero."""
    layer = trained(name).train(training)
    layer.zero_grad()
    before, x = state_of(layer), torch.randn(0, 4, 6, 6, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    moved = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= ({"1.num_batches_tracked"} if name == "sync_bn" else set())


@pytest.mark.parametrize("name", CASES)
def test_constant_maps(name):
    layer, x = trained(name), torch.full((2 if name == "sync_bn" else 4, 4, 6, 6), 3.0)
    for training in MODES:
        assert all(r.isfinite().all() for r in step(layer.train(training), x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing(name, reentrant):
    """Layers used twice, two forward passes before a backward pass: the same gradients, and the
    state moves once for each forward pass."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice = Pair(name, 2), Pair(name, 2, 8, padding=1)

        def forward(self, x):
            return self.twice(self.twice(self.first(x)).relu())

    plain, repeated = Net(), Net()
    for _ in range(4):
        batches = [images(name, 2, requires_grad=True) for _ in range(2)]
        weights = [torch.randn(len(x), 8, 4, 4) for x in batches]
        results = []
        for net in (plain, repeated):
            net.zero_grad()
            run = (
                net if net is plain else functools.partial(checkpoint, net, use_reentrant=reentrant)
            )
            loss = sum((run(x) * w).sum() for x, w in zip(batches, weights, strict=True))
            given = [p for p in net.parameters() if p.requires_grad]
            for p in (*batches, *given):
                p.grad = None
            loss.backward()
            results.append([p.grad for p in (*batches, *given)])
        same(*results)
        assert equal(state_of(plain), state_of(repeated))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bcn estimated", "brn", "cbn", "mabn", "online", "powernorm"])
def test_gradient_checkpointing_of_equal_batches(name, reentrant, as_default):
    """The same images in other forward passes, in one region and in several, step after step, and
    after a batch that is not finite: each pass is repeated with the state that it had met."""
    run = functools.partial(checkpoint, use_reentrant=reentrant)
    plain, repeated = trained(name), trained(name)
    x, w = images(name, 2), torch.randn(3, 4, 8, 4, 4)
    results = []
    for net, call in ((plain, lambda f, *x: f(*x)), (repeated, run)):

        def pair(a, b, net=net):
            return net(a).sin(), net(b).sin()

        call(net, torch.full_like(x, torch.inf).requires_grad_()).sum().backward()
        net.zero_grad()
        given = []
        for _ in range(2):
            given += [x.clone().requires_grad_() for _ in range(3)]
            ys = [*call(pair, *given[-3:-1]), call(net, given[-1])]
            sum((y * v).sum() for y, v in zip(ys, w, strict=True)).backward()
        results.append([t.grad for t in (*given, *net.parameters()) if t.requires_grad])
    same(*results)
    assert equal(state_of(plain), state_of(repeated))


@pytest.mark.parametrize("name", ["bn", "bcn estimated", "brn", "cbn", "mabn", "online"])
def test_selective_checkpointing(name, as_default):
    """Which keeps the results of some operations, by their count, and repeats the others."""
    kept = (torch.ops.aten.mul.Tensor, torch.ops.aten.cat.default, torch.ops.aten.sum.dim_IntList)

    def policy(context, operation, *args, **kwargs):
        save, repeat = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return save if operation in kept else repeat

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    plain, repeated, x = trained(name), trained(name), images(name, 2)
    for _ in range(2):
        same(step(plain, x), step(functools.partial(run, repeated), x, repeated))
    assert equal(state_of(plain), state_of(repeated))


def test_a_repeated_pass_that_cannot_be_told_is_refused():
    layer, x = norms.MABN2d(4, 2), torch.randn(2, 4, 3, 3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=True)
    with torch.no_grad():
        for _ in range(64):
            layer(torch.randn(2, 4, 3, 3))
    with pytest.raises(RuntimeError, match=r"^MABN2d: the backward .* too long ago for its stat"):
        y.sum().backward()

    def inner(x):
        return checkpoint(layer, x, use_reentrant=False) + checkpoint(layer, x, use_reentrant=False)

    layer.warmup = 0
    for _ in range(2):
        y = checkpoint(inner, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"^MABN2d: .* one of several with these statistics$"):
        y.sum().backward()


@pytest.mark.parametrize("name", MOVING)
def test_momentum_of_zero_moves_nothing(name):
    layer = trained(name)
    for part in layer.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = 0
    before = state_of(layer)
    step(layer, images(name, 2))
    assert equal(state_of(layer), before)


@pytest.mark.parametrize("name", MOVING)
def test_running_statistics_anew(name):
    """`reset_running_stats` and `update_bn`, which takes means over all batches of a loader."""
    layer, fresh = trained(name), trained(name, steps=0)
    first = fresh.state_dict()
    layer.zero_grad()
    momentum = [p.momentum for p in layer.modules() if isinstance(p, _BatchNorm)]
    loader = [images(name, 2) * i + i for i in (1, 2)]
    layer.eval()
    swa_utils.update_bn(loader, layer)
    assert not layer.training
    assert momentum == [p.momentum for p in layer.modules() if isinstance(p, _BatchNorm)]
    maps = torch.cat([layer[0](x) for x in loader]).unflatten(0, (-1, 2))  # batches of two images
    mean, var = maps.mean((1, 3, 4)), maps.var((1, 3, 4))
    norm = getattr(layer[1], "bn", layer[1])
    if name in ("mabn", "powernorm"):
        square = maps.square().mean((1, 3, 4))
        torch.testing.assert_close(norm.running_square, square.mean(0))
    elif isinstance(norm, norms.GhostBatchNorm2d):
        torch.testing.assert_close(norm.running_mean, mean.mean(0))
        torch.testing.assert_close(norm.running_var, var.mean(0))
    elif not name.startswith(("mabn", "mbn")):  # whose averages forget
        torch.testing.assert_close(norm.running_mean, mean.mean(0))
    norm.reset_running_stats()
    assert all(torch.equal(b, first[f"1.{k}"]) for k, b in layer[1].named_buffers())


@pytest.mark.parametrize("name", MOVING)
def test_frozen_by_class(name):
    """As tuning recipes do, and as timm does."""
    layer, x = trained(name), images(name, 2)
    exact = copy.deepcopy(layer)
    exact.eval()
    for part in layer.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    before = state_of(layer)
    same(step(layer, x), step(exact, x), rtol=1e-4, atol=1e-5)
    assert equal(state_of(layer), before)
    if any(getattr(part, "behind", "") for part in layer.modules()):
        with pytest.raises(ValueError, match=r"would lose the (layer scaling|clamp)"):
            timm.layers.freeze_batch_norm_2d(layer)
        return
    same([timm.layers.freeze_batch_norm_2d(layer).train()(x)], [exact(x)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MOVING)
def test_batch_norms_without_running_statistics(name):
    """`torch.func.replace_all_batch_norm_modules_`: batch norms take the batch's, always; a method
    that is made of moving statistics says so."""
    layer, x = trained(name), images(name, 2)
    if name.split()[0] in ("mabn", "mbn", "brn", "cbn", "online", "powernorm") or name in (
        "bcn",
        "bcn estimated",
    ):
        with pytest.raises(AttributeError, match="its running_mean cannot be taken away"):
            torch.func.replace_all_batch_norm_modules_(layer)
        return
    expected = layer(x)
    torch.func.replace_all_batch_norm_modules_(layer)
    same([layer(x), layer.eval()(x)], [expected, expected])
    parameters = dict(layer.train().named_parameters())
    batches = torch.stack([x, x + 1])
    together = vmap(lambda x: functional_call(layer, parameters, (x,)))(batches)
    torch.testing.assert_close(together, torch.stack([layer(x) for x in batches]))


@pytest.mark.parametrize("name", MOVING)
def test_synchronized_batch_norms(name):
    """`convert_sync_batchnorm` takes what is a batch norm of a whole batch, nothing else."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    with pytest.raises(
        ValueError, match=r"nn.SyncBatchNorm has no groups|would lose the (layer scaling|clamp)"
    ):
        convert(Pair(name, 2))
    if name.split()[0] in ("bn", "ws_bn", "xbn"):
        layer = Pair(name, None)
        layer(images(name, 2))
        x = images(name, 2)
        expected, state = layer.eval()(x), state_of(layer)
        layer = convert(layer)
        assert type(layer[1]) is nn.SyncBatchNorm
        assert equal(state, layer.state_dict())
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_state_dicts(name):
    """A round trip, strictly; what is missing or too much is an error, as PyTorch's are."""
    layer, other = trained(name), Pair(name, 2)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True, assign=True)
    x = images(name, 2)
    assert all(map(torch.equal, step(other, x), step(layer, x)))
    for key in layer.state_dict():
        short = layer.state_dict()
        del short[key]
        with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
            Pair(name, 2).load_state_dict(short)


@pytest.mark.parametrize("name", MOVING)
def test_a_state_dict_of_another_batch_size(name):
    layer, other = trained(name, 6), Pair(name, 1)
    state = layer.state_dict()
    other.load_state_dict(state)
    for key, value in other.named_buffers():
        if "window" in key:
            assert len(value) != len(state[key])
            torch.testing.assert_close(value.mean(0), state[key].mean(0))
        else:
            assert torch.equal(value, state[key])
    x = images(name, 2)
    torch.testing.assert_close(other.eval()(x), layer.eval()(x))
    assert all(r.isfinite().all() for r in step(other.train(), x))


@pytest.mark.parametrize("name", MOVING)
def test_a_batch_norms_counter_is_loaded_into_none_that_means_another(name):
    norm = getattr(Pair(name, 2)[1], "bn", None) or Pair(name, 2)[1]
    host = nn.BatchNorm2d(8)
    host.num_batches_tracked.fill_(500_000)
    lists = norm.load_state_dict(host.state_dict(), strict=False)
    if isinstance(norm, norms.GhostBatchNorm2d):
        assert norm.num_batches_tracked == 500_000
    else:
        assert "num_batches_tracked" in lists.unexpected_keys
        counters = [b for b in norm.buffers() if b.dtype == torch.int64]
        assert counters
        assert not any(counters)


# --- Construction, copies


CLASSES = {
    name: cls
    for name, cls in vars(norms).items()
    if inspect.isclass(cls) and issubclass(cls, nn.Module)
}


def make(cls, **options):
    if issubclass(cls, nn.Conv2d):
        return cls(8, 8, 3, **options)
    return cls(8, **({"num_groups": 4} if cls is norms.BatchChannelNorm2d else {}), **options)


def reset(layer):
    for part in layer.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


@pytest.mark.parametrize("name", CLASSES)
def test_factory_arguments(name):
    """device=, dtype=, the meta device, `to_empty` and a reset, `skip_init`."""
    cls = CLASSES[name]
    exact = make(cls, dtype=torch.float64)
    floats = [v for v in exact.state_dict().values() if v.is_floating_point()]
    assert {v.dtype for v in floats} == {torch.float64}
    assert make(cls, dtype=torch.bfloat16)(torch.randn(2, 8, 5, 5).bfloat16()).isfinite().all()
    for empty in (
        make(cls, device="meta"),
        nn.utils.skip_init(
            cls,
            8,
            *((8, 3) if issubclass(cls, nn.Conv2d) else ()),
            **({"num_groups": 4} if cls is norms.BatchChannelNorm2d else {}),
        ),
    ):
        if empty.weight.is_meta:
            assert {v.device.type for v in empty.state_dict().values()} == {"meta"}
            empty = empty.to_empty(device="cpu")
        with torch.no_grad():
            for value in empty.state_dict().values():
                value.fill_(7)
        torch.manual_seed(3)
        reset(empty)
        torch.manual_seed(3)
        assert equal(empty.state_dict(), make(cls).state_dict())
    assert all(
        make(cls, affine=False).state_dict().keys()
        == {k for k in make(cls).state_dict() if not k.endswith(("weight", "bias"))}
        for _ in "x"
        if not issubclass(cls, nn.Conv2d)
    )


@pytest.mark.parametrize("name", CASES)
def test_reset(name):
    """`reset_parameters` on every module: as new, with what gradient checkpointing keeps."""
    layer, fresh = trained(name), Pair(name, 2)
    reset(layer)
    reset(fresh)  # convolutions start at random
    for (key, value), other in zip(
        layer.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        if key not in ("0.weight", "0.bias"):
            assert torch.equal(value, other), key
    layer.load_state_dict(fresh.state_dict())
    x = images(name, 2)
    assert all(map(torch.equal, step(layer, x), step(fresh, x)))


@pytest.mark.parametrize("name", CASES)
def test_copies_after_a_backward_pass(name):
    layer, x = trained(name), images(name, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert equal(other.state_dict(), layer.state_dict())
        twin = copy.deepcopy(layer)
        assert all(map(torch.equal, step(other, x), step(twin, x)))
    state = state_of(layer)
    averaged = swa_utils.AveragedModel(layer, use_buffers=True)
    averaged.update_parameters(layer)
    assert equal(state, layer.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_repr(name):
    for layer in (Pair(name, 2), norms.fold(Pair(name, 2)), Pair(name, 2).to("meta")):
        assert repr(layer)
    norm = Pair(name, 2)[1]
    if isinstance(norm, BatchStatisticsNorm):
        assert repr(norm).startswith(f"{type(norm).__name__}(8, batch_size={norm.batch_size}, ")


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_say_the_shapes(name):
    assert "(N, C, " in inspect.getdoc(CLASSES[name])


# --- Shapes, formats, checks


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("name", sorted(set(CASES) - NO_NORM - TIMM - CONV))
def test_any_number_of_dimensions(name, training):
    """(N, C, *) is what (N, C, H, W) is, the positions being no grid."""
    x = torch.randn(2 if name == "sync_bn" else 4, 8, 4, 6) * 2 + 1

    def results(shape):
        layer = trained(name)[1].train(training)
        results = step(layer, x.reshape(shape))
        results[:2] = [r.reshape(x.shape) for r in results[:2]]
        return results + list(layer.buffers())

    for shape in ((len(x), 8, 24), (len(x), 8, 2, 4, 3), (len(x), 8, 2, 2, 2, 3)):
        same(results((len(x), 8, 4, 6)), results(shape), rtol=1e-4, atol=1e-5)
    if name not in ("in",):
        flat = x[:, :, 0, 0]
        layer, other = trained(name)[1].train(training), trained(name)[1].train(training)
        same(
            step(layer, flat),
            [r.flatten(1) if r.dim() > 2 else r for r in step(other, flat[:, :, None, None])],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("shape", [(4, 7, 3, 3), (4, 2000, 3, 3), (8,), (4, 8, 8, 8)[:1]])
@pytest.mark.parametrize("name", [*OURS, "sync_bn"])
def test_another_shape_is_one_message(name, shape, training):
    layer = Pair(name, 2)[1].train(training)
    with pytest.raises(ValueError, match=r"^expected \(N, 8, \*\), got a tensor of shape \("):
        layer(torch.randn(shape))


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timms_layers_are_of_two_dimensional_maps(name):
    for shape in ((4, 7, 3, 3), (4, 8, 9), (4, 8)):
        with pytest.raises(ValueError, match=r"^expected \(N, 8, H, W\), got a tensor of shape \("):
            Pair(name, 2)[1](torch.randn(shape))


# --- torch.fx, torch.jit, torch.export, quantization


@pytest.mark.parametrize("name", CASES)
def test_leaves_of_fx(name):
    """`symbolic_trace`, torchvision's feature extractor and quantization record one call for each
    layer, hooks included."""
    layer, x = trained(name).eval(), images(name, 2)
    layer[1].register_forward_hook(lambda module, inputs, output: output * 2)
    expected, leaves = layer(x), ["0", "1"]
    graph = fx.symbolic_trace(layer)
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"] == leaves
    torch.testing.assert_close(graph(x), expected)
    assert torch.equal(create_feature_extractor(layer, ["1"])(x)["1"], expected)


@pytest.mark.parametrize("name", CASES)
def test_fx_quantization_leaves_them_as_they_are(name):
    layer, x = trained(name).eval(), images(name, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its successor
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        prepared = prepare_fx(copy.deepcopy(layer), get_default_qconfig_mapping(), (x,))
    torch.testing.assert_close(prepared(x), layer(x))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_trace_and_export(name, folded, tmp_path):
    """In evaluation, to another number of images."""
    layer, x, more = trained(name).eval(), torch.randn(2, 4, 6, 6), torch.randn(5, 4, 6, 6)
    layer = norms.fold(layer) if folded else layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is old, and shapes become constants
        torch.jit.save(torch.jit.trace(layer, x), tmp_path / "traced.pt")
        traced = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(traced(more), layer(more))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
        )
    torch.testing.assert_close(exported.module()(more), layer(more))
