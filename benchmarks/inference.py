"""What a scheme costs once training is over: the same network as trained and folded.

    python -m benchmarks.inference [NORM …] [--model resnet50] [--batch 4] [--size 128]

Ratios are to `bn`, as trained or folded.
"""

import argparse
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import models
import norms
from benchmarks import harness
from training import device
from training.export import count_norms

SCHEMES = ["bn", "mabn", "brn", "pws", "ws_bn", "ws_gn", "gn", "ln", "bcn", "evonorm_s0", "frn"]
RUNNING = ("bn", "brn", "ws_bn", "bcn", "mabn", "sync_bn", "evonorm_b0")  # have running statistics
KINDS = ("unfolded", "folded")
HEADS = [
    "`norm=`",
    "as trained, ms",
    "to `bn`",
    "folded, ms",
    "to `bn`",
    "norms left",
    "parameters",
]


@torch.no_grad()
def build(name: str, model: str, size: int) -> tuple[list[nn.Module], dict[str, int]]:
    """The network as trained, its folded copy, and what to say of both. The weights are random, the
    running statistics those of random images. Raises `ValueError` if the two differ."""
    torch.manual_seed(0)
    options: Any = {"momentum": 0.5} if name in RUNNING else {}  # so that a few passes suffice
    scheme = norms.build(name, batch_size=8, **options)
    network = models.build(model, scheme=scheme, num_classes=1000, zero_init=False)
    for _ in range(6):
        network(torch.randn(8, 3, size, size))
    folded = norms.fold(network.eval())
    x = torch.randn(2, 3, size, size)
    expected = network(x)
    deviation = ((folded(x) - expected).abs().max() / expected.abs().max()).item()
    if not deviation <= 1e-3:  # NaN neither
        raise ValueError(f"norm={name}: folded deviates by {deviation:.1e} of the largest logit")
    left = count_norms(network, folded, scheme)[1]
    harness.say(f"{name}: {left} norms left, deviates by {deviation:.1e} of the largest logit")
    parameters = sum(p.numel() for p in network.parameters())
    return [network, folded], {"norm_layers_left": left, "parameters": parameters}


def call(network: nn.Module, x: Tensor) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    network(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return 1000 * (time.perf_counter() - start)


def run(args: argparse.Namespace) -> None:
    if args.quick:
        args.model, args.size, args.rounds = "resnet8", 32, 2
    where = device.resolve(args.device)
    torch.set_num_threads(args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(args.batch, 3, args.size, args.size).to(where, memory_format=layout)
    timers, rows = {}, []
    for name in dict.fromkeys(["bn", *args.norms]):
        both, facts = build(name, args.model, args.size)
        rows.append({"norm": name} | facts)
        for kind, network in zip(KINDS, both, strict=True):
            timers[name, kind] = partial(call, network.to(where).to(memory_format=layout), x)
    with torch.inference_mode():
        times = harness.interleave(timers, args.rounds, warm_up=2)
    for row in rows:
        for kind in KINDS:
            own = times[row["norm"], kind]
            row |= harness.spread(own, f"{kind}_ms")
            row |= harness.ratio(own, times["bn", kind], f"ratio_to_bn_{kind}")
    keys = ("model", "batch", "size", "rounds", "device", "channels_last")
    result = {
        "environment": harness.machine(where),
        "setting": {key: getattr(args, key) for key in keys},
        "rows": rows,
    }
    lines: list[list[Any]] = []
    for row in rows:
        lines.append([row["norm"]])
        for kind in KINDS:
            lines[-1] += [harness.within(row, f"{kind}_ms", 1), row[f"ratio_to_bn_{kind}"]]
        lines[-1] += [row["norm_layers_left"], f"{row['parameters']:,}"]
    harness.publish(args, result, [harness.table(HEADS, lines)])


def main() -> None:
    numbers = dict(batch=4, size=128, threads=1, rounds=15)
    parser = harness.parser(__doc__, "inference", **numbers)
    add = parser.add_argument
    add("norms", nargs="*", default=SCHEMES, metavar="NORM", help="schemes; bn always is one")
    add("--model", default="resnet50")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add("--channels-last", action="store_true")
    add("--quick", action="store_true", help="resnet8, 32 pixels, 2 rounds")
    harness.main(parser, run)


if __name__ == "__main__":
    main()
