"""What a scheme costs once training is over: the same network as trained and folded.

    python benchmarks/inference.py [NORM …] [--model resnet50] [--batch 4] [--size 128]

A round times every network once, in shuffled order, so that a busy machine slows all of them;
ratios to `bn` are taken within a round. Writes inference.json and, into README.md, the table; what
stands around the table there is written by hand and stays.
"""

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

import models
import norms
from norms import cpu_kernels
from training import device
from training.export import count_norms
from training.files import write
from training.progress import say

SCHEMES = ["bn", "mabn", "brn", "pws", "ws_bn", "ws_gn", "gn", "ln", "bcn", "evonorm_s0", "frn"]
RUNNING = ("bn", "brn", "ws_bn", "bcn", "mabn", "sync_bn", "evonorm_b0")  # have running statistics
KINDS = ("unfolded", "folded")
MARKS = ("<!-- measured -->\n", "<!-- /measured -->\n")  # around the table in README.md
HEAD = "| `norm=` | as trained, ms | to `bn` | folded, ms | to `bn` | norms left | parameters |"


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
    say(f"{name}: {left} norms left, folded deviates by {deviation:.1e} of the largest logit")
    parameters = sum(p.numel() for p in network.parameters())
    return [network, folded], {"norm_layers_left": left, "parameters": parameters}


def measure(
    networks: Mapping[Any, Callable[[Tensor], Any]],
    x: Tensor,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, np.ndarray]:
    """Milliseconds of a call of each network in every round."""
    times: dict[Any, list[float]] = {key: [] for key in networks}
    order, shuffle = list(networks), random.Random(0).shuffle
    for i in range(-1, rounds + 1):  # the first two warm up
        shuffle(order)
        for key in order:
            start = clock()
            networks[key](x)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            times[key].append(1000 * (clock() - start))
        took = sum(t[-1] for t in times.values()) / 1000
        say(f"round {i} of {rounds}: {took:.1f} s" if i > 0 else f"warm-up: {took:.1f} s")
    return {key: np.array(t[2:]) for key, t in times.items()}


def summary(name: str, times: dict[Any, np.ndarray], kinds: Any = KINDS) -> dict[str, float]:
    """Medians over the rounds."""
    values = {}
    for kind in kinds:
        own = times[name, kind]
        values[f"{kind}_ms"] = np.median(own)
        values[f"{kind}_iqr_ms"] = np.subtract(*np.percentile(own, [75, 25]))
        values[f"ratio_to_bn_{kind}"] = np.median(own / times["bn", kind])
    return {key: round(float(value), 3) for key, value in values.items()}


def environment(where: torch.device) -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpus)
    cpu = {"cpu": model[1] if model else platform.machine(), "threads": torch.get_num_threads()}
    gpu = {"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return gpu | cpu | versions | {"C compiler": c_compiler()}


def c_compiler() -> str:
    """Which one `norms/cpu_kernels.c` is compiled by: the first line of what it says of itself."""
    if not (command := cpu_kernels.compiler()):
        return "none"
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[0]


def markdown(result: dict[str, Any]) -> str:
    """The table and how it was measured."""
    lines = [HEAD, "|---|" + "---:|" * (HEAD.count("|") - 2)]
    for r in result["rows"]:
        pairs = [
            f"{r[f'{k}_ms']:.1f} ({r[f'{k}_iqr_ms']:.1f}) | {r[f'ratio_to_bn_{k}']:.2f}"
            for k in KINDS
        ]
        cells = (r["norm"], *pairs, f"{r['norm_layers_left']}", f"{r['parameters']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    told = result["setting"] | result["environment"]
    lines.append("\nMedians over the rounds (interquartile range), ratios within a round: ")
    lines[-1] += ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in told.items()) + "."
    return f"    {result['command']}\n\n" + "\n".join(lines) + "\n"


def publish(folder: Path, name: str, result: dict[str, Any], table: str) -> None:
    """Write NAME.json, and the table between its marks in README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")
    page = folder / "README.md"
    text = page.read_text() if page.exists() else f"# {name}\n\n" + "".join(MARKS)
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    write(page, f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")
    say(f"{table}\n{page}: this table is new, the words around it are as they were")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("norms", nargs="*", default=SCHEMES, metavar="NORM", help="schemes; bn always is one")
    add("--model", default="resnet50")
    for key, default in dict(batch=4, size=128, threads=1, rounds=15).items():
        add(f"--{key}", type=int, default=default, help=f"default: {default}")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add("--channels-last", action="store_true")
    add("--quick", action="store_true", help="resnet8, 32 pixels, 2 rounds")
    add("--out", type=Path, help="folder; default: results/inference, quick: runs/inference")
    args = parser.parse_args()
    if args.quick:
        args.model, args.size, args.rounds = "resnet8", 32, 2
    args.out = args.out or Path("runs/inference" if args.quick else "results/inference")
    if min(args.batch, args.size, args.threads, args.rounds) < 1:
        parser.error("--batch, --size, --threads, --rounds: expected whole numbers from 1")
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(args: argparse.Namespace) -> None:
    where = device.find(args.device)
    torch.set_num_threads(args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    networks: dict[Any, nn.Module] = {}
    rows: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(["bn", *args.norms]):
        both, rows[name] = build(name, args.model, args.size)
        for kind, network in zip(KINDS, both, strict=True):
            networks[name, kind] = network.to(where).to(memory_format=layout)
    x = torch.randn(args.batch, 3, args.size, args.size).to(where, memory_format=layout)
    with torch.inference_mode():
        times = measure(networks, x, args.rounds)
    keys = ("model", "batch", "size", "rounds", "device", "channels_last")
    result = {
        "command": " ".join(["python benchmarks/inference.py", *sys.argv[1:]]),
        "environment": environment(where),
        "setting": {key: getattr(args, key) for key in keys},
        "rows": [{"norm": name} | summary(name, times) | rest for name, rest in rows.items()],
    }
    publish(args.out, "inference", result, markdown(result))


if __name__ == "__main__":
    main()
