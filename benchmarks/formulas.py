"""The methods in the plain form of their papers' formulas, as peers of the layers in `norms/`.

They are what the methods' authors publish: MABN as a function with both directions by hand, on
whole activations; BRN and estimated BN as autograd records the formulas; BCN in both ways, from the
formulas and as PyTorch's batch norm twice; the others from the formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import norms
from norms.scheme import replace_child

EPS = 1e-5


def maps(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


class Plain(nn.Module):
    """A layer in the plain form of its formulas; the state that they need, for all of them."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.batches = 0

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        z = (x - maps(mean)) / torch.sqrt(maps(var) + EPS)
        return maps(self.weight) * z + maps(self.bias)

    @torch.no_grad()
    def move(self, mean: Tensor, var: Tensor, rate: float) -> None:
        self.mean += rate * (mean - self.mean)
        self.var += rate * (var - self.var)


class PlainBN(Plain):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        var = ((x - maps(mean)) ** 2).mean((0, 2, 3))
        n = x.numel() / x.shape[1]
        self.move(mean, var * n / (n - 1), 0.1)
        return self.normalize(x, mean, var)


class PlainEstBN(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            var = ((x - maps(self.mean)) ** 2).mean((0, 2, 3))
            self.move(x.mean((0, 2, 3)), var, 0.01)
        return self.normalize(x, self.mean, self.var)


class PlainBRN(Plain):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        std = torch.sqrt(((x - maps(mean)) ** 2).mean((0, 2, 3)) + EPS)
        with torch.no_grad():
            r = torch.clamp(std / self.var, 1 / 3, 3)
            d = torch.clamp((mean - self.mean) / self.var, -5, 5)
        self.move(mean, std, 0.01)
        z = (x - maps(mean)) / maps(std) * maps(r) + maps(d)
        return maps(self.weight) * z + maps(self.bias)


class PlainBCN(nn.Module):
    """Batch norm and a group norm with an affine per group, both from the formulas."""

    def __init__(self, bn: nn.Module, groups: int = 32):
        super().__init__()
        self.bn, self.groups = bn, groups
        self.weight = nn.Parameter(torch.ones(groups, 1))
        self.bias = nn.Parameter(torch.zeros(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(x).reshape(len(x), self.groups, -1)
        mean = z.mean(2, keepdim=True)
        var = ((z - mean) ** 2).mean(2, keepdim=True)
        return (self.weight * (z - mean) / torch.sqrt(var + EPS) + self.bias).view_as(x)


class AuthorsBCN(PlainBCN):
    """The same with PyTorch's batch norm for the second one too, as in the authors' code."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(x).reshape(1, len(x) * self.groups, -1)
        z = F.batch_norm(z, None, None, training=True, momentum=0.0, eps=EPS)
        return (self.weight * z.view(len(x), self.groups, -1) + self.bias).view_as(x)


class _PlainMABN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        layer.batches += 1
        square = (x * x).mean((0, 2, 3))
        layer.squares[layer.batches % len(layer.squares)] = square
        chi = square if layer.own() else layer.squares.mean(0)
        ctx.r = torch.sqrt(maps(chi) + EPS) / torch.sqrt(maps(layer.var) + EPS)
        ctx.r = ctx.r.clamp(1 / 5, 5) if layer.batches > 1000 else torch.ones_like(ctx.r)
        z = x / torch.sqrt(maps(chi) + EPS)
        layer.var = 0.98 * layer.var + 0.02 * chi
        ctx.save_for_backward(z, chi, weight)
        ctx.layer = layer
        return maps(weight) * (ctx.r * z) + maps(bias)

    @staticmethod
    def backward(ctx, dy):
        (z, chi, weight), layer = ctx.saved_tensors, ctx.layer
        g = dy * maps(weight) * ctx.r
        product = (g * z).mean((0, 2, 3))
        layer.products[layer.batches % len(layer.products)] = product
        psi = product if layer.own() else layer.products.mean(0)
        dx = (g - z * maps(psi)) / torch.sqrt(maps(chi) + EPS)
        return dx, (dy * ctx.r * z).sum((0, 2, 3)), dy.sum((0, 2, 3)), None


class PlainMABN(Plain):
    """The authors' release, without its synchronisation with the device to read a counter."""

    squares: Tensor
    products: Tensor

    def __init__(self, channels: int, window: int):
        super().__init__(channels)
        self.register_buffer("squares", torch.zeros(window, channels))
        self.register_buffer("products", torch.zeros(window, channels))

    def own(self) -> bool:
        return self.batches <= len(self.squares) or self.batches < 100

    def forward(self, x: Tensor) -> Tensor:
        return _PlainMABN.apply(x, self.weight, self.bias, self)


class PlainWS(nn.Conv2d):
    """The GN+WS authors' form."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = weight.flatten(1).std(1).view(-1, 1, 1, 1) + EPS
        return self._conv_forward(x, weight / std, self.bias)


class PlainCentered(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class PlainGN(Plain):
    def __init__(self, groups: int, channels: int):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        z = x.reshape(len(x), self.groups, -1)
        mean = z.mean(2, keepdim=True)
        var = ((z - mean) ** 2).mean(2, keepdim=True)
        z = ((z - mean) / torch.sqrt(var + EPS)).view_as(x)
        return self.weight.view(1, -1, 1, 1) * z + self.bias.view(1, -1, 1, 1)


class PlainWSInside(nn.Conv2d):
    """BCN's form of weight standardization: eps inside the root."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = torch.sqrt(weight.flatten(1).var(1) + EPS).view(-1, 1, 1, 1)
        return self._conv_forward(x, weight / std, self.bias)


class PlainPWS(nn.Conv2d):
    gamma: float
    gain: float
    alpha: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        var = (weight**2).mean((1, 2, 3), keepdim=True)
        weight = self.gain * self.alpha.view(-1, 1, 1, 1) * weight / torch.sqrt(var + self.gamma)
        return self._conv_forward(x, weight, self.bias)


def plain_norm(layer: nn.Module) -> nn.Module | None:
    """A norm of ours in the plain form, at its start; None for any other layer."""
    if isinstance(layer, norms.BatchChannelNorm2d):
        estimated = isinstance(layer.bn, norms.EstimatedBatchNorm2d)
        bn = (PlainEstBN if estimated else PlainBN)(layer.num_channels)
        return PlainBCN(bn, layer.num_groups)
    if isinstance(layer, norms.MABN2d):
        form = PlainMABN(layer.num_features, len(layer.window_square))
        form.batches = 2000  # past its warm-up, where it costs the most
        return form
    if isinstance(layer, nn.BatchNorm2d):
        return PlainBN(layer.num_features)
    if isinstance(layer, nn.GroupNorm):
        return PlainGN(layer.num_groups, layer.num_channels)
    return None


def plain_conv(layer: nn.Conv2d) -> None:
    """Turn a convolution of ours into its plain form, in place: the parameters are the same."""
    if isinstance(layer, norms.WSConv2d):
        layer.__class__ = PlainWSInside if layer.eps_inside else PlainWS  # type: ignore[assignment]
    elif isinstance(layer, norms.PWSConv2d):
        layer.__class__ = PlainPWS  # type: ignore[assignment]
    elif isinstance(layer, norms.CenteredConv2d):
        layer.__class__ = PlainCentered  # type: ignore[assignment]


def plain(model: nn.Module) -> nn.Module:
    """The network with every layer as its formulas read, as `build` has just made it."""
    for name, layer in list(model.named_modules()):
        form = plain_norm(layer)
        if form:
            replace_child(model, name, form)
        elif isinstance(layer, nn.Conv2d):
            plain_conv(layer)
    return model
