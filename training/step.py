"""One optimizer step, and all that it changes."""

import logging
import time
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms import Scheme
from training import distributed, optimizer
from training.compile import EAGER, Choice, compiled, first_line
from training.evaluation import batch_norms
from training.graph import CUDAGraphStep
from training.protocol import Plan
from training.schema import Recipe

log = logging.getLogger("smallbatch")


class Step:
    """`step(images, labels, lr)`: forward and backward over this process's part of the SGD batch,
    `plan.micro_batch` images at a time, and one update of the weights.

    `labels`: (S,) classes, or (S, classes) shares of mixed images, whose right answer is the class
    with the largest. Returns the mean loss of that part and how many answers are right, both still
    on the device. With `graph` all calls must have the same number of images.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recipe: Recipe,
        choice: Choice = EAGER,
        graph: bool = False,
        scheme: Scheme | None = None,
    ):
        self.model, self.plan, self.recipe = model, plan, recipe
        self.after_step = scheme.after_step if scheme else None
        self.second_pass = scheme.second_pass if scheme else None
        self.network = compiled(model, choice.mode)
        self.parallel: Any = None
        self.choice = choice
        self.device = next(model.parameters()).device
        half = torch.float16 if recipe.precision == "float16" else torch.bfloat16
        self.autocast = torch.autocast(
            self.device.type, half, enabled=recipe.precision != "float32"
        )
        self.optimizer = optimizer.build(model, recipe, plan.lr)
        self.clipped = optimizer.all_but_the_head(model) if recipe.clip == "agc" else []
        # On a GPU learning rates lie there, where a recorded step finds them.
        groups = self.optimizer.param_groups if self.device.type == "cuda" else []
        self.lr = [torch.tensor(plan.lr, device=self.device) for _ in groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        self.average: Any = None
        if recipe.ema:
            # PyTorch's AveragedModel averages counters as well, begins with the first update's
            # weights and asks for its counter at each update, which no CUDA graph can record.
            from timm.utils import ModelEmaV3  # two seconds

            self.average = ModelEmaV3(model, recipe.ema)
        self.graph_step = CUDAGraphStep(self.compute, self.device) if graph else None
        self.frozen = False

    @property
    def eval_model(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.average.module if self.average else self.model

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        self.warm_up(images, labels)
        for i, group in enumerate(self.optimizer.param_groups):
            own = lr / group.get("lr_divisor", 1.0)
            group["lr"] = self.lr[i].fill_(own) if self.lr else own
        return (self.graph_step or self.compute)(images, labels)

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """At the first call, passes that leave no trace. One compiles; where that fails, it is said
        and the network goes on as it is. With several processes another is DDP's first, after which
        it rearranges its buckets: a run that goes on adds up gradients in the same order."""
        if self.parallel is not None:
            return
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        several = distributed.world_size() > 1
        x, y = images[: self.plan.micro_batch], labels[: self.plan.micro_batch]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self.choice.mode != "false":
                self.compile(x, y)
            elif several:
                self.backward(self.network, x, y)
            self.parallel = self.network
            if several:
                has_unused = any(p.grad is None for p in self.model.parameters() if p.requires_grad)
                self.parallel = distributed.data_parallel(self.network, has_unused)
                self.backward(self.parallel, x, y)
        self.model.load_state_dict(state)

    def compile(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, about itself
                self.backward(self.network, images, labels)
            log.info(f"  compiled in {time.perf_counter() - start:.0f} s")
        except Exception as error:  # of four libraries
            log.warning(
                f"  runtime.compile={self.choice.mode}: torch.compile does not work here "
                f"({first_line(error)}); going on without"
            )
            for layer in self.model.modules():
                layer._compiled_call_impl = None
            self.network, self.choice = self.model, Choice("false", "compiling failed")

    def backward(self, network: Any, images: Tensor, labels: Tensor) -> None:
        with self.autocast:
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()

    def compute(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """All of it on the device, waiting for nothing."""
        self.optimizer.zero_grad()
        loss, correct = torch.zeros(2, device=self.device).unbind()
        passes = [*zip(*(t.split(self.plan.micro_batch) for t in (images, labels)), strict=True)]
        for left, (x, y) in zip(reversed(range(len(passes))), passes, strict=True):
            # Only the last pass averages over processes, what all of them have added up.
            with self.parallel.no_sync() if left and self.plan.devices > 1 else nullcontext():
                with self.autocast:
                    logits = self.parallel(x)
                part = F.cross_entropy(
                    logits.float(), y, label_smoothing=self.recipe.label_smoothing
                ) * (len(y) / len(labels))
                self.scaler.scale(part).backward()
            loss += part.detach()
            correct += (logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
        if self.clipped:
            from timm.utils import adaptive_clip_grad  # two seconds

            self.scaler.unscale_(self.optimizer)
            adaptive_clip_grad(self.clipped, self.recipe.clip_factor)
        elif self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), float(self.recipe.clip))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.after_step:
            self.after_step(self.model)
        if self.average:
            self.average.update(self.model)
        if self.second_pass:
            with torch.no_grad(), self.second_pass(self.model), self.autocast:
                for x in images.split(self.plan.micro_batch):
                    self.network(x)
        return loss, correct

    @torch.no_grad()
    def take_buffers(self, other: nn.Module) -> None:
        """The network, and the average of its weights, get the buffers of another such network."""
        for model in (self.model, self.eval_model):
            for value, new in zip(model.buffers(), other.buffers(), strict=True):
                value.copy_(new)

    def freeze_statistics(self) -> None:
        """Until the network's mode is set anew, its batch norms normalize by running statistics."""
        for layer in batch_norms(self.model):
            layer.eval()
        if self.graph_step and not self.frozen:
            self.graph_step = CUDAGraphStep(self.compute, self.device)
        self.frozen = True

    def state_dict(self) -> dict[str, Any]:
        """Its part of a checkpoint; of the other processes, what is their own."""
        own = {"buffers": dict(self.model.named_buffers()), **self.rng()}
        if self.average:
            own["ema"] = dict(self.eval_model.named_buffers())
        _, *others = distributed.gather(own) or [0]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **self.rng(),
            **({"ema": self.eval_model.state_dict()} if self.average else {}),
            **({"others": others} if others else {}),
        }

    def rng(self) -> dict[str, Any]:
        """States of generators, for a model's own randomness, such as dropout."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {
            "rng": [torch.get_rng_state(), *cuda],
            "threads": torch.get_num_threads(),
            "compiled": self.choice.mode,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` for a checkpoint of another number of processes."""
        others = state.get("others", [])
        if len(others) + 1 != self.plan.devices:
            raise ValueError(
                f"devices={self.plan.devices}: the checkpoint is of {len(others) + 1} processes; "
                f"expected as many"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.state.items():  # fused steps need one layout
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[key] = torch.empty_like(parameter).copy_(value)
        if self.average:
            self.eval_model.load_state_dict(state["ema"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        own = others[distributed.rank() - 1] if distributed.rank() else state
        self.model.load_state_dict(own.get("buffers", {}), strict=False)
        self.eval_model.load_state_dict(own.get("ema", {}), strict=False)
        torch.set_rng_state(own["rng"][0])
        if self.device.type == "cuda" and len(own["rng"]) > 1:
            torch.cuda.set_rng_state(own["rng"][1], self.device)
