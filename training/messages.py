"""What is wrong, in one line."""

import errno
import re
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from training import distributed, process
from training.config import flatten, quoted

MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)
LAUNCHERS = ("joblib", "ray", "submitit_local", "submitit_slurm")  # of other packages
CHOICE = re.compile(r"(model|norm|protocol|data|recipe)=\w+")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def suggest(word: str, known: list[str]) -> str:
    """What may have been meant, whatever its case and the group that it stands in."""
    word, lower = word.lower(), {key.lower(): key for key in known}
    same = [key for small, key in lower.items() if f".{small}".endswith(f".{word}")]
    matches = same or [lower[m] for m in get_close_matches(word, lower, n=3, cutoff=0.5)]
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def explain(error: BaseException) -> str:
    """What is wrong, in one line: the key, the value and what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or [])
        if group == "hydra/launcher" and option in LAUNCHERS:
            extra = option.split("_")[0]
            return f"{group}={option}: not installed; pip install -c constraints.txt '.[{extra}]'"
        return f"{group}={option}: unknown{suggest(option, options)}; allowed: {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        if not equals:
            return f"{key}: cannot be read; expected KEY=VALUE, such as batch=2 or norm=gn"
        value = str(Path(value).expanduser()) if value.startswith("~") else value
        text = shlex.quote(f"{key}={quoted(value)}")
        return f"{error.override}: cannot be read; a text with such letters is quoted: {text}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        what = "a smaller protocol.micro_batch or model needs less"
        return f"out of memory: {what} ({first_line(error)})"
    if distributed.is_lost_peer(error):
        return (
            f"lost another process of this run; the same command goes on from the last checkpoint "
            f"({first_line(error)})"
        )
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
        return explain(error.__cause__)  # a launcher's own
    if hydras := re.search(r"full_key: (hydra\.\S+)", str(error)):  # of plain types, too
        return f"{hydras[1]}: cannot be set to that ({first_line(error)})"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        missing = re.search(r"Missing mandatory value: (\S+)", f"{error} {cause}")
        if missing:
            return f"{missing[1]}=???: needs a value"
        if "Ambiguous value" in str(error):
            return f"{first_line(error)}: several values make a study, which needs -m"
        unknown = re.match(r"Could not override '([^']*)'", str(error))
        if unknown:
            key = getattr(cause, "full_key", None) or unknown[1]
            group = key.split(".")[0]
            swept = next((w for w in sys.argv if re.match(rf"{group}=\S+,", w)), "")
            options = swept.partition("=")[2].split(",")
            keys = known_keys([f"{group}={option}" for option in options if swept])
            if key in keys:
                return f"{key}: not all of {swept} have it; expected a key of all, or two commands"
            return f"{key}: no such key{suggest(key, keys)}; --help lists all"
        place = getattr(error, "full_key", None)
        where = f"{place}: " if place and place not in first_line(error) else ""
        return where + first_line(error) + (f" ({first_line(cause)})" if cause else "")
    if isinstance(error, OSError) and error.filename:
        full = "; runtime.runs and data.cache name the folders that are written"
        return f"{error.filename}: {error.strerror}{full if error.errno in FULL_DISK else ''}"
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def known_keys(swept: list[str]) -> list[str]:
    """Of the configuration that was asked for, with any of some choices."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    keys: set[str] = {"experiment"}
    chosen = [word for word in sys.argv if CHOICE.fullmatch(word)]
    with initialize_config_dir(str(process.ROOT / "configs"), version_base="1.3"):
        for one in swept or [""]:
            keys |= set(flatten(compose("config", [*chosen, *filter(None, [one])])))
    return sorted({*keys, *(key.split(".")[0] for key in keys)})
