"""The runs of studies as DataFrames. Reads files, nothing else; a damaged run is a row that says
so."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.config import different_result, flatten, identity, read_config
from training.files import RESULT, damaged, read, read_data, read_metrics, read_result

STATES = ("diverged", "failed", "unfinished", "damaged")
"""Of runs that are not finished."""
ABSENT = "absent"
MARKS = (".hydra/config.yaml", "result.json", "metrics.csv", "error.txt")  # of a run's folder
IDENTITY = ("norm", "batch_size", "sgd_batch_size", "protocol", "model", "data", "recipe", "seed")
NAMES = ("norm.name", "protocol.name", "model.name", "data.name", "recipe.name")
PRIVATE = ["config", "identity", "overrides", "history"]


def runs(*studies: str | Path) -> pd.DataFrame:
    """A row per run: `study`, `run`, `folder`, `status` (finished, diverged, failed, unfinished or
    damaged), `error`, `experiment`, the keys of result.json and of the configuration
    (`recipe.lr`). Raises `ValueError` for a folder without runs."""
    return load(*studies).drop(columns=PRIVATE)


def history(*studies: str | Path) -> pd.DataFrame:
    """A row per run and epoch: which run it is, and the columns of metrics.csv."""
    frame = load(*studies)
    known = ["study", "run", "status", *IDENTITY]
    rows = [
        {key: run[key] for key in known} | epoch
        for _, run in frame.iterrows()
        for epoch in run["history"]
    ]
    return typed(pd.DataFrame(rows, columns=None if rows else known, dtype=object))


def load(*studies: str | Path) -> pd.DataFrame:
    """`runs`, with four columns for tables: the resolved configuration, its keys that can change a
    result as they are written, the overrides, the rows of metrics.csv."""
    rows = []
    for study in map(Path, studies):
        marked = {
            file.parents[len(Path(mark).parts) - 1]
            for mark in MARKS
            for file in study.glob(f"*/{mark}")
        }
        if not marked:
            raise ValueError(f"{study}: no runs in it; expected a folder such as runs/quickstart")
        rows += [row_of(folder) for folder in sorted(marked)]
    name_data(rows)
    return typed(pd.DataFrame(rows, dtype=object))


def name_data(rows: list[dict[str, Any]]) -> None:
    """Call the folders of images that runs were trained on by the ends of their paths: the same
    files by one name, other files by another."""
    found: dict[str, str] = {}
    for row in rows:
        kept = row.pop("kept")
        if not kept or "data.root" not in row["identity"]:
            continue
        key = json.dumps(kept["files"], sort_keys=True)
        parts = Path(kept["root"]).parts
        tails = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        tails += [f"{tails[0]} ({len(found) + 1})"]  # the same path, at another time
        if key not in found:
            found[key] = next(tail for tail in tails if tail not in found.values())
        row["identity"]["data.root"] = found[key]


def row_of(folder: Path) -> dict[str, Any]:
    """What the files of a run's folder say."""
    row: dict[str, Any] = {"study": folder.resolve().parent.name, "run": folder.name}
    row |= {"folder": str(folder), "status": "unfinished", "error": None, "experiment": None}
    row |= dict.fromkeys((*IDENTITY, *(key for key in RESULT if key not in (*row, "versions"))))
    row |= {"batch_independent": None, "config": {}, "identity": {}, "overrides": [], "history": []}
    row["kept"] = None  # of its data
    failed = folder / "error.txt"
    if failed.exists():
        row |= {"status": "failed", "error": " ".join(failed.read_text(errors="replace").split())}
    over = (folder / "result.json").exists()
    if not over and row["status"] == "failed" and not (folder / ".hydra").exists():
        return row  # it failed before it had a configuration
    try:
        row |= configuration(folder)
        row["history"] = read_metrics(folder)
        if (folder / "data.json").exists():
            row["kept"] = read_data(folder / "data.json")
        if over:
            own = {key: value for key, value in row["identity"].items() if key != "norm"}
            row |= {"error": None} | flatten(finished(folder, row["history"], own))
    except ValueError as error:
        row |= {"status": "damaged", "error": str(error)}
    return row


