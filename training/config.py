"""From a composed configuration to what a run is: checked, identified, turned into numbers."""

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from training import distributed
from training.files import read

# Where a run comes from and how it is carried out, but not what comes out of it.
OUTSIDE = (
    *("device", "study", "name", "overwrite", "data.root", "data.cache", "data.workers"),
    "data.on_error",  # what a run made of all images is, it would be either way
)
OUTSIDE_GROUPS = ("runtime.", "checkpoint.", "probe.")

# Whole numbers, and the least that is allowed. The most is LARGEST, or stands in MOST.
COUNTS = {
    "batch": 1,
    "devices": 1,
    "seed": 0,
    "protocol.sgd_batch": 1,
    "protocol.micro_batch": 1,
    "data.size": 1,
    "data.resize": 1,
    "data.workers": 0,
    "data.classes": 2,
    "data.channels": 1,
    "data.train_images": 1,
    "data.test_images": 1,
    "norm.moving_average_batch_size": 1,
    "norm.warmup": 0,
    "norm.window": 1,
    "norm.size": 1,
    "norm.burn_in": 0,
    "norm.start": 0,
    "norm.r_until": 0,
    "norm.d_until": 0,
    "evaluation.batches": 1,
    "evaluation.batch_size": 1,
    "probe.every": 1,
    "debug.images": 1,
    "debug.test_images": 1,
    "debug.updates": 1,
    "recipe.epochs": 1,
    "recipe.updates": 1,
    "recipe.lr_batch": 1,
    "recipe.crop": 0,
    "recipe.eval_every": 1,
    "recipe.freeze_statistics": 0,
    "runtime.threads": 1,
    "runtime.eval_batch": 1,
    "runtime.log_every": 1,
    "checkpoint.every_updates": 0,
}
# Keys that have no effect where another is given.
IN_PLACE_OF = {
    "recipe.epochs": "recipe.updates",
    "norm.groups": "norm.channels_per_group",
}
LARGEST = 2**53 - 1
MOST = {"runtime.threads": 1024}
PART = (0.0, 1.0, " from 0 to 1")
NUMBERS = {
    "recipe.lr": (1e-300, 1e300, " above 0"),
    "recipe.weight_decay": (0.0, 1e300, " from 0"),
    "recipe.momentum": PART,
    "recipe.warmup": PART,
    "recipe.lr_decay": PART,
    "recipe.label_smoothing": PART,
    "recipe.lighting": (0.0, 1e300, " from 0"),
    "checkpoint.every_minutes": (0.0, 1e300, " from 0"),
    "recipe.clip": (0.0, 1e300, " from 0"),
    "recipe.clip_factor": (1e-300, 1e300, " above 0"),
    "norm.lr_divisor": (1e-300, 1e300, " above 0"),
    "recipe.ema": (0.0, 1 - 1e-9, " from 0, below 1"),
    "recipe.mixup": (0.0, 1e300, " from 0"),
    "recipe.cutmix": (0.0, 1e300, " from 0"),
    "evaluation.alpha": PART,
    "norm.momentum": PART,
    "norm.eta": PART,
    "norm.alpha": PART,
    "norm.alpha_forward": PART,
    "norm.alpha_backward": PART,
    "norm.rate": PART,
    "norm.eps": (0.0, 1e300, " from 0"),
    "norm.ws_eps": (0.0, 1e300, " from 0"),
    "norm.gamma": (0.0, 1e300, " from 0"),
    "norm.r_max": (1.0, 1e300, " from 1"),
    "norm.d_max": (0.0, 1e300, " from 0"),
}
CHOICES: dict[str, tuple[str, ...]] = {  # beside a number, where the key is above too
    "protocol.name": ("direct", "accumulate", "ghost"),
    "protocol.running_statistics": ("first", "mean"),
    "evaluation.statistics": ("running", "precise", "batch"),
    "data.on_error": ("raise", "skip"),
    "recipe.crop": ("random_resized", "random_square"),
    "recipe.pixels": ("standardized", "bgr_255"),
    "recipe.optimizer": ("sgd", "adamw"),
    "recipe.schedule": ("step", "cosine", "linear"),
    "probe.name": ("none", "batch_statistics", "gradient_shift"),
    "recipe.precision": ("float32", "bfloat16", "float16"),
    "norm.compensation": ("layer_scaling", "clamp", "none"),
    "norm.position": ("P1", "P2", "P3"),
    "recipe.clip": ("agc",),
    "runtime.progress": ("auto", "bar", "lines", "none"),
    "runtime.channels_last": ("auto", "true", "false"),
    "runtime.graph": ("auto", "true", "false"),
    "runtime.compile": ("auto", "network", "layers", "false"),
    "runtime.threads": ("auto",),
    "debug.name": ("one_batch", "overfit", "profile"),
}


def times(factor: Any, number: Any) -> Any:
    """`${times:8,${batch}}`: eight times the batch size. What is no number passes, for `check`."""
    return factor * number if type(factor) is type(number) is int else number


OmegaConf.register_new_resolver("times", times, replace=True)
OmegaConf.register_new_resolver("processes", distributed.world_size, replace=True)


