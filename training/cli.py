"""The command line's manners: a mistake of the user gets one line, only a fault of ours more."""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import (
    HydraException,
)
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from training import distributed, process
from training.config import cannot_write, quoted, search_path, shown
from training.messages import MISTAKES, explain, first_line

WORKER = "SMALLBATCH_WORKER"  # in the environment of a run that a launcher started
GRACE_SECONDS = 30.0  # seconds that a run has to stop
OURS = "SMALLBATCH_ONE_LINE"  # in the environment: HYDRA_FULL_ERROR is set by us, not the user
FULL = os.environ.get("HYDRA_FULL_ERROR") == "1" and OURS not in os.environ
TEXTS = re.compile(r"(\+*(?:study|name|runtime\.runs|data\.(?:root|cache)))=([\w.+\-\s,]+)")


def print_error(error: BaseException, what: str = "") -> None:
    if distributed.reports_errors():
        print(f"error: {what}{explain(error)}", file=sys.stderr)


def is_mistake(error: BaseException) -> bool:
    plain = isinstance(error, MISTAKES) or type(error).__name__ == "OutOfMemoryError"
    return plain or distributed.is_lost_peer(error) or "full_key: hydra." in str(error)


def write_error(config: Any, error: BaseException) -> None:
    """Write the reason into the run's folder, for `scripts/study.py`."""
    from training.config import folder
    from training.files import write

    with suppress(*MISTAKES):  # of keys without which it has no folder
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        folder(config).mkdir(parents=True, exist_ok=True)
        write(folder(config) / "error.txt", explain(error) + "\n")


def abort(config: Any, error: BaseException) -> NoReturn:
    """End a process that others may be waiting for, so that whoever started them ends them all."""
    from training.run import RefusedError

    if distributed.reports_errors():
        if not isinstance(error, RefusedError):
            write_error(config, error)
        who = f"process {distributed.rank()} of {distributed.world_size()}: "
        print(f"error: {who}{explain(error)}", file=sys.stderr)
        if FULL or not is_mistake(error):
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def check(config: Any) -> None:
    """Raise `ValueError` for keys of Hydra's that cannot mean anything here."""
    own = {"run.dir": ".", "sweep.dir": str(config.runtime.runs), "sweep.subdir": "."}
    for key, value in (own | {"job.chdir": False, "output_subdir": None}).items():
        given = OmegaConf.select(config.hydra, key)
        if given != value:
            raise ValueError(
                f"hydra.{key}={shown(given)}: a run's folder is runtime.runs/study/name, and paths "
                f"are relative to where the command is given; expected none of this key"
            )
    for key in ("launcher", "sweeper"):
        given = OmegaConf.select(config.hydra, key)
        if not isinstance(given, DictConfig) or "_target_" not in given:
            raise ValueError(
                f"hydra.{key}={shown(given)}: expected no value, but hydra/{key}=NAME and keys of "
                f"that below hydra.{key}"
            )
    launcher = config.hydra.runtime.choices.get("hydra/launcher")
    if distributed.world_size() > 1 and launcher != "basic":
        raise ValueError(
            f"hydra/launcher={launcher}: {distributed.world_size()} processes were started for "
            f"each run, by torchrun or WORLD_SIZE, and would each start all of them; expected basic"
        )


class Report(Callback):
    """Says in one line why a run failed: at once in a sweep, which then goes on."""

    pid = 0
    """Of the process that the sweep is in; launchers have others."""
    composed = False
    """Whether Hydra is through with its part."""
    foreign = False
    """Whether it is a launcher of another package that trains the runs."""
    failures = 0
    folders: list[Path] = []
    """Of the runs of this sweep."""
    reported: set[str] = set()
    """Reasons, so that what all runs lack, such as the data, is said once."""

    @classmethod
    def failed(cls, overrides: Sequence[str], reason: str, where: str = "") -> None:
        cls.failures += 1
        if reason not in cls.reported:
            print(f"error: {' '.join(overrides)}: {reason}{where}", file=sys.stderr)
        cls.reported.add(reason)

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        Report.composed = True
        try:
            check(config)
        except MISTAKES as error:
            print_error(error)
            sys.exit(1)

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        from training.study import record

        self.on_run_start(config)
        Report.pid = os.getpid()
        launcher = config.hydra.runtime.choices.get("hydra/launcher")
        Report.foreign = launcher not in ("basic", "pool")
        try:
            task: Any = OmegaConf.to_container(config.hydra.overrides.task)  # not resolved
            Report.folders = record([*search_path(config.hydra), *task])
        except OSError as error:
            print_error(cannot_write(config, error))
            sys.exit(1)
        except MISTAKES:  # which the sweep will come upon itself, and say so
            pass

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        error = job_return._return_value
        together = distributed.world_size() > 1
        if job_return.status != JobStatus.FAILED or not (sweep or WORKER in os.environ or together):
            return
        from training.run import BusyError, RefusedError

        if isinstance(error, BusyError):  # it is being done, so nothing has failed
            print(f"{error}, skipped")
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            return
        if together:
            abort(config, error)
        if not isinstance(error, RefusedError):
            write_error(config, error)
        if sweep:
            Report.failed(job_return.overrides or [], explain(error))
            if FULL or not is_mistake(error):
                traceback.print_exception(error)
            if Report.pid == os.getpid():  # counted; Hydra would say it again
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            else:  # Hydra keeps the error, and its frames would keep the model
                error.__traceback__ = error.__cause__ = error.__context__ = None

    def on_run_end(self, config: Any, **kwargs: Any) -> None:
        job: JobReturn = kwargs["job_return"]
        error = job._return_value
        if job.status == JobStatus.FAILED and is_mistake(error) and not FULL:
            print_error(error)
            sys.exit(1)  # the job is over; Hydra would put a line of its own before ours


