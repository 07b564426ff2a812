"""Normalization methods, one file each; this folder needs torch alone (three of them timm).

scheme = norms.build("mabn", batch_size=2)
scheme.conv(64, 128, 3, padding=1), scheme.norm(128)
norms.convert(any_network, scheme)
norms.fold(trained_network)  # for inference
"""

import importlib
import inspect
import pkgutil
from difflib import get_close_matches

from .bcn import BatchChannelNorm2d, EstimatedBatchNorm2d
from .bn import GhostBatchNorm2d
from .brn import BatchRenorm2d
from .convert import Conversion, conversion, convert
from .fold import fold
from .mabn import CenteredConv2d, MABN2d
from .online import OnlineNorm2d
from .powernorm import PowerNorm2d
from .pws import PWSConv2d
from .scheme import Scheme
from .ws_gn import WSConv2d

__all__ = [
    "BatchChannelNorm2d",
    "BatchRenorm2d",
    "CenteredConv2d",
    "Conversion",
    "EstimatedBatchNorm2d",
    "GhostBatchNorm2d",
    "MABN2d",
    "OnlineNorm2d",
    "PWSConv2d",
    "PowerNorm2d",
    "Scheme",
    "WSConv2d",
    "build",
    "conversion",
    "convert",
    "fold",
    "names",
]

__version__ = "0.1.0"

# Files of this folder that are no method:
_SHARED = {"backward", "blocks", "convert", "fold", "layer", "moments", "scheme", "standardized"}


def names() -> list[str]:
    """The methods there are: the files of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)


def unknown(what: str, name: str, known: list[str], allowed: str = "") -> ValueError:
    """The error for a name that is none of those known, with near matches."""
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return ValueError(f"{what}: unknown{hint}; allowed: {allowed or ', '.join(known)}")


def build(
    name: str, *, batch_size: int | None = None, sgd_batch_size: int | None = None, **options
) -> Scheme:
    """The scheme `name`, whose statistics are over `batch_size` images (None: a whole batch).

    `sgd_batch_size`: images per optimizer step on this device, for the two methods that count in
    such steps (BRN's schedule, MABN's ImageNet version); None: a step per batch for the one, per
    forward pass for the other. Raises `ValueError` for an unknown name or option, naming near
    matches, and where a method wraps the layer of a library that is not installed.
    """
    if name not in names():
        raise unknown(f"norm={name}", name, names())
    if batch_size is not None and (
        not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1
    ):
        raise ValueError(f"batch={batch_size}: expected a whole number of images from 1")
    try:
        make = importlib.import_module(f"{__name__}.{name}").scheme
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        raise ValueError(
            f"norm={name}: wraps a layer of {library}, which is missing; pip install {library}"
        ) from None
    parameters = inspect.signature(make).parameters
    known = [p for p in parameters if p not in ("batch_size", "sgd_batch_size")]
    for option in options:
        if option not in known:
            raise unknown(f"norm.{option} (norm={name})", option, known)
    if "sgd_batch_size" in parameters:
        options["sgd_batch_size"] = sgd_batch_size
    return make(batch_size=batch_size, **options)
