"""Weights to start from: of a file, of a run, or of a library's pretrained networks."""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def read(file: str | Path) -> Any:
    """What `torch.save` wrote, with nothing in it but tensors and numbers. Raises about anything
    for a file that is damaged."""
    if zipfile.is_zipfile(file):  # torch writes checksums, but does not look at them
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} has another checksum")
    return torch.load(file, map_location="cpu", weights_only=True)


def of_checkpoint(checkpoint: Mapping[str, Any], averaged: bool = True) -> State:
    """The network's state in a run's checkpoint: the moving average of its weights (`ema`), where
    it has one and `averaged`, else the weights themselves."""
    average = checkpoint.get("ema") if averaged else None
    return {**checkpoint["model"], **(average or {})}


def of_file(path: str | Path) -> State:
    """The state dict in a file that torch or safetensors wrote, or in a run's last checkpoint.

    A checkpoint's is found under `model` or `state_dict`, the prefix of a wrapper is dropped.
    Raises `ValueError` for anything else.
    """
    file = Path(path).expanduser()
    file = file / "last.pt" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"{file}: does not exist; expected a file (.pt, .pth, .safetensors) or a run's folder"
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = read(file)
    except ImportError as error:
        raise ValueError(f"{file}: needs a package; pip install safetensors") from error
    except Exception as error:  # of zipfile, pickle, torch and safetensors, whatever it holds
        unsafe = isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(file)
        what = "holds more than tensors and numbers" if unsafe else "damaged or of another format"
        raise ValueError(f"{file}: {what}; expected a state dict or a run's checkpoint") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = of_checkpoint(content)
    elif isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = isinstance(content, dict) and all(isinstance(x, Tensor) for x in content.values())
    if not content or not tensors:
        raise ValueError(f"{file}: no state dict; expected one, or a run's checkpoint")
    if all(key.startswith("module.") for key in content):  # of DistributedDataParallel
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _pretrained(library: str, name: str, channels: int) -> dict[Any, Callable[[], nn.Module]]:
    """The library's pretrained weights for a network: how to get it with them, by their names."""
    if library == "timm":
        import timm

        tagged = {full.partition(".")[2]: full for full in timm.list_pretrained(f"{name}.*")}
        names: dict[Any, str] = {True: name, **tagged} if tagged else {}
        return {
            key: partial(timm.create_model, full, pretrained=True, in_chans=channels)
            for key, full in names.items()
        }
    from torchvision import models

    known = models.get_model_weights(name).__members__
    return {key: partial(models.get_model, name, weights=known[key]) for key in known}


def resolve(weights: Any, library: str | None, name: str, channels: int) -> State:
    """The state dict that the key `model.weights` means: a file's, a run's or, downloaded where it
    is not there yet, that of a library's pretrained network. Raises `ValueError`."""
    named = _pretrained(library, name, channels) if library else {}
    if weights not in named:
        try:
            return of_file(str(weights))
        except ValueError as error:
            names = [str(key).lower() if key is True else key for key in named]
            also = f"; {library} has {', '.join(names)}" if names else ""
            typed = str(weights).lower() if isinstance(weights, bool) else weights
            what = str(error).removeprefix(f"{weights}: ")
            raise ValueError(f"model.weights={typed}: {what}{also}") from error
    try:
        with warnings.catch_warnings():  # of the libraries, about themselves
            warnings.simplefilter("ignore", FutureWarning)
            return named[weights]().state_dict()
    except (OSError, RuntimeError) as error:  # no connection, nothing there any more, damaged
        what = " ".join(str(error).split())[:150]
        raise ValueError(
            f"model.weights={weights}: {library} cannot load its weights of {name} ({what}); "
            f"expected a connection, or the path of a file"
        ) from error


def _misfits(wanted: State, state: State, num_classes: int) -> tuple[list[str], list[str]]:
    """What does not fit, in words, and the keys of a head of another number of classes."""
    wrong = [f"{key} is missing" for key in wanted if key not in state]
    wrong += [f"{key} is unexpected" for key in state if key not in wanted]
    head = []
    for key in [key for key in wanted if key in state]:
        ours, theirs = tuple(wanted[key].shape), tuple(state[key].shape)
        if ours == theirs:
            continue
        if ours[:1] == (num_classes,) and ours[1:] == theirs[1:]:
            head.append(key)
        else:
            wrong.append(f"{key} has the shape {theirs}, not {ours}")
    return wrong, head


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _layers(state: State) -> dict[str, set[str]]:
    """The keys of each layer."""
    layers: dict[str, set[str]] = {}
    for key in state:
        layers.setdefault(_layer(key), set()).add(key)
    return layers


@torch.no_grad()
def load(
    model: nn.Module,
    plain: State,
    state: State,
    num_classes: int,
    what: str,
    log: Callable[[str], None],
) -> bool:
    """Start `model` from `state`, which is of this very network or of the one with batch norms.

    `plain` has the keys and shapes of the latter. From it a layer with the same keys takes over
    everything, any other the parameters of the same name and shape that its scheme does not fix. A
    head of another number of classes stays at its start. Says, in one line, what was taken over and
    what not; returns whether the state was this network's own. Raises `ValueError`, beginning with
    `what`, if it is of neither.
    """
    own = model.state_dict()
    found = [(*_misfits(wanted, state, num_classes), wanted is own) for wanted in (own, plain)]
    wrong, head, same = min(found, key=lambda x: len(x[0]))  # of two the first: the network's own
    if wrong:
        more = f" ({len(wrong)} keys do not fit)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{what}: {wrong[0]}{more}; expected weights of this network, with this scheme or with "
            f"batch norms"
        )
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = _layers(own), _layers(plain)
    taken = {
        key: value
        for key, value in state.items()
        if key in own and value.shape == own[key].shape
        and (same or key in learned or ours[_layer(key)] == theirs[_layer(key)])
    }  # fmt: skip
    model.load_state_dict(taken, strict=False)
    left = [key for key in state if key not in taken and key not in head]
    fresh = [key for key in own if key not in taken and key not in head]
    parts = [f"{len(taken)} of {len(state)} tensors taken over"]
    if head:
        classes = len(state[head[0]])
        parts += [
            f"the head ({', '.join(head)}) is left at its start, theirs has {classes} classes"
        ]
    for keys, why in (
        (left, "left out, as layers of the scheme have other parameters"),
        (fresh, "at their start"),
    ):
        if keys:
            parts += [f"{why}: {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else "")]
    log(f"  {what}: {'; '.join(parts)}")
    return same
