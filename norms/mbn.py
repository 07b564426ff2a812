"""Memorized batch normalization with double forward propagation. Guo et al., arXiv 2010.04947.

The statistics (mu_i, var_i) of the last k batches of n_i positions, i = 1 the oldest, and those of
the current batch (n, mu_B, var_B, weight 1) normalize together:

    alpha_i = lambda * eta^(k - i)        S = n + sum_i alpha_i n_i
    mean = (n mu_B + sum_i alpha_i n_i mu_i) / S
    var = (n ((mu_B - mean)^2 + var_B) + sum_i alpha_i n_i ((mu_i - mean)^2 + var_i)) / S
    y = gamma * (x - mean) / sqrt(var + eps) + beta

The memory is a constant for the gradient. After every optimizer step the same images pass again
under the new weights, without gradients, and only what that pass finds is remembered. At test time
the memory alone normalizes. At lambda = 0 training is batch norm's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import moments as m
from .layer import BatchStatisticsNorm
from .scheme import CONV, Scheme, conv


class MemorizedBatchNorm2d(BatchStatisticsNorm):
    """MBN over groups of `batch_size` images (None: all of a batch).

    Shapes: (N, C, *) -> (N, C, *); in training N must be a multiple of `batch_size`. The memory has
    `size` batches and moves only within `recording`. `lam`: the values of lambda, of which the next
    holds from the optimizer steps in `lam_until` on; a step has `batches_per_step` batches.
    """

    moving_means: Tensor
    moving_vars: Tensor
    moving_counts: Tensor
    num_batches_memorized: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        size: int = 20,
        eta: float = 0.9,
        lam: Sequence[float] = (0.5,),
        lam_until: Sequence[int] = (),
        batches_per_step: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        self.state = {"moving_means": 0.0, "moving_vars": 0.0, "moving_counts": 0.0}
        self.state |= {"num_batches_memorized": 0}
        shapes = dict.fromkeys(("moving_means", "moving_vars"), (size, num_features))
        super().__init__(
            num_features, batch_size, eps, 1.0, affine, device, dtype,
            moving_counts=(size, 1), **shapes,
        )  # fmt: skip
        self.eta, self.lam, self.lam_until = eta, tuple(lam), tuple(lam_until)
        self.batches_per_step, self.recording = batches_per_step, False

    def normalize(self, x: Tensor) -> Tensor:
        m.check_variance(x, self.batch_size)
        mean, var = m.pool_images(*m.moments(x), self.batch_size)
        positions = float(x.numel() // (len(mean) * x.shape[1]))
        alpha = self.lambdas(len(mean)).to(mean.dtype) * self.decay()
        means, vars_, counts = self.memories(mean.detach(), var.detach(), positions)
        weights = alpha * counts
        total = weights.sum(1)  # (G, 1)
        weights = weights / torch.where(total > 0, total, 1.0)[:, None]
        past_mean = (weights * means).sum(1)
        past_var = (weights * ((means - past_mean[:, None]).square() + vars_)).sum(1)
        part = positions / (total + positions)  # of the current batch in all
        both = (1 - part) * past_mean + part * mean
        var = (1 - part) * (past_var + (past_mean - both).square()) + part * (
            var + (mean - both).square()
        )
        return self.apply_statistics(x, both, torch.rsqrt(var + self.eps))

    def decay(self) -> Tensor:
        """eta^(k - i), (k, 1)."""
        age = torch.arange(len(self.moving_counts) - 1, -1, -1, device=self.moving_counts.device)
        return (self.eta ** age.to(self.moving_counts.dtype))[:, None]

    def lambdas(self, groups: int) -> Tensor:
        """Of every group, (G, 1, 1)."""
        count = self.num_batches_memorized
        batch = count + torch.arange(groups, device=count.device) * self.records
        step = batch // self.batches_per_step
        lam = torch.full_like(step, self.lam[0], dtype=torch.float64)
        for value, until in zip(self.lam[1:], self.lam_until, strict=True):
            lam = torch.where(step >= until, value, lam)
        return lam[:, None, None]

    @property
    def records(self) -> bool:
        """Whether this pass is remembered; without momentum a tool wants statistics anew."""
        return self.recording or self.momentum is None

    @torch.no_grad()
    def memories(self, mean: Tensor, var: Tensor, positions: float) -> tuple[Tensor, ...]:
        """The memory as each group meets it: means and variances, (G, k, C), and positions, (G, k,
        1). Where this pass is remembered, every group meets those before it and joins them."""
        names, groups = ("moving_means", "moving_vars", "moving_counts"), len(mean)
        new = (mean, var, torch.full_like(mean[:, :1], positions))
        old = [getattr(self, name).clone() for name in names]
        if not self.records:
            return tuple(v.expand(groups, *v.shape) for v in old)
        together = [torch.cat(pair) for pair in zip(old, new, strict=True)]
        size = len(self.moving_counts)
        self.commit(
            **{name: v[groups:] for name, v in zip(names, together, strict=True)},
            num_batches_memorized=self.num_batches_memorized + groups,
        )
        return tuple(v.unfold(0, size, 1)[:groups].movedim(-1, 1) for v in together)

    def remembered(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the memory alone, 0 and 1 where it is empty."""
        weights = self.decay() * self.moving_counts
        total = weights.sum()
        weights = weights / torch.where(total > 0, total, 1.0)
        mean = (weights * self.moving_means).sum(0)
        var = (weights * ((self.moving_means - mean).square() + self.moving_vars)).sum(0)
        return mean, torch.where(total > 0, var, 1.0)

    @property
    def running_mean(self) -> Tensor:  # type: ignore[override]
        return self.remembered()[0]

    @property
    def running_var(self) -> Tensor:  # type: ignore[override]
        return self.remembered()[1]


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Within it, training passes are remembered."""
    layers = [layer for layer in model.modules() if isinstance(layer, MemorizedBatchNorm2d)]
    for layer in layers:
        layer.recording = True
    try:
        yield
    finally:
        for layer in layers:
            layer.recording = False


def scheme(
    batch_size: int | None = None,
    sgd_batch_size: int | None = None,
    size: int = 20,
    eta: float = 0.9,
    lam: Sequence[float] = (0.5,),
    lam_until: Sequence[int] = (),
    eps: float = 1e-5,
) -> Scheme:
    """Plain convolutions and memorized batch norm, which asks for a second forward pass."""
    numbers = all(isinstance(x, int | float) and x >= 0 for x in (*lam, *lam_until))
    if not lam or not numbers or len(lam) != len(lam_until) + 1:
        raise ValueError(
            f"norm.lam={list(lam)}: expected numbers from 0, one more than the optimizer steps of "
            f"norm.lam_until={list(lam_until)}"
        )
    return Scheme(
        name="mbn",
        conv=partial(conv, CONV),
        norm=partial(
            MemorizedBatchNorm2d,
            batch_size=batch_size,
            size=size,
            eta=eta,
            lam=tuple(lam),
            lam_until=tuple(lam_until),
            batches_per_step=m.batches_per_step(batch_size, sgd_batch_size) or 1,
            eps=eps,
        ),
        channels_last=True,
        second_pass=recording,
    )
