"""A run's folder: one training, from its lock to its result. Every file is written atomically.

.hydra/                  the configuration, as Hydra keeps it
data.json                a fingerprint of the data, where they are a folder of images
last.pt, previous.pt     the last two checkpoints
metrics.csv              a row per epoch
events.out.tfevents.*    for TensorBoard
result.json              only when the run is over
progress.json            only while it trains
error.txt                only after an attempt that failed in a study: the reason, in one line
log.txt                  what it said, where a launcher gave it a process of its own
"""

import csv
import io
import json
import logging
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from training import dataset, distributed
from training.config import (
    cannot_write,
    different,
    different_result,
    different_run,
    folder,
    identity,
    read_config,
)
from training.files import read_checkpoint, read_result, write

log = logging.getLogger("smallbatch")
CHECKPOINT = {"model", "optimizer", "scaler", "progress", "rng", "threads", "compiled"}
COLUMNS = (  # of metrics.csv; accuracies in %
    *("epoch", "update", "learning_rate", "train_loss", "train_top1"),
    *("test_loss", "test_top1", "test_top5", "images_per_second", "seconds"),
)


def plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RefusedError(ValueError):
    """The folder is not this run's to write: its owner's files stay as they are."""


class BusyError(RefusedError):
    """Another process is training this run."""


def differences(folder: Path, cfg: DictConfig) -> list[str]:
    """The keys that can change a result and are not the same in the configuration of a folder."""
    file = folder / ".hydra" / "config.yaml"
    if not file.exists():
        return []
    there, ours = identity(read_config(file, "batch", "seed")), identity(cfg)
    if (folder / dataset.FILE).exists():  # tells better than a path whether the data are the same
        there["data.root"] = ours["data.root"] = None
    found = different(there, ours)
    if (folder / "result.json").exists():  # which may have come from another folder
        found += [f"result.json: {x}" for x in different_result(read_result(folder), ours)]
    return found


