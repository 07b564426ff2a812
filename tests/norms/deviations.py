"""How far every method and variant is from its literal float64 form, as a table.

    python -m tests.norms.deviations > docs/deviations.md

Largest relative deviations, max |ours - literal| / max |literal|, of output, gradients (input and
every parameter) and running state, over six training steps of four batches of two images that pass
at once, while the literal form (tests/norms/literal.py) takes them one by one.
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn

import norms
from norms.nf import ScaledWSConv2d
from tests.norms import literal

CHANNELS, GROUPS, SIZE, STEPS = 8, 4, 2, 6
BRN = dict(r_max=1.5, d_max=0.5, start=4, r_until=16, d_until=12, momentum=0.2)
STATE = {  # buffer of the layer: attribute of the literal form
    "running_mean": "mean",
    "running_var": "var",
    "moving_mean": "mean",
    "moving_std": "std",
    "running_square": "running",
    "moving_means": "means",
    "moving_vars": "vars",
}


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def channel_affine(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    one = torch.ones(groups)
    z = literal.channel_norm(x, groups, one, 0 * one)
    return z * literal.per_channel(weight) + literal.per_channel(bias)


def bcn(x, weight, bias, bn_weight, bn_bias, bn):
    return literal.channel_norm(bn(x, bn_weight, bn_bias), 4, weight, bias)


class ByHand:
    """A literal form with two directions by hand as a function that autograd can call."""

    def __init__(self, reference):
        self.reference = reference

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reference = self.reference

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, bias):
                return reference.forward(x, weight, bias)

            @staticmethod
            def backward(ctx, dy):
                return reference.backward(dy)

        return Function.apply(x, weight, bias)


def one_by_one(reference, x, dy, parameters):
    """Batch after batch, each with its backward pass before the next."""
    x = x.clone().requires_grad_()
    parts = []
    for part, grad in zip(x.split(SIZE), dy.split(SIZE), strict=True):
        y = reference(part, *parameters)
        y.backward(grad, inputs=[x, *(p for p in parameters if p.requires_grad)])
        parts.append(y.detach())
    return torch.cat(parts), x.grad


def imagenet(reference, x, dy, parameters):
    y, dx, dweight, dbias = reference.step(x.split(SIZE), dy.split(SIZE), *parameters)
    for p, grad in zip(parameters, (dweight, dbias), strict=True):
        p.grad = sum(grad)
    return torch.cat(y).detach(), torch.cat(dx).detach()


def move_weights(layer, x) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.1 * torch.randn_like(p)


class Memory:
    """MBN's literal form, which remembers what passes a second time, after the weights moved."""

    def __init__(self, scheme):
        self.scheme, self.literal = scheme, literal.MBN(5, 0.9)

    def __call__(self, *args):
        return self.literal(*args, lam=0.5)

    def after(self, layer, x):
        move_weights(layer, x)
        with torch.no_grad(), self.scheme.second_pass(layer):
            layer(x)
            for part in x.split(SIZE):
                self.literal(part, layer.weight, layer.bias, 0.5, record=True)
        means, variances, _ = zip(*self.literal.memory, strict=True)
        self.means, self.vars = torch.stack(means), torch.stack(variances)


def norm_row(
    name, variant, layer, reference, state, run=one_by_one, after=None, channels=CHANNELS
) -> list[str]:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.5 * torch.randn_like(p)
    forward, gradient = [], []
    for _ in range(STEPS):
        x = torch.randn(GROUPS * SIZE, channels, 5, 3) * 2 + 0.5
        own = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(own)
        dy = torch.randn_like(y)
        y.backward(dy)
        parameters = [
            p.detach().clone().requires_grad_(p.requires_grad) for p in layer.parameters()
        ]
        expected, dx = run(reference, x, dy, parameters)
        forward.append(relative(y, expected))
        gradient += [relative(own.grad, dx)]
        gradient += [
            relative(p.grad, q.grad)
            for p, q in zip(layer.parameters(), parameters, strict=True)
            if p.requires_grad
        ]
        if after:
            after(layer, x)
    moved = [
        relative(value, getattr(state, STATE[key.rpartition(".")[2]]))
        for key, value in layer.named_buffers()
        if key.rpartition(".")[2] in STATE
    ]
    shown = f"{max(moved):.0e}" if moved else "none"
    return [name, variant, f"{max(forward):.0e}", f"{max(gradient):.0e}", shown]


def conv_row(name, variant, layer, weights) -> list[str]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, 6, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    own = {k: p.grad for k, p in layer.named_parameters()} | {"x": x.grad}
    exact = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}
    exact["x"] = x.detach().clone().requires_grad_()
    alpha = [exact[key] for key in ("alpha", "gain") if key in exact]
    expected = literal.conv(exact["x"], weights(exact["weight"], *alpha), exact["bias"])
    expected.backward(dy)
    worst = max(relative(own[k], exact[k].grad) for k in exact)
    return [name, variant, f"{relative(y, expected):.0e}", f"{worst:.0e}", "none"]


