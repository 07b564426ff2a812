"""What becomes of runs: their files as DataFrames, tables, published numbers, figures.

import reporting
runs = reporting.runs("runs/mine")        # a row per run
history = reporting.history("runs/mine")  # a row per run and epoch
"""

from reporting.read import history, runs

__all__ = ["history", "runs"]