def stop_with_launcher() -> None:
    """A worker's standard input ends when its launcher does, however that ended."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def as_typed(word: str) -> str:
    """study=1e3 is a text as it is typed, and no number."""
    found = TEXTS.fullmatch(word)
    if not found:
        return word
    values = []
    for value in found[2].split(","):
        with suppress(HydraException):
            read = OverridesParser.create().parse_override(f"study={value}").value()
            value = value if read is None or isinstance(read, str) else quoted(value.strip())
        values.append(value)
    return f"{found[1]}={','.join(values)}"


def check_group(word: str) -> None:
    """Raise `ValueError` for an option of a group that is no name, at which Hydra ends."""
    group, _, typed = word.lstrip("+").partition("=")
    known = group.startswith("hydra/") or (process.ROOT / "configs" / group).is_dir()
    if group and typed and known:
        with suppress(HydraException):  # which Hydra will say
            value = OverridesParser.create().parse_override(word).value()
            none = value is None and group in ("experiment", "debug")
            if not (none or isinstance(value, str | Sweep)):
                raise ValueError(f"{group}={typed}: expected the name of one of its options")


def arguments(words: list[str]) -> tuple[Any, list[str]]:
    """What is asked of Hydra, and the words for it: flags first, wherever they stood; folders of
    options absolute, so that any process finds them. Raises `ValueError` where there are none."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args, unknown = parser.parse_known_intermixed_args(words)
    for word in unknown:
        key = word.lstrip("-").split("=")[0]
        raise ValueError(f"{word}: keys are written without dashes: {key}=VALUE")
    for name in ("config_path", "config_name", "experimental_rerun"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: there is one configuration, in configs/; "
                f"--config-dir=FOLDER adds options to its groups, such as experiment=NAME"
            )
    places = [args.config_dir] if args.config_dir is not None else []
    overrides = []
    for word in args.overrides:
        if len(word.splitlines()) > 1:  # as of a command in commands.txt
            raise ValueError(f"{' '.join(word.split())}: has a line break; expected a single line")
        if word.startswith("hydra.searchpath="):
            with suppress(HydraException):  # which Hydra will say
                given: Any = OverridesParser.create().parse_override(word).value()
                places += given if isinstance(given, list) else [given]
                continue
        check_group(word)
        overrides.append(as_typed(word))
    if places:
        overrides.append(f"hydra.searchpath=[{','.join(quoted(place(str(x))) for x in places)}]")
    flags = {k: v for k, v in vars(args).items() if k not in ("overrides", "config_dir")}
    words = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in flags.items()
        if value not in (None, False)
    ]
    return args, [*words, *overrides]


def place(path: str) -> str:
    """A folder of options, from wherever it is looked for."""
    if "://" in path and not path.startswith("file://"):
        return path
    folder = Path(path.removeprefix("file://")).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, for --config-dir or hydra.searchpath")
    return f"file://{folder}"


def run(main: Callable[[], Any]) -> None:
    """Call Hydra's entry point; exit 2 for what cannot be composed, 1 for what cannot be run."""
    process.find_project()
    try:
        distributed.check_environment()
        asked, sys.argv[1:] = arguments(sys.argv[1:])
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    if not (asked.help or asked.hydra_help or asked.cfg or asked.info or asked.shell_completion):
        process.open_output()  # else it is what was asked for
    if WORKER in os.environ:
        threading.Thread(target=stop_with_launcher, daemon=True).start()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra leaves its errors to us
    if not FULL:
        os.environ[OURS] = "1"  # for the processes that a launcher starts
    error: Exception | None = None
    Report.composed = False
    try:
        process.set_handlers()  # until here a signal ends the process at once, without a traceback
        main()
    except KeyboardInterrupt as stop:
        process.set_handlers(signal.SIG_IGN)
        if distributed.rank() == 0:
            nothing = "nothing was being trained; the same command goes on"
            if Report.foreign:
                nothing = "the same command goes on with each run from its last checkpoint"
            what = "; ".join(getattr(stop, "__notes__", [])) or nothing
            print(f"interrupted; {what}", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))
    except Exception as raised:
        words = [word for word in sys.argv[1:] if word.lstrip("+~").startswith("hydra.")]
        error = raised
        if words and not Report.composed and not is_mistake(raised):
            error = ValueError(f"{' '.join(words)}: cannot be set to that ({first_line(raised)})")
    finally:
        os.environ.pop(OURS, None)
        distributed.destroy()
    left = [f for f in Report.folders if error and (f / "error.txt").exists()]
    if error and (FULL or not (Report.failures or left or is_mistake(error))):
        raise error
    if not Report.failures:  # they were said foreign, if it was a launcher's processes
        for folder in left:
            print_error(ValueError((folder / "error.txt").read_text()), f"{folder}: ")
    if Report.failures or left:
        studies = " ".join(sorted({str(folder.parent) for folder in Report.folders}))
        print(
            f"error: {Report.failures or len(left)} of these runs failed, see above; the same "
            f"command tries them again and skips the finished ones"
            + (f" (python scripts/study.py {studies} shows all)" if studies else ""),
            file=sys.stderr,
        )
        sys.exit(1)
    if error:
        print_error(error)
        sys.exit(2 if isinstance(error, HydraException) else 1)
