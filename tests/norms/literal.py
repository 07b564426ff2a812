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
