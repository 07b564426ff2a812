"""A network of one's own at batch 2: a U-Net-like segmentation of circles, by five schemes.

    python examples/own_network.py

It needs the layers alone (`pip install .`), downloads nothing and takes a minute on a CPU core. Each
network is trained on batches of two images and then judged in evaluation mode, which is where batch
norm pays for small batches: its running statistics are not those that it was trained with.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smallbatch

SCHEMES = {
    "bn": {},
    "gn": {"groups": 8},  # its 32 do not fit 16 channels
    "ws_gn": {"groups": 8},
    "bcn": {"groups": 8},
    "mabn": {},
}


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Segmentation(nn.Module):
    """(N, 3, H, W) -> (N, H, W) logits; H and W even."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.down, self.deep = block(3, width), block(width, 2 * width)
        self.up, self.head = block(3 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        deep = F.interpolate(self.deep(F.max_pool2d(fine, 2)), scale_factor=2.0)
        return self.head(self.up(torch.cat([fine, deep], 1)))[:, 0]


def images(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Circles of any colour, brightness and size on noise, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    place, radius = (
        torch.rand(count, 2, generator=generator),
        torch.rand(count, generator=generator),
    )
    axis = torch.arange(size) / size
    distance = (axis - place[:, :1])[:, None] ** 2 + (axis - place[:, 1:])[:, :, None] ** 2
    inside = distance.sqrt() < (0.1 + 0.2 * radius)[:, None, None]
    noise = torch.randn(count, 3, size, size, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    light = 4 * torch.rand(count, 1, 1, 1, generator=generator)
    return light * (noise + 2 * colour * inside[:, None]), inside.float()


def intersection_over_union(logits: Tensor, inside: Tensor) -> float:
    found, there = logits > 0, inside > 0
    return 100 * float((found & there).sum() / (found | there).sum())


def train(name: str, steps: int) -> float:
    """IoU in % on images that were not trained on, of a network trained on two at a time."""
    torch.manual_seed(0)
    scheme = smallbatch.build(name, batch_size=2, **SCHEMES[name])
    network = smallbatch.convert(Segmentation(), scheme).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        x, inside = images(2, seed=step)
        loss = F.binary_cross_entropy_with_logits(network(x), inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, inside = images(64, seed=10**6)
    with torch.no_grad():
        return intersection_over_union(smallbatch.fold(network.eval())(x), inside)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="batches of two images")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # two images are too little to share
    for name in SCHEMES:
        print(f"{name:6} {train(name, steps):5.1f} % intersection over union")


if __name__ == "__main__":
    main()
