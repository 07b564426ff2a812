"""Residual networks (He et al., arXiv 1512.03385), written once against a scheme.

Two orders of a block:

    post   relu(norm(conv(...)) + shortcut(x))                        the original
    pws    norm(conv(... relu(x))) + x, or + shortcut(relu(x)) where that convolves
           (arXiv 2103.11590: the identity skips the ReLU and keeps a mean near zero)

Convolutions and norms have the same names under every scheme, so state dicts can be compared.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from norms import Scheme


class PadShortcut(nn.Module):
    """The shortcut without parameters of the CIFAR networks: every second pixel, zero channels."""

    def __init__(self, extra_channels: int):
        super().__init__()
        self.extra = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


class Block(nn.Module):
    """A residual block; subclasses add its branch."""

    expansion = 1
    last_norm = "norm2"

    def __init__(self, cin: int, cout: int, stride: int, pre: bool, pad: bool, scheme: Scheme):
        super().__init__()
        self.pre = pre
        self.downsample: nn.Module | None = None
        if stride > 1 or cin != cout:
            if pad:
                self.downsample = PadShortcut(cout - cin)
            else:
                conv = scheme.conv(cin, cout, 1, stride=stride)
                self.downsample = nn.Sequential(conv, scheme.norm(cout))

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.pre:
            x = F.relu(x)
        if self.downsample is not None:
            convolves = not isinstance(self.downsample, PadShortcut)
            shortcut = self.downsample(x if convolves else shortcut)
        y = self.branch(x) + shortcut
        return y if self.pre else F.relu(y)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    def __init__(self, cin: int, width: int, stride: int, scheme: Scheme, pre: bool, pad: bool):
        super().__init__(cin, width, stride, pre, pad, scheme)
        self.conv1 = scheme.conv(cin, width, 3, stride=stride, padding=1)
        self.norm1 = scheme.norm(width)
        self.conv2 = scheme.conv(width, width, 3, padding=1, inner=True)
        self.norm2 = scheme.norm(width)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3 (with the stride, as everywhere since 2016), 1x1 to four times the width."""

    expansion = 4
    last_norm = "norm3"

    def __init__(
        self,
        cin: int,
        width: int,
        stride: int,
        scheme: Scheme,
        pre: bool,
        pad: bool,
        groups: int = 1,
        group_width: int = 64,
    ):
        super().__init__(cin, 4 * width, stride, pre, pad, scheme)
        inside = width * group_width // 64 * groups  # ResNeXt: `groups` paths of `group_width`
        self.conv1 = scheme.conv(cin, inside, 1)
        self.norm1 = scheme.norm(inside)
        self.conv2 = scheme.conv(
            inside, inside, 3, stride=stride, padding=1, groups=groups, inner=True
        )
        self.norm2 = scheme.norm(inside)
        self.conv3 = scheme.conv(inside, 4 * width, 1, inner=True)
        self.norm3 = scheme.norm(4 * width)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))


class ResNet(nn.Module):
    """Images (N, in_channels, H, W) -> logits (N, num_classes).

    `widths` and `depths`: channels and blocks of each stage. `stem`: "imagenet" (7x7 with stride 2
    and max-pooling) or "cifar" (3x3). `pad`: shortcuts without parameters.
    """

    def __init__(
        self,
        scheme: Scheme,
        num_classes: int,
        in_channels: int,
        make_block: Callable[..., Block],
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        stem: str,
        pad: bool,
        block: str,
        zero_init: bool,
    ):
        super().__init__()
        self.pre = block == "pws"
        end_norm = scheme.end_norm or scheme.norm
        large = stem == "imagenet"
        size, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        channels = widths[0]
        self.conv1 = scheme.conv(in_channels, channels, size, stride=stride, padding=padding)
        self.norm1 = end_norm(channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(make_block(channels, width, stride, scheme, self.pre, pad))
                channels = width * blocks[-1].expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.norm = scheme.end_norm(channels) if scheme.end_norm else nn.Identity()
        self.fc = nn.Linear(channels, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # Goyal et al., arXiv 1706.02677, sec. 5.1
        nn.init.zeros_(self.fc.bias)
        self.stages = [f"layer{i}" for i in range(1, len(widths) + 1)]
        if zero_init:
            self.zero_last_norms()

    def zero_last_norms(self) -> None:
        """Every residual branch starts at zero (arXiv 1706.02677); a branch without norm stays."""
        for block in self.modules():
            if isinstance(block, Block):
                last = getattr(block, block.last_norm)
                if getattr(last, "weight", None) is not None:
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = self.pool(x if self.pre else F.relu(x))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = F.relu(self.norm(x))  # changes nothing after a `post` block under most schemes
        return self.fc(x.mean((2, 3)))