def configuration(folder: Path) -> dict[str, Any]:
    """The keys of .hydra, and those of result.json that follow from them: of a run that is not
    over yet a guess for `sgd_batch_size` on several devices."""
    file, hydra, words = (folder / ".hydra" / f"{x}.yaml" for x in ("config", "hydra", "overrides"))
    config = OmegaConf.create(read_config(file, "batch", "seed"))
    with damaged(file, (TypeError, ValueError, AttributeError, KeyError)):
        flat, own = resolved(config), identity(config)
        for key in NAMES:
            if not isinstance(flat.get(key), str):
                raise ValueError(f"{key} is {flat.get(key)}; expected a name")
        batch, seed = int(flat["batch"]), int(flat["seed"])
        sgd_batch = int(flat.get("protocol.sgd_batch") or batch)
    choices = read(hydra, "hydra")["hydra"]
    with damaged(hydra, (TypeError, KeyError)):
        choices = choices["runtime"]["choices"]
        scheme = str(choices["norm"])
    typed_words: Any = read(words) if words.exists() else []
    library = flat.get("model.library")
    # `device` and `devices` are what was asked for; what it ran on stands in result.json.
    keys = {k: v for k, v in flat.items() if k not in ("device", "devices", "name", "overwrite")}
    return keys | {
        "study": flat.get("study") or folder.resolve().parent.name,
        "experiment": choices.get("experiment"),
        "norm": scheme,
        "batch_size": batch,
        "sgd_batch_size": sgd_batch,
        "protocol": flat["protocol.name"],
        "model": f"{library}/{flat['model.name']}" if library else flat["model.name"],
        "data": flat["data.name"],
        "recipe": flat["recipe.name"],
        "seed": seed,
        "config": flat | {"norm": scheme},
        "identity": own | {"norm": scheme},
        "overrides": list(map(str, typed_words)) if isinstance(typed_words, list) else [],
    }


def resolved(config: DictConfig) -> dict[str, Any]:
    """{"recipe.lr": 0.1, …}, interpolations followed where they lead somewhere."""
    flat = flatten(config)
    for key, value in flat.items():
        if isinstance(value, str) and "${" in value:
            try:
                flat[key] = OmegaConf.select(config, key)
            except OmegaConfBaseException:
                continue
    return flat


def finished(folder: Path, epochs: list[dict[str, float]], own: dict[str, Any]) -> dict[str, Any]:
    """The result of a run that is over. Raises `ValueError` where it is not that of the identity
    `own`, or where metrics.csv ends elsewhere."""
    result = read_result(folder)
    with damaged(folder / "result.json", ValueError):
        if differ := different_result(result, own):
            raise ValueError(f"of another run: {'; '.join(differ)}")
    result.pop("identity", None)
    last = epochs[-1] if epochs else {"update": 0}
    ends = {"update": "updates", "test_top1": "top1"}
    more = {"test_top5": "top5", "test_loss": "test_loss"}
    ends |= {column: key for column, key in more.items() if column in last and key in result}
    with damaged(folder / "metrics.csv", ValueError):
        for column, key in ends.items() if result["status"] == "finished" else ():
            if last.get(column) != result[key]:
                raise ValueError(
                    f"it ends with {column} {last.get(column)}, result.json says {result[key]}"
                )
    return result


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of numbers as numbers: whole ones as such, also where some are missing."""
    for key in frame:
        kinds = {type(value) for value in frame[key] if value is not None and value == value}
        if kinds == {int}:
            frame[key] = frame[key].astype("Int64" if frame[key].isna().any() else "int64")
        elif kinds and kinds <= {int, float}:
            frame[key] = frame[key].astype("float64")
        elif kinds == {bool} and not frame[key].isna().any():
            frame[key] = frame[key].astype("bool")
    return frame
