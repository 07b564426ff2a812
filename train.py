"""Train one network with one normalization at one batch size.

    python train.py norm=pws batch=2
    python train.py -m norm=bn,gn,ws_gn,bcn,pws,mabn batch=2,4,8,16,32 seed=0,1,2

`--help` lists all choices and keys; a run's folder follows from them.
"""

import signal
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out

from training import process

process.set_handlers(signal.SIG_DFL)  # no traceback while the rest is imported

import hydra
from omegaconf import DictConfig

from training import cli


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One run; returns its top-1 accuracy in %, or None if it diverged."""
    import torch  # here and not above: --help and a mistyped key need not wait for it

    import data
    import models
    import norms
    from training import (
        compile,
        config,
        debug,
        device,
        distributed,
        evaluation,
        graph,
        loop,
        probes,
        protocol,
        report,
    )
    from training.progress import log
    from training.run import Run
    from training.tensorboard import TensorBoard

    distributed.init(composed.devices)
    # Every mistake that can be seen without data is found before the run has a folder.
    cfg = config.check(composed)
    plan = protocol.plan(cfg)
    where = device.resolve(cfg.device)
    checking = getattr(cfg, "debug", None)  # a run that counts for nothing
    debug.check(checking, cfg.recipe, plan)
    source = data.resolve(cfg.data, plan.sgd_batch, cfg.recipe)
    options = {k: v for k, v in cfg.norm.items() if k != "name"}
    sizes = dict(batch_size=plan.batch, sgd_batch_size=plan.per_device_batch)
    scheme = norms.build(cfg.norm["name"], **sizes, **options)
    config.check_precision(cfg, scheme.loss_scaling)
    config.check_probe(cfg, scheme.second_pass is not None)
    torch.manual_seed(cfg.seed)
    model = models.build(
        **cfg.model,
        scheme=scheme,
        num_classes=source.num_classes,
        in_channels=source.channels,
        log=log.info,
    )
    evaluation.check_statistics(cfg.evaluation, cfg.recipe.freeze_statistics, model, scheme)
    probe = probes.build(cfg.probe.name, cfg.probe.every, model, plan.batch)
    shape = (plan.micro_batch, source.channels, source.size, source.size)
    models.dry_run(model, shape, source.num_classes, meta=plan.devices > 1)
    graph.enabled(cfg, where)
    work = compile.multiply_adds(model, shape[1:])

    with Run(composed, source.listing) as run:
        if over := run.result():
            log.info(f"{run.folder}: {over['status']} already, skipped")
            return over["top1"]
        state = run.load()
        threads = compile.threads(cfg.runtime.threads, work, plan.micro_batch)
        device.prepare(where, cfg.runtime.threads, threads, state)

        loader = data.load(
            *(source, cfg.data, cfg.recipe, plan.sgd_batch, cfg.seed, where),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            debug=checking,
        )
        layout = device.memory_format(cfg.runtime.channels_last, scheme.channels_last)
        model.to(where).to(memory_format=layout)
        if scheme.initialize and state is None and not getattr(model, "complete", False):
            scheme.initialize(model, loader.sample(128))
        distributed.broadcast_model(model)

        done = state["progress"]["update"] if state else 0
        log.info(f"{run.folder}" + (f": goes on after update {done}" if done else ""))
        updates = protocol.count_updates(cfg.recipe, len(loader))
        expected = compile.estimate_seconds(work, updates, plan.per_device_batch)
        before = state["compiled"] if state else None
        choice = compile.choose(cfg.runtime.compile, where.type, expected, before)
        if before and before != choice.mode:
            log.warning(
                f"runtime.compile={choice.mode}: the checkpoint was made with {before}, so the "
                f"last bits will differ from those of an uninterrupted run"
            )
        log.info(report.describe(cfg, plan, model, loader, where, choice))
        hyperparameters = report.hyperparameters(cfg, plan)
        recording = debug.recording(checking, cfg.recipe, run.folder)
        with closing(TensorBoard(run.folder, done, hyperparameters)) as tensorboard, recording:
            progress = loop.train(
                model, loader, plan, cfg, run, tensorboard, state, probe, choice, scheme
            )
            result = report.result(
                cfg, plan, source, model, loader, scheme.batch_independent, progress
            )
            tensorboard.finish(result)
        run.finish(result)
        log.info(report.closing(result))
        return result["top1"]


if __name__ == "__main__":
    cli.run(main)
