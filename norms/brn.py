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
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import moments as m
from .layer import BatchStatisticsNorm
from .scheme import CONV, Scheme, conv


class BatchRenorm2d(BatchStatisticsNorm):
    """BRN over groups of `batch_size` images of a batch (None: all of them), in order.

    Shapes: (N, C, *) -> (N, C, *). `batches_per_step`: groups that make an optimizer step, in
    which the schedule counts; `fixed_weight`: gamma stays 1. Raises `ValueError` where a group
    holds one value per channel, or where `batch_size` does not divide N in training.
    """

    state = {"moving_mean": 0.0, "moving_std": 1.0, "num_batches_renormalized": 0}
    moving_mean: Tensor
    moving_std: Tensor
    num_batches_renormalized: Tensor

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
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(num_features, batch_size, eps, momentum, affine, device, dtype)
        self.batches_per_step, self.start = batches_per_step, start
        self.limits = ((1.0, r_max, r_until), (0.0, d_max, d_until))
        if affine:
            self.weight.requires_grad_(not fixed_weight)

    def normalize(self, x: Tensor) -> Tensor:
        m.check_variance(x, self.batch_size)
        mean, var = m.pool_images(*m.moments(x), self.batch_size)
        std = torch.sqrt(var + self.eps)
        r, d = self.once(self.correct, mean.detach(), std.detach())
        weight, bias = self.gain_and_shift()
        scale = weight * r / std
        shift = bias + weight * d - mean * scale
        return m.scale_and_shift(x, scale, shift)

    @torch.no_grad()
    def correct(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """From mean and sigma_B of every group to its r and d, (G, C), each by the moving values
        before it; and the update of these by all of them."""
        count = self.num_batches_renormalized
        batch = count + torch.arange(len(mean), device=mean.device)[:, None]
        step = (batch // self.batches_per_step).to(mean.dtype)
        r_max, d_max = (
            low + (high - low) * ((step - self.start) / max(1, until - self.start)).clamp(0, 1)
            for low, high, until in self.limits
        )
        average = m.moving_average(len(mean), self.momentum, count)
        before, after = average(self.moving_mean, mean)
        std_before, std_after = average(self.moving_std, std)
        r = torch.clamp(std / std_before, 1 / r_max, r_max)
        d = torch.clamp((mean - before) / std_before, -d_max, d_max)
        self.commit(
            moving_mean=after[-1],
            moving_std=std_after[-1],
            num_batches_renormalized=count + len(mean),
        )
        return r, d

    @property
    def running_mean(self) -> Tensor:  # type: ignore[override]
        return self.moving_mean

    @property
    def running_var(self) -> Tensor:  # type: ignore[override]  # to which a batch norm adds eps
        return self.moving_std.square() - self.eps


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
        conv=partial(conv, CONV),
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
