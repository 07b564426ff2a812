"""One image file: the only way in which any reader makes pixels of it."""

import io
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.listing import printable

if TYPE_CHECKING:
    from PIL.Image import Image


@cache
def _jpeg_decoder() -> Any:
    """torchvision's, a third faster than PIL's with the same pixels; None where it has none (it is
    deprecated there, and called below the function that says so for every image)."""
    try:
        import torchvision.io  # noqa: F401  # registers it

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None


def decode(file: Path, apply_exif: bool = False) -> Tensor:
    """(3, H, W) uint8, RGB whatever the file's mode and format, as stored or, if `apply_exif`, as
    EXIF's orientation shows it; of an animation the first frame. Raises `ValueError` for a file
    that cannot be read, that has more pixels than PIL takes for safe (179 million), or whose pixels
    have no known range."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        content = np.fromfile(file, np.uint8)
        if not len(content):
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which nobody looks at
            # Reads the header alone, and refuses huge images whichever decoder would take them.
            with Image.open(io.BytesIO(content.data)) as image:
                decoder = _jpeg_decoder()
                if decoder and image.format in ("JPEG", "MPO"):
                    try:
                        return decoder(torch.from_numpy(content), 3, apply_exif)  # 3: RGB
                    except RuntimeError:
                        pass  # PIL can read it, or says better what is wrong
                levels = _levels(image)
                shown = ImageOps.exif_transpose(image) if apply_exif else image
                return torch.from_numpy(np.array(to_rgb(shown, levels))).permute(2, 0, 1)
    except Exception as error:  # a damaged file can end in about any
        # Its text: this frame would keep the error, and that in turn all frames and the workers.
        what = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        what = " ".join(what.split()) or type(error).__name__
        raise ValueError(f"data.root: cannot read the image {printable(file)} ({what})") from error


def _levels(image: "Image") -> tuple[int, int]:
    """The values of black and white for pixels of this type. Raises `ValueError` if it has none."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # TIFF's BitsPerSample, 12 or 16, and Photometric
        white = 2 ** tags.get(258, (16,))[0] - 1
        return (white, 0) if tags.get(262) == 0 else (0, white)  # 0: white is zero
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, as PIL opens them
        return 0, 65535
    if image.mode in ("I", "F"):
        kind = "signed or 32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, of no fixed range; expected 8, 12 or 16 bits")
    return 0, 255


def to_rgb(image: "Image", levels: tuple[int, int] | None = None) -> "Image":
    """The image in eight bits of red, green and blue, whatever its mode. `levels`: the values of
    black and white, where the image no longer knows the file it came from."""
    from PIL import Image

    black, white = levels or _levels(image)
    if (black, white) != (0, 255):  # which `convert` would clip
        scaled = (np.asarray(image).astype(np.int64) - black) * 255 // (white - black)
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
