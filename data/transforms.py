"""Windows of photographs and their sizes: what training draws at random and evaluation fixes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Principal components of ImageNet's colours, columns, times their deviations (AlexNet's; the
# numbers are those of fb.resnet.torch).
COLOURS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
) * (0.2175, 0.0188, 0.0045)

Box = tuple[int, int, int, int]
"""Left, top, width and height of a window, in pixels."""


def random_resized(width: int, height: int, rng: np.random.Generator) -> Box:
    """GoogLeNet's window: 8 to 100 % of the area, sides from 3:4 to 4:3; after ten that do not fit,
    the largest such window in the middle."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(0, [width - w + 1, height - h + 1]).tolist()
            return x, y, w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def random_square(width: int, height: int, rng: np.random.Generator) -> Box:
    """MABN's window: a square of 8 to 100 % of the area; after ten that do not fit, the last one,
    which leaves the image."""
    for _ in range(10):
        edge = max(1, round(math.sqrt(width * height * rng.uniform(0.08, 1))))
        spare = np.array([width - edge, height - edge])
        x, y = rng.integers(np.minimum(spare, 0), np.maximum(spare, 0) + 1).tolist()
        if spare.min() >= 0:
            break
    return x, y, edge, edge


CROPS = {"random_resized": random_resized, "random_square": random_square}


def cut(image: Tensor, box: Box) -> Tensor:
    """The window `box` of (3, H, W), black where it leaves the image."""
    (x, y, w, h), (height, width) = box, image.shape[1:]
    inside = image[:, max(y, 0) : y + h, max(x, 0) : x + w]
    if inside.shape[1:] == (h, w):
        return inside
    sides = (max(-x, 0), max(x + w - width, 0), max(-y, 0), max(y + h - height, 0))
    return F.pad(inside, sides)


def scale(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, smoothed where it shrinks: (3, H, W) uint8 to (3, height, width)."""
    pixels = image[None].contiguous(memory_format=torch.channels_last)  # much the fastest
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]


def centre(image: Tensor, size: int, resize: int) -> Tensor:
    """The short side scaled to `resize`, `size` x `size` pixels cut out of the middle."""
    height, width = image.shape[1:]
    short = min(height, width)
    height, width = int(resize * height / short), int(resize * width / short)
    y, x = round((height - size) / 2), round((width - size) / 2)
    return scale(image, height, width)[:, y : y + size, x : x + size]
