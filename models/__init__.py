"""Networks by name: `models.build("resnet20", scheme=norms.build("gn"), num_classes=10)`."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import norms
from models import weights as pretrained
from models.resnet import ORDERS, BasicBlock, Bottleneck, ResNet
from norms import Scheme

# The CIFAR networks of He et al.: 6n + 2 layers in three stages, shortcuts without parameters.
# Those of the PWS paper: ImageNet's widths on a 3x3 stem. Then the ImageNet ones.
_CIFAR: dict[str, Any] = dict(make_block=BasicBlock, widths=(16, 32, 64), stem="cifar", pad=True)
_WIDE: dict[str, Any] = dict(widths=(64, 128, 256, 512), pad=False)
_RESNEXT = partial(Bottleneck, groups=32, group_width=4)
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet8": dict(_CIFAR, depths=(1, 1, 1)),
    "resnet20": dict(_CIFAR, depths=(3, 3, 3)),
    "resnet32": dict(_CIFAR, depths=(5, 5, 5)),
    "resnet56": dict(_CIFAR, depths=(9, 9, 9)),
    "resnet110": dict(_CIFAR, depths=(18, 18, 18)),
    "resnet18_cifar": dict(_WIDE, make_block=BasicBlock, depths=(2, 2, 2, 2), stem="cifar"),
    "resnet34_cifar": dict(_WIDE, make_block=BasicBlock, depths=(3, 4, 6, 3), stem="cifar"),
    "resnet18": dict(_WIDE, make_block=BasicBlock, depths=(2, 2, 2, 2), stem="imagenet"),
    "resnet34": dict(_WIDE, make_block=BasicBlock, depths=(3, 4, 6, 3), stem="imagenet"),
    "resnet50": dict(_WIDE, make_block=Bottleneck, depths=(3, 4, 6, 3), stem="imagenet"),
    "resnet101": dict(_WIDE, make_block=Bottleneck, depths=(3, 4, 23, 3), stem="imagenet"),
    "resnext50_32x4d": dict(_WIDE, make_block=_RESNEXT, depths=(3, 4, 6, 3), stem="imagenet"),
}


def check_name(name: str, known: list[str], allowed: str = "") -> None:
    if name not in known:
        raise norms.unknown(f"model.name={name}", name, known, allowed)


def _host(library: str, name: str, num_classes: int, in_channels: int) -> nn.Module:
    """A network of timm or torchvision, untrained."""
    if library == "timm":
        import timm

        check_name(name, timm.list_models(), "those of timm.list_models()")
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
    if library == "torchvision":
        import torchvision

        known = torchvision.models.list_models(torchvision.models)
        check_name(name, known, "those of torchvision.models.list_models()")
        if in_channels != 3:
            raise ValueError(
                f"model=torchvision: its networks take 3 channels and the data has {in_channels}; "
                f"model=timm model.name={name} takes any number"
            )
        with warnings.catch_warnings():  # of GoogLeNet and Inception: that their start is slow
            warnings.simplefilter("ignore", FutureWarning)
            return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    raise ValueError(f"model.library={library}: expected null, timm or torchvision")


def build(
    name: str,
    *,
    scheme: Scheme,
    num_classes: int,
    in_channels: int = 3,
    library: str | None = None,
    block: str = "auto",
    zero_init: bool | str = "auto",
    weights: Any = None,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """The network `name` with the layers of `scheme`: (N, in_channels, H, W) -> (N, num_classes).

    `block`: the order in a residual block, one of `ORDERS`; "auto": as the scheme's paper.
    `zero_init`: whether the last norm of each branch starts at zero; "auto" likewise.
    `library`: "timm" or "torchvision", whose network is then converted and keeps its own order and
    start. `weights`: a file, a run's folder, or the name of the library's pretrained ones (timm:
    True or a tag), to start from; what of them is taken over is told to `log`. Raises `ValueError`
    for anything unknown.
    """
    if block not in ("auto", *ORDERS):
        raise ValueError(f"model.block={block}: expected auto, {', '.join(ORDERS)}")
    if zero_init not in ("auto", True, False):
        raise ValueError(f"model.zero_init={zero_init}: expected auto, true or false")
    if library:
        for key, value in (("block", block), ("zero_init", zero_init)):
            if value != "auto":
                raise ValueError(
                    f"model.{key}={value}: a network of {library} keeps its own; expected auto"
                )
        host = _host(library, name, num_classes, in_channels)
        plain = host.state_dict()
        model = norms.convert(host, scheme)
    else:
        check_name(name, list(NETWORKS))
        order = scheme.block if block == "auto" else block
        make: Callable[..., ResNet] = partial(ResNet, block=order, **NETWORKS[name])
        zeros = scheme.zero_init if zero_init == "auto" else bool(zero_init)
        model = make(scheme, num_classes, in_channels, zero_init=zeros)
    if weights is None:
        return model
    state = pretrained.resolve(weights, library, name, in_channels)
    if not library:
        with torch.device("meta"):
            plain = make(norms.build("bn"), num_classes, in_channels, zero_init=False).state_dict()
    what = f"model.weights={weights}"
    model.complete = pretrained.load(model, plain, state, num_classes, what, log)  # type: ignore[assignment]
    return model


SMALL = 2**17  # pixels in a forward pass that take less time than loading what meta tensors need


@torch.no_grad()
def dry_run(
    model: nn.Module, shape: tuple[int, int, int, int], num_classes: int, meta: bool = False
) -> None:
    """A training forward pass without data, for the errors that it would raise.

    Runs a copy of the model on black images; many or large ones, or if `meta`, on the meta device,
    without arithmetic. Raises `ValueError`, also for a network that returns anything but logits
    (N, num_classes).
    """
    model = copy.deepcopy(model).train()
    if meta or shape[0] * shape[2] * shape[3] > SMALL:
        model.to("meta")
    try:
        with torch.random.fork_rng(devices=[]):  # dropout draws from it
            logits = model(torch.zeros(shape, device=next(model.parameters()).device))
    except (RuntimeError, AssertionError) as error:  # timm asserts the size of images
        raise ValueError(
            f"{type(model).__name__} cannot take images of {shape[2]}x{shape[3]} ({error})"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (shape[0], num_classes):
        raise ValueError(
            f"{type(model).__name__} returns {getattr(logits, 'shape', type(logits).__name__)} in "
            f"training; expected logits of shape ({shape[0]}, {num_classes})"
        )
