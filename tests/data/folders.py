"""Folders of small images, as a user has them."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise(
    root: Path, classes: str = "cat dog", train: int = 6, test: int = 2, seed: int = 0, to: str = ""
) -> Path:
    """`root`/train/<class>/000.png … beside test/ (or `to`): 10 x 10 pixels, told apart by seed."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), (to or "test", test)):
        for name in classes.split():
            place = root / part / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i:03}.png")
    return root
