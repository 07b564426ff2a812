"""The trained network of a run as a `torch.export` program that needs nothing of this project."""

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import norms
from training.files import write
from training.restore import load

TOLERANCE = 1e-4  # of the largest logit; float32 rounds to some 1e-6


class FromPixels(nn.Module):
    """The network behind the normalization that its training images had."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, reverse: bool = False):
        super().__init__()
        self.network, self.reverse = network, reverse  # reverse: from RGB to BGR
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        images = images.flip(1) if self.reverse else images
        return self.network(images.float() * self.scale + self.shift)


def count_norms(model: nn.Module, folded: nn.Module, scheme: norms.Scheme) -> tuple[int, int]:
    """How many norms the network has, and at how many of their places its folded copy has one."""
    makes = [make for make in (scheme.norm, scheme.norm_act, scheme.boundary_norm) if make]
    kinds = tuple({type(make(64)) for make in makes} - {nn.Identity})
    names = [name for name, layer in model.named_modules() if type(layer) in kinds]
    kinds += (nn.BatchNorm2d, nn.GroupNorm)
    places = [folded.get_submodule(name).modules() for name in names]
    return len(names), sum(any(isinstance(x, kinds) for x in place) for place in places)


@torch.no_grad()
def export(run: Path, out: Path) -> str:
    """Write the program of a run to `out`; returns what to say. Raises `ValueError`, `OSError`."""
    model, scheme, result = load(run)
    if out.suffix != ".pt2" or not out.parent.is_dir():
        raise ValueError(f"--out {out}: expected the name of a .pt2 file in an existing folder")
    folded = norms.fold(model)
    mean, std = (torch.tensor(result["pixels"][k])[:, None, None] for k in ("mean", "std"))
    shape, random = result["image_shape"], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=random)
    reverse = result["pixels"].get("reversed", False)
    network = FromPixels(folded, mean, std, reverse).eval()
    any_number = ({0: torch.export.Dim("batch", min=1)},)
    try:
        program = torch.export.export(network, (images,), dynamic_shapes=any_number)
    except (RuntimeError, TypeError) as error:
        what = str(error).strip().splitlines()[0]
        raise ValueError(f"{run}: torch.export cannot take this network ({what})") from error
    file = io.BytesIO()
    torch.export.save(program, file)
    with warnings.catch_warnings():  # of torch 2.11, about how it reads the file itself
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        again = torch.export.load(io.BytesIO(file.getvalue())).module()
    deviations = []
    for part in (images[:1], images):
        expected = model(((part.flip(1) if reverse else part) / 255 - mean) / std)
        deviations.append((again(part) - expected).abs().max() / expected.abs().max())
    deviation = torch.stack(deviations).max().item()
    if not deviation <= TOLERANCE:  # NaN neither
        raise ValueError(
            f"{run}: the exported network deviates by {deviation:.1e} of the largest logit from "
            f"the run's; expected at most {TOLERANCE:g}; nothing written"
        )
    write(out, file.getvalue())
    standardized = sum(hasattr(layer, "standardized") for layer in model.modules())
    before, left = count_norms(model, folded, scheme)
    return (
        f"{out}: {out.stat().st_size / 1e6:.2f} MB, uint8 images (N, {', '.join(map(str, shape))})"
        f" -> {result['classes']} logits\n"
        f"  {standardized} standardized convolutions became plain; of {before} norms "
        f"{before - left} disappeared, {left} remain\n"
        f"  largest deviation from the network of the run: {deviation:.1e} of the largest logit"
    )
