"""What a scheme costs in training: the time of an optimizer step, and memory.

    python benchmarks/training.py [NORM …] [--model resnet20] [--size 32] [--forward 64]

Time: forward, backward and optimizer step, protocol `ghost`, one forward pass of `--forward` images
for every batch size; at the last batch size, which is all of them, `bn` is PyTorch's own layer. On
one thread of a CPU it is the thread's own time, which other programs on the machine do not add to.
A round times every network once, in shuffled order; ratios to `bn` are taken within a round.

Memory: weights, gradients, momentum and what the forward pass keeps for the backward one, counted
on the meta device for ResNet-50, 32 images of 224 pixels and batch size 2.

Writes training.json and, into README.md, the table; what stands around it is written by hand.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

import models
import norms
from benchmarks.inference import environment, measure, publish, summary
from training import device
from training.cost import memory
from training.optimizer import sgd

SCHEMES = ["bn", "gn", "ws_gn", "bcn", "pws", "mabn", "brn"]
RECIPE = Path(__file__).resolve().parent.parent / "configs" / "recipe" / "cifar.yaml"
LARGE = {"model": "resnet50", "images": 32, "size": 224, "batch": 2}  # for memory


def step(name: str, model: str, batch: int, where: torch.device) -> Callable[[Tensor], None]:
    """An optimizer step of a network in training, on the images that it is given. The learning rate
    is 0, so that no round differs from the one before."""
    torch.manual_seed(0)
    scheme = norms.build(name, batch_size=batch)
    network = models.build(model, scheme=scheme, num_classes=10, zero_init=False)
    layout = device.memory_format("auto", scheme.channels_last)
    network.to(where).to(memory_format=layout)
    optimizer = sgd(network.train(), OmegaConf.load(RECIPE), lr=0.0)

    def run(x: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.arange(len(x), device=where) % 10).backward()
        optimizer.step()

    return run


def needs(name: str, large: dict[str, Any]) -> int:
    """Bytes in training at `LARGE`'s sizes."""
    with torch.device("meta"):
        scheme = norms.build(name, batch_size=large["batch"])
        network = models.build(large["model"], scheme=scheme, num_classes=1000)
    return memory(network, (large["images"], 3, large["size"], large["size"]), half=False)


def markdown(result: dict[str, Any]) -> str:
    """The table and how it was measured."""
    batches = result["setting"]["batches"]
    heads = [f"batch {b}, ms | to `bn`" for b in batches]
    lines = [f"| `norm=` | {' | '.join(heads)} | memory, GiB | to `bn` |"]
    lines.append("|---|" + "---:|" * (lines[0].count("|") - 2))
    base = result["rows"][0]["memory_bytes"]
    for r in result["rows"]:
        pairs = [
            f"{r[f'batch_{b}_ms']:.0f} ({r[f'batch_{b}_iqr_ms']:.0f}) | "
            f"{r[f'ratio_to_bn_batch_{b}']:.2f}"
            for b in batches
        ]
        held = r["memory_bytes"]
        pairs.append(f"{held / 2**30:.2f} | {held / base:.2f}")
        lines.append(f"| {r['norm']} | {' | '.join(pairs)} |")
    told = result["setting"] | result["environment"]
    large = result["memory_setting"]
    lines.append("\nMedians over the rounds (interquartile range), ratios within a round: ")
    lines[-1] += ", ".join(f"{k} {v}" for k, v in told.items()) + ". Memory: "
    lines[-1] += ", ".join(f"{k} {v}" for k, v in large.items()) + "."
    return f"    {result['command']}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("norms", nargs="*", default=SCHEMES, metavar="NORM", help="schemes; bn always is one")
    add("--model", default="resnet20")
    for key, default in dict(forward=64, size=32, threads=1, rounds=15).items():
        add(f"--{key}", type=int, default=default, help=f"default: {default}")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add("--quick", action="store_true", help="resnet8, 16 pixels, 2 rounds; memory of resnet18, 64")
    add("--out", type=Path, help="folder; default: results/training, quick: runs/training")
    args = parser.parse_args()
    if args.quick:
        args.model, args.size, args.rounds = "resnet8", 16, 2
    args.out = args.out or Path("runs/training" if args.quick else "results/training")
    if min(args.size, args.threads, args.rounds) < 1:
        parser.error("--size, --threads, --rounds: expected whole numbers from 1")
    if args.forward < 64 or args.forward % 32:
        parser.error(f"--forward {args.forward}: expected a multiple of 32 from 64")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(args: argparse.Namespace) -> None:
    where = device.find(args.device)
    torch.set_num_threads(args.threads)
    own = where.type == "cpu" and args.threads == 1
    batches, schemes = (2, 32, args.forward), list(dict.fromkeys(["bn", *args.norms]))
    large = LARGE | ({"model": "resnet18", "size": 64} if args.quick else {})
    steps = {(n, f"batch_{b}"): step(n, args.model, b, where) for n in schemes for b in batches}
    held = {name: needs(name, large) for name in schemes}
    torch.manual_seed(0)
    x = torch.randn(args.forward, 3, args.size, args.size).to(where)
    times = measure(steps, x, args.rounds, time.process_time if own else time.perf_counter)
    kinds = [f"batch_{b}" for b in batches]
    setting = {key: getattr(args, key) for key in ("model", "size", "forward", "rounds", "device")}
    setting |= {"batches": list(batches), "clock": "own time" if own else "wall"}
    result = {
        "command": " ".join(["python benchmarks/training.py", *sys.argv[1:]]),
        "environment": environment(where),
        "setting": setting,
        "memory_setting": large,
        "rows": [
            {"norm": n} | summary(n, times, kinds) | {"memory_bytes": held[n]} for n in schemes
        ],
    }
    publish(args.out, "training", result, markdown(result))


if __name__ == "__main__":
    main()
