"""What every layer that follows the batch does with its state, and what every layer owes PyTorch's
tools: batch norm's place in the class tree, factory arguments, resets, leaves of `torch.fx`."""

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import (
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    _CheckpointFrame,
)

from . import moments as m
from .backward import check_vmap
from .scheme import frozen_batch_norm

Numbers = TypeVar("Numbers", bound=tuple[Tensor, ...])
BATCH_NORM_STATE = ("running_mean", "running_var", "num_batches_tracked")


class Leaf(nn.Module):
    """A layer that `torch.fx` records as one call, as it does PyTorch's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, fx.Proxy)), None)
        if proxy is None:
            return super().__call__(*args, **kwargs)
        tracer: Any = proxy.tracer

        def record(*args: Any, **kwargs: Any) -> fx.Proxy:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, record, args, kwargs)


def repeated() -> bool:
    """Whether this forward pass runs inside a backward pass: then gradient checkpointing repeats
    one that has been, which moves no state again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpoint_frame(hooks: Any) -> weakref.ref[_CheckpointFrame] | None:
    """The region of non-reentrant gradient checkpointing that runs or is repeated, by the hooks
    that it puts around what autograd saves."""
    pack: Any = inspect.unwrap(hooks[0]) if hooks else None
    for cell in getattr(pack, "__closure__", None) or ():
        value = cell.cell_contents
        value = value() if isinstance(value, weakref.ref) else value  # while it is repeated
        if isinstance(value, _CheckpointFrame):
            return weakref.ref(value)
    return None


def uncounted() -> AbstractContextManager[Any]:
    """Selective checkpointing counts operations, and those that move state are not repeated."""
    if not torch.compiler.is_compiling():
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, _CachedTorchDispatchMode | _CachingTorchDispatchMode):
                return _disable_current_modes()
    return nullcontext()


@dataclass(eq=False)
class Pass:
    """A forward pass that gradient checkpointing may repeat."""

    statistics: tuple[Tensor, ...]
    numbers: Any
    frame: Any
    with_grad: bool
    sequence_nr: int  # of the next autograd node
    thread: int
    graph: int = -1  # the backward pass that has repeated it

    def had(self, statistics: tuple[Tensor, ...]) -> bool:
        pairs = list(zip(self.statistics, statistics, strict=True))
        return all(a.shape == b.shape and a.allclose(b, 1e-3, equal_nan=True) for a, b in pairs)


@torch.no_grad()
def settle(layer: nn.Module, before: list[Tensor]) -> None:
    """After a forward pass of another library's layer, which moved its own state: back to `before`,
    copies of its buffers, where the state of ours would not have moved."""
    if not before:
        return
    floats = [b.flatten() for b in layer.buffers() if b.is_floating_point()]
    moves = torch.cat(floats).isfinite().all() & (not repeated())
    for buffer, old in zip(layer.buffers(), before, strict=True):
        buffer.data.copy_(torch.where(moves, buffer, old))  # the backward pass never reads it


