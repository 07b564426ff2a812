"""The training loop, one for every scheme, protocol and device."""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from norms import Scheme
from training import distributed, evaluation, graph
from training.checkpoints import Checkpoints
from training.compile import EAGER, Choice
from training.evaluation import evaluate, with_statistics
from training.optimizer import learning_rate
from training.probes import Probe, Sums
from training.progress import ProgressBar
from training.protocol import Plan, count_updates
from training.run import Run
from training.schema import Config
from training.step import Step
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
    compiled: Choice = EAGER
    """How the network was computed in the end."""
    graph: bool = False
    """Whether the steps came from a CUDA graph in the end."""
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

    def flush(self) -> float:
        """Fetch what is pending, for which the device must have finished; returns the last loss."""
        now = self.now
        pending = torch.stack([torch.stack(x) for x in zip(*self.pending, strict=True)])
        losses, corrects = distributed.all_reduce(pending).tolist()
        losses = [loss / distributed.world_size() for loss in losses]
        for update, loss in enumerate(losses, now.update - len(losses) + 1):
            if not math.isfinite(loss) and not now.diverged:
                now.diverged_at = update
        for loss in losses:  # in any grouping the same sum
            now.loss += loss
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
    cfg: Config,
    run: Run,
    tensorboard: TensorBoard,
    state: Any,
    probe: Probe | None = None,
    choice: Choice = EAGER,
    scheme: Scheme | None = None,
) -> Progress:
    """Train until the last update, or until the loss is no longer finite.

    `loader`: the SGD batches of an epoch by `train(epoch, start)`, `len(loader)` of them, and the
    test images by `test(size)`. `state`: a checkpoint to go on from, or None.
    """
    recipe, runtime = cfg.recipe, cfg.runtime
    per_epoch = len(loader)
    updates = count_updates(recipe, per_epoch)
    epochs = math.ceil(updates / per_epoch)
    if recipe.freeze_statistics >= epochs:
        raise ValueError(
            f"recipe.freeze_statistics={recipe.freeze_statistics}: expected less than the {epochs} "
            f"epochs of this run"
        )
    device = next(model.parameters()).device
    step = Step(model, plan, recipe, choice, graph.enabled(cfg, device), scheme)
    now = Progress()
    if state:
        step.load_state_dict(state)
        now = Progress(**state["progress"])
    meter = Meter(now)
    if probe:
        probe.sums = now.probed
    run.write_metrics(now.rows)

    def save() -> None:
        if meter.pending:
            meter.flush()
        run.save(step.state_dict() | {"progress": asdict(now)})

    checkpoints = Checkpoints(cfg.checkpoint.every_updates, cfg.checkpoint.every_minutes, save)
    with checkpoints, ProgressBar(runtime.progress, updates, now.update) as bar:
        while len(now.rows) < epochs and not now.diverged:
            epoch = len(now.rows)
            first = now.update - epoch * per_epoch
            last = min(per_epoch, updates - epoch * per_epoch)  # the epoch's updates
            model.train()
            rule = cfg.protocol.running_statistics
            if epoch >= epochs - recipe.freeze_statistics:
                if epoch == epochs - recipe.freeze_statistics and first == 0:
                    distributed.share_buffers(model, rule)
                    with step.autocast:
                        step.take_buffers(with_statistics(model, loader, cfg.evaluation))
                step.freeze_statistics()
            batches = checkpoints.interruptible(loader.train(epoch, first) if first < last else ())
            for seen, (images, labels) in enumerate(batches, first + 1):
                lr = learning_rate(now.update, updates, plan.lr, recipe)
                step.warm_up(images, labels)  # ahead of a probe, which is not to see it
                with probe.watch(now.update) if probe else nullcontext():
                    done = step(images, labels, lr)
                meter.add(*done)

                pause = seen % runtime.log_every == 0 or seen == last
                due = checkpoints.due(now.update, pause)
                if pause or due:
                    loss = meter.flush()
                    if pause:
                        tensorboard.loss(now.update, loss)
                    bar.update(epoch + 1, now, seen, plan.sgd_batch)
                    run.write_progress(now.update, updates, now.wall_seconds)
                if now.diverged or seen == last:
                    break
                if due:
                    save()
                    checkpoints.written()
            if now.diverged:
                break

            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "update": now.update,
                "learning_rate": learning_rate(now.update - 1, updates, plan.lr, recipe),
                "train_loss": now.loss / last,
                "train_top1": 100 * now.correct / (last * plan.sgd_batch),
                **dict.fromkeys(("test_loss", "test_top1", "test_top5"), ""),
                "images_per_second": last * plan.sgd_batch / now.epoch_seconds,
            }
            if (epoch + 1) % recipe.eval_every == 0 or now.update == updates:
                by = evaluation.evaluated_by(cfg) if step.frozen else cfg.evaluation
                with step.autocast, distributed.evaluation_buffers(step.eval_model, rule):
                    network = with_statistics(step.eval_model, loader, by)
                    size = evaluation.images_at_once(cfg.evaluation, runtime.eval_batch)
                    row |= evaluate(network, checkpoints.interruptible(loader.test(size)))
                if not math.isfinite(row["test_loss"]):
                    now.diverged_at = now.update
                    break
            meter.lap()
            row |= probe.pop_epoch() if probe else {}
            now.rows.append(row | {"seconds": now.wall_seconds})
            now.loss, now.correct, now.epoch_seconds = 0.0, 0, 0.0
            run.write_metrics(now.rows)
            tensorboard.epoch(row)
            save()
            bar.epoch(row, epochs)
            checkpoints.written()
    now.compiled = step.choice
    now.graph = bool(step.graph_step and step.graph_step.replay)
    if now.diverged:
        now.update = now.diverged_at or 0  # however late somebody looked
        save()
    return now
