"""Files that are whole or not there."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """All of the content or the file as it was, whenever the machine stops."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
