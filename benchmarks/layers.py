"""What the layers alone cost: time forward and backward, and what they keep for the backward pass.

    python benchmarks/layers.py [--images 2] [--threads 1] [--device cuda]

Four tables, each with what PyTorch, timm and a plain reading of the papers' formulas take for the
same in the same run:

norms      at the shapes of ResNet-50's 53 norms (224 pixels), `--images` images that share
           statistics: every shape, and all 53; fewer rounds where maps are large
groups     `--groups` times as many images in groups that share statistics (`protocol=ghost`), at
           three of the shapes; a plain form takes the groups one by one
weights    standardized convolutions at three of ResNet-50's shapes and one output position, where
           the weights are nearly all there is to compute; contiguous and channels-last
networks   a training step of ResNet-50 on `--images` images of `--size` pixels

The plain forms are those of benchmarks/formulas.py. A round times every case once, in
shuffled order, so that a busy machine slows all of them; on one thread of a CPU the clock is the
thread's own time, which other programs do not add to. Kept: bytes of all tensors that the forward
pass saves for the backward one, the input included, parameters not.

Writes layers.json and, into README.md, the tables; what stands around them is written by hand.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.formulas import (
    AuthorsBCN,
    PlainBCN,
    PlainBN,
    PlainBRN,
    PlainCentered,
    PlainEstBN,
    PlainMABN,
    PlainWS,
)
from benchmarks.inference import environment, publish
from benchmarks.training import step
from norms import (
    BatchChannelNorm2d,
    BatchRenorm2d,
    CenteredConv2d,
    EstimatedBatchNorm2d,
    GhostBatchNorm2d,
    MABN2d,
    PWSConv2d,
    WSConv2d,
)
from training import device
from training.progress import say

# Channels and side of the maps of ResNet-50's norms at 224 pixels, and how many there are of each.
SHAPES = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}
GROUPED = [(64, 56), (256, 14), (512, 7)]
WEIGHTS = [(1024, 256, 1), (256, 256, 3), (512, 512, 3)]  # channels in and out, kernel
NETWORKS = ["bn", "pws", "mabn", "bcn", "gn", "ws_gn"]


def norm_layers(channels: int, batch: int) -> dict[str, nn.Module]:
    """Name: layer over `batch` images; the MABN layers past their warm-up."""
    window = max(1, -(-32 // batch))
    mabn, plain = MABN2d(channels, batch), PlainMABN(channels, window)
    mabn.num_batches_tracked.fill_(2000)
    plain.batches = 2000
    brn = BatchRenorm2d(channels, batch, start=0, r_until=1, d_until=1, fixed_weight=False)
    return {
        "nn.BatchNorm2d": nn.BatchNorm2d(channels),
        "nn.GroupNorm, 32 groups": nn.GroupNorm(32, channels),
        "bn": GhostBatchNorm2d(channels, batch),
        "bn, formulas": PlainBN(channels),
        "mabn": mabn,
        "mabn, formulas": plain,
        "bcn": BatchChannelNorm2d(channels, 32, batch),
        "bcn, formulas": PlainBCN(PlainBN(channels)),
        "bcn, batch norm twice": AuthorsBCN(nn.BatchNorm2d(channels)),
        "bcn estimated": BatchChannelNorm2d(channels, 32, batch, rate=0.01),
        "bcn estimated, formulas": PlainBCN(PlainEstBN(channels)),
        "estimated bn": EstimatedBatchNorm2d(channels, 0.01, batch),
        "estimated bn, formulas": PlainEstBN(channels),
        "brn": brn,
        "brn, formulas": PlainBRN(channels),
    }


def conv_layers(cin: int, cout: int, kernel: int) -> dict[str, nn.Module]:
    from timm.layers import ScaledStdConv2d, StdConv2d

    shape: Any = dict(in_channels=cin, out_channels=cout, kernel_size=kernel, bias=False)
    std: Any = {k.replace("in_channels", "in_channel"): v for k, v in shape.items()}
    return {
        "nn.Conv2d": nn.Conv2d(**shape),
        "ws_gn": WSConv2d(**shape),
        "ws_gn, eps inside": WSConv2d(**shape, eps_inside=True),
        "ws_gn, formulas": PlainWS(**shape),
        "timm StdConv2d": StdConv2d(**std, padding=0),
        "pws": PWSConv2d(**shape),
        "timm ScaledStdConv2d": ScaledStdConv2d(**shape, padding=0),
        "mabn": CenteredConv2d(**shape),
        "mabn, formulas": PlainCentered(**shape),
    }


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass saves for the backward one, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    found: dict[int, Tensor] = {}  # holds them, so that no address comes twice

    def keep(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    held = sum(t.untyped_storage().nbytes() for p, t in found.items() if p not in own)
    y.sum().backward()  # MABN's backward pass is part of its state
    return held


def both_ways(layer: nn.Module, x: Tensor, dy: Tensor, batch: int | None = None) -> None:
    """Forward and backward; if `batch` is given, so many images at a time."""
    x.grad = None
    if batch is None:
        layer(x).backward(dy)
        return
    for part, grad in zip(x.split(batch), dy.split(batch), strict=True):
        layer(part).backward(grad)


def measure(calls: Mapping[str, Callable[[], None]], rounds: int, own: bool, where: Any) -> Any:
    """Milliseconds of every call in every round. `own`: the thread's own time."""
    clock = time.thread_time if own else time.perf_counter
    times: dict[str, list[float]] = {key: [] for key in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for i in range(-2, rounds):  # the first two warm up
        shuffle(order)
        for key in order:
            start = clock()
            calls[key]()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            if i >= 0:
                times[key].append(1000 * (clock() - start))
    return {key: np.array(t) for key, t in times.items()}


def rows(times: dict[str, np.ndarray], base: str, held: dict[str, int] | None = None) -> Any:
    """Medians, interquartile ranges and ratios of medians to `base`."""
    table = []
    for name, t in times.items():
        ratio = np.median(t) / np.median(times[base])
        row: dict[str, Any] = {"layer": name, "ms": round(float(np.median(t)), 4)}
        row["iqr_ms"] = round(float(np.subtract(*np.percentile(t, [75, 25]))), 4)
        row["ratio"] = round(float(ratio), 3)
        table.append(row | ({"kept_bytes": held[name]} if held else {}))
    return table


def norms_table(args: argparse.Namespace, where: torch.device, own: bool) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    total: dict[str, float] = {}
    for (channels, side), count in args.shapes.items():
        layers, held, calls = norm_layers(channels, args.images), {}, {}
        for name, layer in layers.items():
            x = torch.randn(args.images, channels, side, side).to(where, memory_format=args.layout)
            layer, dy = layer.to(where), torch.randn_like(x)
            x.requires_grad_()
            held[name] = kept(layer, x)
            calls[name] = partial(both_ways, layer, x, dy)
        rounds = max(min(5, args.rounds), round(args.rounds * min(1.0, 2**19 / x.numel())))
        times = measure(calls, rounds, own, where)
        shape = f"{args.images}x{channels}x{side}x{side}"
        tables[shape] = rows(times, "nn.BatchNorm2d", held)
        for name, t in times.items():
            total[name] = total.get(name, 0.0) + count * np.median(t)
        say(f"norms at {shape}: {rounds} rounds")
    base = total["nn.BatchNorm2d"]
    whole = [{"layer": k, "ms": round(v, 3), "ratio": round(v / base, 3)} for k, v in total.items()]
    return {f"all {sum(args.shapes.values())}": whole} | tables


def groups_table(args: argparse.Namespace, where: torch.device, own: bool) -> dict[str, Any]:
    tables = {}
    for channels, side in args.grouped:
        calls = {}
        shape = (args.images * args.groups, channels, side, side)
        for name, layer in norm_layers(channels, args.images).items():
            x = torch.randn(shape).to(where, memory_format=args.layout)
            dy = torch.randn_like(x)
            alone = args.images if "formulas" in name or "twice" in name else None
            layer = layer.to(where)
            calls[name] = partial(both_ways, layer, x.requires_grad_(), dy, alone)
        times = measure(calls, max(3, args.rounds // 3), own, where)
        tables["x".join(map(str, shape))] = rows(times, "nn.BatchNorm2d")
        say(f"groups at {'x'.join(map(str, shape))}")
    return tables


def weights_table(args: argparse.Namespace, where: torch.device, own: bool) -> dict[str, Any]:
    tables = {}
    for cin, cout, kernel in WEIGHTS:
        for layout in (torch.contiguous_format, torch.channels_last):
            calls = {}
            x = torch.randn(1, cin, kernel, kernel, device=where)
            for name, layer in conv_layers(cin, cout, kernel).items():
                layer = layer.to(where).to(memory_format=layout)
                dy = torch.randn(1, cout, 1, 1, device=where)
                calls[name] = partial(both_ways, Fresh(layer), x, dy)
            times = measure(calls, args.rounds, own, where)
            last = ", channels-last" if layout == torch.channels_last else ""
            tables[f"{cin} to {cout}, {kernel}x{kernel}{last}"] = rows(times, "nn.Conv2d")
    say(f"weights: {args.rounds} rounds")
    return tables


class Fresh(nn.Module):
    """The layer, whose gradients do not add up from call to call."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.layer.zero_grad()
        return self.layer(x)


def networks_table(args: argparse.Namespace, where: torch.device, own: bool) -> dict[str, Any]:
    x = torch.randn(args.images, 3, args.size, args.size).to(where, memory_format=args.layout)
    calls = {n: partial(step(n, args.model, args.images, where), x) for n in NETWORKS}
    times = measure(calls, max(2, args.rounds // 2), own, where)
    table = rows(times, "bn")
    for row, base in zip(table, ("bn", "bn", "bn", "bn", "gn", "gn"), strict=True):
        row |= {"to": base, "ratio": round(float(np.median(times[row["layer"]] / times[base])), 3)}
    say("networks")
    return {f"{args.model}, {args.images} images of {args.size} pixels": table}


def markdown(result: dict[str, Any]) -> str:
    """The tables and how they were measured."""
    lines = [f"    {result['command']}\n"]
    everything, *shapes = result["norms"]
    first = shapes[-1] if len(shapes) < 2 else shapes[1]  # at 56 pixels, the one often quoted
    data = {shape: {r["layer"]: r for r in t} for shape, t in result["norms"].items()}
    kept = data[first]["nn.BatchNorm2d"]["kept_bytes"]
    lines.append(f"| layer | {first}, ms | to `nn.BatchNorm2d` | all shapes | 53 norms, ms | "
                 "to `nn.BatchNorm2d` | kept, to `nn.BatchNorm2d` |")  # fmt: skip
    lines.append("|---|" + "---:|" * 6)
    for name, r in data[first].items():
        ratios = [data[s][name]["ratio"] for s in shapes]
        whole = data[everything][name]
        lines.append(
            f"| {name} | {r['ms']:.2f} ({r['iqr_ms']:.2f}) | {r['ratio']:.2f} | "
            f"{min(ratios):.2f} – {max(ratios):.2f} | {whole['ms']:.0f} | {whole['ratio']:.2f} | "
            f"{r['kept_bytes'] / kept:.2f} |"
        )
    for part in ("groups", "weights", "networks"):
        tables = result[part]
        heads = [f"{key}, ms | ratio" for key in tables]
        lines += ["", f"| {part} | {' | '.join(heads)} |", "|---|" + "---:|" * 2 * len(tables)]
        for i, row in enumerate(next(iter(tables.values()))):
            cells = [
                f"{t[i]['ms']:.2f} ({t[i]['iqr_ms']:.2f}) | {t[i]['ratio']:.2f}"
                + (f" of `{t[i]['to']}`" if "to" in t[i] else "")
                for t in tables.values()
            ]
            lines.append(f"| {row['layer']} | {' | '.join(cells)} |")
    told = result["setting"] | result["environment"]
    lines.append("\nForward and backward, medians over the rounds (interquartile range), ratios of "
                 "medians: " + ", ".join(f"{k} {v}" for k, v in told.items()) + ".")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for key, default in dict(images=2, groups=16, size=224, threads=1, rounds=45).items():
        add(f"--{key}", type=int, default=default, help=f"default: {default}")
    add("--model", default="resnet50", help="of the last table; default: resnet50")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add("--gpu", action="store_true", help="--device cuda --images 32 --rounds 100")
    add("--channels-last", action="store_true", help="the activations")
    add("--quick", action="store_true", help="two small shapes, 2 rounds, resnet8 on 32 pixels")
    add("--out", type=Path, help="folder; default: results/layers, quick: runs/layers")
    args = parser.parse_args()
    if args.gpu:
        args.device, args.images, args.rounds = "cuda", 32, 100
    if args.quick:
        args.size, args.rounds, args.model = 32, 2, "resnet8"
    args.shapes = {(64, 8): 2, (128, 4): 1} if args.quick else SHAPES
    args.grouped = [(64, 8)] if args.quick else GROUPED
    args.out = args.out or Path("runs/layers" if args.quick else "results/layers")
    if min(args.images, args.groups, args.size, args.threads, args.rounds) < 1:
        parser.error("--images, --groups, --size, --threads, --rounds: expected numbers from 1")
    args.layout = torch.channels_last if args.channels_last else torch.contiguous_format
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(args: argparse.Namespace) -> None:
    where = device.find(args.device)
    torch.set_num_threads(args.threads)
    own = where.type == "cpu" and args.threads == 1
    torch.manual_seed(0)
    keys = ("images", "groups", "rounds", "device", "channels_last")
    setting = {key: getattr(args, key) for key in keys}
    setting |= {"clock": "own time" if own else "wall"}
    result = {
        "command": " ".join(["python benchmarks/layers.py", *sys.argv[1:]]),
        "environment": environment(where),
        "setting": setting,
        "norms": norms_table(args, where, own),
        "groups": groups_table(args, where, own),
        "weights": weights_table(args, where, own),
        "networks": networks_table(args, where, own),
    }
    publish(args.out, "layers", result, markdown(result))


if __name__ == "__main__":
    main()
