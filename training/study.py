"""A study from outside: the runs that its commands ask for, and how far each of them is."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from training.config import check, folder, settle
from training.files import read_progress, read_result, write
from training.messages import MISTAKES, explain

COMMANDS = "commands.txt"  # in a study's folder, a line each
PLAIN = re.compile(r"(batch|seed)=\d+")


@dataclass
class Cell:
    """One run that a study asks for."""

    overrides: list[str]
    cfg: DictConfig
    folder: Path


@contextmanager
def composing() -> Iterator[None]:
    """Hydra ready to compose, as it is already within `train.py`."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
        yield


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every run of `train.py -m OVERRIDES`: sweeps taken apart, those that an
    experiment brings among them. Of Hydra's own keys the search path remains."""
    parser = OverridesParser.create()
    given = [
        o
        for o in parser.parse_overrides(overrides)
        if o.key_or_group == "hydra.searchpath" or not o.key_or_group.startswith("hydra")
    ]
    fixed = [str(o.input_line) for o in given if not o.is_sweep_override()]
    with composing():
        params = composed(*fixed)[1].hydra.sweeper.get("params") or {}
    brought = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    return BasicSweeper.split_arguments(brought + given, None)[0]


@cache
def composed(*overrides: str) -> tuple[DictConfig, DictConfig]:
    """A run's configuration, and the same with Hydra's part."""
    full = compose("config", list(overrides), return_hydra_config=True)
    own = full.copy()
    with open_dict(own):
        del own["hydra"]
    return own, full


def cells(jobs: list[list[str]], checked: bool = False) -> list[Cell]:
    """The run that each list of overrides asks for. Raises `ValueError` if one cannot be, and
    `checked` is asked for.

    Batch size and seed are plain numbers that nothing else is composed from, so one composition
    (a fifth of a second) serves all runs that differ in them alone.
    """
    found = []
    with composing():
        before = HydraConfig.instance().cfg
        for job in jobs:
            numbers = {o.split("=")[0]: o.split("=")[1] for o in job if PLAIN.fullmatch(o)}
            cfg, full = composed(*(o for o in job if not PLAIN.fullmatch(o)))
            cfg = cfg.copy()
            for key, value in numbers.items():
                cfg[key] = int(value)
            HydraConfig.instance().set_config(full)
            settle(cfg)
            if checked:
                check(cfg)
            found.append(Cell(job, cfg, folder(cfg)))
        HydraConfig.instance().cfg = before
    return found


def record(overrides: list[str]) -> list[Path]:
    """Note a command in the folder of its study, or of each of them, for `scripts/study.py`;
    returns the folders of its runs."""
    line = shlex.join(overrides)
    folders = [cell.folder for cell in cells(jobs(overrides))]
    for study in {run.parent for run in folders}:
        study.mkdir(parents=True, exist_ok=True)
        file = study / COMMANDS
        with FileLock(study / ".commands.lock"):
            lines = file.read_text().splitlines() if file.exists() else []
            if line not in lines:
                write(file, "".join(f"{line}\n" for line in [*lines, line]))
    return folders


def requested(study: Path) -> tuple[list[Cell], list[str]]:
    """The runs that a study's commands ask for, and a line for each command that can no longer be
    composed. A folder that none of a command's runs are in was renamed or copied since."""
    found: dict[str, Cell] = {}
    problems = []
    file = study / COMMANDS
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            runs = cells(jobs(shlex.split(line)))
        except MISTAKES as error:
            problems.append(f"{file}: {line}: {explain(error)}")
            continue
        for cell in [run for run in runs if run.folder.parent.name == study.name] or runs:
            cell.folder = study / cell.folder.name
            found.setdefault(cell.folder.name, cell)
    return list(found.values()), problems


@dataclass
class State:
    """How far a run is: finished, diverged, damaged, running, failed, interrupted or waiting."""

    name: str
    update: int = 0
    updates: int = 0
    seconds: float = 0.0
    """Spent on those updates."""
    text: str = ""
    """The accuracy, or why it failed."""

    @property
    def left(self) -> float | None:
        """Seconds until it is over, at its speed so far."""
        return (self.updates - self.update) * self.seconds / self.update if self.update else None


def locked(folder: Path) -> bool:
    """Whether some process is training the run of this folder now."""
    file = folder / ".lock"
    try:
        with FileLock(file, blocking=False) if file.exists() else nullcontext():
            return False
    except Timeout:
        return True
    except OSError:  # of a study that this user may not write
        return False


def state(folder: Path) -> State:
    """Of the run in a folder, from its files."""
    if (folder / "result.json").exists():
        try:
            result = read_result(folder)
        except ValueError as error:  # of one run, and no reason not to show the others
            return State("damaged", text=str(error))
        text = f"top-1 {result['top1']:.2f} %" if result["top1"] is not None else ""
        if result.get("diverged_at_update") is not None:
            text = f"at update {result['diverged_at_update']}"
        done = result["updates"]
        return State(result["status"], done, done, result["wall_seconds"], text)
    now = State("interrupted" if (folder / ".hydra").exists() else "waiting")
    if told := read_progress(folder):
        now = State("interrupted", told["update"], told["updates"], told["seconds"])
    if locked(folder):
        now.name = "running"
    elif (folder / "error.txt").exists():
        now.name = "failed"
        now.text = " ".join((folder / "error.txt").read_text(errors="replace").split())
    return now