MOVED = "moved_to"  # in a folder without a run: the name of the run of this configuration
RENAMED = {  # keys of stored runs that have another name now
    "data.complete": "data.verify_counts",
    "protocol.forward": "protocol.micro_batch",
}


def read_config(file: Path, *keys: str) -> dict[str, Any]:
    """The configuration of a stored run, its keys as they are called now. Raises `ValueError` if it
    is damaged or lacks one of `keys`."""
    config = read(file, *keys)
    for old, new in RENAMED.items():
        group, key = old.split(".")
        own = config.get(group)
        if isinstance(own, dict) and key in own:
            own[new.split(".")[1]] = own.pop(key)
    return config


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
    """The keys that can change a result. Paths do not, but the name of a folder of images stands
    for the data set, whose files `training/dataset.py` compares."""
    flat = flatten(config)
    keys = {k: v for k, v in flat.items() if k not in OUTSIDE and not k.startswith(OUTSIDE_GROUPS)}
    devices = keys.pop("devices", 1)
    keys["devices"] = devices if isinstance(devices, int) else distributed.world_size()
    if keys["devices"] == 1:  # as before there was such a key
        del keys["devices"]
        keys.pop("protocol.running_statistics", None)
    if flat.get("data.name") == "folder" or flat.get("data.verify_counts") is False:
        keys["data.root"] = os.path.basename(os.path.normpath(str(flat["data.root"])))
    return keys


def choices() -> dict[str, str]:
    """The option chosen in each group."""
    return dict(HydraConfig.get().runtime.choices)


def defaults(cfg: DictConfig) -> DictConfig:
    """What the study of this run gives when nothing but scheme, batch size and seed is chosen.

    An experiment is its study's default. Without one, a study that is not named is called after
    data, model and protocol, so these choices are its own.
    """
    chosen, named = choices(), str(OmegaConf.to_container(cfg)["study"])  # type: ignore[index, call-overload]
    groups = ["norm"]
    if chosen["experiment"]:
        groups += ["experiment"]
    elif named.startswith("${"):
        groups += ["data", "protocol", *(["model"] if chosen["model"] == cfg.model.name else [])]
    return composed(*(f"{group}={chosen[group]}" for group in groups))


def search_path(hydra: Any) -> list[str]:
    """The override by which a command finds options outside of configs/, if it does."""
    found = ", ".join(quoted(folder) for folder in hydra.searchpath)
    return [f"hydra.searchpath=[{found}]"] if found else []


def quoted(text: str) -> str:
    """As Hydra reads it back."""
    return '"' + text.replace('"', '\\"') + '"'


def composed(*overrides: str) -> DictConfig:
    """The configuration of other choices, found where this run's were."""
    return _composed(*search_path(HydraConfig.get()), *overrides)


@cache
def _composed(*overrides: str) -> DictConfig:
    return compose("config", list(overrides))


def run_name(cfg: DictConfig) -> str:
    """<scheme>-b<batch>-s<seed>, and a short hash of the other keys that are not the default."""
    if cfg.name is not None:
        return str(cfg.name)
    base, own = identity(defaults(cfg)), identity(cfg)
    own = {k: v for k, v in own.items() if k not in ("batch", "seed")}
    if "data.root" in own:  # data sets in folders of the same name are not the same
        own["data.root"] = os.path.realpath(os.path.expanduser(str(cfg.data.root)))  # noqa: PTH111
    base.pop("devices", None)
    other = {k: v for k, v in own.items() if k not in base or base[k] != v}
    name = f"{choices()['norm']}-b{cfg.batch}-s{cfg.seed}"
    if other:
        number = {k: float(v) for k, v in other.items() if type(v) is int}  # 1 and 1.0 are one
        text = json.dumps(other | number, sort_keys=True)
        name += "-" + hashlib.sha256(text.encode()).hexdigest()[:6]
    return name


def folder(cfg: DictConfig) -> Path:
    """Of a run: a pure function of its configuration. Raises `ValueError` for a name that would
    lead elsewhere."""
    for key in ("study", "name"):
        name = str(cfg[key])
        rules = {
            "not empty": name,
            "without slashes": "/" not in name,
            "without a dot or space at either end": name == name.strip(". "),
            "without control characters": name.isprintable(),
            "of at most 200 bytes": len(os.fsencode(name)) <= 200,
        }
        for rule, kept in rules.items():
            if cfg[key] is not None and not kept:
                name = name if name.isprintable() else repr(name)
                raise ValueError(f"{key}={name}: expected the name of a folder, {rule}")
    path = Path(str(cfg.runtime.runs)) / str(cfg.study) / run_name(cfg)
    if (path / MOVED).exists():  # its data had another path when it began
        path = path.with_name((path / MOVED).read_text())
    return path


def cannot_write(cfg: DictConfig, error: OSError) -> OSError:
    """What is wrong with the folder of all studies."""
    return OSError(
        f"runtime.runs={cfg.runtime.runs}: cannot write {error.filename} ({error.strerror}); "
        f"expected a folder that can be written"
    )


