"""The trained network of a run, from the files of its folder."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

import models
import norms
from models.weights import of_checkpoint
from training import protocol
from training.config import different_result, different_run, identity, read_config, typed
from training.files import read_checkpoint, read_result


def network(cfg: DictConfig, plan: protocol.Plan, classes: int, channels: int) -> Any:
    """The scheme and the untrained network of a run, on the device of the context."""
    options = {k: v for k, v in cfg.norm.items() if k != "name"}
    sizes = dict(batch_size=plan.batch, sgd_batch_size=plan.per_device_batch)
    scheme = norms.build(cfg.norm.name, **sizes, **options)
    keys = {**cfg.model, "weights": None}
    return scheme, models.build(**keys, scheme=scheme, num_classes=classes, in_channels=channels)


def configuration(run: Path) -> Any:
    """The configuration of a run, finished or not."""
    file = run / ".hydra" / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run}: not a run; expected a folder such as runs/quickstart/bn-b2-s0")
    return OmegaConf.create(read_config(file, "batch", "norm", "model", "protocol", "recipe"))


def check_own(file: Path, differ: list[str]) -> None:
    """Raise `ValueError` where a file differs from the run in whose folder it is."""
    if differ:
        raise ValueError(
            f"{file}: of another run ({'; '.join(differ)}); overwrite=true trains anew"
        )


def read_finished(run: Path) -> dict[str, Any]:
    """What a finished run came to. Raises `ValueError` if it diverged, or if it was another run."""
    result = read_result(run)
    check_own(run / "result.json", different_result(result, identity(configuration(run))))
    if result["status"] == "diverged":
        raise ValueError(f"{run}: diverged, so it has no trained network; expected a finished run")
    return result


def trained(
    run: Path, cfg: Any, classes: int, channels: int, averaged: bool = True
) -> tuple[nn.Module, norms.Scheme, dict[str, Any]]:
    """The network of a run's last checkpoint in evaluation mode, with the moving average of its
    weights where there is one and `averaged`; its scheme; the checkpoint."""
    scheme, model = network(cfg, protocol.plan(typed(cfg)), classes, channels)
    state = read_checkpoint(run / "last.pt")
    own = identity(configuration(run))
    check_own(run / "last.pt", different_run(state.get("identity", {}), own))
    try:
        model.load_state_dict(of_checkpoint(state, averaged))
    except Exception as error:  # of torch, for whatever the file holds
        what = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{run / 'last.pt'}: of another network ({what}); overwrite=true trains it again"
        ) from error
    return model.eval(), scheme, state


def load(run: Path) -> tuple[nn.Module, norms.Scheme, dict[str, Any]]:
    """The trained network of a finished run in evaluation mode, its scheme and its result."""
    cfg = configuration(run)
    if not (run / "result.json").exists():
        raise ValueError(f"{run}: not finished; the command that trains it goes on where it is")
    result = read_finished(run)
    model, scheme, _ = trained(run, cfg, result["classes"], result["image_shape"][0])
    return model, scheme, result
