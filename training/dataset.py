"""Which data a run was trained on: kept in its folder, compared before it is skipped or goes on.

For the user a data set is a path, `data.root`. For a run it is what lies there, by a fingerprint of
its files: so data may move, and other data under the same path are noticed.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from training.config import RELOCATED, identity, read_config
from training.files import read, write
from training.progress import say

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
    ours, path = identity(cfg) | {"data.root": None}, _path(cfg)
    here = None
    for file in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}*/.hydra/config.yaml")):
        config, run = read_config(file, "batch", "seed", "data"), file.parent.parent
        there = _path(config)
        if not there or identity(config) | {"data.root": None} != ours:
            continue
        gone, alike = not there.exists(), there.name == path.name
        if (run / FILE).exists():
            here = here or listing.fingerprint()
            same = (gone or alike) and not differences(read(run / FILE, "files")["files"], here)
        else:
            same = alike and (gone or there == path)
        if same:
            say(f"data.root={cfg.data.root}: the data of {run}, which were in {there}")
            (folder / "error.txt").unlink(missing_ok=True)  # of an attempt before they were found
            with suppress(OSError):
                folder.rmdir()
            RELOCATED[folder] = run
            return run
    return folder


def check(folder: Path, cfg: DictConfig, listing: Any) -> list[str]:
    """What differs between the data that the run in `folder` saw and those of `listing` (None: not
    a folder of the user's). A run that has come to nothing yet sees these from now on."""
    from data.listing import differences

    begun = any((folder / name).exists() for name in ("result.json", "last.pt", "previous.pt"))
    here = listing.fingerprint() if listing else None
    file = folder / FILE
    if begun and file.exists():
        there = read(file, "files")["files"]
        if here is None:
            return [f"images of a folder there, data={cfg.data.name}'s own here"]
        return differences(there, here)
    if begun and here:
        if read_config(folder / ".hydra" / "config.yaml", "data")["data"].get("root") is None:
            return [f"data={cfg.data.name}'s own images there, those of a folder here"]
        say(
            f"{folder}: from before runs kept a fingerprint of their data; data.root="
            f"{cfg.data.root} is taken to hold the same"
        )
    if here and not (folder / "result.json").exists():
        write(file, json.dumps({"root": str(_path(cfg)), "files": here}, indent=1) + "\n")
    elif not begun:
        file.unlink(missing_ok=True)
    return []


def names(folders: list[Path]) -> dict[Path, str]:
    """For a table: what to call the data of each run that has a fingerprint. The same data have one
    name, the end of their path, other data another."""
    found: dict[str, str] = {}
    called = {}
    for folder in folders:
        if not (folder / FILE).exists():
            continue
        content = read(folder / FILE, "root", "files")
        key = json.dumps(content["files"], sort_keys=True)
        parts = Path(content["root"]).parts
        tails = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        tails += [f"{tails[0]} ({len(found) + 1})"]  # the same path, at another time
        if key not in found:
            found[key] = next(tail for tail in tails if tail not in found.values())
        called[folder] = found[key]
    return called


def _path(config: Any) -> Path:
    return Path(os.path.realpath(os.path.expanduser(str(config["data"].get("root")))))  # noqa: PTH111
