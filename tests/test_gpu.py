"""What a GPU computes, against float64 on the CPU, and how it is asked to.

The same tests run on the CPU where that says something; those marked `gpu` are skipped without one.
`scripts/gpu_session.sh right` runs them on a card.
"""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import models
import norms
from norms import moments
from tests.norms import literal
from training.protocol import Plan
from training.step import Step

ROOT = Path(__file__).parent.parent
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
ON_GPU = pytest.mark.parametrize("device", [CUDA])
PRECISIONS = pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
SCHEMES = ["bn", "gn", "ws_gn", "bcn", "pws", "mabn"]
# Of the largest value. float32: 24 bits, and sums over a hundred values. bfloat16: 8 bits; an input
# is given as such, an output or a weight is rounded once, a gradient two or three times.
CLOSE = {False: 1e-4, True: 2e-2}
EXACT = 1e-4  # statistics, which are taken in float32 in either precision


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """Without TF32, which has 11 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def close(ours, theirs, tolerance, what=""):
    theirs = theirs.detach().double()
    limit = tolerance * max(theirs.abs().max().item(), 1e-3)
    error = (ours.detach().cpu().double() - theirs).abs().max().item()
    assert error <= limit, f"{what}: off by {error:.2e}, allowed {limit:.2e}"


# --- the passes over activations

SHAPES = [(2, 64, 56, 56), (3, 70, 9, 7), (1, 256, 1, 1), (2, 5, 33, 31), (8, 512, 7, 7)]
TYPES = {  # of activations, and how close: a result of many, and a map that is written
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (1e-4, 1e-2),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@DEVICES
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passes(shape, layout, dtype, device):
    """Those of `norms/moments.py`, forward and backward, from their formulas."""
    many, written = TYPES[dtype]
    x, dy = ((torch.randn(shape) * 2 + 0.5).to(dtype, memory_format=FORMATS[layout]) for _ in "xd")
    own, exact = x.to(device).requires_grad_(), x.double()
    mean, var = moments.moments(own)
    close(mean, exact.mean((2, 3)), many, "mean")
    close(var, exact.var((2, 3), correction=0), many, "var")
    close(moments.mean_square(own), exact.square().mean((2, 3)), many, "mean square")
    area = shape[2] * shape[3]
    for rows in {1, shape[0]}:
        numbers = torch.randn(2, rows, shape[1], dtype=torch.promote_types(dtype, torch.float32))
        scale, shift = (v.requires_grad_() for v in numbers.to(device).unbind())
        y = moments.scale_and_shift(own, scale, shift)
        a, b = numbers.double()[:, :, :, None, None]
        close(y, exact * a + b, written, "scale and shift")
        given = torch.autograd.grad(y, (own, scale, shift), dy.to(device))
        close(given[0], dy.double() * a, written, "dx")
        limit = many * max(1.0, area**0.5)  # terms of either sign, which nearly cancel
        for found, of in zip(given[1:], (dy.double() * exact, dy.double()), strict=True):
            expected = of.sum((2, 3)).view(shape[0], -1)
            expected = expected if rows > 1 else expected.sum(0, keepdim=True)
            close(found, expected, limit, "sums")


# --- layers

CHANNELS, SIZE = 8, 4
# Batches of `SIZE` images in a forward pass.
GROUPS = pytest.mark.parametrize("groups", [1, 3])


def batch_norm():
    bn = literal.BN(CHANNELS)
    return bn, {"running_mean": lambda: bn.mean, "running_var": lambda: bn.var}


def estimated(rate):
    bn = literal.EstBN(CHANNELS, rate)
    return bn, {"running_mean": lambda: bn.mean, "running_var": lambda: bn.var}


def group_norm(groups):
    def formula(x, weight, bias):
        one = torch.ones(groups)
        z = literal.channel_norm(x, groups, one, one * 0)
        return literal.per_channel(weight) * z + literal.per_channel(bias)

    return formula, {}


def batch_channel_norm(rate):
    bn, state = batch_norm() if rate is None else estimated(rate)

    def formula(x, weight, bias, bn_weight, bn_bias):
        return literal.channel_norm(bn(x, bn_weight, bn_bias), 4, weight, bias)

    return formula, {f"bn.{name}": value for name, value in state.items()}


def renorm():
    bounds = dict(r_max=1.5, d_max=0.5, start=2, r_until=9, d_until=6)
    brn = literal.BRN(CHANNELS, **bounds, momentum=0.2)
    return brn, {"moving_mean": lambda: brn.mean, "moving_std": lambda: brn.std}


def make_renorm():
    bounds = dict(r_max=1.5, d_max=0.5, start=2, r_until=9, d_until=6)
    return norms.BatchRenorm2d(CHANNELS, SIZE, 1, **bounds, fixed_weight=False, momentum=0.2)


def evonorm():
    reference = literal.EvoNormB0(CHANNELS)
    return reference, {"running_var": lambda: reference.var}


def norm(name, **options):
    scheme = norms.build(name, batch_size=SIZE, **options)
    return (scheme.norm_act or scheme.norm)(CHANNELS)


NORMS = {  # the layer, and its formulas with what they keep
    "bn": (partial(norm, "bn"), batch_norm),
    "gn": (partial(norm, "gn", groups=4), partial(group_norm, 4)),
    "ln": (partial(norm, "ln"), partial(group_norm, 1)),
    "in": (partial(norm, "in"), partial(group_norm, CHANNELS)),
    "bcn": (
        partial(norm, "bcn", groups=4, statistics="batch"),
        partial(batch_channel_norm, None),
    ),
    "bcn_estimated": (
        partial(norm, "bcn", groups=4, statistics="estimated", rate=0.1),
        partial(batch_channel_norm, 0.1),
    ),
    "estbn": (
        partial(norms.EstimatedBatchNorm2d, CHANNELS, 0.1, SIZE),
        partial(estimated, 0.1),
    ),
    "brn": (make_renorm, renorm),
    "frn": (partial(norm, "frn"), lambda: (literal.frn, {})),
    "evonorm_s0": (
        partial(norm, "evonorm_s0", groups=4),
        lambda: (partial(literal.evonorm_s0, groups=4), {}),
    ),
    "evonorm_b0": (partial(norm, "evonorm_b0"), evonorm),
}


def randomized(layer, device):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + 1)
    return layer.to(device)


def images(half, layout, groups, channels=CHANNELS):
    """As a GPU gets them, and the same in float64."""
    x = torch.randn(groups * SIZE, channels, 9, 7) * 2 + 0.5
    x = x.to(torch.bfloat16 if half else torch.float32).to(memory_format=FORMATS[layout])
    return x, x.double()


def call(layer, x, device, half):
    """Forward and backward on the device: y, dy in float64, dx."""
    x = x.to(device).requires_grad_()
    layer.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=half):
        y = layer(x)
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy.to(device))
    return y, dy.double(), x.grad


class TestLayers:
    @DEVICES
    @PRECISIONS
    @pytest.mark.parametrize("layout", FORMATS)
    @GROUPS
    @pytest.mark.parametrize("name", NORMS)
    def test_norm(self, name, groups, layout, half, device):
        make, reference = NORMS[name]
        layer = randomized(make(), device)
        formula, state = reference()
        for _ in range(3):
            x, exact = images(half, layout, groups)
            exact = exact.contiguous().requires_grad_()
            y, dy, dx = call(layer, x, device, half)
            p = [q.detach().cpu().double().requires_grad_() for q in layer.parameters()]
            expected = torch.cat([formula(part, *p) for part in exact.split(SIZE)])
            expected.backward(dy)
            close(y, expected, CLOSE[half], "y")
            close(dx, exact.grad, CLOSE[half], "dx")
            for (key, ours), theirs in zip(layer.named_parameters(), p, strict=True):
                close(ours.grad, theirs.grad, CLOSE[half], key)
        for key, value in state.items():
            close(layer.get_buffer(key), value(), EXACT, key)

    @DEVICES
    @PRECISIONS
    @pytest.mark.parametrize("layout", FORMATS)
    @GROUPS
    @pytest.mark.parametrize("start", [0, 92, 998])
    def test_mabn(self, start, groups, layout, half, device):
        layer = randomized(norms.MABN2d(CHANNELS, SIZE, 16, momentum=0.9), device)
        formula = literal.MABN(CHANNELS, 4, momentum=0.9)
        layer.num_batches_averaged.fill_(start)
        formula.iteration = start
        for _ in range(4):
            x, exact = images(half, layout, groups)
            y, dy, dx = call(layer, x, device, half)
            weight, bias = (p.detach().cpu().double() for p in layer.parameters())
            ys, backward = [], []
            for part, grad in zip(exact.split(SIZE), dy.split(SIZE), strict=True):
                ys.append(formula.forward(part, weight, bias))
                backward.append(formula.backward(grad))
            expected, dweight, dbias = zip(*backward, strict=True)
            close(y, torch.cat(ys), CLOSE[half], "y")
            close(dx, torch.cat(expected), CLOSE[half], "dx")
            close(layer.weight.grad, sum(dweight), CLOSE[half], "weight")
            close(layer.bias.grad, sum(dbias), CLOSE[half], "bias")
        close(layer.running_square, formula.running, EXACT, "running_square")
        assert layer.num_batches_averaged == start + 4 * groups

    @DEVICES
    @PRECISIONS
    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("name", ["ws_gn", "bcn", "pws", "mabn"])
    def test_convolution(self, name, layout, half, device):
        made = norms.build(name, batch_size=SIZE).conv(CHANNELS, 6, 3, padding=1, stride=2)
        layer = made.to(memory_format=FORMATS[layout]).to(device)
        x, exact = images(half, layout, groups=3)
        y, dy, dx = call(layer, x, device, half)
        p = {
            key: q.detach().cpu().double().contiguous().requires_grad_()
            for key, q in layer.named_parameters()
        }
        weight = {
            "ws_gn": lambda: literal.standardize(p["weight"], True, 1e-5, False),
            "bcn": lambda: literal.standardize(p["weight"], True, 1e-5, True),
            "pws": lambda: literal.pws_weight(p["weight"], p["alpha"], 1e-3, CHANNELS * 9),
            "mabn": lambda: literal.center(p["weight"]),
        }[name]()
        exact = exact.contiguous().requires_grad_()
        expected = literal.conv(exact, weight, p.get("bias"), padding=1, stride=2)
        expected.backward(dy)
        close(y, expected, CLOSE[half], "y")
        close(dx, exact.grad, CLOSE[half], "dx")
        for key, ours in layer.named_parameters():
            close(ours.grad, p[key].grad, CLOSE[half], key)


@DEVICES
@pytest.mark.parametrize("name", norms.names())
def test_a_network_computes_what_it_does_in_float64(name, device):
    """Every scheme as a whole: the loss, the gradients and the state of an update."""
    torch.manual_seed(1)
    scheme = norms.build(name, batch_size=4, sgd_batch_size=8)
    exact = models.build("resnet8", scheme=scheme, num_classes=3, in_channels=1).train()
    ours = copy.deepcopy(exact).to(device)
    exact = exact.double()
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    if name in ("frn", "evonorm_s0", "evonorm_b0"):  # timm's take statistics in float32
        exact = exact.float()
    kind = next(exact.parameters()).dtype
    torch.nn.functional.cross_entropy(exact(x.to(kind)), y).backward()
    torch.nn.functional.cross_entropy(ours(x.to(device)), y.to(device)).backward()
    for (key, q), p in zip(ours.named_parameters(), exact.parameters(), strict=True):
        if name == "mimicnorm" and key == "fc.bias":
            continue  # which the batch norm behind takes off: its gradient is rounding
        if q.requires_grad:  # by length: rounding may turn one of thousands of ReLUs around
            error = (q.grad.cpu() - p.grad).norm() / p.grad.norm().clamp(min=1e-6)
            assert error < 2e-2, f"{key}: off by {error:.1e} of its length"
    for (key, q), b in zip(ours.named_buffers(), exact.buffers(), strict=True):
        close(q, b, 1e-3, key)


# --- steps

PROTOCOLS = {"direct": (4, 4), "ghost": (12, 12), "accumulate": (12, 4)}  # SGD batch and forward


def recipe(**values):
    common = OmegaConf.load(ROOT / "configs" / "config.yaml").recipe
    return OmegaConf.merge(
        common, OmegaConf.load(ROOT / "configs" / "recipe" / "cifar.yaml"), values
    )


def make_step(name, protocol, device, precision="float32", **how):
    torch.manual_seed(1)
    sgd_batch, forward = PROTOCOLS[protocol]
    scheme = norms.build(name, batch_size=4, sgd_batch_size=sgd_batch)
    model = models.build("resnet8", scheme=scheme, num_classes=3, in_channels=1).to(device).train()
    plan = Plan(4, sgd_batch, 1, forward, 0.02)
    return Step(model, plan, recipe(precision=precision), **how)


def updates(step, device, count=8):
    """The losses, and how many answers were right. Small steps: at larger ones a rounding error
    turns a ReLU around, and another run begins."""
    rng = torch.Generator().manual_seed(2)
    kept = []
    for update in range(count):
        x = torch.randn((step.plan.sgd_batch, 1, 8, 8), generator=rng).to(device)
        y = torch.randint(0, 3, (step.plan.sgd_batch,), generator=rng).to(device)
        loss, right = step(x, y, 0.02 / (1 + update))
        kept.append(torch.stack([loss, right]).clone())
    return torch.stack(kept).cpu().double()


def same(name, protocol, device, tolerance, **how):
    eager, other = (make_step(name, protocol, device, **h) for h in ({}, how))
    expected, found = updates(eager, device), updates(other, device)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=tolerance, atol=tolerance)
    pairs = zip(other.model.state_dict().items(), eager.model.state_dict().values(), strict=True)
    for key, (ours, theirs) in ((key, (a, b)) for (key, a), b in pairs):
        close(ours, theirs.cpu(), 10 * tolerance, key)


EVERY = [pytest.param(*CUDA.values, n, p, marks=CUDA.marks) for n in SCHEMES for p in PROTOCOLS]
STEPS = pytest.mark.parametrize(("device", "name", "protocol"), EVERY)
AND_ON_CPU = pytest.mark.parametrize(
    ("device", "name", "protocol"), [("cpu", "mabn", protocol) for protocol in PROTOCOLS] + EVERY
)


@AND_ON_CPU
def test_captured_steps_give_the_same_losses(name, protocol, device):
    """On a CPU, which records nothing, two steps that are the same."""
    same(name, protocol, device, 1e-3, **({"graph": True} if device == "cuda" else {}))


@STEPS
def test_bfloat16_is_captured_as_it_is(name, protocol, device):
    """Autocast keeps casts of the weights: a graph must not keep those of its first update."""
    eager, other = (make_step(name, protocol, device, "bfloat16", graph=g) for g in (False, True))
    expected, found = (updates(step, device)[:, 0] for step in (eager, other))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@AND_ON_CPU
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_no_step_waits_for_the_device(name, protocol, captured, device):
    how = {"graph": True} if captured and device == "cuda" else {}
    step = make_step(name, protocol, device, **how)
    x = torch.randn(step.plan.sgd_batch, 1, 8, 8).to(device)
    y = (torch.arange(len(x)) % 3).to(device)
    for _ in range(5):  # cuDNN's choices are made, a graph is recorded
        step(x, y, 0.02)
    try:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        losses = [step(x, y, 0.02 / (1 + update))[0].clone() for update in range(3)]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


# --- distributed


def run(*args, environment=None):
    made = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | (environment or {}),
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout


def weights(runs):
    [file] = runs.glob("s/*/last.pt")
    return torch.load(file, weights_only=True, map_location="cpu")["model"]


@ON_GPU
def test_a_process_that_torchrun_started_alone_is_none(tmp_path, device):
    keys = ["norm=mabn", "batch=4", "protocol=ghost", "protocol.sgd_batch=16", "recipe.updates=5"]
    keys += [f"device={device}", "study=s", "runtime.progress=none"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    for place, before in (("alone", []), ("started", torchrun)):
        run(*before, "train.py", *keys, f"runtime.runs={tmp_path / place}")
    ours, theirs = (weights(tmp_path / place) for place in ("started", "alone"))
    for key, value in theirs.items():
        close(ours[key], value, 1e-3, key)


WORLD = """
import sys, torch
import torch.distributed as dist
import tests.test_gpu as t
from training import distributed

device, file, scheme = sys.argv[1:]
alone = t.updates(t.make_step(scheme, "ghost", device), device)
backend = {"cuda": "nccl", "cpu": "gloo"}[device]
dist.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
distributed.world_size = lambda: 2  # so that everything is sent round, to itself
step = t.make_step(scheme, "ghost", device)
together = t.updates(step, device)
assert step.parallel is not step.network  # DistributedDataParallel
torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
dist.destroy_process_group()
print("equal")
"""


@DEVICES
def test_gradients_that_went_round_a_world_of_one_are_the_same(tmp_path, device):
    """NCCL on a GPU, with one process."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    out = run("-c", WORLD, device, str(tmp_path / "store"), "bn", environment=path)
    assert out.strip() == "equal"


# --- compiled: last, since it takes the longest


@STEPS
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, in torch 2.11
def test_compiled_steps_give_the_same_losses(name, protocol, device):
    same(name, protocol, device, 3e-3, compiled=True)
