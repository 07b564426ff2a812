"""Batch renormalization (BRN). Ioffe, arXiv 1702.03275, algorithm 1.

    sigma_B = sqrt(var + eps)                                 mean and biased variance of the batch
    r = clip(sigma_B / sigma, 1 / r_max, r_max)               constants for the gradient, from the
    d = clip((mean - mu) / sigma, -d_max, d_max)              moving values before their update
    y = gamma * ((x - mean) / sigma_B * r + d) + beta
    mu <- mu + momentum * (mean - mu)        sigma <- sigma + momentum * (sigma_B - sigma)

The moving average is of the standard *deviation*, with eps already inside, so at test time y =
gamma * (x - mu) / sigma + beta. The paper fixes gamma at 1. r_max and d_max start at 1 and 0, where
BRN is batch norm, for `start` optimizer steps, and then rise linearly until `r_until` and `d_until`
(the paper: 3 and 5, after 5,000, at 40,000 and 25,000 steps of its 130,000 or more, "gradually").
Passes over activations as in `norms/bn.py`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms import moments as m
from norms import numbers as num
from norms.numbers import Array
from norms.scheme import Scheme, conv, frozen_batch_norm


class BatchRenorm2d(nn.Module):
    """BRN over groups of `batch_size` images of a batch (None: all of them), in order.

    Shapes: (N, C, H, W) -> (N, C, H, W). `batches_per_step`: groups that make an optimizer step, in
    which the schedule counts; `fixed_weight`: gamma stays 1. Raises `ValueError` where a group
    holds one value per channel, or where `batch_size` does not divide N in training.
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        batches_per_step: int = 1,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: int = 5000,
        r_until: int = 40000,
        d_until: int = 25000,
        fixed_weight: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.01,
    ):
        super().__init__()
        self.num_features, self.batch_size = num_features, batch_size
        self.batches_per_step, self.start = batches_per_step, start
        self.limits = ((1.0, r_max, r_until), (0.0, d_max, d_until))
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=not fixed_weight)
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        m.check_4d(x)
        if not self.training:
            var = self.running_std.square() - self.eps  # which a batch norm adds again
            state = (self.running_mean, var, self.weight, self.bias)
            return F.batch_norm(x, *state, training=False, eps=self.eps)
        m.check_variance(x, self.batch_size)
        numbers = self.correct(*m.moments(x.detach()))
        return m.Normalize.apply(x, self.weight, self.bias, *numbers, True)

    @num.quiet
    def correct(self, mean: Array, var: Array) -> list[Tensor]:
        """From the moments of every map, (N, C): mean, 1 / sigma_B, r and d of every group, (G, C);
        and the update of the moving values by all of them."""
        xp, mean, var, running_mean, running_std, tracked = num.arrays(
            mean, var, self.running_mean, self.running_std, self.num_batches_tracked
        )
        mean, var = m.pooled(mean, var, self.batch_size)
        std = xp.sqrt(var + self.eps)
        batch = tracked + xp.arange(len(mean), device=mean.device)[:, None]
        step = num.as_type(batch // self.batches_per_step, std)
        r_max, d_max = (
            low + (high - low) * ((step - self.start) / max(1, until - self.start)).clip(0, 1)
            for low, high, until in self.limits
        )
        before, after = num.moving_average(running_mean, mean, self.momentum)
        std_before, std_after = num.moving_average(running_std, std, self.momentum)
        r = xp.clip(std / std_before, 1 / r_max, r_max)
        d = xp.clip((mean - before) / std_before, -d_max, d_max)
        running_mean[...] = after[-1]
        running_std[...] = std_after[-1]
        tracked += len(mean)
        return [num.tensor(v) for v in (mean, 1 / std, r, d)]

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        var = self.running_std**2 - self.eps  # which a batch norm adds again
        return frozen_batch_norm(self.weight, self.bias, self.running_mean, var, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, batch_size={self.batch_size}"


def scheme(
    batch_size: int | None = None,
    sgd_batch_size: int | None = None,
    r_max: float = 3.0,
    d_max: float = 5.0,
    start: int = 5000,
    r_until: int = 40000,
    d_until: int = 25000,
    fixed_weight: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.01,
) -> Scheme:
    """Plain convolutions and BRN."""
    if r_max < 1 or d_max < 0:
        key, value, least = ("r_max", r_max, 1) if r_max < 1 else ("d_max", d_max, 0)
        raise ValueError(f"norm.{key}={value}: expected a number from {least}")
    return Scheme(
        name="brn",
        conv=partial(conv, nn.Conv2d),
        norm=partial(
            BatchRenorm2d,
            batch_size=batch_size,
            batches_per_step=m.batches_per_step(batch_size, sgd_batch_size) or 1,
            r_max=r_max,
            d_max=d_max,
            start=start,
            r_until=r_until,
            d_until=d_until,
            fixed_weight=fixed_weight,
            eps=eps,
            momentum=momentum,
        ),
        channels_last=True,
    )
