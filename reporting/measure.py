"""The number of a run that a table is about."""

import statistics
from dataclasses import dataclass
from typing import Any

import pandas as pd

RULES = {"last": "last epoch", "best": "best epoch", "median5": "median of the last 5 epochs"}


def is_number(value: Any) -> bool:
    number = pd.api.types.is_number(value) and not pd.api.types.is_bool(value)
    return number and not pd.isna(value)


@dataclass(frozen=True)
class Measure:
    metric: str = "top1"
    rule: str | None = "last"
    """Which epoch's test accuracy, of `RULES`; None: `metric` is a number of result.json."""
    errors: bool = False
    """100 - accuracy."""

    def __post_init__(self) -> None:
        if self.errors and not self.accuracy:
            raise ValueError(f"--errors: {self.metric} is no accuracy; expected top1 or top5")

    @property
    def accuracy(self) -> str | None:
        """top1 or top5, if it is one."""
        return {"top1": "top1", "best_top1": "top1", "top5": "top5"}.get(self.metric)

    def of(self, run: pd.Series) -> float:
        """Of a finished run. Raises `ValueError` if it lacks the number."""
        if self.rule is None:
            value = run.get(self.metric)
            if not is_number(value):
                numbers = [k for k in run.index if k not in run["config"] and is_number(run[k])]
                raise ValueError(
                    f"--metric {self.metric}: {run['run']} has no such number; expected one of "
                    f"{', '.join(sorted(numbers))}"
                )
            value = float(value)
        else:
            tested = [row["test_top1"] for row in run["history"] if "test_top1" in row]
            least = 5 if self.rule == "median5" else 1
            if len(tested) < least:
                raise ValueError(
                    f"--rule {self.rule}: {run['folder']} was evaluated after {len(tested)} "
                    f"epochs, expected at least {least} (--rule last needs 1; see "
                    f"recipe.eval_every)"
                )
            five = statistics.median(tested[-5:])
            value = {"last": tested[-1], "best": max(tested), "median5": five}[self.rule]
        return 100 - value if self.errors else value

    def values(self, runs: pd.DataFrame) -> pd.Series:
        """Of every run, NaN where it is not finished."""
        finished = runs["status"] == "finished"
        return pd.Series(
            [
                self.of(run) if over else float("nan")
                for over, (_, run) in zip(finished, runs.iterrows(), strict=True)
            ],
            runs.index,
            dtype=float,
        )

    @property
    def name(self) -> str:
        if not self.accuracy:
            return self.metric.replace("_", " ")
        number = f"{self.accuracy[:3]}-{self.accuracy[3:]}"
        return f"{number} {'error' if self.errors else 'accuracy'} (%)"

    @property
    def when(self) -> str:
        """Which epoch's."""
        if self.rule:
            return RULES[self.rule]
        if not self.accuracy:
            return ""
        return RULES["best" if self.metric.startswith("best_") else "last"]
