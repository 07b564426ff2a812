"""What the layers alone cost: time forward and backward, eager and compiled, what they keep for the
backward pass, and how long they take to compile.

    python -m benchmarks.layers [--before FOLDER] [--shapes 64x56 512x7]

norms      at the shapes of ResNet-50's norms (224 pixels), `--images` images that share statistics;
           all 53 together; and 64 images in groups of so many (`protocol=ghost`)
weights    standardized convolutions at three of ResNet-50's shapes and one output position, where
           the weights are nearly all there is to compute; beside timm's
compile    seconds until a layer's first gradients are there: with an empty cache, and in a new
           process with what that left

Ratios are to `nn.BatchNorm2d` (`nn.Conv2d`), eager, in the same memory format. On one thread of a
CPU the clock is the process's own time, which other programs do not add to. `--before` measures the
layers of another checkout beside these, as they are (eager). Kept: bytes of all tensors that the
forward pass saves for the backward one, the input included, as multiples of the input's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.worker import CONVS, FORMATS, NORMS

# Channels and side of the maps of ResNet-50's norms at 224 pixels, and how many there are of each.
SHAPES = {
    **{(64, 112): 1, (64, 56): 6, (256, 56): 4, (128, 56): 1, (128, 28): 7, (512, 28): 5},
    **{(256, 28): 1, (256, 14): 11, (1024, 14): 7, (512, 14): 1, (512, 7): 5, (2048, 7): 4},
}
GHOST = (64, 16, 32, 32)
WEIGHTS = [(1024, 256, 1), (256, 256, 3), (512, 512, 3)]  # channels in and out, kernel
LIBRARY = ("nn.", "timm")  # how names begin that are not ours
Case = tuple[str, str, str]  # layer, way (eager, layers: compiled, before), memory format


def compare(what: str, shape: Sequence[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every layer, way and memory format; in processes of their own, where no other shape
    has left compiled code that would be looked through."""
    base = "nn.BatchNorm2d" if what == "norm" else "nn.Conv2d"
    cases: dict[Any, dict[Case, dict[str, Any]]] = {}
    order: list[Case] = []
    for name in dict.fromkeys((base, *chosen(what, args))):
        ours = not name.startswith(LIBRARY)
        ways = {"eager": harness.ROOT} | (
            {"layers": harness.ROOT} if ours and not args.eager else {}
        )
        ways |= {"before": args.before} if ours and args.before else {}
        for key in ((name, way, format) for way in ways for format in FORMATS):
            how = {"way": "layers" if key[1] == "layers" else "eager", "batch": args.images}
            case = dict(what=what, name=name, shape=shape, format=key[2], **how)
            cases.setdefault(("", ways[key[1]]), {})[key] = case
            order.append(key)
    span = 0.0 if args.quick else 0.01
    times, kept = harness.measure(cases, args.rounds, args.threads, span, what == "norm")
    size = 4 * torch.Size(shape).numel()
    return [
        dict(zip(("layer", "way", "format"), key, strict=True))
        | harness.spread(times[key], "ms")
        | harness.ratio(times[key], times[base, "eager", key[2]])
        | ({"kept": round(kept[key] / size, 3)} if kept else {})
        for key in order
    ]


def chosen(what: str, args: argparse.Namespace) -> list[str]:
    every = NORMS if what == "norm" else CONVS
    return [name for name in every if not args.layers or name in args.layers]


def whole(tables: list[list[dict[str, Any]]], counts: list[int]) -> list[dict[str, Any]]:
    """The time of all norms of the network together; ratios of these sums."""
    rows = []
    for same in zip(*tables, strict=True):
        ms = sum(count * row["ms"] for count, row in zip(counts, same, strict=True))
        row = {key: same[0][key] for key in ("layer", "way", "format")} | {"ms": round(ms, 3)}
        ratios = [r["ratio"] for r in same]
        row |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append(row | {"kept": max(r["kept"] for r in same)})
    bases = {row["format"]: row["ms"] for row in rows if row["layer"] == "nn.BatchNorm2d"}
    return [row | {"ratio": round(row["ms"] / bases[row["format"]], 3)} for row in rows]


def page(title: str, rows: list[dict[str, Any]]) -> str:
    """A line for a layer and way, both formats in it."""
    found = {(r["layer"], r["way"], r["format"]): r for r in rows}
    kept = ["kept"] if "kept" in rows[0] else []
    lines: list[list[Any]] = []
    for name, way in dict.fromkeys((r["layer"], r["way"]) for r in rows):
        lines.append([name, {"layers": "compiled"}.get(way, way)])
        for row in (found[name, way, format] for format in FORMATS):
            lines[-1] += [f"{row['ms']:.3g}", harness.within(row, "ratio"), *(row[k] for k in kept)]
    heads = [x for format in FORMATS for x in (f"{format}, ms", "ratio", *kept)]
    return f"{title}:\n\n" + harness.table(["layer", "", *heads], lines)


def compile_times(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for what, shape in (("norm", (args.images, 64, 56, 56)), ("conv", WEIGHTS[1])):
        for name in chosen(what, args):
            if not name.startswith(LIBRARY):
                case: Any = dict(what=what, name=name, shape=shape, way="layers")
                rows.append({"layer": name, "what": what})
                rows[-1] |= harness.compile_seconds(args.threads, **case)
                say(f"compiled: {rows[-1]}")
    return rows


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.span = 0.0 if args.quick else 0.01
    shapes = {(64, 8): 2, (128, 4): 1} if args.quick else SHAPES
    weights = [(8, 8, 3)] if args.quick else WEIGHTS
    ghost = (8, 16, 8, 8) if args.quick else GHOST
    if args.shapes:
        shapes = {shape: SHAPES.get(shape, 1) for shape in args.shapes}
    norms = {
        "x".join(map(str, shape)): compare("norm", shape, args)
        for shape in [*((args.images, c, side, side) for c, side in shapes), ghost]
    }
    *each, _ = norms.values()
    together = {f"all {sum(shapes.values())}": whole(each, list(shapes.values()))}
    weighted = {
        f"weights, {cin} to {cout}, {kernel}x{kernel}": compare("conv", (cin, cout, kernel), args)
        for cin, cout, kernel in weights
    }
    compiling = [] if args.quick or args.eager else compile_times(args)
    result = {
        "environment": harness.machine(torch.device("cpu")),
        "setting": {key: getattr(args, key) for key in ("images", "rounds")}
        | {"clock": "own time" if args.threads == 1 else "wall"},
        "norms": together | norms,
        "weights": weighted,
        "compile": compiling,
    }
    tables = [page(title, rows) for title, rows in (together | norms | weighted).items()]
    if compiling:
        rows = [(f"{r['layer']}, {r['what']}", r["cold_s"], r["warm_s"]) for r in compiling]
        tables.append(harness.table(["compile", "cold, s", "warm, s"], rows))
    harness.publish(args, result, tables)


def side(text: str) -> tuple[int, int]:
    channels, pixels = map(int, text.split("x"))
    return channels, pixels


def main() -> None:
    parser = harness.parser(__doc__, "layers", images=2, threads=1, rounds=15)
    add = parser.add_argument
    add("--layers", nargs="+", metavar="NAME", choices={*NORMS, *CONVS}, help="default: all")
    add("--shapes", nargs="+", type=side, metavar="CxS", help="default: ResNet-50's")
    add("--before", type=Path, metavar="FOLDER", help="a checkout to be measured beside this one")
    add("--eager", action="store_true", help="nothing compiled")
    add("--quick", action="store_true", help="small shapes, and nothing of the compiler's time")
    harness.main(parser, run)


if __name__ == "__main__":
    main()
