"""Files that are whole or not there."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


def write(path: Path, content: str | bytes, durable: bool = True) -> None:
    """All of the content or the file as it was, whenever the machine stops; not `durable`: whenever
    the process does. Raises `OSError` with the file's name."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk has no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same file, which stays."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON or YAML file of a run. Raises `ValueError` with its name if it is damaged or lacks
    one of `keys`."""
    from omegaconf import OmegaConf

    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of three libraries, for whatever stands in the file
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read ({problem}); overwrite=true starts again"
        ) from error
    lost = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lost:
        raise ValueError(
            f"{path}: cannot be read (no {lost[0]} in it); overwrite=true starts again"
        )
    return content
