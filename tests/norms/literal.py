"""Every method as its paper's formulas read, on plain loops, for comparison with the layers.

One call is one batch of images that share statistics; nothing is vectorized over batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


class BN:
    def __init__(self, channels: int, momentum=0.1, eps=1e-5):
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        self.momentum, self.eps = momentum, eps

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        var = ((x - per_channel(mean)) ** 2).mean((0, 2, 3))
        n = x.numel() // x.shape[1]
        self.mean = (1 - self.momentum) * self.mean + self.momentum * mean.detach()
        self.var = (1 - self.momentum) * self.var + self.momentum * var.detach() * n / (n - 1)
        z = (x - per_channel(mean)) / per_channel(torch.sqrt(var + self.eps))
        return per_channel(weight) * z + per_channel(bias)

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = (x - per_channel(self.mean)) / per_channel(torch.sqrt(self.var + self.eps))
        return per_channel(weight) * z + per_channel(bias)


def channel_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps=1e-5) -> Tensor:
    """Group norm with an affine per group."""
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size]
            mean = part.mean()
            var = ((part - mean) ** 2).mean()
            z = (part - mean) / torch.sqrt(var + eps)
            out[n, g * size : (g + 1) * size] = weight[g] * z + bias[g]
    return out


class EstBN:
    def __init__(self, channels: int, rate: float, eps=1e-5):
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        self.rate, self.eps = rate, eps

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean((0, 2, 3))
            var = ((x - per_channel(self.mean)) ** 2).mean((0, 2, 3))
            self.mean = (1 - self.rate) * self.mean + self.rate * mean
            self.var = (1 - self.rate) * self.var + self.rate * var
        return self.evaluate(x, weight, bias)

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = (x - per_channel(self.mean)) / per_channel(torch.sqrt(self.var + self.eps))
        return per_channel(weight) * z + per_channel(bias)


class MABN:
    """The authors' release, by hand in both directions (no autograd)."""

    def __init__(self, channels: int, window: int, momentum=0.98, warmup=100, eps=1e-5):
        self.window, self.momentum, self.warmup, self.eps = window, momentum, warmup, eps
        self.iteration = 0
        self.running = torch.ones(channels)
        self.ring_x2 = torch.zeros(window, channels)
        self.ring_gz = torch.zeros(window, channels)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.iteration += 1
        own = self.iteration <= self.window or self.iteration < self.warmup
        x2 = (x * x).mean((0, 2, 3))
        self.ring_x2[self.iteration % self.window] = x2
        self.chi = x2 if own else self.ring_x2.mean(0)
        self.r = torch.sqrt(self.chi + self.eps) / torch.sqrt(self.running + self.eps)
        if self.iteration <= max(1000, self.warmup):
            self.r = torch.ones_like(self.r)
        else:
            self.r = self.r.clamp(1 / 5, 5)
        self.z = x / per_channel(torch.sqrt(self.chi + self.eps))
        self.running = self.momentum * self.running + (1 - self.momentum) * self.chi
        self.weight, self.own = weight, own
        return per_channel(weight) * per_channel(self.r) * self.z + per_channel(bias)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight, dbias."""
        g = dy * per_channel(self.weight) * per_channel(self.r)
        gz = (g * self.z).mean((0, 2, 3))
        self.ring_gz[self.iteration % self.window] = gz
        mean_gz = gz if self.own else self.ring_gz.mean(0)
        dx = (g - self.z * per_channel(mean_gz)) / per_channel(torch.sqrt(self.chi + self.eps))
        return dx, (dy * per_channel(self.r) * self.z).sum((0, 2, 3)), dy.sum((0, 2, 3))

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return per_channel(weight) * x / per_channel(torch.sqrt(self.running + self.eps)) + (
            per_channel(bias)
        )


def standardize(weight: Tensor, unbiased: bool, eps: float, inside: bool) -> Tensor:
    filters = []
    for w in weight:
        deviation = w - w.mean()
        var = (deviation**2).sum() / (w.numel() - int(unbiased))
        filters.append(deviation / (torch.sqrt(var + eps) if inside else torch.sqrt(var) + eps))
    return torch.stack(filters)


def pws_weight(weight: Tensor, alpha: Tensor, gamma: float, fan: int) -> Tensor:
    filters = []
    for w, a in zip(weight, alpha, strict=True):
        var = ((w - w.mean()) ** 2).mean()
        filters.append((2 / fan) ** 0.5 * a * (w - w.mean()) / torch.sqrt(var + gamma))
    return torch.stack(filters)


def center(weight: Tensor) -> Tensor:
    return torch.stack([w - w.mean() for w in weight])


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    return F.conv2d(x, weight, bias, **options)


class MABNImageNet(MABN):
    """The authors' training code: one call of `step` is an optimizer step of several batches."""

    def __init__(self, channels: int, window: int, momentum=0.98, warmup=100, eps=1e-5):
        super().__init__(channels, window, momentum, warmup, eps)
        self.seen = 0
        self.old_x2 = [torch.zeros(channels)] * window
        self.old_gz = [torch.zeros(channels)] * window

    def step(self, batches, dys, weight: Tensor, bias: Tensor):
        """y, dx, dweight, dbias of all batches, as lists."""
        self.iteration += 1
        own = self.seen < self.window
        r_is_one = self.iteration < self.warmup
        results, chis = [], []
        for x, dy in zip(batches, dys, strict=True):
            x2 = (x * x).mean((0, 2, 3))
            self.old_x2 = [*self.old_x2[1:], x2]
            chi = x2 if own else torch.stack(self.old_x2).mean(0)
            chis.append(chi)
            r = torch.sqrt(chi + self.eps) / torch.sqrt(self.running + self.eps)
            r = torch.ones_like(r) if r_is_one else r.clamp(1 / 5, 5)
            z = x / per_channel(torch.sqrt(chi + self.eps))
            g = dy * per_channel(weight) * per_channel(r)
            gz = (g * z).mean((0, 2, 3))
            self.old_gz = [*self.old_gz[1:], gz]
            mean_gz = gz if own else torch.stack(self.old_gz).mean(0)
            results.append(
                (
                    per_channel(weight) * per_channel(r) * z + per_channel(bias),
                    (g - z * per_channel(mean_gz)) / per_channel(torch.sqrt(chi + self.eps)),
                    (dy * per_channel(r) * z).sum((0, 2, 3)),
                    dy.sum((0, 2, 3)),
                )
            )
        mean = torch.stack(chis).mean(0)
        if self.iteration == 1:
            self.running = mean
        self.running = self.momentum * self.running + (1 - self.momentum) * mean
        self.seen += len(batches)
        return zip(*results, strict=True)


