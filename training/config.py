"""From a composed configuration to what a run is: checked, identified, turned into numbers."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from training import distributed
from training.files import read
from training.schema import Config, refusal, shown

# Where a run comes from and how it is carried out, but not what comes out of it.
OUTSIDE = (
    *("device", "study", "name", "overwrite", "data.root", "data.cache", "data.workers"),
    "data.on_error",  # what a run made of all images is, it would be either way
)
OUTSIDE_GROUPS = ("runtime.", "checkpoint.", "probe.")

# A key, another, the values of that beside which it has an effect, and the same in words.
EFFECT: list[tuple[str, str, Callable[[Any], bool], str]] = [
    ("recipe.epochs", "recipe.updates", lambda x: x is None, "=null"),
    ("recipe.milestones", "recipe.schedule", lambda x: x == "step", "=step"),
    ("recipe.lr_decay", "recipe.schedule", lambda x: x == "step", "=step"),
    ("recipe.momentum", "recipe.optimizer", lambda x: x == "sgd", "=sgd"),
    ("recipe.nesterov", "recipe.optimizer", lambda x: x == "sgd", "=sgd"),
    ("recipe.nesterov", "recipe.momentum", lambda x: x != 0, " above 0"),
    ("recipe.betas", "recipe.optimizer", lambda x: x == "adamw", "=adamw"),
    ("recipe.weight_decay_norms", "recipe.weight_decay", lambda x: x != 0, " above 0"),
    ("recipe.clip_factor", "recipe.clip", lambda x: x == "agc", "=agc"),
    ("norm.groups", "norm.channels_per_group", lambda x: x is None, "=null"),
    ("norm.rate", "norm.statistics", lambda x: x != "batch", " that is not batch"),
    ("evaluation.batches", "evaluation.statistics", lambda x: x == "precise", "=precise"),
    (
        "evaluation.batch_size",
        "evaluation.statistics",
        lambda x: x != "running",
        " that is not running",
    ),
    ("probe.every", "probe.name", lambda x: x != "none", " that is not none"),
]


def times(factor: Any, number: Any) -> Any:
    """`${times:8,${batch}}`: eight times the batch size. What is no number passes, for `check`."""
    return factor * number if type(factor) is type(number) is int else number


OmegaConf.register_new_resolver("times", times, replace=True)
OmegaConf.register_new_resolver("processes", distributed.world_size, replace=True)


# An interpolation whose value the rest of the configuration does not tell; that of a time counts as
# it is written, so that the same command goes on.
FOREIGN = re.compile(r"(?!.*\$\{now:).*\$\{(?!times:|processes:)[\w.]+:", re.DOTALL)

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


def outside(key: str) -> bool:
    return key in OUTSIDE or key.startswith(OUTSIDE_GROUPS)


def identity(config: Any) -> dict[str, Any]:
    """The keys that can change a result. Paths do not, but the name of a folder of images stands
    for the data set, whose files `training/dataset.py` compares."""
    flat = flatten(config)
    keys = {k: v for k, v in flat.items() if not outside(k)}
    devices = keys.pop("devices", 1)
    keys["devices"] = devices if isinstance(devices, int) else distributed.world_size()
    if keys["devices"] == 1:  # as before there was such a key
        del keys["devices"]
        keys.pop("protocol.running_statistics", None)
    if flat.get("data.name") == "folder" or flat.get("data.verify_counts") is False:
        keys["data.root"] = os.path.basename(os.path.normpath(str(flat["data.root"])))
    return keys


def settle(cfg: DictConfig) -> None:
    """Put values in place of what `FOREIGN` finds: they count, and are kept with the run."""
    for key, value in flatten(cfg).items():
        if (key == "data.root" or not outside(key)) and FOREIGN.match(str(value)):
            OmegaConf.update(cfg, key, flatten(cfg, resolve=True)[key])


def different(there: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The keys in which two identities differ, in words."""
    absent = object()
    return [
        f"{key} is {there.get(key, 'absent')} there and {ours.get(key, 'absent')} here"
        for key in sorted(there | ours)
        if there.get(key, absent) != ours.get(key, absent)
    ]


def different_run(kept: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The keys in which a file that holds its run's identity, `kept`, is not one of the run `ours`;
    older files do not hold all of them."""
    there = ours | {RENAMED.get(key, key): value for key, value in kept.items()}
    return different(there | {"data.root": None}, ours | {"data.root": None})


def different_result(result: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The same of a result."""
    names = {"batch": "batch_size", "seed": "seed"}
    names |= {f"{key}.name": key for key in ("protocol", "data", "recipe")}
    told = {key: result[name] for key, name in names.items()}
    return different_run(result.get("identity", {}) | told, ours)


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
    elif named.startswith("${data.name}"):
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


def check_precision(cfg: Config, loss_scaling: bool) -> None:
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
            f"{cfg.norm['name']} averages gradients over them; expected float32 or bfloat16"
        )


def check_probe(cfg: Config, second_pass: bool) -> None:
    """Raise `ValueError` where a probe would see the images of an update twice."""
    if second_pass and cfg.probe.name != "none":
        raise ValueError(
            f"probe={cfg.probe.name}: looks at every forward pass, and norm={cfg.norm['name']} "
            f"passes each batch twice; expected probe=none"
        )


def typed(cfg: DictConfig) -> Config:
    """The same, whose keys mypy knows."""
    return cast(Config, cfg)


def check(cfg: DictConfig) -> Config:
    """Raise `ValueError`, in one line, for a value that no run can have."""
    settle(cfg)
    groups = ["data", "model", "norm", "probe", "protocol", "recipe"]
    for group in groups:
        if not choices().get(group):
            raise ValueError(f"{group}=null: a run needs one; --help lists the options")
    if OmegaConf.is_missing(cfg.model, "name"):
        raise ValueError("model.name=???: needs a value, such as model.name=resnet18")
    if cfg.recipe.epochs is None and cfg.recipe.updates is None:
        raise ValueError("recipe.epochs=null: expected a number, of epochs or recipe.updates")
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
        if expected := refusal(key, value, default):
            raise ValueError(f"{key}={shown(value)}: expected {expected}")
        group, _, last = key.partition(".")
        if last == "name" and group != "model" and value != default:  # with keys of another
            raise ValueError(
                f"{key}={shown(value)}: an option is chosen as {group}={shown(value)}; expected "
                f"{default}, or no {key}"
            )
    words = [word.lstrip("+").split("=")[0] for word in HydraConfig.get().overrides.task]
    for key, other, has_effect, expected in () if choices().get("debug") else EFFECT:
        given = key in words and own[key] not in (None, False)
        if given and other in own and not has_effect(own[other]):
            raise ValueError(
                f"{key}={shown(own[key])}: has no effect beside {other}={shown(own[other])}; "
                f"expected {other}{expected}, or no {key}"
            )
    if own["evaluation.statistics"] == "batch" and own["evaluation.alpha"]:
        raise ValueError(
            f"evaluation.alpha={own['evaluation.alpha']}: weighs an image against running "
            f"statistics; expected 0.0 with evaluation.statistics=batch"
        )
    folder(cfg)  # has a name that can be one
    return typed(cfg)
