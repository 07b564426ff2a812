"""One optimizer step, and all that it changes."""

import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms import Scheme
from training import distributed, optimizer
from training.compile import EAGER, Choice, compiled, first_line
from training.graph import Recorded
from training.protocol import Plan
from training.run import Say


class Step:
    """`step(images, labels, lr)`: forward and backward over this process's part of the SGD batch,
    `plan.forward` images at a time, and one update of the weights.

    `labels`: (S,) classes, or (S, classes) shares of mixed images, whose right answer is the class
    with the largest. Returns the mean loss of that part and how many answers are right, both still
    on the device. With `graph` all calls must have the same number of images.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recipe: Any,
        choice: Choice = EAGER,
        graph: bool = False,
        scheme: Scheme | None = None,
        say: Say = print,
    ):
        self.model, self.plan, self.recipe = model, plan, recipe
        self.after_step = scheme.after_step if scheme else None
        self.second_pass = scheme.second_pass if scheme else None
        self.network = compiled(model, choice.mode)
        self.choice, self.tried, self.say = choice, choice.mode == "false", say
        self.device = next(model.parameters()).device
        half = torch.float16 if recipe.precision == "float16" else torch.bfloat16
        self.autocast = torch.autocast(
            self.device.type, half, enabled=recipe.precision != "float32"
        )
        self.optimizer = optimizer.build(model, recipe, plan.lr)
        self.clipped = optimizer.all_but_the_head(model) if recipe.clip == "agc" else []
        # On a GPU learning rates lie there, where a recorded step finds them.
        self.lr = [torch.tensor(plan.lr, device=self.device) for _ in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        self.gradients = distributed.flat_gradients(model)
        self.average: Any = None
        if recipe.ema:
            from timm.utils import ModelEmaV3  # two seconds

            self.average = ModelEmaV3(model, recipe.ema)
        self.recorded = Recorded(self.compute, self.device, say) if graph else None

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.average.module if self.average else self.model

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        self.try_compiler(images, labels)
        for group, on_device in zip(self.optimizer.param_groups, self.lr, strict=True):
            own = lr / group.get("lr_divisor", 1.0)
            group["lr"] = on_device.fill_(own) if self.device.type == "cuda" else own
        return (self.recorded or self.compute)(images, labels)

    def try_compiler(self, images: Tensor, labels: Tensor) -> None:
        """At the first call, one pass that leaves no trace, for what may be missing; where it
        fails, says so and goes on without."""
        if self.tried:
            return
        self.tried, start = True, time.perf_counter()
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        x, y = images[: self.plan.forward], labels[: self.plan.forward]
        try:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, about itself
                with self.autocast:
                    logits = self.network(x)
                F.cross_entropy(logits.float(), y).backward()
            self.say(f"  compiled in {time.perf_counter() - start:.0f} s")
        except Exception as error:  # of four libraries
            self.say(
                f"  runtime.compile={self.choice.mode}: torch.compile does not work here "
                f"({first_line(error)}); going on without"
            )
            for layer in self.model.modules():
                layer._compiled_call_impl = None
            self.network, self.choice = self.model, Choice("false", "compiling failed")
        self.model.load_state_dict(state)

    def compute(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """All of it on the device, waiting for nothing."""
        self.optimizer.zero_grad(set_to_none=not self.gradients)
        loss, correct = torch.zeros(2, device=self.device).unbind()
        passes = zip(images.split(self.plan.forward), labels.split(self.plan.forward), strict=True)
        for x, y in passes:
            with self.autocast:
                logits = self.network(x)
            part = F.cross_entropy(
                logits.float(), y, label_smoothing=self.recipe.label_smoothing
            ) * (len(y) / len(labels))
            self.scaler.scale(part).backward()
            loss += part.detach()
            correct += (logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
        for gradients in self.gradients:
            distributed.total(gradients).div_(self.plan.devices)
        if self.clipped:
            from timm.utils import adaptive_clip_grad  # two seconds

            self.scaler.unscale_(self.optimizer)
            adaptive_clip_grad(self.clipped, self.recipe.clip_factor)
        elif self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.after_step:
            self.after_step(self.model)
        if self.average:
            self.average.update(self.model)
        if self.second_pass:
            with torch.no_grad(), self.second_pass(self.model), self.autocast:
                for x in images.split(self.plan.forward):
                    self.network(x)
        return loss, correct

    def state_dict(self) -> dict[str, Any]:
        """Its part of a checkpoint; of the other processes, what is their own."""
        own = {"buffers": dict(self.model.named_buffers()), **self.rng()}
        if self.average:
            own["ema"] = dict(self.evaluated.named_buffers())
        _, *others = distributed.gather(own) or [0]
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **self.rng(),
            **({"ema": self.evaluated.state_dict()} if self.average else {}),
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
            self.evaluated.load_state_dict(state["ema"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        own = others[distributed.rank() - 1] if distributed.rank() else state
        self.model.load_state_dict(own.get("buffers", {}), strict=False)
        self.evaluated.load_state_dict(own.get("ema", {}), strict=False)
        torch.set_rng_state(own["rng"][0])
        if self.device.type == "cuda" and len(own["rng"]) > 1:
            torch.cuda.set_rng_state(own["rng"][1], self.device)