class BatchStatisticsNorm(Leaf, nn.BatchNorm2d):
    """A norm over groups of `batch_size` images (None: all of a batch) with state that every
    training batch moves. (N, C, *) -> (N, C, *); in training N is a multiple of `batch_size`.

    It is an `nn.BatchNorm2d`, whatever the number of dimensions, to whoever freezes batch norms by
    class or sets `momentum` (weight of the new value; 0: nothing moves; None: the mean of all
    batches). `state`: its buffers and their first values, one for each channel; whole numbers are
    counters, whose names are batch norm's only where they mean the same. `shapes`: those of the
    buffers that are neither.
    """

    state: dict[str, float] = {}
    dim: int | None = None  # of the maps, where `convert` has seen it: `fold` has to know
    init_scale = 1.0  # what the gain starts at
    centers = True  # whether the mean is removed
    behind = ""  # what it does after the normalization
    batch_size: int | None
    running_mean: Any  # None where a tool has taken them away
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self,
        num_features: int,
        batch_size: int | None,
        eps: float,
        momentum: float | None,
        affine: bool,
        device: Any,
        dtype: Any,
        **shapes: tuple[int, ...],
    ):
        nn.Module.__init__(self)
        self.num_features, self.batch_size = num_features, batch_size
        self.eps, self.momentum, self.track_running_stats = eps, momentum, True
        for name in ("weight", "bias"):
            values = torch.empty(num_features, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(values) if affine else None)
        for name, value in self.state.items():
            counter = isinstance(value, int)
            shape = shapes.get(name, () if counter else (num_features,))
            type_ = torch.int64 if counter else dtype
            self.register_buffer(name, torch.empty(shape, device=device, dtype=type_))
        self._recent: deque[Pass] = deque(maxlen=64)
        self.reset_parameters()

    @property
    def affine(self) -> bool:  # type: ignore[override]
        """Whether there are a gain and a shift per channel."""
        tool = sys._getframe(1).f_code.co_name
        behind = "activation of what was a norm and activation in one"
        behind = behind if hasattr(self, "act") else self.behind
        if behind and tool in ("convert_sync_batchnorm", "freeze_batch_norm_2d"):
            raise ValueError(
                f"{type(self).__name__}: {tool} would lose the {behind}; set these layers to "
                f"evaluation mode, or leave them as they are"
            )
        if tool == "convert_sync_batchnorm" and (
            self.batch_size is not None or "num_batches_tracked" not in self.state
        ):
            raise ValueError(
                f"{type(self).__name__}: nn.SyncBatchNorm has no groups of images that share "
                f"statistics; convert with norm=sync_bn instead, or leave these layers as they are"
            )
        return self.weight is not None

    def reset_running_stats(self) -> None:
        """Set the state to its first values."""
        for name, value in self.state.items():
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)
        self._recent.clear()

    def reset_parameters(self) -> None:
        """Set gain, shift and state to their first values."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.constant_(self.weight, self.init_scale)
            nn.init.zeros_(self.bias)

    def gain_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,): the parameters, or ones and zeros without an affine."""
        if self.weight is not None:
            return self.weight, self.bias
        like = next(self.buffers())
        return like.new_ones(self.num_features), like.new_zeros(self.num_features)

    def forward(self, x: Tensor) -> Tensor:
        m.check_input(x, self.num_features)
        if x.shape[0] and (self.training or self.running_mean is None):
            return self.normalize(x)
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *state, training=False, eps=self.eps)

    def normalize(self, x: Tensor) -> Tensor:
        """What it computes in training."""
        raise NotImplementedError

    def apply_statistics(self, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        """(x - mean) * inverse, by (G, C) numbers, with gain and shift."""
        weight, bias = self.gain_and_shift()
        scale = weight * inverse
        return m.scale_and_shift(x, scale, bias - mean * scale)

    def fold(self) -> nn.Module:
        """What it computes in evaluation, in PyTorch's own layers: see `norms/fold.py`."""
        if self.running_mean is None:
            return self
        return frozen_batch_norm(self, self.running_mean, self.running_var)

    def once(self, update: Callable[..., Numbers], *statistics: Tensor) -> Numbers:
        """`update(*statistics)`, which may move the state; where gradient checkpointing repeats a
        forward pass, what that pass came to. Raises `RuntimeError` where it cannot be told."""
        if (
            torch.compiler.is_compiling()
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return update(*statistics)
        gone = [p for p in self._recent if p.frame and p.frame() is None]  # with their graph
        for p in gone:
            self._recent.remove(p)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        frame, with_grad = checkpoint_frame(hooks), torch.is_grad_enabled()
        with uncounted():
            if repeated():
                first = self.repeats(frame, statistics)
                numbers, again = first.numbers, frame != first.frame or not with_grad  # if nested
            else:
                numbers, again = update(*statistics), True
        if again and (hooks or not with_grad):  # else it is in no region
            nr = torch._C._autograd._get_sequence_nr()
            self._recent.append(Pass(statistics, numbers, frame, with_grad, nr, get_ident()))
        return numbers

    def repeats(self, frame: Any, statistics: tuple[Tensor, ...]) -> Pass:
        """The forward pass that is repeated now."""
        graph, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        inside = [p for p in self._recent if frame and p.frame == frame]
        # A reentrant region has no gradients inside, and a node that is made right before it runs.
        inside = inside or [
            p for p in self._recent if not p.with_grad and p.sequence_nr > node._sequence_nr()
        ]
        if len({p.thread for p in inside}) == 1:  # each thread counts its nodes
            for p in inside:
                if p.graph != graph and p.had(statistics):
                    p.graph = graph
                    return p
        same = [p for p in self._recent if p.had(statistics)]
        pairs = [zip(p.numbers, same[0].numbers, strict=True) for p in same[1:]]
        if not (same and all(torch.equal(a, b) for pair in pairs for a, b in pair)):
            raise RuntimeError(
                f"{type(self).__name__}: the backward pass repeats a forward pass that is "
                f"{'one of several with these' if same else 'too long ago for its'} statistics"
            )
        return same[0]

    @torch.no_grad()
    def commit(self, **moved: Tensor) -> None:
        """Move the state to these values, counters included, unless one is infinite or NaN: such a
        batch leaves all as it was, as a loss scaler skips a step."""
        if self.momentum == 0 or repeated():
            return
        with uncounted():
            floats = torch.cat([v.flatten() for v in moved.values() if v.is_floating_point()])
            finite = (floats * 0).sum() == 0  # what is infinite or NaN gives NaN
            for name, value in moved.items():
                buffer = getattr(self, name)
                check_vmap(type(self).__name__, value, buffer)
                buffer.copy_(torch.where(finite, value, buffer))

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None and name in BATCH_NORM_STATE and "num_batches_tracked" not in self.state:
            raise AttributeError(
                f"{type(self).__name__}: its {name} cannot be taken away, since the method is made "
                f"of moving statistics; expected evaluation mode, or norm=bn"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": deque(maxlen=self._recent.maxlen)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Not batch norm's own, which adds a counter to state dicts from before there was one.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def extra_repr(self) -> str:
        given = f"{self.num_features}, batch_size={self.batch_size}, eps={self.eps}"
        return f"{given}, momentum={self.momentum}, affine={self.weight is not None}"


class SquareNorm(BatchStatisticsNorm):
    """One by the mean square: nothing is centred."""

    running_square: Tensor
    centers = False

    @property
    def running_mean(self) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(self.running_square)

    @property
    def running_var(self) -> Tensor:  # type: ignore[override]
        return self.running_square