def rows() -> list[list[str]]:
    ws, pws = norms.WSConv2d, norms.PWSConv2d
    standardize = literal.standardize
    fan = 2 / 36  # of the 3x3 convolution below
    convs = [
        ("ws", "unbiased, eps outside", ws(4, 6, 3), lambda w: standardize(w, True, 1e-5, False)),
        ("ws", "unbiased, eps inside (BCN)", ws(4, 6, 3, eps_inside=True),
         lambda w: standardize(w, True, 1e-5, True)),
        ("ws", "biased, eps inside (paper)", ws(4, 6, 3, eps_inside=True, unbiased=False),
         lambda w: standardize(w, False, 1e-5, True)),
        ("ws", "biased, eps 1e-6 inside (timm)",
         ws(4, 6, 3, eps_inside=True, unbiased=False, eps=1e-6),
         lambda w: standardize(w, False, 1e-6, True)),
        ("pws", "gamma 1e-3", pws(4, 6, 3), partial(literal.pws_weight, gamma=1e-3, fan=36)),
        ("pws", "gamma 0.1, equiv", pws(4, 6, 3, gamma=0.1, equiv=True),
         partial(literal.pws_weight, gamma=0.1 * fan, fan=36)),
        ("pws", "gamma 1e-3, fan_out", pws(4, 6, 3, mode="fan_out"),
         partial(literal.pws_weight, gamma=1e-3, fan=54)),
        ("nf", "scaled standardization", ScaledWSConv2d(4, 6, 3), literal.scaled_standardize),
        ("mabn", "centred convolution", norms.CenteredConv2d(4, 6, 3), literal.center),
    ]  # fmt: skip

    def build(name, act=False, **options):
        scheme = norms.build(name, batch_size=SIZE, **options)
        return (scheme.norm_act if act else scheme.norm)(CHANNELS)

    bn, brn, brn2 = literal.BN(CHANNELS), literal.BRN(CHANNELS, **BRN), literal.BRN(CHANNELS, **BRN)
    bcn_bn, bcn_est = literal.BN(CHANNELS), literal.EstBN(CHANNELS, 0.1)
    est = literal.EstBN(CHANNELS, 0.1)
    release, clipped = (literal.MABN(CHANNELS, 4, momentum=0.9, warmup=6) for _ in range(2))
    late = build("mabn", moving_average_batch_size=8, momentum=0.9, warmup=6)
    late.num_batches_averaged.fill_(995)
    clipped.iteration = 995
    steps = literal.MABNImageNet(CHANNELS, 4, momentum=0.9, warmup=3)
    stream = dict(alpha_forward=0.9, alpha_backward=0.8)
    online = literal.Online(CHANNELS, 0.9, 0.8)
    power = literal.PowerNorm(CHANNELS, 0.9, 0.8, 12)
    b0 = literal.EvoNormB0(CHANNELS)
    cross = norms.build("cbn", batch_size=SIZE, window=3, burn_in=2)
    pair = nn.Sequential(cross.conv(4, CHANNELS, 3, padding=1), cross.norm(CHANNELS))
    cross.finish(pair)
    cbn = literal.CBN(CHANNELS, window=3, burn_in=2)
    memorized = norms.build("mbn", batch_size=SIZE, size=5)
    memory = Memory(memorized)
    window = dict(moving_average_batch_size=8, momentum=0.9)
    return [
        norm_row("bn", "", build("bn"), bn, bn),
        *(norm_row(n, "", build(n, **o), partial(channel_affine, groups=g), None)
          for n, o, g in (("gn", {"groups": 4}, 4), ("ln", {}, 1), ("in", {}, CHANNELS))),
        norm_row("brn", "gamma fixed", build("brn", **BRN), brn, brn),
        norm_row("brn", "gamma learned", build("brn", **BRN, fixed_weight=False), brn2, brn2),
        norm_row("bcn", "batch statistics", build("bcn", groups=4, statistics="batch"),
                 partial(bcn, bn=bcn_bn), bcn_bn),
        norm_row("bcn", "estimated statistics", build("bcn", groups=4, rate=0.1),
                 partial(bcn, bn=bcn_est), bcn_est),
        norm_row("bcn", "EstBN alone", norms.EstimatedBatchNorm2d(CHANNELS, 0.1, SIZE), est, est),
        norm_row("mabn", "release", build("mabn", **window, warmup=6), ByHand(release), release),
        norm_row("mabn", "release, clipping begins", late, ByHand(clipped), clipped),
        norm_row("mabn", "imagenet", build("mabn", **window, warmup=3, version="imagenet"),
                 steps, steps, imagenet),
        norm_row("online", "without compensation",
                 build("online", **stream, compensation="none"), ByHand(online), online),
        norm_row("cbn", "behind its convolution, weights move", pair, partial(cbn, padding=1), cbn,
                 after=move_weights, channels=4),
        norm_row("mbn", "second pass, weights move", memorized.norm(CHANNELS), memory, memory,
                 after=memory.after),
        norm_row("powernorm", "", build("powernorm", **stream, warmup=12), ByHand(power), power),
        norm_row("frn", "with threshold, timm", build("frn", act=True), literal.frn, None),
        norm_row("evonorm_s0", "timm", build("evonorm_s0", act=True, groups=4),
                 partial(literal.evonorm_s0, groups=4), None),
        norm_row("evonorm_b0", "timm", build("evonorm_b0", act=True), b0, b0),
        *(conv_row(*case) for case in convs),
    ]  # fmt: skip


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    header = ["method", "variant", "forward", "gradients", "state"]
    out = [
        "# How far each layer is from its formula",
        "",
        f"Made by `python -m tests.norms.deviations` (torch {torch.__version__}, CPU, float64):",
        "largest relative deviations from the literal form in "
        "[tests/norms/literal.py](../tests/norms/literal.py),",
        f"over {STEPS} steps of {GROUPS} batches of {SIZE} images that pass at once, while the "
        "literal form takes them",
        "one by one. timm's layers take their statistics in float32, whatever their input is.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * 5, *rows())),
    ]
    assert isinstance(norms.build("none").norm(4), nn.Identity)  # has no formula to compare with
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
