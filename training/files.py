"""The files of runs: written whole or not at all, and checked when they are read."""

import csv
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

NUMBER = (int, float)
RESULT: dict[str, tuple[type, ...]] = {  # key of result.json: what it may be
    "status": (str,),
    "top1": (*NUMBER, type(None)),
    "top5": (*NUMBER, type(None)),
    "best_top1": (*NUMBER, type(None)),
    "norm": (str,),
    "batch_size": (int,),
    "sgd_batch_size": (int,),
    "protocol": (str,),
    "model": (str,),
    "data": (str,),
    "recipe": (str,),
    "seed": (int,),
    "epochs": NUMBER,
    "updates": (int,),
    "parameters": (int,),
    "images_per_second": NUMBER,
    "wall_seconds": NUMBER,
    "peak_memory_bytes": (int, type(None)),
    "threads": (int,),
    "device": (str,),
    "versions": (dict,),
}
WHOLE = ("micro_batch", "devices", "train_images", "test_images", "ignored_files", "classes")
LATER: dict[str, tuple[type, ...]] = {  # which older results lack
    **dict.fromkeys((*WHOLE, "unreadable_images"), (int,)),
    **dict.fromkeys(("batch_independent", "graph", "channels_last"), (bool,)),
    **dict.fromkeys(("study", "compiled_reason"), (str,)),
    **dict.fromkeys(("learning_rate", "ema"), NUMBER),
    **dict.fromkeys(("pixels", "identity"), (dict,)),
    "compiled": (str, bool),
    "test_loss": (*NUMBER, type(None)),
    "diverged_at_update": (int, type(None)),
    "evaluation": (dict, type(None)),
    "debug": (str, type(None)),
    "image_shape": (list,),
}
RENAMED = {  # keys of older results
    "sgd_batch": "sgd_batch_size",
    "batch_free": "batch_independent",
    "forward": "micro_batch",
}
ACCURACIES = ("top1", "top5", "best_top1")


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
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def damaged(path: Path, errors: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn `errors` into a `ValueError` with the file's name and what is wrong with it."""
    try:
        yield
    except errors as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read ({problem}); overwrite=true starts again"
        ) from error


def read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON or YAML file of a run. Raises `ValueError` with its name if it is damaged or lacks
    one of `keys`."""
    from omegaconf import OmegaConf

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    with damaged(path, Exception):  # of three libraries, for whatever stands in the file
        if path.suffix == ".json":
            content: Any = json.loads(path.read_text(), parse_constant=refuse)
        else:
            content = OmegaConf.to_container(OmegaConf.load(path))
        for key in keys:
            if not isinstance(content, dict) or key not in content:
                raise ValueError(f"no {key} in it")
    return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run. Raises `ValueError` with its name if it is damaged."""
    from models import weights  # with torch, which tables do without

    with damaged(path, Exception):  # of pickle, zipfile and torch, for whatever stands in the file
        content: dict[str, Any] = weights.read(path)
        return content


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a run that is over, older keys under today's names. Raises `ValueError`
    with its name for a key that is missing, of another type or no number."""
    path = folder / "result.json"
    result: dict[str, Any] = {
        RENAMED.get(key, key): value for key, value in read(path, "status").items()
    }
    with damaged(path, ValueError):
        if result["status"] not in ("finished", "diverged"):
            raise ValueError(f"status is {result['status']}; expected finished or diverged")
        for key, types in (RESULT | {k: v for k, v in LATER.items() if k in result}).items():
            if key not in result:
                raise ValueError(f"no {key} in it")
            value = result[key]
            if type(value) not in types:
                expected = " or ".join(t.__name__.replace("NoneType", "null") for t in types)
                raise ValueError(f"{key} is {value!r}; expected {expected}")
            if key in ACCURACIES and value is None and result["status"] == "finished":
                raise ValueError(f"{key} is null in a finished run")
            if key in ACCURACIES and isinstance(value, NUMBER) and not 0 <= value <= 100:
                raise ValueError(f"{key} is {value}; expected 0 to 100")
            if type(value) in NUMBER and not value >= 0:
                raise ValueError(f"{key} is {value}; expected no less than 0")
    return result


def read_data(path: Path) -> dict[str, Any]:
    """The data.json of a run: root, files. Raises `ValueError` with its name if it is damaged."""
    kept = read(path, "root", "files")
    with damaged(path, (TypeError, ValueError, KeyError, AttributeError)):
        for part in ("train", "test"):
            for name, (count, digest) in kept["files"][part].items():
                if type(count) is not int or not isinstance(digest, str):
                    raise ValueError(f"{part}/{name} is {count!r}, {digest!r}")
        if not isinstance(kept["root"], str):
            raise ValueError(f"root is {kept['root']!r}; expected a path")
    return kept


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv without their empty fields; none without the file. Raises
    `ValueError` with its name for a row that is cut off or a field that is no finite number."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    rows = []
    with damaged(path, (ValueError, OSError, csv.Error)), open(path, newline="") as file:
        for i, row in enumerate(csv.DictReader(file, strict=True), 1):
            if None in row or None in row.values():
                raise ValueError(f"row {i} has not as many fields as the header")
            for key in ("epoch", "update"):
                if not row.get(key):
                    raise ValueError(f"no {key} in row {i}")
            counts = {key: int(row[key]) for key in ("epoch", "update")}
            numbers = {key: float(value) for key, value in row.items() if value} | counts
            for key, number in numbers.items():
                if not math.isfinite(number) and not key.startswith("probe/"):
                    raise ValueError(f"{key} is {number} in row {i}")
            rows.append(numbers)
    return rows


def read_progress(folder: Path) -> dict[str, Any]:
    """How far a run says it is: update, updates, seconds. Nothing without the file, or if it is
    damaged: it is for whoever watches, and the run will soon write another."""
    try:
        told = read(folder / "progress.json", "update", "updates", "seconds")
    except ValueError:
        return {}
    numbers = all(type(told[key]) in NUMBER for key in ("update", "updates", "seconds"))
    return told if numbers else {}
