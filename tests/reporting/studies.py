"""Run folders as `train.py` leaves them, made by hand."""

import csv
import json
import re
from pathlib import Path
from zlib import crc32

from omegaconf import OmegaConf


def put(
    study: Path,
    norm: str,
    batch: int,
    seed: int,
    top1: float | None = None,
    status: str = "finished",
    *,
    free: bool = False,
    sgd: int | None = 32,
    curve: list[float] | None = None,
    error: str | None = None,
    experiment: str | None = None,
    method: str | None = None,
    result: dict | None = None,
    overrides: tuple[str, ...] = (),
    **config: object,
) -> Path:
    """The folder of a run; unfinished without a `top1`, unless diverged or failed. `curve`: the
    test accuracies of the epochs before the last. Keys of the configuration have __ for the dot."""
    suffix = f"-{crc32(repr(config).encode()):08x}" if config else ""
    folder = study / f"{norm}-b{batch}-s{seed}{suffix}"
    (folder / ".hydra").mkdir(parents=True)
    protocol = "ghost" if sgd else "direct"
    cfg = OmegaConf.create(
        {
            "batch": batch,
            "seed": seed,
            "study": study.name,
            "model": {"name": "resnet8", "library": None},
            "data": {"name": "digits", "train_fraction": 1.0, "holdout": 0.0},
            "norm": {"name": method or norm, "eps": 1e-5},
            "recipe": {"name": "digits", "lr": 0.1},
            "protocol": {"name": protocol, "sgd_batch": sgd, "forward": "${.sgd_batch}"},
            "runtime": {"threads": seed},
        }
    )
    for key, value in config.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    choices = {"norm": norm, "experiment": experiment, "protocol": protocol}
    hydra = {"hydra": {"runtime": {"choices": choices}}}
    OmegaConf.save(OmegaConf.create(hydra), folder / ".hydra" / "hydra.yaml")
    words = [f"norm={norm}", f"batch={batch}", f"seed={seed}", *overrides]
    OmegaConf.save(OmegaConf.create(words), folder / ".hydra" / "overrides.yaml")
    if error is not None:
        (folder / "error.txt").write_text(error + "\n")
    if top1 is None and status == "finished":
        return folder

    tested = [*(curve or []), top1] if top1 is not None else []
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "update", "test_top1", "images_per_second", "seconds"])
        for epoch, accuracy in enumerate(tested, 1):
            writer.writerow([epoch, 40 * epoch, accuracy, 640.0 + batch, 2.5 * epoch])
    content = {
        "status": status,
        "top1": top1,
        "top5": top1 and 99.0,
        "best_top1": top1 and max(tested),
        "test_loss": top1 and 1.5,
        "norm": norm,
        "batch_size": batch,
        "sgd_batch_size": cfg.protocol.sgd_batch or batch,
        "protocol": cfg.protocol.name,
        "model": cfg.model.name,
        "data": cfg.data.name,
        "recipe": cfg.recipe.name,
        "seed": seed,
        "batch_independent": free,
        "epochs": float(len(tested)),
        "updates": 40 * len(tested),
        "parameters": 1000,
        "images_per_second": 640.0,
        "wall_seconds": 60.0,
        "peak_memory_bytes": None,
        "threads": 1,
        "device": "cpu",
        "versions": {"torch": "2.14.1"},
    }
    (folder / "result.json").write_text(json.dumps(content | (result or {})))
    return folder


def squeezed(text):
    """Without the spaces and dashes that align a table."""
    return re.sub(" +", " ", re.sub("-{2,}", "-", text))