class Run:
    """The folder of one training, locked for this process while the `with` lasts. The lock is the
    kernel's: it ends with the process, however that ends."""

    def __init__(self, cfg: DictConfig, listing: Any = None):
        """`listing`: the files of the data set, if it is a folder of the user's.

        Raises `BusyError` if another process trains it, `RefusedError` if it holds another
        configuration or other data, and `OSError` if it cannot be written."""
        self.folder = distributed.broadcast_result(dataset.locate)(folder(cfg), cfg, listing)
        self.overwrite = cfg.overwrite
        self.identity = identity(cfg) | {"data.root": None}
        self.saved: int | None = None
        """The update of the last checkpoint."""
        self._progress_written = 0.0
        self.open(cfg, listing)

    @distributed.broadcast_result
    def open(self, cfg: DictConfig, listing: Any) -> None:
        """Lock the folder and see that it is ours."""
        self._lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A process that was just killed may be about to let go, and whoever looks whether a
            # run is being trained holds its lock for a moment.
            self._lock.acquire(timeout=2, poll_interval=0.1)
        except Timeout as error:
            raise BusyError(f"{self.folder}: another process is training this run") from error
        except OSError as error:
            if cfg.overwrite or not (self.folder / "result.json").exists():
                raise cannot_write(cfg, error) from error
            self.check_config(cfg)  # it is over, so that nothing has to be written
            self.check_data(cfg, listing, writable=False)
            return
        try:
            if cfg.overwrite:
                self.clear()
            self.check_config(cfg)
            self.check_data(cfg, listing)
            # Of an earlier attempt, and what it was writing when it was killed.
            for pattern in ("error.txt", "progress.json", "*.tmp", ".hydra/*.tmp"):
                for file in self.folder.glob(pattern):
                    file.unlink(missing_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "Run":
        return self

    @distributed.rank_zero_only
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._lock.release()
        if isinstance(error, KeyboardInterrupt):
            error.add_note(
                "nothing is trained yet; the same command starts again"
                if self.saved is None
                else f"the same command goes on from here, after update {self.saved}"
                if not self.overwrite
                else f"the same command starts again, without overwrite=true after {self.saved} "
                "updates"
            )

    def clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        kept = ("result.json", "metrics.csv", "*.pt", "events.out.tfevents.*", dataset.FILE)
        for pattern in kept:
            for file in self.folder.glob(pattern):
                file.unlink()
        shutil.rmtree(self.folder / ".hydra", ignore_errors=True)

    def check_config(self, cfg: DictConfig) -> None:
        """Refuse the folder if its configuration differs in a key that can change a result; write
        ours if it has none."""
        file = self.folder / ".hydra" / "config.yaml"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            hydra_config = HydraConfig.get()
            write(file.with_name("hydra.yaml"), OmegaConf.to_yaml({"hydra": hydra_config}))
            write(file.with_name("overrides.yaml"), OmegaConf.to_yaml(hydra_config.overrides.task))
            write(file, OmegaConf.to_yaml(OmegaConf.merge(cfg, {"devices": cfg.devices})))
            return
        differ = differences(self.folder, cfg)
        if differ:
            raise RefusedError(
                f"{self.folder}: holds a run of another configuration ({'; '.join(differ)}); "
                f"choose another name= or study=, or delete it with overwrite=true"
            )

    def check_data(self, cfg: DictConfig, listing: Any, writable: bool = True) -> None:
        """Refuse the folder if its run saw other data than these; write down which these are."""
        differ = dataset.compare(self.folder, cfg, listing)
        if differ:
            raise RefusedError(
                f"data.root={cfg.data.get('root')}: not the data of {self.folder} "
                f"({'; '.join(differ)}); choose another name= or study=, or delete that run with "
                f"overwrite=true"
            )
        if writable:
            dataset.keep(self.folder, cfg, listing)

    @distributed.broadcast_result
    def result(self) -> dict[str, Any] | None:
        file = self.folder / "result.json"
        return read_result(self.folder) if file.exists() else None

    @distributed.rank_zero_only
    def finish(self, result: dict[str, Any]) -> None:
        text = json.dumps(plain(result | {"identity": self.identity}), indent=2)
        write(self.folder / "result.json", text + "\n")
        (self.folder / "progress.json").unlink(missing_ok=True)

    @distributed.rank_zero_only
    def write_progress(self, update: int, updates: int, seconds: float) -> None:
        """How far the run is, for whoever watches: once a second at most, not waiting for the disk,
        and not worth a run if that is full."""
        if time.monotonic() - self._progress_written > 1:
            self._progress_written = time.monotonic()
            told = {"update": update, "updates": updates, "seconds": seconds, "pid": os.getpid()}
            with suppress(OSError):
                write(self.folder / "progress.json", json.dumps(told), durable=False)

    @distributed.rank_zero_only
    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """All rows since the first epoch, so that a resumed run has neither gaps nor doubles."""
        text = io.StringIO()
        probed = {column: None for row in rows for column in row if column not in COLUMNS}
        writer = csv.DictWriter(text, [*COLUMNS, *probed], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(self.folder / "metrics.csv", text.getvalue())

    @distributed.rank_zero_only
    def save(self, state: dict[str, Any]) -> None:
        """Make `state` the last checkpoint and keep the one before."""
        buffer = io.BytesIO()
        torch.save(state | {"identity": self.identity}, buffer)
        last = self.folder / "last.pt"
        if last.exists():
            os.replace(last, self.folder / "previous.pt")
        write(last, buffer.getvalue())
        self.saved = state["progress"]["update"]

    @distributed.broadcast_result
    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read; says so where that is not the last one."""
        files = [self.folder / name for name in ("last.pt", "previous.pt")]
        files = [file for file in files if file.exists()]
        for i, file in enumerate(files, 1):
            problem = "damaged"
            with suppress(ValueError):
                state = read_checkpoint(file)
                if different_run(state.get("identity", {}), self.identity):
                    problem = "of another run"
                elif set(state) >= CHECKPOINT:
                    self.saved = state["progress"]["update"]
                    return state
            instead = f"going on from {files[i]}" if i < len(files) else "starting again"
            log.warning(f"{file}: {problem}; {instead}")
        return None
