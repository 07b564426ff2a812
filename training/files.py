"""Files that are whole or not there."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> None:
    """All of the content or the file as it was, whenever the machine stops."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
