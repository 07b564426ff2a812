"""Cross-iteration batch normalization. Yao et al., arXiv 2002.05712.

Statistics over a window of k batches: the current one, t, and those of the k - 1 iterations before,
as they would be under the weights theta of today. For a norm right behind a convolution, with mu
and nu the means of y and y^2 per channel:

    mu~_s = mu_s + <d mu_s / d theta, theta_t - theta_s>          nu~_s likewise, to first order
    mean = mean_s mu~_s        var = mean_s max(nu~_s, mu~_s^2) - mean^2
    z = gamma * (y - mean) / sqrt(var + eps) + beta

The gradient flows through the current batch's statistics alone. No autograd is needed for theta: d
mu / d theta is the mean input patch, d nu / d theta twice the mean of y times the patch. For the
first `burn_in` batches k is 1, which is batch norm; at test time moving averages of each batch's
statistics normalize, as batch norm's.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from . import moments as m
from .layer import BatchStatisticsNorm
from .scheme import Scheme, conv
from .standardized import StandardizedConv

WEIGHT_GRADIENT: dict[int, Any] = {
    1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight
}  # fmt: skip


class _ObservedConv(StandardizedConv):
    """A plain convolution that in training keeps its last input and output until its norm has seen
    them."""

    seen: tuple[Tensor, Tensor] | None = None

    def standardized(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen = (x.detach(), y) if self.training else None
        return y

    def patches(self: Any, x: Tensor, y: Tensor, channels: int) -> Tensor:
        """Means over images and positions of y times the input patch, (channels, fan_in)."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, self._reversed_padding_repeated_twice, mode)  # which says what "same" is
        total = WEIGHT_GRADIENT[self.weight.dim() - 2](
            x, (channels, *self.weight.shape[1:]), y, self.stride, 0, self.dilation, self.groups
        )
        return total.flatten(1) / (y.numel() // channels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None}


class ObservedConv1d(_ObservedConv, nn.Conv1d):
    """(N, C, L) -> (N, C, L)."""


class ObservedConv2d(_ObservedConv, nn.Conv2d):
    """(N, C, H, W) -> (N, C, H, W)."""


class ObservedConv3d(_ObservedConv, nn.Conv3d):
    """(N, C, D, H, W) -> (N, C, D, H, W)."""


OBSERVED_CONV = {1: ObservedConv1d, 2: ObservedConv2d, 3: ObservedConv3d}


class CrossIterationBatchNorm2d(BatchStatisticsNorm):
    """CBN over windows of `window` batches of `batch_size` images (None: all of a batch), behind
    the convolution that `follow` names.

    Shapes: (N, C, *) -> (N, C, *); in training N must be a multiple of `batch_size`. `window`: k;
    None: the paper's min(ceil(16 / batch_size), 8).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_compensated: Tensor
    past_mean: Tensor
    past_mean_slope: Tensor
    past_square: Tensor
    past_square_slope: Tensor

    def __init__(
        self,
        num_features: int,
        batch_size: int | None = None,
        window: int | None = None,
        burn_in: int = 1000,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        if window is None:
            window = min(-(-16 // batch_size), 8) if batch_size else 1
        self.state = {"running_mean": 0.0, "running_var": 1.0, "num_batches_compensated": 0}
        super().__init__(num_features, batch_size, eps, momentum, affine, device, dtype)
        self.window, self.burn_in = window, burn_in
        self._conv: tuple[Any, ...] = ()  # a tuple, so that it is no child

    def follow(self, conv: nn.Module) -> None:
        """Normalize the output of `conv`. Raises `ValueError` if it cannot be this layer's."""
        if not isinstance(conv, _ObservedConv) or conv.out_channels != self.num_features:
            raise ValueError(
                f"norm=cbn: no convolution of {self.num_features} channels ahead of it"
            )
        self._conv = (conv,)
        self.state = {k: v for k, v in self.state.items() if not k.startswith("past")}
        for name in ("past_mean", "past_square"):
            shape = (self.window - 1, *conv.weight.flatten(1).shape)
            self.register_buffer(name, self.running_mean.new_zeros(shape[:2]))
            self.register_buffer(f"{name}_slope", self.running_mean.new_zeros(shape))
            self.state |= {name: 0.0, f"{name}_slope": 0.0}

    def normalize(self, x: Tensor) -> Tensor:
        m.check_variance(x, self.batch_size)
        mean, var = m.pool_images(*m.moments(x), self.batch_size)
        past_mean, past_var, valid = self.once(
            partial(self.look_back, x), mean.detach(), var.detach()
        )
        means = torch.cat([past_mean, mean[:, None]], 1)  # (G, k, C)
        vars_ = torch.cat([past_var, var[:, None]], 1)
        count = valid.sum(1)
        mean = (means * valid).sum(1) / count
        var = ((vars_ + (means - mean[:, None]).square()) * valid).sum(1) / count
        return self.apply_statistics(x, mean, torch.rsqrt(var + self.eps))

    @torch.no_grad()
    def look_back(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu~ and max(nu~ - mu~^2, 0) of the k - 1 batches before every group, (G, k - 1, C), and
        which of the whole window count, (G, k, 1); moves the window and the running statistics."""
        seen = self._conv[0].seen if self._conv else None
        known = torch.compiler.is_compiling()  # or else whether it is the same tensor, hooks aside
        if seen is None or not (known or seen[1] is x or seen[1].data_ptr() == x.data_ptr()):
            raise ValueError(
                "norm=cbn: needs the input of the convolution whose output it normalizes, and "
                "another layer stands between; expected norm=bn, or a network without"
            )
        conv = self._conv[0]
        inputs, conv.seen = m.promote(seen[0]), None
        theta = conv.weight.detach().to(mean.dtype).flatten(1)
        bias = torch.zeros_like(mean[0]) if conv.bias is None else conv.bias.to(mean.dtype)
        past_mean = self.past_mean + (self.past_mean_slope * theta).sum(2)
        past_square = self.past_square + (self.past_square_slope * theta).sum(2)
        past_var = (past_square - past_mean.square()).clamp(min=0)
        count, groups, size = self.num_batches_compensated, len(mean), self.window
        batch = count + torch.arange(groups, device=mean.device)[:, None]
        age = torch.arange(size - 1, -1, -1, device=mean.device)  # in batches; 0: the current one
        valid = (age <= batch) & ((age == 0) | (batch >= self.burn_in))
        windows = [
            torch.cat(pair).unfold(0, size, 1).movedim(-1, 1)[:, :-1]
            for pair in ((past_mean + bias, mean), (past_var, var))
        ]

        new: dict[str, list[Tensor]] = {name: [] for name in self.state if name.startswith("past")}
        kept = min(groups, size - 1)
        # Past batches get the bias of today: what is kept of a batch is of y without it.
        images = (m.promote(x) - m.over_maps(bias[None], x)).unflatten(0, (groups, -1))
        center = mean - bias
        for g in range(groups - kept, groups):
            part, y = inputs.unflatten(0, (groups, -1))[g], images[g]
            patch = conv.patches(part, torch.ones_like(y[:, : conv.groups]), conv.groups)
            slope = patch.repeat_interleave(len(theta) // conv.groups, 0)
            square_slope = 2 * conv.patches(part, y, len(theta))
            square = var[g] + center[g].square()
            new["past_mean"].append(center[g] - (slope * theta).sum(1))
            new["past_mean_slope"].append(slope)
            new["past_square"].append(square - (square_slope * theta).sum(1))
            new["past_square_slope"].append(square_slope)
        moved = {
            k: torch.cat([getattr(self, k)[kept:], torch.stack(v)]) for k, v in new.items() if v
        }

        n = x.numel() // (groups * x.shape[1])
        unbiased = var * (n / max(1, n - 1))
        average = m.moving_average(groups, self.momentum, count)
        self.commit(
            **moved,
            running_mean=average(self.running_mean, mean)[1][-1],
            running_var=average(self.running_var, unbiased)[1][-1],
            num_batches_compensated=count + groups,
        )
        return windows[0], windows[1], valid[..., None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A window of another length: the newest batches, or the oldest again for those before it.
        for name in (n for n in self.state if n.startswith("past")):
            given, missing = state_dict.get(prefix + name), self.window - 1
            if (
                given is not None
                and len(given)
                and given.shape[1:] == getattr(self, name).shape[1:]
            ):
                oldest = given[:1].expand(max(0, missing - len(given)), *given.shape[1:])
                state_dict[prefix + name] = torch.cat(
                    [oldest, given[max(0, len(given) - missing) :]]
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}"


def follow_convolutions(model: nn.Module) -> None:
    """Link every norm of a finished network with the convolution that stands right ahead of it."""
    before: nn.Module = model
    for layer in list(model.modules()):
        if isinstance(layer, CrossIterationBatchNorm2d):
            layer.follow(before)
        elif any(True for _ in layer.parameters(recurse=False)):
            before = layer


def scheme(
    batch_size: int | None = None,
    window: int | None = None,
    burn_in: int = 1000,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> Scheme:
    """Convolutions that show their input, and cross-iteration batch norm."""
    return Scheme(
        name="cbn",
        needs_conv=True,
        conv=partial(conv, OBSERVED_CONV),
        norm=partial(
            CrossIterationBatchNorm2d,
            batch_size=batch_size,
            window=window,
            burn_in=burn_in,
            eps=eps,
            momentum=momentum,
        ),
        channels_last=True,
        finish=follow_convolutions,
    )
