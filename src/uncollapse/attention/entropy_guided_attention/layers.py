"""Layers for decoders with fewer nonlinearities: attention with temperatures, feed-forward layers down to one scaled matrix."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from uncollapse.errors import ConfigError, DataError

Parametrization = Literal["clamp", "softplus"]

LOWEST_TEMPERATURE = 1e-3
"""Where a temperature is cut off; below, the scores of a row differ by thousands and nothing is learnt."""


class CausalAttention(nn.Module):
    """Causal multi-head self-attention, (batch, time, width) to the same; any kernel of PyTorch's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"attention: width {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Attend to the own and all earlier positions."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.sharpened(q), k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))

    def sharpened(
        self, query: Float[Tensor, "batch head time feature"]
    ) -> Float[Tensor, "batch head time feature"]:
        """The queries that the softmax sees."""
        return query


class TemperedAttention(CausalAttention):
    """Attention with a learnable temperature of each head and query position: softmax_j(z_ij / (t_hi sqrt(d_k))).

    The entropy of a row rises with its temperature, dE/dt = Var_a(z) / (d_k t^3) >= 0: from ln(number of largest scores) at 0 to
    ln(keys) at infinity. Positions beyond `context` share the last temperature.

    Args:
        context: positions with a temperature of their own.
        t_init: every temperature at the start, at least 1e-3. The paper prints 1e-2 and 1e-1.
        parametrization: "clamp" cuts the parameter off at 1e-3 (a temperature that falls below stays there); "softplus" is
            ln(1 + exp(parameter)).

    Raises:
        ConfigError: an option out of range.

    Source: arXiv 2501.03489, section 4.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        *,
        t_init: float = 1.0,
        parametrization: Parametrization = "clamp",
    ) -> None:
        super().__init__(width, heads)
        if parametrization not in get_args(Parametrization):
            raise ConfigError(f"parametrization is {parametrization!r}; give 'clamp' or 'softplus'")
        if not LOWEST_TEMPERATURE <= t_init < math.inf:
            raise ConfigError(f"t_init is {t_init:g}; give a temperature of at least {LOWEST_TEMPERATURE:g}")
        if context < 1:
            raise ConfigError(f"context is {context}; give at least one position")
        self.parametrization = parametrization
        start = t_init if parametrization == "clamp" else t_init + math.log(-math.expm1(-t_init))
        self.raw_temperature = nn.Parameter(torch.full((heads, context), start))

    @property
    def temperature(self) -> Float[Tensor, "head context"]:
        """Temperatures, all positive."""
        if self.parametrization == "clamp":
            return self.raw_temperature.clamp(min=LOWEST_TEMPERATURE)
        return F.softplus(self.raw_temperature)

    def sharpened(
        self, query: Float[Tensor, "batch head time feature"]
    ) -> Float[Tensor, "batch head time feature"]:
        """Queries over their temperature."""
        temperature = self.temperature
        place = torch.arange(query.shape[2], device=query.device).clamp(max=temperature.shape[1] - 1)
        return query / temperature[:, place, None]


# ---- feed-forward layers, residual included --------------------------------------------------------------------


def fuse_linear(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One linear layer that does what `second(first(x))` does: W = W_2 W_1, b = W_2 b_1 + b_2.

    Raises:
        DataError: layers that do not follow on each other.
    """
    if first.out_features != second.in_features:
        raise DataError(f"fuse_linear: {first.out_features} features out, but {second.in_features} in")
    biased = first.bias is not None or second.bias is not None
    weight = second.weight.detach() @ first.weight.detach()
    fused = nn.Linear(
        first.in_features, second.out_features, bias=biased, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        fused.weight.copy_(weight)
        if biased:
            fused.bias.zero_()
            if first.bias is not None:
                fused.bias.add_(second.weight @ first.bias)
            if second.bias is not None:
                fused.bias.add_(second.bias)
    return fused


class ScaledFusedFFN(nn.Module):
    """beta x + (x W) / alpha: a linear feed-forward layer fused to one matrix, with learnable scales; residual included.

    Both scales start at 1. They keep the residual stream from growing where no normalisation does, and vanish into W after
    training.

    Source: arXiv 2501.03489, section 4.
    """

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)
        self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    @classmethod
    def from_linear(cls, first: nn.Linear, second: nn.Linear) -> ScaledFusedFFN:
        """The same function as x + second(first(x)).

        Raises:
            DataError: layers that do not lead back to where they start.
        """
        fused = fuse_linear(first, second)
        if fused.in_features != fused.out_features:
            raise DataError(f"from_linear: {fused.in_features} features in, but {fused.out_features} out")
        made = cls(fused.in_features, bias=fused.bias is not None).to(fused.weight)
        made.linear = fused
        return made

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The scaled sum of both branches."""
        return self.beta * x + self.linear(x) / self.alpha


class ResidualFFN(nn.Module):
    """x + W_2 act(W_1 norm(x)), four times as wide inside; `act` and `norm` may be the identity."""

    def __init__(self, width: int, act: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Residual included."""
        return x + self.down(self.act(self.up(self.norm(x))))


class Block(nn.Module):
    """Attention with its residual, then a feed-forward layer that brings its own."""

    def __init__(
        self, attention: CausalAttention, feed_forward: ScaledFusedFFN | ResidualFFN, norm: nn.Module
    ) -> None:
        super().__init__()
        self.norm, self.attention, self.feed_forward = norm, attention, feed_forward

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Both layers."""
        return self.feed_forward(x + self.attention(self.norm(x)))


class SoftmaxOnlyBlock(Block):
    """The paper's block, SM(t)+ScFuFFN: of tempered attention and a scaled fused linear layer, only softmax is not linear.

    Arguments and errors as in `TemperedAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        *,
        t_init: float = 1.0,
        parametrization: Parametrization = "clamp",
    ) -> None:
        attention = TemperedAttention(width, heads, context, t_init=t_init, parametrization=parametrization)
        super().__init__(attention, ScaledFusedFFN(width), nn.Identity())
