"""What the papers say goes wrong, measured while a run trains: `probe=…`.

A probe watches whole updates through hooks that are gone in between, keeps its sums on the device
and gives one value per layer and epoch, which go to metrics.csv and TensorBoard as
`probe/<statistic>/<layer>`. It changes nothing that is trained, and without one there is no hook.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from norms.moments import moments, pool, promote

Sums = dict[str, Tensor]  # "<layer> <quantity>": number of batches, sum, sum of squares, a row each


class Probe:
    """Watches every `every`th update of `model`, whose statistics are over `batch` images.

    `sums` is where an epoch's measurements add up: a part of a run's progress. Raises `ValueError`
    where the network has no layer to watch.
    """

    def __init__(self, model: nn.Module, batch: int, every: int):
        self.batch, self.every = batch, every
        self.sums: Sums = {}
        self.layers = {name: m for name, m in model.named_modules() if self.fits(m)}
        if not self.layers:
            raise ValueError(f"probe={self.name}: {self.needs}; expected another probe or norm")

    name = needs = ""

    def fits(self, layer: nn.Module) -> bool:
        raise NotImplementedError

    def hook(self, name: str) -> Callable[..., None]:
        """The forward hook of a layer."""
        raise NotImplementedError

    def after(self) -> None:
        """What is to be seen when an update is done."""

    def value(self, layer: str) -> dict[str, Tensor]:
        """An epoch's figures of a layer."""
        raise NotImplementedError

    @contextmanager
    def watch(self, update: int) -> Iterator[None]:
        """Measure during update number `update`, if it is one of those to be measured."""
        if update % self.every:
            yield
            return
        hooks = [
            # first of all hooks: before the activation of converted norm-activation layers
            layer.register_forward_hook(self.hook(name), prepend=True)
            for name, layer in self.layers.items()
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would pass hooks by
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self.after()

    def add(self, layer: str, quantity: str, values: Tensor) -> None:
        """Add up one row of `values` per batch."""
        values = values.detach().double()
        count = torch.full_like(values[0], len(values))
        row = torch.stack([count, values.sum(0), values.square().sum(0)])
        key = f"{layer} {quantity}"
        self.sums[key] = self.sums[key].to(row.device) + row if key in self.sums else row

    def mean(self, layer: str, quantity: str) -> Tensor:
        count, total, _ = self.sums[f"{layer} {quantity}"]
        return total / count

    def variance(self, layer: str, quantity: str) -> Tensor:
        """From batch to batch."""
        count, total, squares = self.sums[f"{layer} {quantity}"]
        return (squares / count - (total / count) ** 2).clamp_min(0)

    def pop_epoch(self) -> dict[str, float]:
        """The columns of an epoch's row; the next epoch starts from nothing."""
        if not self.sums:
            return {}
        seen = {key.split()[0] for key in self.sums}
        values = {
            f"probe/{statistic}/{name}": value
            for name in self.layers
            if name in seen
            for statistic, value in self.value(name).items()
        }
        row = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        self.sums.clear()
        return row


class BatchStatistics(Probe):
    """BN's four batch statistics in every norm with a gain per channel and no activation of its
    own (of `bcn` the batch norm cannot be seen from outside): of its input x, over batches of
    `batch` images,

        mu = mean(x)    var = mean((x - mu)^2)          z = (x - mu) / sqrt(var + eps)
        phi = mean(g)   psi = mean(g * z)               g = weight * dL/dy

    per channel (MABN, eqs. 4-6). For each, the root mean square over channels of its average, and
    its `spread`: the standard deviation from batch to batch in units of what it is a statistic of,
    sqrt(var), var, and the root mean square of g. Training by a small batch is training with this
    noise. Over an epoch of updates some of it is the change of the weights.
    """

    name = "batch_statistics"
    needs = "no norm of maps with a weight per channel and without activation"
    eps = 1e-5

    def fits(self, layer: Any) -> bool:
        weight = getattr(layer, "weight", None)
        channels = getattr(layer, "num_features", getattr(layer, "num_channels", None))
        other = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm3d) or hasattr(layer, "apply_act")
        return isinstance(weight, Tensor) and weight.shape == (channels,) and not other

    def hook(self, name: str) -> Callable[..., None]:
        def forward(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            mean, var = (v.view(-1, self.batch, x.shape[1]) for v in moments(x))
            mean, var = pool(mean, var, dim=1)  # (batches, channels)
            self.add(name, "mean", mean)
            self.add(name, "var", var)
            weight = layer.weight.detach()
            output.register_hook(lambda dy: backward(x, mean, var, weight * channels_last(dy)))

        def channels_last(x: Tensor) -> Tensor:
            """(N, C, H, W) -> (batches, images and positions, C)."""
            last = promote(x).permute(0, 2, 3, 1)
            return last.reshape(-1, self.batch * x.shape[2] * x.shape[3], x.shape[1])

        def backward(x: Tensor, mean: Tensor, var: Tensor, g: Tensor) -> None:
            z = (channels_last(x) - mean[:, None]) * torch.rsqrt(var + self.eps)[:, None]
            self.add(name, "phi", g.mean(1))
            self.add(name, "psi", (g * z).mean(1))
            self.add(name, "gradient", g.square().mean(1))

        return forward

    def value(self, layer: str) -> dict[str, Tensor]:
        var, gradient = (self.mean(layer, q).mean() for q in ("var", "gradient"))
        units = {"mean": var.sqrt(), "var": var, "phi": gradient.sqrt(), "psi": gradient.sqrt()}
        tiny = torch.finfo(torch.float32).tiny
        return {q: self.mean(layer, q).square().mean().sqrt() for q in units} | {
            f"{q}_spread": self.variance(layer, q).mean().sqrt() / (unit + tiny)
            for q, unit in units.items()
        }


class GradientShift(Probe):
    """The mean of the n weights of each filter, in the gradient and in the weight itself:

        shift = sqrt(n) * rms_k(mean(v_k)) / rms(v)

    over filters k: about 1 if the n entries are independent with mean 0, sqrt(n) if they are all
    equal, 0 if the filters are centred. And the variance of each convolution's output, one number
    over images, channels and positions, whose growth from layer to layer the shift explains.
    """

    name = "gradient_shift"
    needs = "no convolution with more than one weight to a filter"

    def fits(self, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Conv2d):
            return False
        return layer.weight.requires_grad and layer.weight[0].numel() > 1

    def hook(self, name: str) -> Callable[..., None]:
        def forward(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.add(name, "output_variance", promote(output.detach()).var().view(1, 1))

        return forward

    def after(self) -> None:
        for name, layer in self.layers.items():
            weight: Any = layer.weight
            if weight.grad is None:  # a layer that this update did not use
                continue
            for quantity, values in (("gradient_shift", weight.grad), ("weight_shift", weight)):
                filters = values.detach().flatten(1)
                shift = filters.mean(1).square().mean() / filters.square().mean()
                self.add(name, quantity, (shift * filters.shape[1]).sqrt().view(1, 1))

    def value(self, layer: str) -> dict[str, Tensor]:
        quantities = ("gradient_shift", "weight_shift", "output_variance")
        return {q: self.mean(layer, q).squeeze() for q in quantities}


PROBES = {probe.name: probe for probe in (BatchStatistics, GradientShift)}


def build(name: str, every: int, model: nn.Module, batch: int) -> Probe | None:
    """The probe `name`, or None for "none"."""
    return None if name == "none" else PROBES[name](model, batch, every)
