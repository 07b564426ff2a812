"""The picture of a probe: its statistics layer by layer, one line per run.

    python scripts/probe.py runs/STUDY/RUN… [--out probe.png] [--epoch N]

The runs are those of one probe (`probe=batch_statistics` or `probe=gradient_shift`) on one network.
Reads their metrics.csv and nothing else.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting.figures import probed, probes
from training.process import run_script


def name(run: Path, runs: list[Path]) -> str:
    """Of a run's folder, without the hash where that is enough to tell the runs apart."""
    short = [r.name.rsplit("-", r.name.count("-") - 2)[0] for r in runs]
    return short[runs.index(run)] if len(set(short)) == len(runs) else run.name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs with a probe")
    parser.add_argument("--out", type=Path, default=Path("probe.png"), help="the picture to write")
    parser.add_argument("--epoch", type=int, help="which epoch (default: the last)")
    args = parser.parse_args()
    try:
        probes({name(run, args.runs): probed(run, args.epoch) for run in args.runs}, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    run_script(main)