class BRN:
    def __init__(self, channels: int, r_max, d_max, start, r_until, d_until, momentum, eps=1e-5):
        self.mean, self.std = torch.zeros(channels), torch.ones(channels)
        self.bounds = (r_max, d_max, start, r_until, d_until)
        self.momentum, self.eps = momentum, eps
        self.batches, self.batches_per_step = 0, 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        r_end, d_end, start, r_until, d_until = self.bounds
        step = self.batches // self.batches_per_step
        rise = [min(1, max(0, (step - start) / (u - start))) for u in (r_until, d_until)]
        r_max, d_max = 1 + (r_end - 1) * rise[0], d_end * rise[1]
        mean = x.mean((0, 2, 3))
        std = torch.sqrt(((x - per_channel(mean)) ** 2).mean((0, 2, 3)) + self.eps)
        with torch.no_grad():
            r = (std / self.std).clamp(1 / r_max, r_max)
            d = ((mean - self.mean) / self.std).clamp(-d_max, d_max)
            self.mean = self.mean + self.momentum * (mean - self.mean)
            self.std = self.std + self.momentum * (std - self.std)
        self.batches += 1
        z = (x - per_channel(mean)) / per_channel(std) * per_channel(r) + per_channel(d)
        return per_channel(weight) * z + per_channel(bias)

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = (x - per_channel(self.mean)) / per_channel(self.std)
        return per_channel(weight) * z + per_channel(bias)


def frn(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None = None, eps=1e-5) -> Tensor:
    nu2 = (x**2).mean((2, 3), keepdim=True)
    y = per_channel(weight) * x / torch.sqrt(nu2 + eps) + per_channel(bias)
    return y if tau is None else torch.maximum(y, per_channel(tau))


