"""The trained network of a run as one file that needs nothing of this project.

    python scripts/export.py runs/STUDY/RUN [--out FILE.pt2]

Writes the folded network as a `torch.export` program from images as they are in the data set, uint8
of shape (N, C, H, W) with any N from 1, to logits: `torch.export.load(FILE).module()(images)`. The
file is written only if it computes what the network of the run does. The data need not be there.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.export import export
from training.messages import MISTAKES, explain
from training.process import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/model.pt2)")
    args = parser.parse_args()
    try:
        print(export(args.run, args.out or args.run / "model.pt2"))
    except MISTAKES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
