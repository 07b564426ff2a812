"""The training loop, one for every scheme, protocol and device."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Plan
from training.optimizer import learning_rate, sgd
from training.progress import Board
from training.run import Run
from training.tensorboard import TensorBoard


@dataclass
class Progress:
    """How far a run is: with the weights, all that a checkpoint needs."""

    update: int = 0
    """Optimizer steps done."""
    loss: float = 0.0
    """Of this epoch's updates so far, added up."""
    correct: int = 0
    train_seconds: float = 0.0
    """Spent on updates, evaluation apart, since the run's first start."""
    epoch_seconds: float = 0.0
    wall_seconds: float = 0.0
    diverged_at: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.csv."""

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None


def train(
    model: nn.Module, loader: Any, plan: Plan, recipe: Any, runtime: Any, run: Run, state: Any
) -> Progress:
    """Train until the last update or until the loss is no longer finite.

    `loader`: the SGD batches of an epoch by `train(epoch, start)`, `len(loader)` of them, and the
    test images by `test(size)`. `state`: a checkpoint to go on from, or None.
    """
    per_epoch = len(loader)
    updates = recipe.updates or recipe.epochs * per_epoch
    epochs = math.ceil(updates / per_epoch)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    optimizer = sgd(model, recipe, plan.lr)
    now = Progress()
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        now = Progress(**state["progress"])
        restore_rng(state["rng"], device)

    def checkpoint() -> None:
        run.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": asdict(now),
                "rng": rng(device),
                "threads": torch.get_num_threads(),
            }
        )

    def step(images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One update; loss and number of correct answers stay on the device."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for x, y in zip(images.split(plan.forward), labels.split(plan.forward), strict=True):
            with autocast:
                logits = model(x)
            part = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
            part = part * (len(y) / len(labels))  # so that the parts add up to the batch's mean
            part.backward()
            loss += part.detach()
            correct += (logits.argmax(1) == y).sum()
        optimizer.step()
        return loss, correct

    clock = time.perf_counter()
    board = Board(runtime.progress, updates, now.update)
    tensorboard = TensorBoard(run.folder, now.update)
    pending: list[tuple[Tensor, Tensor]] = []  # on the device, of updates not yet looked at

    def look(epoch: int, seen: int) -> None:
        """Fetch what the last updates left on the device: the loop's only synchronization."""
        nonlocal clock
        if not pending:
            return
        losses, corrects = (torch.stack(x).tolist() for x in zip(*pending, strict=True))
        for i, loss in enumerate(losses):
            if not math.isfinite(loss) and not now.diverged:
                now.diverged_at = now.update - len(pending) + i + 1
        now.loss += sum(losses)
        now.correct += int(sum(corrects))
        pending.clear()
        elapsed = time.perf_counter() - clock
        clock += elapsed
        for name in ("train_seconds", "epoch_seconds", "wall_seconds"):
            setattr(now, name, getattr(now, name) + elapsed)
        speed = now.update * plan.sgd_batch / now.train_seconds
        top1 = 100 * now.correct / (seen * plan.sgd_batch)
        board.update(epoch + 1, now.update, now.loss / seen, top1, speed)
        tensorboard.loss(now.update, losses[-1])

    with board:
        while now.update < updates and not now.diverged:
            epoch, first = divmod(now.update, per_epoch)
            last = min(per_epoch, updates - epoch * per_epoch)  # of the updates of this epoch
            model.train()
            for seen, (images, labels) in enumerate(loader.train(epoch, first), first + 1):
                lr = learning_rate(now.update, updates, plan.lr, recipe)
                pending.append(step(images, labels, lr))
                now.update += 1
                save = runtime.checkpoint_every and now.update % runtime.checkpoint_every == 0
                if seen % runtime.log_every == 0 or save or seen == last:
                    look(epoch, seen)
                if now.diverged or seen == last:
                    break
                if save:
                    checkpoint()
            if now.diverged:
                break
            row = {
                "epoch": epoch + 1,
                "update": now.update,
                "learning_rate": lr,
                "train_loss": now.loss / last,
                "train_top1": 100 * now.correct / (last * plan.sgd_batch),
                "test_loss": "",
                "test_top1": "",
                "test_top5": "",
                "images_per_second": last * plan.sgd_batch / now.epoch_seconds,
                "seconds": 0.0,
            }
            if (epoch + 1) % recipe.eval_every == 0 or now.update == updates:
                with autocast:
                    row |= evaluate(model, loader.test(runtime.eval_batch))
            elapsed = time.perf_counter() - clock
            clock += elapsed
            now.wall_seconds += elapsed
            row["seconds"] = now.wall_seconds
            now.rows.append(row)
            now.loss, now.correct, now.epoch_seconds = 0.0, 0, 0.0
            run.write_metrics(now.rows)
            tensorboard.epoch(row)
            board.epoch(row, epochs)
            checkpoint()
    tensorboard.close()
    return now


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any) -> dict[str, float]:
    """Mean cross-entropy and the accuracies in %, over every image once."""
    model.eval()
    parts, count = [], 0
    for images, labels in batches:
        logits = model(images).float()
        best = logits.topk(min(5, logits.shape[1]), 1).indices
        hits = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        parts.append(torch.stack([loss, hits[:, 0].sum(), hits.sum()]))
        count += len(labels)
    loss, top1, top5 = torch.stack(parts).double().sum(0).tolist()
    return {
        "test_loss": loss / count,
        "test_top1": 100 * top1 / count,
        "test_top5": 100 * top5 / count,
    }


def rng(device: torch.device) -> dict[str, Tensor]:
    """The state of the global generators, which only a model's own randomness draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