def evonorm_s0(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int, eps=1e-5) -> Tensor:
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    std = torch.sqrt(((parts - mean) ** 2).mean((2, 3, 4), keepdim=True) + eps)
    top = (x * torch.sigmoid(per_channel(v) * x)).unflatten(1, (groups, -1))
    return per_channel(weight) * (top / std).flatten(1, 2) + per_channel(bias)


class EvoNormB0:
    def __init__(self, channels: int, momentum=0.1, eps=1e-3):
        self.var, self.momentum, self.eps = torch.ones(channels), momentum, eps

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, v: Tensor) -> Tensor:
        var = ((x - x.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))
        n = x.numel() // x.shape[1]
        self.var = (1 - self.momentum) * self.var + self.momentum * var.detach() * n / (n - 1)
        return self.formula(x, var, weight, bias, v)

    def formula(self, x, var, weight, bias, v):
        own = ((x - x.mean((2, 3), keepdim=True)) ** 2).mean((2, 3), keepdim=True)
        right = per_channel(v) * x + torch.sqrt(own + self.eps)
        bottom = torch.maximum(per_channel(torch.sqrt(var + self.eps)), right)
        return per_channel(weight) * x / bottom + per_channel(bias)


class Online:
    """The authors' loop over images, by hand in both directions (no autograd)."""

    def __init__(self, channels: int, a: float, b: float, eps=1e-5):
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        self.u, self.w = torch.zeros(channels), torch.zeros(channels)
        self.a, self.b, self.eps = a, b, eps

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.weight, self.z, self.scales = weight, [], []
        for image in x:
            mean = image.mean((1, 2))
            var = ((image - mean[:, None, None]) ** 2).mean((1, 2))
            scale = torch.sqrt(self.var + self.eps)
            self.z.append((image - self.mean[:, None, None]) / scale[:, None, None])
            self.scales.append(scale)
            change = mean - self.mean
            self.var = self.a * self.var + (1 - self.a) * var + self.a * (1 - self.a) * change**2
            self.mean = self.mean + (1 - self.a) * change
        return per_channel(weight) * torch.stack(self.z) + per_channel(bias)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight, dbias."""
        dx = []
        for grad, z, scale in zip(dy * per_channel(self.weight), self.z, self.scales, strict=True):
            h = grad - (1 - self.b) * self.w[:, None, None] * z
            self.w = self.w + (h * z).mean((1, 2))
            d = h / scale[:, None, None] - (1 - self.b) * self.u[:, None, None]
            self.u = self.u + d.mean((1, 2))
            dx.append(d)
        return torch.stack(dx), (dy * torch.stack(self.z)).sum((0, 2, 3)), dy.sum((0, 2, 3))

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = (x - per_channel(self.mean)) / per_channel(torch.sqrt(self.var + self.eps))
        return per_channel(weight) * z + per_channel(bias)


def layer_scaling(y: Tensor, eps=1e-5) -> Tensor:
    return torch.stack([image / torch.sqrt((image**2).mean() + eps) for image in y])


class PowerNorm:
    """The authors' code, by hand in both directions (no autograd)."""

    def __init__(self, channels: int, a: float, b: float, warmup: int, eps=1e-5):
        self.running, self.gamma = torch.ones(channels), torch.zeros(channels)
        self.a, self.b, self.warmup, self.eps, self.iteration = a, b, warmup, eps, 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.iteration += 1
        it, self.weight = self.iteration, weight
        self.q = (x**2).mean((0, 2, 3))
        if it <= self.warmup:
            self.z = x / per_channel(torch.sqrt(self.q + self.eps))
        else:
            self.z = x / per_channel(torch.sqrt(self.running + self.eps))
        if it < self.warmup:
            self.running = self.running * (it - 1) / it + self.q / it
        self.running = self.a * self.running + (1 - self.a) * self.q
        return per_channel(weight) * self.z + per_channel(bias)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight, dbias."""
        g = per_channel(self.weight) * dy
        h = g - (1 - self.b) * per_channel(self.gamma) * self.z
        self.gamma = self.gamma + (h * self.z).mean((0, 2, 3))
        dx = h / per_channel(torch.sqrt(self.q + self.eps))
        return dx, (dy * self.z).sum((0, 2, 3)), dy.sum((0, 2, 3))

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = x / per_channel(torch.sqrt(self.running + self.eps))
        return per_channel(weight) * z + per_channel(bias)


class CBN:
    """A convolution and the norm behind it, with derivatives by the weights from autograd."""

    def __init__(self, channels: int, window: int, burn_in: int, momentum=0.1, eps=1e-5):
        self.mean, self.var = torch.zeros(channels), torch.ones(channels)
        self.window, self.burn_in, self.momentum, self.eps = window, burn_in, momentum, eps
        self.past, self.batches = [], 0

    def __call__(self, x: Tensor, theta: Tensor, weight: Tensor, bias: Tensor, **options) -> Tensor:
        own = theta.detach().clone().requires_grad_()
        y = conv(x.detach(), own, **options)
        mu, nu = y.mean((0, 2, 3)), (y**2).mean((0, 2, 3))
        (dmu,) = torch.autograd.grad(mu.sum(), own, retain_graph=True)
        (dnu,) = torch.autograd.grad(nu.sum(), own)

        y = conv(x, theta, **options)
        mus, nus = [y.mean((0, 2, 3))], [(y**2).mean((0, 2, 3))]
        if self.batches >= self.burn_in:
            for old in self.past:
                change = own.detach() - old["theta"]
                mus.append(old["mu"] + (old["dmu"] * change).sum((1, 2, 3)))
                nus.append(old["nu"] + (old["dnu"] * change).sum((1, 2, 3)))
        mean = torch.stack(mus).mean(0)
        squares = [torch.maximum(nu, mu**2) for mu, nu in zip(mus, nus, strict=True)]
        var = torch.stack(squares).mean(0) - mean**2
        z = (y - per_channel(mean)) / per_channel(torch.sqrt(var + self.eps))

        now = {"mu": mu.detach(), "nu": nu.detach(), "dmu": dmu, "dnu": dnu, "theta": own.detach()}
        self.past = [*self.past, now][1 - self.window :] if self.window > 1 else []
        n, of_batch = y.numel() // y.shape[1], now["nu"] - now["mu"] ** 2
        self.mean = (1 - self.momentum) * self.mean + self.momentum * now["mu"]
        self.var = (1 - self.momentum) * self.var + self.momentum * of_batch * n / (n - 1)
        self.batches += 1
        return per_channel(weight) * z + per_channel(bias)


class MBN:
    """The memory as a list of past batches, the oldest first."""

    def __init__(self, size: int, eta: float, eps=1e-5):
        self.size, self.eta, self.eps, self.memory = size, eta, eps, []

    def combine(self, batches, weights):
        total = sum(w * n for (_, _, n), w in zip(batches, weights, strict=True))
        pairs = list(zip(batches, weights, strict=True))
        mean = sum(w * n * mu for (mu, _, n), w in pairs) / total
        var = sum(w * n * ((mu - mean) ** 2 + v) for (mu, v, n), w in pairs) / total
        return mean, var

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, lam: float, record=False) -> Tensor:
        mu = x.mean((0, 2, 3))
        own = (mu, ((x - per_channel(mu)) ** 2).mean((0, 2, 3)), x.numel() // x.shape[1])
        past = [lam * self.eta**i for i in reversed(range(len(self.memory)))]
        mean, var = self.combine([*self.memory, own], [*past, 1.0])
        if record:
            self.memory = [*self.memory, own][-self.size :]
        z = (x - per_channel(mean)) / per_channel(torch.sqrt(var + self.eps))
        return per_channel(weight) * z + per_channel(bias)

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights = [self.eta**i for i in reversed(range(len(self.memory)))]
        mean, var = self.combine(self.memory, weights)
        z = (x - per_channel(mean)) / per_channel(torch.sqrt(var + self.eps))
        return per_channel(weight) * z + per_channel(bias)


def scaled_standardize(weight: Tensor, gain: Tensor, eps=1e-6) -> Tensor:
    gamma = (2 / (1 - 1 / torch.pi)) ** 0.5
    filters = []
    for w, g in zip(weight, gain, strict=True):
        var = ((w - w.mean()) ** 2).mean()
        filters.append(g * gamma * (w - w.mean()) / torch.sqrt(w.numel() * (var + eps)))
    return torch.stack(filters)
