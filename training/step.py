"""One optimizer step, and all that it changes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.optimizer import sgd
from training.protocol import Plan


class Step:
    """`step(images, labels, lr)`: forward and backward over the SGD batch, `plan.forward` images at
    a time, and one update of the weights.

    Returns the mean loss of the SGD batch and how many answers are right, both still on the device.
    """

    def __init__(self, model: nn.Module, plan: Plan, recipe: Any):
        self.model, self.plan, self.recipe = model, plan, recipe
        self.device = next(model.parameters()).device
        half = torch.float16 if recipe.precision == "float16" else torch.bfloat16
        self.autocast = torch.autocast(
            self.device.type, half, enabled=recipe.precision != "float32"
        )
        self.optimizer = sgd(model, recipe, plan.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss, correct = torch.zeros(2, device=self.device).unbind()
        passes = zip(images.split(self.plan.forward), labels.split(self.plan.forward), strict=True)
        for x, y in passes:
            with self.autocast:
                logits = self.model(x)
            part = F.cross_entropy(
                logits.float(), y, label_smoothing=self.recipe.label_smoothing
            ) * (len(y) / len(labels))
            self.scaler.scale(part).backward()
            loss += part.detach()
            correct += (logits.argmax(1) == y).sum()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, correct

    def state_dict(self) -> dict[str, Any]:
        """Its part of a checkpoint. The generators' states are for a model's own randomness, such
        as dropout."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": [torch.get_rng_state(), *cuda],
            "threads": torch.get_num_threads(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"][0])
        if self.device.type == "cuda" and len(state["rng"]) > 1:
            torch.cuda.set_rng_state(state["rng"][1], self.device)
