"""From a composed configuration to what a run is: checked, identified, turned into numbers."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

# Where a run comes from and how it is carried out, but not what comes out of it.
OUTSIDE = ("device", "study", "name", "overwrite", "runtime", "data.root", "data.cache")

# key: lowest and highest value allowed (None: no bound), and whether they are allowed themselves
RANGES: dict[str, tuple[float, float | None, bool]] = {
    "batch": (1, None, True),
    "seed": (0, None, True),
    "protocol.sgd_batch": (1, None, True),
    "protocol.forward": (1, None, True),
    "data.size": (1, None, True),
    "data.classes": (2, None, True),
    "data.channels": (1, None, True),
    "data.train_images": (1, None, True),
    "data.test_images": (1, None, True),
    "recipe.epochs": (1, None, True),
    "recipe.updates": (1, None, True),
    "recipe.lr": (0, None, False),
    "recipe.lr_batch": (1, None, True),
    "recipe.momentum": (0, 1, True),
    "recipe.weight_decay": (0, None, True),
    "recipe.warmup": (0, 1, True),
    "recipe.decay": (0, 1, True),
    "recipe.label_smoothing": (0, 1, True),
    "recipe.crop": (0, None, True),
    "recipe.eval_every": (1, None, True),
    "runtime.threads": (1, None, True),
    "runtime.eval_batch": (1, None, True),
    "runtime.log_every": (1, None, True),
    "runtime.checkpoint_every": (0, None, True),
}
WHOLE = {
    *("batch", "seed", "protocol.sgd_batch", "protocol.forward", "recipe.epochs", "recipe.updates"),
    *("recipe.lr_batch", "runtime.threads"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "protocol.name": ("direct", "accumulate", "ghost"),
    "recipe.schedule": ("step", "cosine", "linear"),
    "recipe.precision": ("float32", "bfloat16"),
    "runtime.progress": ("auto", "bar", "lines", "none"),
}


def flatten(config: Any, resolve: bool = False) -> dict[str, Any]:
    """{"recipe.lr": 0.1, …}, interpolations as written unless `resolve`."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=resolve)
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def identity(config: Any) -> dict[str, Any]:
    """The keys that can change a result."""
    return {
        k: v
        for k, v in flatten(config).items()
        if k not in OUTSIDE and not k.startswith("runtime.")
    }


def scheme_name() -> str:
    """The option of the group `norm` that was chosen: the name of a row in the table."""
    return dict(HydraConfig.get().runtime.choices)["norm"]


def defaults(cfg: DictConfig) -> DictConfig:
    """What the study of this run gives when nothing but scheme, batch size and seed is chosen.

    An experiment is its study's default. Without one, a study that is not named is called after
    data, model and protocol, so these choices are its own.
    """
    choices = dict(HydraConfig.get().runtime.choices)
    chosen = ["norm"]
    if choices["experiment"]:
        chosen += ["experiment"]
    elif OmegaConf.to_container(cfg)["study"].startswith("${"):  # type: ignore[index, call-overload]
        chosen += ["data", "model", "protocol"]
    base = compose("config", [f"{group}={choices[group]}" for group in chosen])
    base.batch, base.seed = cfg.batch, cfg.seed
    return base


def run_name(cfg: DictConfig) -> str:
    """<scheme>-b<batch>-s<seed>, and a short hash of the other keys that are not the default."""
    if cfg.name is not None:
        return str(cfg.name)
    base, own = identity(defaults(cfg)), identity(cfg)
    other = {k: v for k, v in own.items() if k not in base or base[k] != v}
    name = f"{scheme_name()}-b{cfg.batch}-s{cfg.seed}"
    if other:
        text = json.dumps(other, sort_keys=True)
        name += "-" + hashlib.sha256(text.encode()).hexdigest()[:6]
    return name


def check(cfg: DictConfig) -> None:
    """Raise `ValueError`, in one line, for a value that no run can have."""
    if OmegaConf.is_missing(cfg.model, "name"):
        raise ValueError("model.name=???: needs a value, such as model.name=resnet18")
    if cfg.recipe.epochs is None and cfg.recipe.updates is None:
        raise ValueError("recipe.epochs=null: expected a number, of epochs or recipe.updates")
    base, own = flatten(defaults(cfg)), flatten(cfg, resolve=True)
    for key, value in own.items():
        default = base.get(key)
        if key == "recipe.epochs" and value is None:
            continue
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{key}={shown(value)}: expected true or false")
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number or key in ("batch", "seed") or (key in RANGES and value is not None):
            check_number(key, value, whole=isinstance(default, int) or key in WHOLE)
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{key}={value}: expected {', '.join(CHOICES[key])}")
    milestones = own["recipe.milestones"]
    if not isinstance(milestones, list) or any(
        not isinstance(m, int | float) or not 0 <= m <= 1 for m in milestones
    ):
        raise ValueError(f"recipe.milestones={milestones}: expected parts from 0 to 1: [0.5,0.75]")
    if cfg.recipe.flip and not cfg.data.mirror:
        raise ValueError(
            f"recipe.flip=true: images of data={cfg.data.name} change their class when mirrored; "
            f"expected false"
        )
    for key in ("study", "name"):
        if cfg[key] is not None and str(cfg[key]) != os.path.basename(str(cfg[key])).strip(". "):
            raise ValueError(f"{key}={cfg[key]}: expected the name of a folder, without slashes")


def shown(value: Any) -> str:
    """A value as one would type it."""
    return (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )


def check_number(key: str, value: Any, whole: bool) -> None:
    low, high, closed = RANGES.get(key, (float("-inf"), None, True))
    kind = "a whole number" if whole else "a number"
    bounds = f" {'from' if closed else 'above'} {low:g}" if low > float("-inf") else ""
    bounds += f" to {high:g}" if high is not None else ""
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if (
        not right_type
        or not (low <= value if closed else low < value)
        or (high is not None and value > high)
        or value in (float("inf"), float("-inf"))
    ):
        raise ValueError(f"{key}={shown(value)}: expected {kind}{bounds}")


@dataclass(frozen=True)
class Plan:
    """How batches become optimizer steps."""

    batch: int
    """Images that share statistics."""
    sgd_batch: int
    """Images per optimizer step, over all devices."""
    forward: int
    """Images per forward pass on one device."""
    lr: float
    """Learning rate after scaling to the SGD batch."""


def plan(cfg: DictConfig, devices: int = 1) -> Plan:
    """The protocol's two numbers and the learning rate, or `ValueError` where they do not fit."""
    batch, recipe = cfg.batch, cfg.recipe
    sgd_batch = cfg.protocol.sgd_batch or batch * devices
    forward = cfg.protocol.forward
    if sgd_batch % (batch * devices):
        raise ValueError(
            f"protocol.sgd_batch={sgd_batch}: expected a multiple of batch={batch}"
            + (f" times {devices} devices" if devices > 1 else "")
        )
    share = sgd_batch // devices
    if forward == cfg.protocol.sgd_batch:
        forward = share
    if forward % batch or share % forward:
        raise ValueError(
            f"protocol.forward={forward}: expected a multiple of batch={batch} that divides the "
            f"{share} images of an optimizer step on one device"
        )
    return Plan(batch, sgd_batch, forward, recipe.lr * sgd_batch / recipe.lr_batch)
