"""What a scheme costs in training: the time of an optimizer step, eager and compiled, how long it
takes to compile, and memory.

    python -m benchmarks.training [NORM …] [--before FOLDER] [--ways eager layers network]

Time: forward, backward and optimizer step of `--images` images in groups of `--batch` that share
statistics (protocol `ghost`); `nn.BatchNorm2d` is PyTorch's own layer over all of them. As it is
(eager), with the layers compiled one by one (layers), and compiled as a whole (network), in both
memory formats, all in one run; `--before` measures another checkout in the same rounds, eager, from
a process of its own as every scheme is. On one thread of a CPU the clock is the process's own time,
which other programs do not add to. Ratios are to the fastest `nn.BatchNorm2d` of all ways and
formats; the second table has the fastest of each scheme.

Compile: seconds of the first step, with an empty cache of compiled code, and in a new process with
what that left; channels-last.

Memory: weights, gradients, momentum and what the forward pass keeps for the backward one, counted
on the meta device for ResNet-50, 32 images of 224 pixels and batch size 2.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import norms
from benchmarks import harness
from benchmarks.harness import say
from benchmarks.worker import FORMATS
from training.cost import memory

BASE = "nn.BatchNorm2d"
SCHEMES = ["bn", "bcn", "mabn", "gn", "ws_gn", "pws"]
WAYS = ["eager", "layers", "network"]
LIBRARY = (BASE, "gn")  # have no layer of ours to compile
LARGE = {"model": "resnet50", "images": 32, "size": 224, "batch": 2}  # for memory
Case = tuple[str, str, str, str]  # scheme, code (now or before), way, memory format


def cases(args: argparse.Namespace) -> list[Case]:
    names = dict.fromkeys([BASE, *args.norms])
    codes = ["now", *(["before"] if args.before else [])]
    return [
        (name, code, way, format)
        for name in names
        for code in codes
        for way in args.ways
        for format in FORMATS
        if not (name in LIBRARY and (way == "layers" or code == "before"))
        and not (way != "eager" and code == "before")
    ]


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ("model", "images", "size", "batch")}


def measure(args: argparse.Namespace) -> dict[Case, Any]:
    """Milliseconds of every case in every round."""
    folders = {"now": harness.ROOT, "before": args.before}
    grouped: dict[Any, dict[Case, dict[str, Any]]] = {}
    for case in cases(args):
        name, code, way, format = case
        asked = dict(what="network", name=name, way=way, format=format, **sizes(args))
        grouped.setdefault((name, folders[code]), {})[case] = asked
    return harness.measure(grouped, args.rounds, args.threads)[0]


def fastest(times: dict[Case, Any], name: str, code: str) -> Case:
    own = [case for case in times if case[:2] == (name, code)]
    return min(own, key=lambda case: float(np.median(times[case])))


def rows(times: dict[Case, Any]) -> list[dict[str, Any]]:
    base = times[fastest(times, BASE, "now")]
    return [
        dict(zip(("norm", "code", "way", "format"), case, strict=True))
        | harness.spread(own, "ms")
        | harness.ratio(own, base)
        for case, own in times.items()
    ]


def best(times: dict[Case, Any]) -> list[dict[str, Any]]:
    """Of each scheme, and beside the fastest of the other checkout."""
    found = []
    for name in dict.fromkeys(case[0] for case in times):
        now = fastest(times, name, "now")
        row: dict[str, Any] = {"norm": name, "way": now[2], "format": now[3]}
        row |= harness.ratio(times[now], times[fastest(times, BASE, "now")])
        if any(case[:2] == (name, "before") for case in times):
            before = fastest(times, name, "before")
            row |= {"before_way": before[2], "before_format": before[3]}
            row |= harness.ratio(times[now], times[before], "to_before")
        found.append(row)
    return found


def needs(name: str, large: dict[str, Any]) -> int:
    """Bytes in training at `LARGE`'s sizes."""
    with torch.device("meta"):
        scheme = norms.build(name, batch_size=large["batch"])
        network = models.build(large["model"], scheme=scheme, num_classes=1000)
    return memory(network, (large["images"], 3, large["size"], large["size"]), half=False)


def compile_times(args: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys([BASE, *args.norms]):
        for way in args.ways:
            if way != "eager" and not (way == "layers" and name in LIBRARY):
                case = dict(what="network", name=name, way=way, format="channels-last")
                found.append({"norm": name, "way": way})
                found[-1] |= harness.compile_seconds(args.threads, **case, **sizes(args))
                say(f"compiled: {found[-1]}")
    return found


def tables(result: dict[str, Any]) -> list[str]:
    by = {(r["norm"], r["code"], r["way"], r["format"]): r for r in result["rows"]}
    lines: list[list[Any]] = []
    for name, code, way in dict.fromkeys(key[:3] for key in by):
        lines.append([name, way if code == "now" else f"{way}, before"])
        for row in (by[name, code, way, format] for format in FORMATS):
            lines[-1] += [harness.within(row, "ms", 0), harness.within(row, "ratio")]
    heads = [x for format in FORMATS for x in (f"{format}, ms", f"to `{BASE}`")]
    made = [harness.table(["`norm=`", "", *heads], lines)]
    heads = ["fastest", "", f"to `{BASE}`", "before", "to it"]
    lines = []
    for row in result["best"]:
        told = [f"{row['way']}, {row['format']}", harness.within(row, "ratio"), "", ""]
        if "to_before" in row:
            told[2] = f"{row['before_way']}, {row['before_format']}"
            told[3] = harness.within(row, "to_before")
        lines.append([row["norm"], *told])
    made.append(harness.table(heads, lines))
    if result["compile"]:
        lines = [[r["norm"], r["way"], r["cold_s"], r["warm_s"]] for r in result["compile"]]
        made.append(harness.table(["compile", "", "cold, s", "warm, s"], lines))
    held, large = result["memory_bytes"], result["memory_setting"]
    lines = [[name, size / 2**30, size / held["bn"]] for name, size in held.items()]
    made.append(harness.table(["memory", "GiB", "to `bn`"], lines))
    made.append("Memory: " + ", ".join(f"{k} {v}" for k, v in large.items()) + ".")
    return made


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for name in args.norms:
        norms.build(name)
    if args.images % args.batch:
        raise ValueError(f"--images {args.images}: expected a multiple of --batch {args.batch}")
    large = LARGE | ({"model": "resnet18", "size": 64} if args.quick else {})
    times = measure(args)
    result = {
        "environment": harness.machine(torch.device("cpu")),
        "setting": sizes(args)
        | {"rounds": args.rounds, "clock": "own time" if args.threads == 1 else "wall"},
        "memory_setting": large,
        "rows": rows(times),
        "best": best(times),
        "compile": [] if args.quick else compile_times(args),
        "memory_bytes": {name: needs(name, large) for name in dict.fromkeys(["bn", *args.norms])},
    }
    harness.publish(args, result, tables(result))


def main() -> None:
    numbers = dict(images=128, batch=2, size=32, threads=1, rounds=15)
    parser = harness.parser(__doc__, "training", **numbers)
    add = parser.add_argument
    add("norms", nargs="*", default=SCHEMES, metavar="NORM", help=f"default: {', '.join(SCHEMES)}")
    add("--model", default="resnet20", help="default: resnet20")
    add("--ways", nargs="+", default=WAYS, choices=WAYS, help="default: all")
    add("--before", type=Path, metavar="FOLDER", help="a checkout to be measured in the same run")
    add("--quick", action="store_true", help="memory of resnet18, 64; no compile times")
    harness.main(parser, run)


if __name__ == "__main__":
    main()
