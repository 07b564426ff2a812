"""What a study will cost, before anyone pays for it.

    python scripts/plan.py experiment=cifar10_table              # the overrides of train.py -m
    python scripts/plan.py experiment=gn_imagenet --speed 938    # images/s of a device you know
    python scripts/plan.py norm=bn,pws batch=2,32 --gpus 1,8,64 --memory 24

For every cell its epochs, updates, time and memory; then the hours of all runs that are not over
yet, on one or more devices with one run on each at a time. The time of an update is that of the
finished runs of the same cell, or else measured here, on random images; `--speed` gives it instead.
Memory is that of weights, gradients and momentum with all that the forward pass keeps for the
backward one, counted without computing anything; a device needs some hundred MiB besides.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from training import device as devices
from training.cli import arguments
from training.cost import Row, makespan, rows
from training.messages import MISTAKES, explain
from training.process import run_script
from training.study import cells, jobs

GIB = 2**30


def text(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def size(memory: float) -> str:
    return f"{memory / GIB:.1f} GiB" if memory >= GIB else f"{memory / 2**20:.0f} MiB"


def show(made: list[Row], gpus: list[int], limit: float, where: str, console: Console) -> None:
    title = f"on {where}, one run at a time on each device"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("scheme", "batch", "SGD batch", "runs left", "epochs", "updates", "ms/update"):
        justify: Any = "right" if column != "scheme" else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for column in ("images/s", "time from", "memory", "a run"):
        table.add_column(column, justify="right", overflow="fold")
    for row in made:
        plan = row.plan
        table.add_row(
            *(row.scheme, str(plan.batch), str(plan.sgd_batch), f"{row.left}/{row.runs}"),
            *(f"{row.epochs:g}", f"{row.updates:,}"),
            *(f"{1000 * row.seconds:,.1f}", f"{plan.sgd_batch / row.seconds:,.0f}")
            if row.seconds
            else ("–", "–"),
            *(row.source, size(row.memory), text(row.hours) if row.seconds else "–"),
        )
    console.print(table)
    hours = [row.hours for row in made for _ in range(row.left)]
    if hours:
        console.print(
            f"{len(hours)} runs, {text(sum(hours))} in all, {text(max(hours))} the longest: "
            + ", ".join(f"{n} device{'s' * (n > 1)} {text(makespan(hours, n))}" for n in gpus)
        )
    for row in made:
        if row.memory > limit:
            smaller = f"protocol.micro_batch={row.plan.batch} needs less"
            console.print(
                f"warning: {row.scheme} at batch {row.plan.batch} needs about "
                f"{size(row.memory)} and the device has {size(limit)}; "
                + (
                    smaller
                    if row.plan.micro_batch > row.plan.batch
                    else "only a smaller model needs less"
                )
            )
    same = [row for row in made if row.batch_independent and row.cfg.protocol.name != "direct"]
    alike = Counter((row.scheme, row.plan.sgd_batch) for row in same if row.left)
    names = sorted({scheme for (scheme, _), count in alike.items() if count > 1})
    if names:
        console.print(
            f"{', '.join(names)}: without batch statistics, the same computation at every "
            f"batch size that has the same SGD batch; one is enough, the table says so"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of train.py -m")
    parser.add_argument("--config-dir", help="folder with options of your own, as of train.py")
    parser.add_argument("--speed", type=float, help="images/s in training, instead of measuring")
    parser.add_argument("--memory", type=float, help="GiB of the device (default: of this one)")
    parser.add_argument("--gpus", default="1,8,64", help="numbers of devices (default: 1,8,64)")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    try:
        gpus = [int(n) for n in args.gpus.split(",") if int(n) > 0]
    except ValueError:
        gpus = []
    if not gpus:
        parser.error(f"--gpus {args.gpus}: expected whole numbers from 1, such as 1,8,64")
    for option in ("speed", "memory"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            parser.error(f"--{option} {value:g}: expected a number above 0")
    try:
        folder = [f"--config-dir={args.config_dir}"] if args.config_dir is not None else []
        found = cells(jobs(arguments([*folder, *args.overrides])[1]), checked=True)
        where = devices.resolve(found[0].cfg.device)
        here = torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else physical_memory()
        limit = args.memory * GIB if args.memory else here
        made = rows(found, args.speed, where, limit)
    except MISTAKES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "this CPU"
    show(made, gpus, limit, "a device of that speed" if args.speed else name, console)


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    run_script(main)
