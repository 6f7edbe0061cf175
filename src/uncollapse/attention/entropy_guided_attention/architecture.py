"""The paper's architectures: GPT-2's decoder, and what is left of it when normalisation and activations go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from uncollapse.attention.entropy_guided_attention.layers import (
    Block,
    CausalAttention,
    Parametrization,
    ResidualFFN,
    ScaledFusedFFN,
    TemperedAttention,
)
from uncollapse.errors import ConfigError, DataError

FeedForward = Literal["gelu", "relu", "linear", "scaled-fused", "weight-norm", "spectral-norm"]

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
_WEIGHT_NORMS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "weight-norm": parametrizations.weight_norm,
    "spectral-norm": parametrizations.spectral_norm,
}


@dataclass(frozen=True)
class Architecture:
    """Which nonlinearities beside softmax a decoder has.

    `norm`: LayerNorm before attention, feed-forward layer and output. `feed_forward`: its kind; "scaled-fused" has no
    LayerNorm of its own, "weight-norm" and "spectral-norm" are linear layers with normalised weights. `tempered`: learnable temperatures.
    """

    norm: bool
    feed_forward: FeedForward
    tempered: bool = False

    def __post_init__(self) -> None:
        if self.feed_forward not in get_args(FeedForward):
            raise ConfigError(
                f"feed_forward is {self.feed_forward!r}; give one of {', '.join(get_args(FeedForward))}"
            )
        if self.norm and self.feed_forward == "scaled-fused":
            raise ConfigError("a scaled fused feed-forward layer replaces normalisation; give norm=False")


ARCHITECTURES: Mapping[str, Architecture] = {
    "SM+LN+G": Architecture(norm=True, feed_forward="gelu"),
    "SM+LN+R": Architecture(norm=True, feed_forward="relu"),
    "SM+LN": Architecture(norm=True, feed_forward="linear"),
    "SM+G": Architecture(norm=False, feed_forward="gelu"),
    "SM+R": Architecture(norm=False, feed_forward="relu"),
    "SM": Architecture(norm=False, feed_forward="linear"),
    "SM+WNorm": Architecture(norm=False, feed_forward="weight-norm"),
    "SM+SNorm": Architecture(norm=False, feed_forward="spectral-norm"),
    "SM+ScFuFFN": Architecture(norm=False, feed_forward="scaled-fused"),
    "SM(t)+ScFuFFN": Architecture(norm=False, feed_forward="scaled-fused", tempered=True),
}
"""The paper's architectures by its names: softmax (SM), LayerNorm (LN), GELU (G), ReLU (R), temperatures (t)."""


class ReducedDecoder(nn.Module):
    """GPT-2's decoder with the nonlinearities of one architecture: token ids to logits of the next token.

    Learned positions, output tied to the token embedding, weights drawn with deviation 0.02 (over sqrt(2 layers) where a
    branch joins the residual), biases 0.

    Args:
        architecture: a name of `ARCHITECTURES`, or one of your own.
        context: longest input.
        seed: of the weights.
        t_init: temperatures at the start, for tempered architectures.

    Raises:
        ConfigError: an unknown name, or an option out of range.
    """

    def __init__(
        self,
        architecture: str | Architecture,
        *,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        context: int,
        seed: int = 0,
        t_init: float = 1.0,
        parametrization: Parametrization = "clamp",
    ) -> None:
        super().__init__()
        if isinstance(architecture, str):
            if architecture not in ARCHITECTURES:
                raise ConfigError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
            architecture = ARCHITECTURES[architecture]
        self.architecture, self.context = architecture, context
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
            blocks = [self._block(width, heads, t_init, parametrization) for _ in range(layers)]
            self.blocks = nn.ModuleList(blocks)
            self.norm = self._norm(width)
            self._draw(blocks)

    def _norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width) if self.architecture.norm else nn.Identity()

    def _block(self, width: int, heads: int, t_init: float, parametrization: Parametrization) -> Block:
        kind = self.architecture.feed_forward
        attention: CausalAttention
        if self.architecture.tempered:
            attention = TemperedAttention(
                width, heads, self.context, t_init=t_init, parametrization=parametrization
            )
        else:
            attention = CausalAttention(width, heads)
        if kind == "scaled-fused":
            return Block(attention, ScaledFusedFFN(width), self._norm(width))
        act = _ACTIVATIONS.get(kind, nn.Identity)()
        return Block(attention, ResidualFFN(width, act, self._norm(width)), self._norm(width))

    @torch.no_grad()
    def _draw(self, blocks: Sequence[Block]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        normalize = _WEIGHT_NORMS.get(self.architecture.feed_forward)
        for block in blocks:
            ffn = block.feed_forward
            for join in (block.attention.out, ffn.linear if isinstance(ffn, ScaledFusedFFN) else ffn.down):
                join.weight /= math.sqrt(2 * len(blocks))
            if normalize is not None and isinstance(ffn, ResidualFFN):
                normalize(ffn.up)  # last, since it takes norm and direction from the weights
                normalize(ffn.down)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits after each position. Raises `DataError` for more than `context` tokens."""
        if ids.shape[1] > self.context:
            raise DataError(f"{ids.shape[1]} tokens, but the decoder has {self.context} positions")
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)
