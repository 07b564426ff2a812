"""The trained network of a run as one file that needs nothing of this project.

    python scripts/export.py runs/STUDY/RUN [--out FILE.pt2]

Writes the folded network as a `torch.export` program from images as they are in the data set, uint8
of shape (N, C, H, W) with any N from 1, to logits: `torch.export.load(FILE).module()(images)`. The
file is written only if it computes what the network of the run does. The data need not be there.
"""

import argparse
import io
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

import norms
from models.weights import of_checkpoint
from scripts.plan import network
from training import protocol
from training.config import read_config
from training.files import read, write

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


def configuration(run: Path) -> Any:
    """The configuration of a run, finished or not."""
    file = run / ".hydra" / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run}: not a run; expected a folder such as runs/quickstart/bn-b2-s0")
    return OmegaConf.create(read_config(file, "batch", "norm", "model", "protocol", "recipe"))


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run came to. Raises `ValueError` if it diverged."""
    result = read(run / "result.json", "status", "image_shape", "classes", "pixels")
    if result["status"] == "diverged":
        raise ValueError(f"{run}: diverged, so it has no trained network; expected a finished run")
    return result


def trained(
    run: Path, cfg: Any, classes: int, channels: int, averaged: bool = True
) -> tuple[nn.Module, norms.Scheme, dict[str, Any]]:
    """The network of a run's last checkpoint in evaluation mode, with the moving average of its
    weights where there is one and `averaged`; its scheme; the checkpoint."""
    scheme, model = network(cfg, protocol.plan(cfg), classes, channels)
    try:
        state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(of_checkpoint(state, averaged))
    except Exception as error:  # of zipfile, pickle and torch, for whatever the file holds
        what = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{run / 'last.pt'}: missing, damaged or of another network ({what}); overwrite=true "
            f"trains it again"
        ) from error
    return model.eval(), scheme, state


def load(run: Path) -> tuple[nn.Module, norms.Scheme, dict[str, Any]]:
    """The trained network of a finished run in evaluation mode, its scheme and its result."""
    cfg = configuration(run)
    if not (run / "result.json").exists():
        raise ValueError(f"{run}: not finished; the command that trains it goes on where it is")
    result = outcome(run)
    model, scheme, _ = trained(run, cfg, result["classes"], result["image_shape"][0])
    return model, scheme, result


def count_norms(model: nn.Module, folded: nn.Module, scheme: norms.Scheme) -> tuple[int, int]:
    """How many norms the network has, and at how many of their places its folded copy has one."""
    makes = [make for make in (scheme.norm, scheme.norm_act, scheme.end_norm) if make]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/model.pt2)")
    args = parser.parse_args()
    try:
        print(export(args.run, args.out or args.run / "model.pt2"))
    except (ValueError, OSError, OmegaConfBaseException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
