"""Random kills, combinations of keys, damages and images, for an hour or however long it is told.

    make soak                                    # everything, about an hour on two cores
    make soak LENGTH=0.1 SEED=7                  # a tenth of it, with other random numbers
    python -m tests.soak --part damage --only 17 # one try again; its folder stays

Prints every fault with what repeats it, and at the end what was tried. Exits 1 if there was one.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COUNTS = {"damage": 1000, "combinations": 2000, "kills": 200, "images": 1000}  # at length 1


def part(name: str, seed: int, count: int, minutes: float, only: int | None, home: Path) -> bool:
    """Whether nothing was wrong."""
    from tests.soak import combinations, damage, harness, images, kills

    harness.warm()
    found = harness.Part(name, seed, home, minutes)
    begin = time.monotonic()
    tries = dict(damage=damage, combinations=combinations, kills=kills, images=images)[name]
    tries.run(found, count, only)
    kinds = ", ".join(f"{n} {kind}" for kind, n in found.tried.most_common())
    print(
        f"{name}: {found.tried.total()} ({kinds}); {len(found.faults)} faults; "
        f"{(time.monotonic() - begin) / 60:.1f} minutes; seed {seed}",
        flush=True,
    )
    return not found.faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=float, default=1.0, help="1: about an hour on two cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="the most that a part may take")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time")
    parser.add_argument("--part", choices=COUNTS, help="this alone")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this try of the part alone")
    args = parser.parse_args()
    if args.part:
        home = Path(tempfile.mkdtemp(prefix=f"soak-{args.part}-"))
        count = max(1, round(COUNTS[args.part] * args.length))
        right = part(args.part, args.seed, count, args.minutes, args.only, home)
        if right and args.only is None:
            from tests.soak.harness import remove

            remove(home)
        else:
            print(f"folders: {home}")
        sys.exit(not right)

    def start(name: str) -> int:
        words = [sys.executable, "-m", "tests.soak", "--part", name]
        words += ["--length", str(args.length), "--seed", str(args.seed)]
        words += ["--minutes", str(args.minutes)]
        return subprocess.run(words).returncode

    print(f"{shlex.join(sys.argv)}, seed {args.seed}, length {args.length}, {os.cpu_count()} cores")
    with ThreadPoolExecutor(args.jobs) as pool:
        sys.exit(any(list(pool.map(start, COUNTS))))


if __name__ == "__main__":
    main()
