"""Runs that check instead of count: what `debug=` needs beside its keys."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training import distributed
from training.protocol import Plan
from training.schema import Debug, Recipe

log = logging.getLogger("smallbatch")
TRACE = "trace.json"


def check(debug: Debug | None, recipe: Recipe, plan: Plan) -> None:
    """Raise `ValueError` where the numbers of a debug run do not fit."""
    if not debug:
        return
    if debug.name == "overfit" and debug.images < plan.sgd_batch:
        raise ValueError(
            f"debug.images={debug.images}: expected at least the SGD batch of {plan.sgd_batch}"
        )
    if debug.name == "profile" and (recipe.updates or 0) <= debug.updates:
        raise ValueError(
            f"debug.updates={debug.updates}: expected less than recipe.updates="
            f"{recipe.updates}, since the first updates warm up"
        )


@contextmanager
def recording(debug: Debug | None, recipe: Recipe, folder: Path) -> Iterator[None]:
    """With debug=profile, record the last `debug.updates` updates of what happens inside: a trace
    in the run's folder, the top operators on the screen."""
    if not debug or debug.name != "profile" or distributed.rank():
        yield
        return
    from torch import profiler
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def done(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / f"{TRACE}.tmp"))
        os.replace(folder / f"{TRACE}.tmp", folder / TRACE)
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50)
        log.info(f"{table}\n  the trace of {debug.updates} updates: {folder / TRACE}")

    first = (recipe.updates or 0) - debug.updates
    schedule = profiler.schedule(wait=first - 1, warmup=1, active=debug.updates, repeat=1)
    # acc_events: there is one cycle, and torch 2.11 warns that a second one would forget it
    with profiler.profile(schedule=schedule, on_trace_ready=done, acc_events=True) as profile:
        hook = register_optimizer_step_post_hook(lambda *_: profile.step())
        try:
            yield
        finally:
            hook.remove()
