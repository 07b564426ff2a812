"""The training loop, one for every scheme, protocol and device."""

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.optimizer import learning_rate, sgd
from training.probes import Probe, Sums
from training.progress import Board
from training.protocol import Plan
from training.run import Run
from training.tensorboard import TensorBoard


@dataclass
class Progress:
    """How far a run is. With the weights and the generators, all that a checkpoint needs: order
    and augmentation follow from seed and epoch."""

    update: int = 0
    """Optimizer steps done."""
    loss: float = 0.0
    """Of this epoch's updates so far, added up."""
    correct: int = 0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    """Spent on updates since the run's first start, through all interruptions."""
    wall_seconds: float = 0.0
    """The same with evaluations and checkpoints."""
    diverged_at: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.csv."""
    probed: Sums = field(default_factory=dict)
    """What a probe has added up in this epoch so far."""

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None


class Meter:
    """Leaves losses and correct answers on the device until somebody looks."""

    def __init__(self, now: Progress):
        self.now = now
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.clock = time.perf_counter()

    def add(self, loss: Tensor, correct: Tensor) -> None:
        self.pending.append((loss, correct))
        self.now.update += 1

    def look(self) -> float:
        """Fetch what is pending, for which the device must have finished; returns the last loss."""
        now = self.now
        losses, corrects = (torch.stack(x).tolist() for x in zip(*self.pending, strict=True))
        for update, loss in enumerate(losses, now.update - len(losses) + 1):
            if not math.isfinite(loss) and not now.diverged:
                now.diverged_at = update
        now.loss += sum(losses)
        now.correct += int(sum(corrects))
        self.pending.clear()
        seconds = self.lap()
        now.epoch_seconds += seconds
        now.train_seconds += seconds
        return losses[-1]

    def lap(self) -> float:
        """Seconds since the last call, which all count as the run's."""
        start, self.clock = self.clock, time.perf_counter()
        self.now.wall_seconds += self.clock - start
        return self.clock - start


def train(
    model: nn.Module,
    loader: Any,
    plan: Plan,
    recipe: Any,
    runtime: Any,
    run: Run,
    tensorboard: TensorBoard,
    state: Any,
    probe: Probe | None = None,
) -> Progress:
    """Train until the last update, or until the loss is no longer finite.

    `loader`: the SGD batches of an epoch by `train(epoch, start)`, `len(loader)` of them, and the
    test images by `test(size)`. `state`: a checkpoint to go on from, or None.
    """
    per_epoch = len(loader)
    updates = recipe.updates or recipe.epochs * per_epoch
    epochs = math.ceil(updates / per_epoch)
    device = next(model.parameters()).device
    half = torch.float16 if recipe.precision == "float16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=recipe.precision != "float32")
    optimizer = sgd(model, recipe, plan.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    now = restore(state, model, optimizer, scaler) if state else Progress()
    meter = Meter(now)
    if probe:
        probe.sums = now.probed
    run.write_metrics(now.rows)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step: the mean loss of the SGD batch, and how many answers are right."""
        optimizer.zero_grad()
        loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for x, y in zip(images.split(plan.forward), labels.split(plan.forward), strict=True):
            with autocast:
                logits = model(x)
            part = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
            part = part * (len(y) / len(labels))
            scaler.scale(part).backward()
            loss += part.detach()
            correct += (logits.argmax(1) == y).sum()
        scaler.step(optimizer)
        scaler.update()
        return loss, correct

    with Board(runtime.progress, updates, now.update) as board:
        while now.update < updates and not now.diverged:
            epoch, first = divmod(now.update, per_epoch)
            last = min(per_epoch, updates - epoch * per_epoch)  # the epoch's updates
            model.train()
            for seen, (images, labels) in enumerate(loader.train(epoch, first), first + 1):
                lr = learning_rate(now.update, updates, plan.lr, recipe)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with probe.watch(now.update) if probe else nullcontext():
                    done = step(images, labels)
                meter.add(*done)

                save = runtime.checkpoint_every and now.update % runtime.checkpoint_every == 0
                if seen % runtime.log_every == 0 or save or seen == last:
                    tensorboard.loss(now.update, meter.look())
                    board.update(epoch + 1, now, seen, plan.sgd_batch)
                    run.tell(now.update, updates, now.wall_seconds)
                if now.diverged or seen == last:
                    break
                if save:
                    run.save(snapshot(model, optimizer, scaler, now))
            if now.diverged:
                break

            row = {
                "epoch": epoch + 1,
                "update": now.update,
                "learning_rate": lr,
                "train_loss": now.loss / last,
                "train_top1": 100 * now.correct / (last * plan.sgd_batch),
                **dict.fromkeys(("test_loss", "test_top1", "test_top5"), ""),
                "images_per_second": last * plan.sgd_batch / now.epoch_seconds,
            }
            if (epoch + 1) % recipe.eval_every == 0 or now.update == updates:
                with autocast:
                    row |= evaluate(model, loader.test(runtime.eval_batch))
                if not math.isfinite(row["test_loss"]):
                    now.diverged_at = now.update
                    break
            meter.lap()
            row |= probe.take() if probe else {}
            now.rows.append(row | {"seconds": now.wall_seconds})
            now.loss, now.correct, now.epoch_seconds = 0.0, 0, 0.0
            run.write_metrics(now.rows)
            tensorboard.epoch(row)
            board.epoch(row, epochs)
            run.save(snapshot(model, optimizer, scaler, now))
    if now.diverged:
        now.update = now.diverged_at or 0  # however late somebody looked
        run.save(snapshot(model, optimizer, scaler, now))
    return now


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean cross-entropy and the accuracies in %, over every image once."""
    model.eval()
    parts, count = [], 0
    for images, labels in batches:
        logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        parts.append(torch.stack([loss, hits[:, 0].sum(), hits.sum()]))
        count += len(labels)
    loss, top1, top5 = (torch.stack(parts).double().sum(0) / count).tolist()
    return {"test_loss": loss, "test_top1": 100 * top1, "test_top5": 100 * top5}


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, now: Progress
) -> dict[str, Any]:
    """A checkpoint. The generators' states are for a model's own randomness, such as dropout."""
    device = next(model.parameters()).device
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "progress": asdict(now),
        "rng": [torch.get_rng_state(), *cuda],
        "threads": torch.get_num_threads(),
    }


def restore(
    state: Any, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """Put a checkpoint back into model, optimizer and generators."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"][0])
    device = next(model.parameters()).device
    if device.type == "cuda" and len(state["rng"]) > 1:
        torch.cuda.set_rng_state(state["rng"][1], device)
    return Progress(**state["progress"])
