"""What a run can be told, as types: configs/ has the values and explains them, the rules here say
which are allowed. A composed configuration has these attributes, so that with `cfg: Config` mypy
follows a key from its type to its use. Options of a scheme are open, since its function knows them;
`NORM` has rules for those that are numbers or words.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

NUMBER = (int, float)
LARGEST = 2**53 - 1


def shown(value: Any) -> str:
    """As it is typed: in quotes what would be no text without them."""
    typed = {None: "null", True: "true", False: "false"}
    if isinstance(value, str):
        with suppress(ValueError):
            float(value)
            return repr(value)
        return repr(value) if value in typed.values() else value
    return typed[value] if value is None or isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Rule:
    """Values of some types, numbers among them from `low` to `high`; with `count`, a list of so
    many of them (0: any number); besides, some words."""

    what: str
    types: tuple[type, ...] = NUMBER
    low: float = -1e300
    high: float = 1e300
    words: tuple[str, ...] = ()
    count: int | None = None

    def allows(self, value: Any) -> bool:
        return type(value) in self.types and (
            type(value) not in NUMBER or self.low <= value <= self.high
        )

    def refusal(self, value: Any) -> str:
        """What is expected instead of the value; empty where it is right."""
        if self.count is None:
            right = self.allows(value) or shown(value) in self.words
        else:
            right = type(value) is list and len(value) == (self.count or len(value))
            right = right and all(map(self.allows, value))
        too_large = self.types == (int,) and type(value) is int and value > self.high
        numbers = f"{self.what} to {self.high}" if too_large else self.what
        return "" if right else ", ".join(filter(None, [numbers, *self.words]))


def whole(least: int, *words: str, most: int = LARGEST) -> Rule:
    return Rule(f"a whole number from {least}", (int,), least, most, words)


def word(*words: str) -> Rule:
    return Rule("", (), words=words)


ABOVE_0 = Rule("a number above 0", low=1e-300)
FROM_0 = Rule("a number from 0", low=0)
PART = Rule("a number from 0 to 1", low=0, high=1)
TEXT = Rule("a text", (str, bool, *NUMBER))
BY_TYPE = {  # of a default, where there is no rule of its own
    bool: Rule("true or false", (bool,)),
    int: Rule("a number"),
    float: Rule("a number"),
    list: Rule("a list", (str, bool, *NUMBER), count=0),
}
SWITCH = word("auto", "true", "false")


@dataclass
class Recipe:
    name: str
    epochs: Annotated[int | None, whole(1)]
    updates: Annotated[int | None, whole(1)]
    lr: Annotated[float, ABOVE_0]
    lr_batch: Annotated[int, whole(1)]
    lr_decay: Annotated[float, PART]
    milestones: Annotated[
        list[float], Rule("parts from 0 to 1: [0.5,0.75]", low=0, high=1, count=0)
    ]
    schedule: Annotated[str, word("step", "cosine", "linear")]
    warmup: Annotated[float, PART]
    optimizer: Annotated[str, word("sgd", "adamw")]
    momentum: Annotated[float, PART]
    nesterov: bool
    betas: Annotated[
        list[float],
        Rule("two numbers from 0, below 1: [0.9,0.999]", low=0, high=1 - 1e-9, count=2),
    ]
    weight_decay: Annotated[float, FROM_0]
    weight_decay_norms: bool
    label_smoothing: Annotated[float, PART]
    clip: Annotated[float | str, Rule("a number from 0", low=0, words=("agc",))]
    clip_factor: Annotated[float, ABOVE_0]
    ema: Annotated[float, Rule("a number from 0, below 1", low=0, high=1 - 1e-9)]
    mixup: Annotated[float, FROM_0]
    cutmix: Annotated[float, FROM_0]
    crop: Annotated[int | str, whole(0, "random_resized", "random_square")]
    flip: bool
    lighting: Annotated[float, FROM_0]  # of photographs alone, as are pixels
    pixels: Annotated[str, word("standardized", "bgr_255")]
    precision: Annotated[str, word("float32", "bfloat16", "float16")]
    eval_every: Annotated[int, whole(1)]
    freeze_statistics: Annotated[int, whole(0)]


@dataclass
class Evaluation:
    statistics: Annotated[str, word("running", "precise", "batch")]
    batches: Annotated[int, whole(1)]
    batch_size: Annotated[int, whole(1)]
    alpha: Annotated[float, PART]


@dataclass
class Data:
    """Every data set has the first three keys, and some of the others."""

    name: str
    train_fraction: float
    holdout: float
    root: str | None
    cache: str
    on_error: Annotated[str, word("raise", "skip")]
    verify_counts: bool
    size: Annotated[int, whole(1)]
    resize: Annotated[int | None, whole(1)]
    workers: Annotated[int | None, whole(0)]
    classes: Annotated[int, whole(2)]
    channels: Annotated[int, whole(1)]
    train_images: Annotated[int, whole(1)]
    test_images: Annotated[int, whole(1)]


@dataclass
class Protocol:
    name: Annotated[str, word("direct", "accumulate", "ghost")]
    sgd_batch: Annotated[int | None, whole(1)]
    micro_batch: Annotated[int, whole(1)]
    running_statistics: Annotated[str, word("first", "mean")]


@dataclass
class Runtime:
    runs: str
    threads: Annotated[int | str, whole(1, "auto", most=1024)]
    eval_batch: Annotated[int, whole(1)]
    log_every: Annotated[int, whole(1)]
    channels_last: Annotated[bool | str, SWITCH]
    graph: Annotated[bool | str, SWITCH]
    compile: Annotated[bool | str, word("auto", "network", "layers", "false")]
    progress: Annotated[str, word("auto", "bar", "lines", "none")]


@dataclass
class Checkpoint:
    every_updates: Annotated[int, whole(0)]
    every_minutes: Annotated[float, FROM_0]


@dataclass
class Probe:
    name: Annotated[str, word("none", "batch_statistics", "gradient_shift")]
    every: Annotated[int, whole(1)]


@dataclass
class Debug:
    """Every one has a name and some of the others."""

    name: Annotated[str, word("one_batch", "overfit", "profile")]
    images: Annotated[int, whole(1)]
    test_images: Annotated[int, whole(1)]
    updates: Annotated[int, whole(1)]


@dataclass
class Config:
    batch: Annotated[int, whole(1)]
    devices: Annotated[int, whole(1)]
    seed: Annotated[int, whole(0)]
    device: str
    study: str
    name: str | None
    overwrite: bool
    model: dict[str, Any]
    norm: dict[str, Any]
    recipe: Recipe
    evaluation: Evaluation
    data: Data
    protocol: Protocol
    runtime: Runtime
    checkpoint: Checkpoint
    probe: Probe
    debug: Debug  # absent from most runs


NORM = {
    **dict.fromkeys(("moving_average_batch_size", "window", "size"), whole(1)),
    **dict.fromkeys(("warmup", "burn_in", "start", "r_until", "d_until"), whole(0)),
    **dict.fromkeys(("momentum", "eta", "alpha", "alpha_forward", "alpha_backward", "rate"), PART),
    **dict.fromkeys(("eps", "ws_eps", "gamma", "d_max"), FROM_0),
    "r_max": Rule("a number from 1", low=1),
    "lr_divisor": ABOVE_0,
    "compensation": word("layer_scaling", "clamp", "none"),
    "position": word("P1", "P2", "P3"),
}


def rules(kind: type, prefix: str = "") -> dict[str, Rule]:
    """{"recipe.lr": …}, of the keys that have a rule of their own."""
    found: dict[str, Rule] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if rule := getattr(hint, "__metadata__", None):
            found[prefix + name] = rule[0]
        elif hasattr(hint, "__dataclass_fields__"):
            found |= rules(hint, f"{prefix}{name}.")
    return found


RULES = rules(Config) | {f"norm.{key}": rule for key, rule in NORM.items()}


def refusal(key: str, value: Any, default: Any) -> str:
    """What is expected of a key instead of the value; empty where it is right."""
    return (RULES.get(key) or BY_TYPE.get(type(default), TEXT)).refusal(value)
