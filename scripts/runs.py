"""The runs of studies, as their files tell them: what tables, figures and boards are made of."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from training import dataset
from training.config import flatten, identity, read_config
from training.files import read as load

RULES = {"last": "last epoch", "best": "best epoch", "median5": "median of the last 5 epochs"}
ABSENT = "absent"


@dataclass(eq=False)
class Record:
    """What a run's folder says."""

    folder: Path
    choices: dict[str, Any]
    """The option of each group, and the experiment."""
    whole: DictConfig
    config: dict[str, Any]
    """The keys that can change a result, as written, and `norm`, the scheme."""
    result: dict[str, Any] | None
    error: str | None
    """Why it failed, in one line."""

    @property
    def scheme(self) -> str:
        return str(self.choices["norm"])

    @property
    def seed(self) -> int:
        return int(self.whole.seed)

    @property
    def batch(self) -> int:
        return int(self.whole.batch)

    @property
    def state(self) -> str:
        """finished, diverged, failed or unfinished."""
        if self.result:
            return str(self.result["status"])
        return "unfinished" if self.error is None else "failed"

    def value(self, key: str) -> Any:
        """Of any key of the run's configuration, or of `norm`: its scheme. Can be hashed."""
        if key == "norm":
            return self.scheme
        value = OmegaConf.select(self.whole, key, default=ABSENT)
        return value if isinstance(value, str | int | float | None) else str(value)

    @property
    def model(self) -> str:
        library, name = self.value("model.library"), str(self.value("model.name"))
        return name if library in (None, ABSENT) else f"{library}/{name}"

    @property
    def data(self) -> str:
        """The name of the data set: a folder's own, where it is a folder of images."""
        name = str(self.value("data.name"))
        return Path(str(self.value("data.root"))).name if name == "folder" else name

    @property
    def sgd_batch(self) -> int:
        """Images per optimizer step; before the end of a run on several devices a guess."""
        if self.result:
            return int(self.result["sgd_batch"])
        size = self.value("protocol.sgd_batch")
        return self.batch if size in (None, ABSENT) else int(size)

    @cached_property
    def epochs(self) -> list[dict[str, float]]:
        """The rows of metrics.csv without their empty fields. Raises `ValueError` if damaged."""
        file = self.folder / "metrics.csv"
        if not file.exists():
            return []
        with open(file, newline="") as lines:
            try:
                return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: cannot be read ({error})") from error


def read(*studies: Path) -> list[Record]:
    """All runs of the studies. Raises `ValueError` if one has none, or a file is damaged."""
    records = []
    called = dataset.names([file.parent for s in studies for file in sorted(s.glob("*/data.json"))])
    for study in studies:
        files = sorted(study.glob("*/.hydra/config.yaml"))
        if not files:
            raise ValueError(f"{study}: no runs in it; expected a folder such as runs/quickstart")
        for file in files:
            folder = file.parent.parent
            whole = OmegaConf.create(read_config(file, "batch", "seed"))
            choices = load(file.with_name("hydra.yaml"), "hydra")["hydra"]["runtime"]["choices"]
            done, failed = folder / "result.json", folder / "error.txt"
            result = load(done, "status", "batch_free", "sgd_batch") if done.exists() else None
            error = " ".join(failed.read_text().split()) if failed.exists() else None
            config = identity(whole) | {"norm": choices["norm"]}
            if "data.root" in config and folder in called:
                config["data.root"] = called[folder]
            records.append(Record(folder, choices, whole, config, result, error))
    return records


def early(*studies: Path) -> dict[str, str]:
    """The runs that failed before they had a configuration, such as those of an option that the
    network cannot have: name and reason."""
    return {
        file.parent.name: " ".join(file.read_text().split())
        for study in studies
        for file in sorted(study.glob("*/error.txt"))
        if not file.with_name(".hydra").exists()
    }


@dataclass(frozen=True)
class Measure:
    """The number of a run that a table is about."""

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

    def of(self, run: Record) -> float:
        """Of a finished run. Raises `ValueError` if it lacks the number."""
        if self.rule is None:
            value: Any = run.result.get(self.metric) if run.result else None
            if type(value) not in (int, float):
                numbers = (k for k, v in (run.result or {}).items() if type(v) in (int, float))
                raise ValueError(
                    f"--metric {self.metric}: {run.folder.name} has no such number; expected one "
                    f"of {', '.join(sorted(numbers))}"
                )
        else:
            tested = [row["test_top1"] for row in run.epochs if "test_top1" in row]
            least = 5 if self.rule == "median5" else 1
            if len(tested) < least:
                raise ValueError(
                    f"--rule {self.rule}: {run.folder} was evaluated after {len(tested)} epochs, "
                    f"expected at least {least} (--rule last needs 1; see recipe.eval_every)"
                )
            five = statistics.median(tested[-5:])
            value = {"last": tested[-1], "best": max(tested), "median5": five}[self.rule]
        return 100 - value if self.errors else value

    @property
    def name(self) -> str:
        if not self.accuracy:
            return self.metric.replace("_", " ")
        return (
            f"{self.accuracy[:3]}-{self.accuracy[3:]} {'error' if self.errors else 'accuracy'} (%)"
        )

    @property
    def when(self) -> str:
        """Which epoch's."""
        if self.rule is None:
            return (
                RULES["best" if self.metric.startswith("best_") else "last"]
                if self.accuracy
                else ""
            )
        return RULES[self.rule]


def need(records: list[Record], option: str, key: str) -> None:
    """Raise `ValueError` unless a run has `key`, which the user gave with `option`."""
    known = {"norm", *(k for r in records for k in flatten(r.whole))}
    if key not in known:
        near = get_close_matches(key, known, n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"{option} {key}: no run has this key{hint}")


def label(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def split(records: list[Record], keys: Iterable[str]) -> dict[str, list[Record]]:
    """The runs by the values of `keys`, such as "recipe.lr=0.1"; "" without keys."""
    parts: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        parts[", ".join(f"{key}={label(record.value(key))}" for key in keys)].append(record)
    return dict(parts)


def explains(axis: str, key: str) -> bool:
    """Whether `key` may follow from the value of `axis`: the options of a scheme, the sizes of a
    data set, the SGD batch where it grows with the batch size."""
    group = {"norm": "norm", "batch": "protocol"}.get(axis, axis.removesuffix(".name"))
    return key.startswith(f"{group}.")


def check(records: list[Record], axes: list[str], free: Iterable[str] = ()) -> None:
    """Raise `ValueError` where runs differ in more than the seed: those of a cell in anything, two
    cells in a key that does not follow from the values of `axes`. `free`: keys that may differ."""
    allowed = {"seed", *axes, *free}
    for key in sorted({key for r in records for key in r.config} - allowed):
        given = [axis for axis in axes if explains(axis, key)]
        first: dict[tuple[Any, ...], Record] = {}
        for record in records:
            other = first.setdefault(tuple(record.value(axis) for axis in given), record)
            one, two = (r.config.get(key, ABSENT) for r in (record, other))
            if one != two:
                raise ValueError(
                    f"{record.folder.name} and {other.folder.name} differ in {key} "
                    f"({label(one)} and {label(two)}); --split {key} makes a table for each value"
                )
    once: dict[tuple[Any, ...], Record] = {}
    for record in records:
        where = tuple(record.value(key) for key in ("seed", *axes, *free))
        same = once.setdefault(where, record)
        if same is not record:
            raise ValueError(f"{record.folder} and {same.folder} are the same run twice")