def check_precision(cfg: DictConfig, loss_scaling: bool) -> None:
    """Raise `ValueError` where float16 would put a changing factor on gradients that a scheme or a
    probe averages over batches."""
    if cfg.recipe.precision == "float16" and cfg.probe.name == "batch_statistics":
        raise ValueError(
            "recipe.precision=float16: its loss scale changes between updates, and "
            "probe=batch_statistics averages gradients over them; expected float32 or bfloat16"
        )
    if cfg.recipe.precision == "float16" and not loss_scaling:
        raise ValueError(
            f"recipe.precision=float16: its loss scale changes between updates, and norm="
            f"{cfg.norm.name} averages gradients over them; expected float32 or bfloat16"
        )


def check_probe(cfg: DictConfig, second_pass: bool) -> None:
    """Raise `ValueError` where a probe would see the images of an update twice."""
    if second_pass and cfg.probe.name != "none":
        raise ValueError(
            f"probe={cfg.probe.name}: looks at every forward pass, and norm={cfg.norm.name} passes "
            f"each batch twice; expected probe=none"
        )


def shown(value: Any) -> str:
    """As it is typed: in quotes what would be no text without them."""
    typed = {None: "null", True: "true", False: "false"}
    if isinstance(value, str):
        with suppress(ValueError):
            float(value)
            return repr(value)
        return repr(value) if value in typed.values() else value
    return typed[value] if value is None or isinstance(value, bool) else str(value)


def check(cfg: DictConfig) -> None:
    """Raise `ValueError`, in one line, for a value that no run can have."""
    groups = ["data", "model", "norm", "probe", "protocol", "recipe"]
    for group in groups:
        if not choices().get(group):
            raise ValueError(f"{group}=null: a run needs one; --help lists the options")
    if OmegaConf.is_missing(cfg.model, "name"):
        raise ValueError("model.name=???: needs a value, such as model.name=resnet18")
    if cfg.recipe.epochs is None and cfg.recipe.updates is None:
        raise ValueError("recipe.epochs=null: expected a number, of epochs or recipe.updates")
    for key, other in IN_PLACE_OF.items():
        given = [o for o in HydraConfig.get().overrides.task if o.lstrip("+").startswith(f"{key}=")]
        value, rules = (OmegaConf.select(cfg, name) for name in (key, other))
        if given and None not in (value, rules) and not choices().get("debug"):
            raise ValueError(
                f"{key}={value}: has no effect beside {other}={rules}; expected {other}=null, or "
                f"no {key}"
            )
    if choices().get("debug"):
        groups.append("debug")
    base = flatten(composed(*(f"{group}={choices()[group]}" for group in groups)))
    own = flatten(cfg, resolve=True)
    for key in base.keys() - own.keys():
        if any(name.startswith(f"{key}.") for name in own):
            value = OmegaConf.to_container(OmegaConf.select(cfg, key))
            raise ValueError(f"{key}={value}: expected a single value")
        raise ValueError(f"{key}: removed; a run needs it")
    for key, value in own.items():
        if key not in base:
            raise ValueError(f"{key}: no such key; --help lists all")
        default = base[key]
        if value is None and (default is None or key == "recipe.epochs"):
            continue
        allowed = CHOICES.get(key, ())
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in COUNTS:
            most = MOST.get(key, LARGEST)
            right = number and isinstance(value, int) and COUNTS[key] <= value <= most
            right = right or value in allowed
            above = f" to {most}" if number and value > most else ""
            expected = ", ".join([f"a whole number from {COUNTS[key]}{above}", *allowed])
        elif isinstance(default, bool):
            right, expected = isinstance(value, bool), "true or false"
        elif key in NUMBERS or isinstance(default, int | float):
            low, high, bounds = NUMBERS.get(key, (-1e300, 1e300, ""))
            right = (number and low <= value <= high) or value in allowed
            expected = ", ".join([f"a number{bounds}", *allowed])
        else:
            one = value is not None and isinstance(value, list) == isinstance(default, list)
            right = one and (not allowed or shown(value) in allowed)
            expected = ", ".join(allowed) or "a text"
        if not right:
            raise ValueError(f"{key}={shown(value)}: expected {expected}")
    milestones = own["recipe.milestones"]
    if not isinstance(milestones, list) or any(
        not isinstance(m, int | float) or not 0 <= m <= 1 for m in milestones
    ):
        raise ValueError(f"recipe.milestones={milestones}: expected parts from 0 to 1: [0.5,0.75]")
    betas = own["recipe.betas"]
    if not (
        isinstance(betas, list)
        and len(betas) == 2
        and all(isinstance(b, int | float) and 0 <= b < 1 for b in betas)
    ):
        raise ValueError(f"recipe.betas={betas}: expected two numbers from 0, below 1: [0.9,0.999]")
    if own["evaluation.statistics"] == "batch" and own["evaluation.alpha"]:
        raise ValueError(
            f"evaluation.alpha={own['evaluation.alpha']}: weighs an image against running "
            f"statistics; expected 0.0 with evaluation.statistics=batch"
        )
    folder(cfg)  # has a name that can be one
