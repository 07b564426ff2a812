"""Residual networks (He et al., arXiv 1512.03385), written once against a scheme.

Orders of a block:

    post     relu(norm(conv(...)) + shortcut(x))                        the original
    pws      norm(conv(... relu(x))) + x, or + shortcut(relu(x)) where that convolves
             (arXiv 2103.11590: the identity skips the ReLU and keeps a mean near zero)
    pws_tf   the same with relu(x / sqrt(2)), of the paper's TensorFlow code
    nf       the same with relu(x) * input_scale, which the scheme sets (arXiv 2101.08692)

The stem ends with a ReLU under `post` and `pws` (the authors' PyTorch code rectifies it although
every block begins with a ReLU, so the first block's identity is rectified too), not under
`pws_tf` and `nf`.

Convolutions and norms have the same names under every scheme, so state dicts can be compared.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from norms import Scheme


def scaled_relu(x: Tensor) -> Tensor:
    return F.relu(x * 2**-0.5)


def unchanged(x: Tensor) -> Tensor:
    return x


# What stands before a block's branch, and before the pooling; None: the ReLU stands behind a block.
ORDERS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "post": None,
    "pws": F.relu,
    "pws_tf": scaled_relu,
    "nf": F.relu,
}


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
    input_scale = 1.0

    def __init__(self, cin: int, cout: int, stride: int, order: str, pad: bool, scheme: Scheme):
        super().__init__()
        self.pre = ORDERS[order]
        self.act = unchanged if scheme.norm_act else F.relu  # behind the norms inside a branch
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
            x = self.pre(x) * self.input_scale if self.input_scale != 1 else self.pre(x)
        if self.downsample is not None:
            convolves = not isinstance(self.downsample, PadShortcut)
            shortcut = self.downsample(x if convolves else shortcut)
        y = self.branch(x) + shortcut
        return y if self.pre else F.relu(y)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    def __init__(self, cin: int, width: int, stride: int, scheme: Scheme, order: str, pad: bool):
        super().__init__(cin, width, stride, order, pad, scheme)
        self.conv1 = scheme.conv(cin, width, 3, stride=stride, padding=1)
        self.norm1 = (scheme.norm_act or scheme.norm)(width)
        self.conv2 = scheme.conv(width, width, 3, padding=1, inner=True)
        self.norm2 = scheme.norm(width)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


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
        order: str,
        pad: bool,
        groups: int = 1,
        group_width: int = 64,
    ):
        super().__init__(cin, 4 * width, stride, order, pad, scheme)
        inside = width * group_width // 64 * groups  # ResNeXt: `groups` paths of `group_width`
        self.conv1 = scheme.conv(cin, inside, 1)
        self.norm1 = (scheme.norm_act or scheme.norm)(inside)
        self.conv2 = scheme.conv(
            inside, inside, 3, stride=stride, padding=1, groups=groups, inner=True
        )
        self.norm2 = (scheme.norm_act or scheme.norm)(inside)
        self.conv3 = scheme.conv(inside, 4 * width, 1, inner=True)
        self.norm3 = scheme.norm(4 * width)

    def branch(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
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
        self.pre = ORDERS[block]
        boundary_norm = scheme.boundary_norm or scheme.norm
        large = stem == "imagenet"
        size, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        channels = widths[0]
        self.conv1 = scheme.conv(in_channels, channels, size, stride=stride, padding=padding)
        own_act = scheme.norm_act if not (self.pre or scheme.boundary_norm) else None
        self.norm1 = (own_act or boundary_norm)(channels)
        self.act = unchanged if own_act or block in ("pws_tf", "nf") else F.relu
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(make_block(channels, width, stride, scheme, block, pad))
                channels = width * blocks[-1].expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.norm = scheme.boundary_norm(channels) if scheme.boundary_norm else nn.Identity()
        self.fc = nn.Linear(channels, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # Goyal et al., arXiv 1706.02677, sec. 5.1
        nn.init.zeros_(self.fc.bias)
        self.stages = [f"layer{i}" for i in range(1, len(widths) + 1)]
        if zero_init:
            self.zero_last_norms()
        if scheme.finish:
            scheme.finish(self)

    def zero_last_norms(self) -> None:
        """Every residual branch starts at zero (arXiv 1706.02677), where its norm has a gain."""
        for block in self.modules():
            if isinstance(block, Block):
                last = getattr(block, block.last_norm)
                weight = getattr(last, "weight", None)
                if weight is not None and weight.requires_grad:
                    nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = (self.pre or F.relu)(self.norm(x))  # a `post` block has had its ReLU
        return self.fc(x.mean((2, 3)))
