"""Moving average batch normalization (MABN). Yan et al., arXiv 2001.06838, and their code.

Convolutions are centred, W - mean(W) per filter, so the mean need not be removed and the statistic
is chi = mean(x^2) over a batch of B images, per channel. With bars for means over the last
m = max(1, ceil(32 / B)) batches, the current one included:

    z = x / sqrt(chi_bar + eps)          r = clip(sqrt(chi_bar + eps) / sqrt(chi_run + eps), 1/5, 5)
    y = gamma * r * z + beta             chi_run <- momentum * chi_run + (1 - momentum) * chi_bar
    g = gamma * r * dL/dy                psi = mean(g * z)
    dL/dx = (g - z * psi_bar) / sqrt(chi_bar + eps)

r is a constant for the gradient and uses chi_run from before its update. For the first
max(m, warmup - 1) batches, chi and psi of the batch itself stand for their means, and r is 1 for
the first max(1000, warmup). At test time y = gamma * x / sqrt(chi_run + eps) + beta. This is the
authors' release; every count is in batches of B images, whatever passes through the network at
once.
"""

from functools import partial

import torch
from torch import Tensor, nn

from norms import moments as m
from norms.scheme import Scheme, conv


class CenteredConv2d(nn.Conv2d):
    """`nn.Conv2d` whose filters have zero mean (weight centralization)."""

    def standardized(self) -> Tensor:
        """The weights that the convolution uses."""
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


def _window_mean(window: Tensor, new: Tensor, own: Tensor) -> Tensor:
    """For each of G new (G, C) values the mean of the last m, itself included; `window` holds the
    m values before, oldest first, and is moved on. Where `own`, just the value itself."""
    size = window.shape[0]
    values = torch.cat([window, new])
    window.copy_(values[-size:])
    return torch.where(own[:, None], new, values.unfold(0, size, 1)[1:].mean(-1))


class _MABN(torch.autograd.Function):
    """The two directions above, for all groups of a batch at once. x: (N, C, H, W)."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        square = m.promote(x).square().mean((2, 3))
        square = m.split(square, layer.batch_size).mean(1)  # (G, C)
        groups = square.shape[0]
        size = x.shape[0] // groups
        step = layer.num_batches_tracked + torch.arange(1, groups + 1, device=x.device)
        own = (step <= layer.window_square.shape[0]) | (step < layer.warmup)
        chi = _window_mean(layer.window_square, square, own)
        running = m.moving_average(layer.running_square, chi, 1 - layer.momentum)
        r = torch.sqrt((chi + layer.eps) / (running[:-1] + layer.eps)).clamp(1 / 5, 5)
        r = torch.where((step > max(1000, layer.warmup))[:, None], r, 1.0)
        layer.running_square.copy_(running[-1])
        layer.num_batches_tracked += groups

        inverse = torch.rsqrt(chi + layer.eps)
        gain = r * inverse
        ctx.save_for_backward(x, weight, gain, inverse, own)
        ctx.layer, ctx.size = layer, size
        return m.affine(x, (weight * gain).repeat_interleave(size, 0), bias[None])

    @staticmethod
    def backward(ctx, dy):
        x, weight, gain, inverse, own = ctx.saved_tensors
        groups, size, area = gain.shape[0], ctx.size, x.shape[2] * x.shape[3]
        dy = m.promote(dy)
        dyx = (dy * x).sum((2, 3)).view(groups, size, -1).sum(1)  # (G, C)
        scale = weight * gain
        psi = scale * dyx / (size * area)
        psi = _window_mean(ctx.layer.window_product, psi, own)
        back = (inverse**2 * psi).repeat_interleave(size, 0)[:, :, None, None]
        dx = dy * scale.repeat_interleave(size, 0)[:, :, None, None] - x * back
        return dx.to(x.dtype), (gain * dyx).sum(0), dy.sum((0, 2, 3)), None


class MABN2d(nn.Module):
    """MABN over groups of `batch_size` images (None: all of a batch).

    Shapes: (N, C, H, W) -> (N, C, H, W); in training N must be a multiple of `batch_size`, else
    `ValueError`. The window holds max(1, ceil(moving_average_batch_size / batch_size)) batches;
    `momentum` is the weight of the old running value; `warmup` counts batches.
    """

    running_square: Tensor
    window_square: Tensor
    window_product: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        moving_average_batch_size: int = 32,
        momentum: float = 0.98,
        warmup: int = 100,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.num_features, self.batch_size = num_features, batch_size
        self.momentum, self.warmup, self.eps = momentum, warmup, eps
        window = max(1, -(-moving_average_batch_size // batch_size)) if batch_size else 1
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_square", torch.ones(num_features))
        self.register_buffer("window_square", torch.zeros(window, num_features))
        self.register_buffer("window_product", torch.zeros(window, num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        if self.training:
            return _MABN.apply(x, self.weight, self.bias, self)
        scale = self.weight * torch.rsqrt(self.running_square + self.eps)
        return m.affine(x, scale[None], self.bias[None])

    def extra_repr(self) -> str:
        window = self.window_square.shape[0]
        return f"{self.num_features}, batch_size={self.batch_size}, window={window}"


def scheme(
    batch_size: int | None = None,
    moving_average_batch_size: int = 32,
    momentum: float = 0.98,
    warmup: int = 100,
    eps: float = 1e-5,
) -> Scheme:
    """Centred convolutions and MABN, in the authors' release form."""
    return Scheme(
        name="mabn",
        conv=partial(conv, CenteredConv2d),
        norm=partial(
            MABN2d,
            batch_size=batch_size,
            moving_average_batch_size=moving_average_batch_size,
            momentum=momentum,
            warmup=warmup,
            eps=eps,
        ),
    )
