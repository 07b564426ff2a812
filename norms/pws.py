"""Weight standardization without activation norms (PWS). arXiv 2103.11590 (AAAI 2021).

    W'_k = sqrt(2 / fan) * alpha_k * (W_k - mean(W_k)) / sqrt(var(W_k) + gamma)
    y = conv(x, W') + beta

per output filter k, with the biased variance. alpha is learned, starts at 1 and is never decayed;
beta is the convolution's ordinary bias; gamma is a constant and not a small epsilon: at the start
a filter is shrunk by sqrt(v / (v + gamma)), v = 2 / fan, 0.55 for 3x3x512 at gamma = 1e-3.

The authors published two forms. `pytorch` (their ImageNet numbers, and the default): GN with one
group remains at two places, after the stem and after the last stage; the residual block keeps its
identity ahead of the ReLU (`block="pws"`). `tensorflow` (the CIFAR runs of the paper): no norm at
all, relu(x / sqrt(2)) before a block and before the pooling (`block="pws_tf"`), weights from a
uniform distribution, and fan is always fan_in. Defaults are those of the PyTorch code's CIFAR
configuration. Its options: `equiv` (gamma relative to v), `initalpha` (data-dependent: the first
convolution of each branch, the stem and the shortcuts start with the output variance 2) and
`mode`, the fan that is meant.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import _calculate_correct_fan

from .moments import promote
from .scheme import Scheme, he_init, identity
from .standardized import StandardizedConv, check_filters


class ParametricWeightStandardization(StandardizedConv):
    """A convolution with the weights above; `alpha` has one value per filter, shape (C_out,).

    Takes what PyTorch's convolution takes. `mode`: "fan_in" or "fan_out"; `equiv`: gamma counts in
    units of the initial variance 2/fan. Raises `ValueError` where a filter has a single weight, or
    for another mode.
    """

    no_weight_decay = ("alpha",)
    inner = False  # whether it is the second or a later convolution of a residual branch

    def __init__(
        self,
        *args,
        gamma: float = 1e-3,
        equiv: bool = False,
        mode: Literal["fan_in", "fan_out"] = "fan_in",
        device: Any = None,
        dtype: Any = None,
        **kwargs,
    ):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        check_filters(self)
        if mode not in ("fan_in", "fan_out"):
            raise ValueError(f"norm.mode={mode}: expected fan_in or fan_out")
        variance = 2 / _calculate_correct_fan(self.weight, mode)
        self.gain, self.mode = variance**0.5, mode
        self.gamma = gamma * variance if equiv else gamma
        self.alpha = nn.Parameter(self.weight.new_empty(len(self.weight)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's weights, and alpha = 1."""
        if "alpha" in self._parameters:  # PyTorch's constructor calls this ahead of ours
            nn.init.ones_(self.alpha)
            he_init(self, self.mode)

    def standardized(self) -> Tensor:
        gain = (self.gain * self.alpha).view(-1, *(1 for _ in self.weight.shape[1:]))
        return gain * F.group_norm(self.weight, 1, eps=self.gamma)


class PWSConv1d(ParametricWeightStandardization, nn.Conv1d):
    """(N, C, L) -> (N, C, L)."""


class PWSConv2d(ParametricWeightStandardization, nn.Conv2d):
    """(N, C, H, W) -> (N, C, H, W)."""


class PWSConv3d(ParametricWeightStandardization, nn.Conv3d):
    """(N, C, D, H, W) -> (N, C, D, H, W)."""


PWS_CONV = {1: PWSConv1d, 2: PWSConv2d, 3: PWSConv3d}


@torch.no_grad()
def initialize_alpha(model: nn.Module, images: Tensor) -> None:
    """Set alpha so that each outer convolution's output has variance 2, in one forward pass.

    One scalar for a layer (the unbiased variance over images, channels and positions), from the
    stem onwards, so that each layer sees what its already rescaled predecessors give. In a
    converted network all convolutions count as outer ones.
    """

    done = set()

    def rescale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, ParametricWeightStandardization)
        if layer in done:  # used twice in the network: the first use counts
            return output
        done.add(layer)
        layer.alpha.fill_((2 / promote(output).var()).sqrt())
        return layer.forward(*inputs)

    outer = [
        x for x in model.modules() if isinstance(x, ParametricWeightStandardization) and not x.inner
    ]
    for layer in outer:
        nn.init.ones_(layer.alpha)
    hooks = [layer.register_forward_hook(rescale) for layer in outer]
    training = model.training
    try:
        model.train()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def conv(*args, dim: int = 2, inner: bool = False, uniform: bool = False, **kwargs) -> Any:
    """A PWS convolution, with a bias since no norm follows it."""
    layer = PWS_CONV[dim](*args, bias=True, **kwargs)
    layer.inner = inner
    if uniform:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    return layer


def scheme(
    batch_size: int | None = None,
    gamma: float = 1e-3,
    equiv: bool = False,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    initalpha: bool = False,
    form: Literal["pytorch", "tensorflow"] = "pytorch",
) -> Scheme:
    """PWS convolutions with bias; GN(1) at both ends of the network or, by `form`, nowhere."""
    if form not in ("pytorch", "tensorflow"):
        raise ValueError(f"norm.form={form}: expected pytorch or tensorflow")
    plain = form == "tensorflow"
    for key, value, default in (("mode", mode, "fan_in"), ("initalpha", initalpha, False)):
        if plain and value != default:
            message = f"norm.{key}={value}: form=tensorflow has no such option; expected {default}"
            raise ValueError(message.lower())
    return Scheme(
        name="pws",
        needs_conv=True,
        conv=partial(conv, gamma=gamma, equiv=equiv, mode=mode, uniform=plain),
        norm=identity,
        end_norm=identity if plain else partial(nn.GroupNorm, 1),
        block="pws_tf" if plain else "pws",
        batch_free=True,
        channels_last=True,
        initialize=initialize_alpha if initalpha else None,
    )
