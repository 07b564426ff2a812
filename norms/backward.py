"""What layers share whose backward pass is not the derivative of their forward pass, and moves
state: MABN, PowerNorm, Online Norm. Their `autograd.Function`s keep the buffers as `ctx.state` and
begin and end `backward` with the two functions below."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_batched(x: Tensor) -> bool:
    """Whether it is several tensors to `torch.vmap`, alone or within another transform."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x) and not functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def vmap_error(layer: str) -> RuntimeError:
    return RuntimeError(
        f"{layer}: in training its statistics and gradients move from batch to batch, which "
        f"torch.vmap cannot follow; expected evaluation mode"
    )


def check_vmap(layer: str, value: Tensor, buffer: Tensor | None) -> None:
    """Raise `RuntimeError` where `torch.vmap` has several values for one state."""
    if buffer is None or torch.compiler.is_compiling():
        return
    if is_batched(value) and not is_batched(buffer):
        raise vmap_error(layer)


def check_float16(layer: str, x: Tensor) -> None:
    """Raise `ValueError` where a loss scale would change between the batches that are averaged."""
    if x.dtype == torch.float16 and torch.is_grad_enabled():
        raise ValueError(
            f"{layer}: averages gradients over batches, and float16 needs a loss scale that "
            f"changes between them; expected float32 or bfloat16"
        )


class _NoDerivative(torch.autograd.Function):
    """Its second argument, which depends on the others; asked for the derivative, an error."""

    @staticmethod
    def forward(layer: str, dx: Tensor, *on: Tensor) -> Tensor:
        return dx.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.layer}: its backward pass is not the derivative of a function, so there is no "
            f"second derivative through it in training; norm=bcn and norm=gn have one"
        )


def state_before(ctx: Any, layer: str, dy: Tensor) -> Sequence[Tensor]:
    """The state as the first backward pass over this graph finds it."""
    check_vmap(layer, dy, ctx.state[0])
    if ctx.before is None:
        ctx.before = [buffer.clone() for buffer in ctx.state]
    return ctx.before


def move_state(
    ctx: Any, layer: str, gradients: list[Tensor], moved: Sequence[Tensor], on: Sequence[Tensor]
) -> list[Tensor]:
    """Move the state, once and unless a value is infinite or NaN; returns the gradients, which
    depend on `on` and have no derivative."""
    if not ctx.frozen:
        finite = (torch.cat([v.flatten() for v in moved]) * 0).sum() == 0
        for buffer, value in zip(ctx.state, moved, strict=True):
            buffer.copy_(torch.where(finite, value, buffer))
        ctx.frozen = True  # another pass over this graph finds what this one found
    if torch.is_grad_enabled():
        gradients = [_NoDerivative.apply(layer, g, *on) for g in gradients]
    return gradients
