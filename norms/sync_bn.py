"""Synchronized batch norm: `nn.SyncBatchNorm`, batch norm over the batches of all devices.

The formulas are those of `norms/bn.py` with statistics over `batch_size` images on each device. On
one device it is batch norm. PyTorch has no CPU form for several processes, and no ghost batches: a
forward pass holds one batch.
"""

from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import moments as m
from .backward import check_vmap
from .layer import BatchStatisticsNorm, Leaf, settle
from .scheme import CONV, Scheme, conv


class SyncBatchNorm2d(Leaf, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` for (N, C, H, W) that says in one line where it cannot run."""

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(num_features, eps, momentum)
        self.batch_size = batch_size

    def forward(self, input: Tensor) -> Tensor:
        m.check_input(input, self.num_features)
        if not self.training:
            return super().forward(input)
        check_vmap("SyncBatchNorm2d", input, self.running_mean)
        if input.shape[0] and self.batch_size not in (None, input.shape[0]):
            raise ValueError(
                f"norm=sync_bn: a forward pass of {input.shape[0]} images with batch="
                f"{self.batch_size}; its statistics span a whole pass: expected "
                f"protocol=accumulate, direct or protocol.micro_batch={self.batch_size}"
            )
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1:
            m.check_variance(input, None)
        elif input.device.type == "cpu":
            raise ValueError(
                f"norm=sync_bn: nn.SyncBatchNorm cannot join {world} processes on CPUs; "
                f"expected device=cuda, or norm=bn"
            )
        if input.device.type == "meta":  # shapes only: nothing to synchronize
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, True
            )
        before = [buffer.clone() for buffer in self.buffers()]
        try:
            return super().forward(input)
        finally:  # gradient checkpointing ends a repeated pass by an error
            settle(self, before)

    fold = BatchStatisticsNorm.fold


def scheme(batch_size: int | None = None, eps: float = 1e-5, momentum: float = 0.1) -> Scheme:
    """Plain convolutions and synchronized batch norm."""
    return Scheme(
        name="sync_bn",
        conv=partial(conv, CONV),
        norm=partial(SyncBatchNorm2d, batch_size=batch_size, eps=eps, momentum=momentum),
        channels_last=True,
    )
