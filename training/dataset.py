"""Which data a run was trained on: kept in its folder, compared before it is skipped or goes on.

For the user a data set is a path, `data.root`. For a run it is what lies there, by a fingerprint of
its files: so data may move, and other data under the same path are noticed.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.config import MOVED, identity, read_config
from training.files import read_data, write

log = logging.getLogger("smallbatch")
FILE = "data.json"


def locate(folder: Path, cfg: DictConfig, listing: Any) -> Path:
    """Where the run `cfg` on the files of a listing is: in `folder`, which is named by their path,
    or beside it, if it began when the same files had another path.

    The other path must be gone or end as ours does, as that of a copy on a node's own disk does.
    Runs from before there were fingerprints were named by that end alone.
    """
    from data.listing import differences  # with torch, which tables do without

    if not listing or "data.root" not in identity(cfg) or cfg.name is not None:
        return folder
    if (folder / ".hydra").exists():
        return folder
    ours, path = identity(cfg) | {"data.root": None}, _path(cfg.data.root)
    for file in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}*/.hydra/config.yaml")):
        try:
            config, run = read_config(file, "batch", "seed", "data"), file.parent.parent
        except ValueError:  # a damaged run, whose own command says so
            continue
        if identity(config) | {"data.root": None} != ours:
            continue
        kept = read_data(run / FILE) if (run / FILE).exists() else None
        there = _path(kept["root"] if kept else config["data"].get("root"))
        gone, alike = not there.exists(), there.name == path.name
        if kept and (gone or alike) and there != path:
            same = not differences(kept["files"], listing.fingerprint)
        else:
            same = there == path or (gone and alike)
        if same:
            if there != path:
                log.info(f"data.root={cfg.data.root}: the data of {run}, which were in {there}")
            folder.mkdir(exist_ok=True)
            write(folder / MOVED, run.name)
            (folder / "error.txt").unlink(missing_ok=True)  # of an attempt before they were found
            return run
    return folder


def compare(folder: Path, cfg: DictConfig, listing: Any) -> list[str]:
    """What differs between the data that the run in `folder` saw and those of `listing` (None: not
    a folder of the user's); empty for a run that has come to nothing yet."""
    from data.listing import differences

    if not any((folder / name).exists() for name in ("result.json", "last.pt", "previous.pt")):
        return []
    file = folder / FILE
    if listing and file.exists():
        return differences(read_data(file)["files"], listing.fingerprint)
    if file.exists():
        return [f"images of a folder there, data={cfg.data.name}'s own here"]
    if not listing:
        return []
    if read_config(folder / ".hydra" / "config.yaml", "data")["data"].get("root") is None:
        return [f"data={cfg.data.name}'s own images there, those of a folder here"]
    log.warning(
        f"{folder}: from before runs kept a fingerprint of their data; data.root={cfg.data.root} "
        f"is taken to hold the same"
    )
    return []


def keep(folder: Path, cfg: DictConfig, listing: Any) -> None:
    """Write down what the run in `folder` sees and where it is, if that can be known: not for one
    that was over before there were fingerprints."""
    file = folder / FILE
    if not listing:
        file.unlink(missing_ok=True)
    elif file.exists() or not (folder / "result.json").exists():
        content = {"root": str(_path(cfg.data.root)), "files": listing.fingerprint}
        text = json.dumps(content, indent=1) + "\n"
        if not file.exists() or file.read_text() != text:
            write(file, text)


def _path(root: Any) -> Path:
    return Path(os.path.realpath(os.path.expanduser(str(root))))  # noqa: PTH111
