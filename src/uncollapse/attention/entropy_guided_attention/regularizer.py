"""The penalty: squared deviation of a head's entropy from its threshold, where it leaves the dead zone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.attention import AttentionRows
from uncollapse.measure.precision import at_least_float32

Granularity = Literal["head", "head_per_sample", "row_mean", "row_sum"]
Reference = Literal["log_T", "causal"]
Gate = Literal["hard", "smooth"]
Stats = dict[str, Tensor]
Thresholds = Float[Tensor, "_ _"]
"""(layer, head), or (1, head) for all layers; the shape is checked by hand, for an error that says what to give."""


@dataclass(frozen=True)
class EntropyRegularizer:
    """coef * mean over heads and layers of the gated (E - theta E_max)^2; nats squared.

    With delta = E - theta E_max and margin m = gamma E_max, the gate keeps delta^2 where |delta| > m and gives 0 elsewhere.
    The gradient in theta is -2 E_max delta there: thresholds drift towards the entropies that they are meant to hold.

    Args:
        gamma: half width of the dead zone as a share of E_max, at least 0; from 1 on nothing is penalised.
        coef: weight. The paper's 1e-5 goes with `row_sum`; the same force in the other granularities is
            coef * batch * length, about 0.04 for 32 rows of 128 tokens.
        reference: E_max. "log_T": ln(number of keys), the paper's. "causal": ln(keys that the row may see).
        granularity: what has an entropy of its own. "head": each head, averaged over batch and queries. "head_per_sample":
            each head in each sample, penalties averaged over samples. "row_mean": each row, penalties averaged. "row_sum":
            each row, penalties summed over batch and queries, as in the released code.
        gate: "hard" as above, "smooth" for max(delta^2 - m^2, 0).
        skip_trivial_rows: leave out rows that see one key only and have entropy 0 whatever the model does.
        context_size: the T of "log_T" instead of the number of keys.
        eps: added inside the logarithm where probabilities are given; 1e-9 in the released code.

    Raises:
        ConfigError: an option out of range.
    """

    gamma: float = 0.2
    coef: float = 1e-5
    reference: Reference = "log_T"
    granularity: Granularity = "head"
    gate: Gate = "hard"
    skip_trivial_rows: bool = False
    context_size: int | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        choices = {"reference": Reference, "granularity": Granularity, "gate": Gate}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                given = ", ".join(map(repr, get_args(kind)))
                raise ConfigError(
                    f"EntropyRegularizer: {name} is {getattr(self, name)!r}; give one of {given}"
                )
        for name in ("gamma", "coef", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"EntropyRegularizer: {name} is {getattr(self, name):g}; give at least 0")
        if self.context_size is not None and self.context_size < 2:
            raise ConfigError(f"EntropyRegularizer: context_size is {self.context_size}; give at least 2")

    def __call__(
        self,
        attn_list: Sequence[Float[Tensor, "batch head query key"] | None],
        theta: Thresholds,
        mask: Bool[Tensor, "#batch #head query key"] | None = None,
        query_mask: Bool[Tensor, "batch query"] | None = None,
    ) -> tuple[Float[Tensor, ""], Stats]:
        """Penalty and its figures from the attention probabilities of each layer, as eager attention returns them.

        Args:
            attn_list: one per layer, rows that sum to 1.
            theta: thresholds as a share of E_max; one row for all layers is allowed.
            mask: True where a query may see a key; a causal mask if not given. Only `reference="causal"` and
                `skip_trivial_rows` look at it.
            query_mask: False at queries that are padding.

        Raises:
            DataError: no layer, layers of different shapes, a missing layer, or thresholds of another shape.
        """
        given = [attn for attn in attn_list if attn is not None]
        if len(given) < len(attn_list):
            raise DataError(
                "EntropyRegularizer: the model gave no attention probabilities, as SDPA and flash attention do; load it "
                "with attn_implementation='eager', or use attach_entropy_regularizer, which needs none"
            )
        _check_alike([tuple(attn.shape) for attn in given])
        entropy = torch.stack([_entropy(attn, self.eps) for attn in given])
        queries, keys = given[0].shape[-2:]
        if mask is None:
            allowed = torch.arange(keys - queries + 1, keys + 1, device=entropy.device)
        else:
            allowed = mask.sum(-1)
        return self._penalty(entropy, allowed.to(entropy.dtype).expand_as(entropy), keys, theta, query_mask)

    def from_rows(
        self,
        rows: Sequence[AttentionRows],
        keys: int,
        theta: Thresholds,
        query_mask: Bool[Tensor, "batch query"] | None = None,
    ) -> tuple[Float[Tensor, ""], Stats]:
        """The same from statistics of rows, one per layer, over `keys` keys; `eps` plays no part.

        Raises:
            DataError: no layer, layers of different shapes, or thresholds of another shape.
        """
        _check_alike([tuple(layer.entropy.shape) for layer in rows])
        entropy = torch.stack([layer.entropy for layer in rows])
        allowed = torch.stack([layer.allowed for layer in rows])
        return self._penalty(entropy, allowed, keys, theta, query_mask)

    def _penalty(
        self,
        entropy: Float[Tensor, "layer batch head query"],
        allowed: Float[Tensor, "layer batch head query"],
        keys: int,
        theta: Thresholds,
        query_mask: Bool[Tensor, "batch query"] | None,
    ) -> tuple[Float[Tensor, ""], Stats]:
        layers, _, heads, _ = entropy.shape
        if theta.ndim != 2 or theta.shape[0] not in (1, layers) or theta.shape[1] != heads:
            shape = "x".join(map(str, theta.shape))
            raise DataError(f"EntropyRegularizer: theta is {shape}; give {layers} layers x {heads} heads")
        counted = ~entropy.isnan() & (allowed >= (2 if self.skip_trivial_rows else 1))
        if query_mask is not None:
            counted = counted & query_mask[:, None]
        weight = counted.to(entropy.dtype)
        entropy = torch.where(counted, entropy, 0)
        if self.reference == "log_T":
            ceiling = torch.full_like(entropy, math.log(self.context_size or keys))
        else:
            ceiling = allowed.clamp(min=1).log()

        over = {"head": (1, 3), "head_per_sample": (3,)}.get(self.granularity, ())
        if over:  # the entropy of a whole head, and what it could be at most
            rows = weight.sum(over, keepdim=True)
            entropy = entropy.sum(over, keepdim=True) / rows.clamp(min=1)
            ceiling = (ceiling * weight).sum(over, keepdim=True) / rows.clamp(min=1)
            weight = (rows > 0).to(entropy.dtype)
        threshold = theta.to(entropy.dtype)[:, None, :, None]
        deviation = (entropy - threshold * ceiling) * weight
        margin = self.gamma * ceiling
        active = (deviation.abs() > margin) & (weight > 0)
        excess = deviation.square()
        if self.gate == "smooth":
            excess = excess - margin.square()
        total = torch.where(active, excess, 0).sum((1, 3))
        if self.granularity != "row_sum":
            total = total / weight.sum((1, 3)).clamp(min=1)
        loss = self.coef * total.mean()
        count = weight.sum().clamp(min=1)
        return loss, {
            "attention_entropy/penalty/value": loss.detach(),
            "attention_entropy/head/mean": (entropy * weight).sum().detach() / count,
            "attention_entropy/deviation/mean": deviation.detach().abs().sum() / count,
            "attention_entropy/active/frac": active.sum() / count,
            "attention_entropy/theta/mean": theta.detach().mean(),
        }


def _check_alike(shapes: Sequence[tuple[int, ...]]) -> None:
    if not shapes:
        raise DataError("EntropyRegularizer: no layer was given")
    if len(set(shapes)) > 1:
        raise DataError(
            f"EntropyRegularizer: layers differ in shape, {shapes[0]} and {sorted(set(shapes))[-1]}"
        )


def _entropy(attn: Float[Tensor, "*rows key"], eps: float) -> Float[Tensor, "*rows"]:
    """-sum_j a_j ln(a_j + eps). The floor lends a finite slope to probabilities that are exactly 0."""
    attn = at_least_float32(attn)
    return -(attn * (attn + eps).clamp(min=torch.finfo(attn.dtype).tiny).log()).sum(-1)
