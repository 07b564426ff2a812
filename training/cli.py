"""The command line's manners: a mistake of the user gets one line, only a fault of ours more."""

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training import distributed
from training.config import flatten

WORKER = "SMALLBATCH_WORKER"  # in the environment of a run that a launcher started
FULL = os.environ.get("HYDRA_FULL_ERROR") == "1"
MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)
FLAGS = re.compile(
    r"-(h|p|r|m|c|i|sc|cp|cn|cd|-help|-hydra-help|-version|-cfg|-resolve|-package|-run|-multirun"
    r"|-shell-completion|-config-path|-config-name|-config-dir|-experimental-rerun|-info)(=.*)?"
)
LAUNCHERS = ("joblib", "ray", "submitit_local", "submitit_slurm")  # of other packages
CHOICE = re.compile(r"(model|norm|protocol|data|recipe)=\w+")


def near(word: str, known: list[str]) -> str:
    matches = get_close_matches(word, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def explain(error: BaseException) -> str:
    """What is wrong, in one line: the key, the value and what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or [])
        if group == "hydra/launcher" and option in LAUNCHERS:
            extra = option.split("_")[0]
            return f"{group}={option}: not installed; pip install -c constraints.txt '.[{extra}]'"
        return f"{group}={option}: unknown{near(option, options)}; allowed: {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; expected KEY=VALUE, such as batch=2 or norm=gn"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return f"out of memory: a smaller protocol.forward or model needs less ({first(error)})"
    if distributed.lost(error):
        return (
            f"lost another process of this run; the same command goes on from the last checkpoint "
            f"({first(error)})"
        )
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
        return explain(error.__cause__)  # a launcher's own
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        missing = re.search(r"Missing mandatory value: (\S+)", f"{error} {cause}")
        if missing:
            return f"{missing[1]}=???: needs a value"
        if "Ambiguous value" in str(error):
            return f"{first(error)}: several values make a study, which needs -m"
        unknown = re.match(r"Could not override '([^']*)'", str(error))
        if unknown:
            key = getattr(cause, "full_key", None) or unknown[1]
            keys = known_keys()
            return f"{key}: no such key{near(key, keys)}; --help lists all"
        return first(error) + (f" ({first(cause)})" if cause else "")
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename}: {error.strerror}; runtime.runs and data.cache name the folders "
            f"that are written"
        )
    return " ".join(str(error).split()) or type(error).__name__


def first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".:")


def known_keys() -> list[str]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
        keys = list(flatten(compose("config", [w for w in sys.argv if CHOICE.fullmatch(w)])))
    return sorted({*keys, *(k.split(".")[0] for k in keys), "experiment"})


def complain(error: BaseException, what: str = "") -> None:
    if distributed.speaks():
        print(f"error: {what}{explain(error)}", file=sys.stderr)


def is_mistake(error: BaseException) -> bool:
    plain = isinstance(error, MISTAKES) or type(error).__name__ == "OutOfMemoryError"
    return plain or distributed.lost(error)


def leave(config: Any, error: BaseException) -> None:
    """Write the reason into the run's folder, for `scripts/study.py`."""
    from training.config import folder
    from training.files import write

    with suppress(*MISTAKES):  # of keys without which it has no folder
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        folder(config).mkdir(parents=True, exist_ok=True)
        write(folder(config) / "error.txt", explain(error) + "\n")


def abandon(config: Any, error: BaseException) -> None:
    """End a process that others may be waiting for, so that whoever started them ends them all."""
    from training.run import RefusedError

    if distributed.speaks():
        if not isinstance(error, RefusedError):
            leave(config, error)
        who = f"process {distributed.rank()} of {distributed.size()}: "
        print(f"error: {who}{explain(error)}", file=sys.stderr)
        if FULL or not is_mistake(error):
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Report(Callback):
    """Says in one line why a run failed: at once in a sweep, which then goes on."""

    failures = 0
    folders: list[Path] = []
    """Of the runs of this sweep."""
    told: set[str] = set()
    """Reasons, so that what all runs lack, such as the data, is said once."""

    @classmethod
    def failed(cls, overrides: Sequence[str], reason: str, where: str = "") -> None:
        cls.failures += 1
        if reason not in cls.told:
            print(f"error: {' '.join(overrides)}: {reason}{where}", file=sys.stderr)
        cls.told.add(reason)

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        from training.study import record

        with suppress(*MISTAKES):  # which the sweep will come upon itself, and say so
            Report.folders = record(list(config.hydra.overrides.task))

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        error = job_return._return_value
        together = distributed.size() > 1
        if job_return.status != JobStatus.FAILED or not (sweep or WORKER in os.environ or together):
            return
        from training.run import BusyError, RefusedError

        if isinstance(error, BusyError):  # it is being done, so nothing has failed
            print(f"{error}, skipped")
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            return
        if together:
            abandon(config, error)
        if not isinstance(error, RefusedError):
            leave(config, error)
        if sweep:
            Report.failed(job_return.overrides or [], explain(error))
            if not is_mistake(error):
                traceback.print_exception(error)
            # Hydra keeps the error until the sweep ends, and its frames would keep the model.
            error.__traceback__ = error.__cause__ = error.__context__ = None

    def on_run_end(self, config: Any, **kwargs: Any) -> None:
        job: JobReturn = kwargs["job_return"]
        error = job._return_value
        if job.status == JobStatus.FAILED and is_mistake(error) and not FULL:
            complain(error)
            sys.exit(1)  # the job is over; Hydra would put a line of its own before ours


def end_with_launcher() -> None:
    """A worker's standard input ends when its launcher does, however that ended."""
    os.read(0, 1)
    os._exit(1)


def run(main: Callable[[], Any]) -> None:
    """Call Hydra's entry point; exit 2 for what cannot be composed, 1 for what cannot be run."""
    for word in sys.argv[1:]:
        if word.startswith("-") and not FLAGS.fullmatch(word):
            key = word.lstrip("-").split("=")[0]
            complain(ValueError(f"{word}: keys are written without dashes: {key}=VALUE"))
            sys.exit(2)
    if WORKER in os.environ:
        threading.Thread(target=end_with_launcher, daemon=True).start()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra leaves its errors to us
    try:
        main()
    except KeyboardInterrupt as stop:
        if distributed.rank() == 0:
            print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))
    except Exception as error:
        left = [f for f in Report.folders if (f / "error.txt").exists()]
        if FULL or not (Report.failures or left or is_mistake(error)):
            raise
        if not Report.failures:  # they were said elsewhere, if it was a launcher's processes
            for folder in left:
                complain(ValueError((folder / "error.txt").read_text()), f"{folder}: ")
        if Report.failures or left:
            studies = " ".join(sorted({str(folder.parent) for folder in Report.folders}))
            hint = f" (python scripts/study.py {studies} shows all)" if studies else ""
            print(
                f"error: {Report.failures or len(left)} of these runs failed, see above; the same "
                f"command tries them again and skips the finished ones{hint}",
                file=sys.stderr,
            )
        else:
            complain(error)
        sys.exit(2 if isinstance(error, HydraException) else 1)
    finally:
        distributed.leave()
