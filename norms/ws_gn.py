"""Weight standardization with group norm. Qiao et al., arXiv 1903.10520, eqs. 7-8.

    W' = (W - mean(W)) / (std(W) + eps)          y = conv(x, W')

per output filter, over its n = C_in * k * k weights, without a gain; group norm follows. The
authors' code behind the GN+WS numbers takes the unbiased deviation (n - 1) and adds eps = 1e-5
outside the root; their BCN code (arXiv 1911.09738) adds it to the variance, inside; timm's
`StdConv2d` takes the biased variance and eps = 1e-6 inside (1e-8 in its BiT networks). All are
here; every convolution is standardized, the stem and the shortcuts included, the classifier is not.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from norms import cpu_kernels
from norms import moments as m
from norms import numbers as num
from norms.gn import grouping
from norms.scheme import Scheme, conv

_group_norm_backward = torch.ops.aten.native_group_norm_backward.default


def as_rows(weight: Tensor) -> Tensor:
    """A view of (C_out, C_in, k, k) filters as (1, C_out, n, 1), whichever way they are stored."""
    if not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)  # channels-last
    return weight.reshape(1, len(weight), -1, 1)


def as_filters(rows: Tensor, weight: Tensor) -> Tensor:
    """Back to the shape of `weight` and to the way in which it is stored."""
    if weight.is_contiguous():
        return rows.view_as(weight)
    return rows.view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def standardize(weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """scale * (W - mean) / sqrt(var + eps) with the biased variance, in one fused call: it is group
    norm over the filters as groups. Channels-last weights stay so, without a copy."""
    rows = as_rows(weight)
    return as_filters(F.group_norm(rows, len(weight), scale, eps=eps), weight)


class _Standardize(torch.autograd.Function):
    """(W - mean) / (std + eps) with the unbiased or the biased deviation: no call has this form.

    Its gradient, with n - 1 or n for m,

        dL/dW = (g - mean(g)) / (std + eps) - (W - mean) sum(g (W - mean)) / ((std + eps)^2 m std)

    is the one of group norm, scale * (W - mean) * inverse, at inverse^2 = n / (m std (std + eps))
    and scale = 1 / ((std + eps) inverse).
    """

    @staticmethod
    @num.quiet
    def forward(ctx, weight, eps, unbiased):
        rows = as_rows(weight)
        xp, mean, var = num.arrays(*m.moments(rows))
        ratio = rows.shape[2] / (rows.shape[2] - unbiased)
        std = xp.sqrt(var * ratio)
        by = 1 / (std + eps)
        inverse = xp.where(std > 0, xp.sqrt(ratio * by / std), 1.0)
        ctx.save_for_backward(weight, *(num.tensor(v[0]) for v in (mean, inverse, by / inverse)))
        return as_filters(m.affine(rows, by, -mean * by), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, mean, inverse, scale = ctx.saved_tensors
        rows, dy = as_rows(weight), dy if weight.is_contiguous() else dy.permute(0, 2, 3, 1)
        shape = (1, len(weight), rows.shape[2], len(weight))  # images, channels, positions, groups
        state = (mean[None], inverse[None], scale, *shape, [True, False, False])
        dy = m.promote(dy.reshape(rows.shape).contiguous())
        dx = _group_norm_backward(dy, m.promote(rows), *state)[0]
        return as_filters(m.to_type(dx, weight), weight), None, None


class _Compiled(torch.autograd.Function):
    """The same where norms/cpu_kernels.c has it."""

    @staticmethod
    def forward(ctx, weight, eps, unbiased):
        y, *kept = cpu_kernels.standardize(as_rows(weight), eps, unbiased)
        ctx.save_for_backward(weight, *kept)
        return as_filters(y, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, *kept = ctx.saved_tensors
        if not weight.is_contiguous():
            dy = dy.permute(0, 2, 3, 1)
        dx = cpu_kernels.standardize_backward(dy, as_rows(weight), *kept)
        return as_filters(dx, weight), None, None


class WSConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weights are standardized, the same in training and evaluation.

    `unbiased`: divide by n - 1; `eps_inside`: sqrt(var + eps) instead of std + eps.
    Raises `ValueError` where a filter has a single weight.
    """

    def __init__(
        self,
        *args,
        eps: float = 1e-5,
        unbiased: bool = True,
        eps_inside: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                f"WSConv2d: a filter of 1 weight cannot be standardized (in_channels="
                f"{self.in_channels}, groups={self.groups}, kernel_size={self.kernel_size})"
            )
        self.eps, self.unbiased, self.eps_inside = eps, unbiased, eps_inside

    def standardized(self) -> Tensor:
        """The weights that the convolution uses."""
        if not self.eps_inside:
            rows = as_rows(self.weight)
            compiled = rows.is_contiguous() and cpu_kernels.take(rows)
            function = _Compiled if compiled else _Standardize
            return function.apply(self.weight, self.eps, self.unbiased)
        if not self.unbiased:
            return standardize(self.weight, self.eps)
        # sqrt(var n / (n - 1) + eps) = sqrt(n / (n - 1)) sqrt(var + eps (n - 1) / n)
        n = self.weight[0].numel()
        scale = self.weight.new_full((self.out_channels,), ((n - 1) / n) ** 0.5)
        return standardize(self.weight, self.eps * (n - 1) / n, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


def scheme(
    batch_size: int | None = None,
    groups: int = 32,
    min_channels: int = 2,
    channels_per_group: int | None = None,
    eps: float = 1e-5,
    ws_eps: float = 1e-5,
    unbiased: bool = True,
    eps_inside: bool = False,
) -> Scheme:
    """Standardized convolutions and group norm (groups in narrow layers as in `norms/gn.py`)."""
    weights = partial(WSConv2d, eps=ws_eps, unbiased=unbiased, eps_inside=eps_inside)
    norm, check = grouping(groups, min_channels, channels_per_group, eps)
    return Scheme(
        name="ws_gn",
        conv=partial(conv, weights),
        norm=norm,
        batch_free=True,
        check=check,
    )
