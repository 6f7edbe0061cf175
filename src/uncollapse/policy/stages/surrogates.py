"""Policy-gradient surrogates: what a token's probability ratio and advantage cost, unreduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Columns, TokenMap, TokenMask
from uncollapse.policy.protocols import Needs
from uncollapse.policy.stats import Logp

FARTHEST = 20.0
"""Largest |log ratio| that enters a ratio."""

_READS: Needs = frozenset({"old_logp", "advantage", Logp("now")})


def log_ratio(batch: Batch) -> TokenMap:
    """log pi - log pi_old of the sampled token."""
    return batch.stats[Logp("now")] - batch.old_logp


def bounded_ratio(difference: Tensor) -> Tensor:
    """exp of a log ratio, bounded at +-20 as in verl: an infinite ratio that a clip silences would still have the gradient
    0 x inf."""
    return difference.clamp(-FARTHEST, FARTHEST).exp()


def ratio_of(batch: Batch) -> TokenMap:
    """pi / pi_old of the sampled token, bounded."""
    return bounded_ratio(log_ratio(batch))


def clip_losses(ratio: Tensor, advantage: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """`-A r` and `-A clip(r, low, high)`; bounds of the ratio, both numbers or both tensors."""
    return -advantage * ratio, -advantage * ratio.clamp(low, high)


def clipped_loss(ratio: Tensor, advantage: Tensor, low: Any, high: Any, dual: float | None) -> Tensor:
    """The larger of both losses, for A < 0 at most `-dual A`."""
    loss = torch.maximum(*clip_losses(ratio, advantage, low, high))
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


def silenced_by_clip(ratio: Tensor, advantage: Tensor, low: Any, high: Any, dual: float | None) -> Tensor:
    """Tokens whose gradient the clip, single or dual, takes away."""
    free, bounded = clip_losses(ratio, advantage, low, high)
    if dual is None:
        return bounded > free
    beyond = torch.maximum(free, bounded) > -dual * advantage
    return (bounded > free) | ((advantage < 0) & beyond)


@dataclass(frozen=True)
class Unclipped:
    """`-A r`: the plain importance-weighted policy gradient."""

    needs: Needs = _READS
    scope: None = None

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        return -batch.advantage * ratio_of(batch)

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """No token ever is."""
        return torch.zeros_like(batch.mask)


@dataclass(frozen=True)
class PPOClip:
    """`max(-A r, -A clip(r, 1-low, 1+high))`, for A < 0 at most `-dual A` with a dual clip.

    Defaults: 0.2 on both sides (arXiv 1707.06347). `high > low` is DAPO's clip-higher (arXiv 2503.14476); `dual`,
    above 1, is the dual clip of arXiv 1912.09729 (verl uses 3).
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    needs: Needs = _READS
    scope: None = None

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0 or (self.dual is not None and self.dual <= 1):
            raise ConfigError(f"ppo-clip: low and high must be at least 0 and dual above 1; got {self}")

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        return clipped_loss(ratio_of(batch), batch.advantage, 1 - self.low, 1 + self.high, self.dual)

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """Tokens that the clip, single or dual, has silenced."""
        return silenced_by_clip(ratio_of(batch), batch.advantage, 1 - self.low, 1 + self.high, self.dual)


@dataclass(frozen=True)
class SequenceClip:
    """PPO's clip on the sequence-level ratio `s = exp(mean_t log r_t)` (GSPO, arXiv 2507.18071).

    Every token of a row carries the row's loss. Defaults: the paper's 3e-4 and 4e-4.
    """

    low: float = 3e-4
    high: float = 4e-4
    needs: Needs = _READS
    scope: None = None

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def _both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        difference = torch.where(batch.mask, log_ratio(batch), 0.0)
        length = batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
        ratio = (difference.sum(dim=1, keepdim=True) / length).exp()
        return clip_losses(ratio, batch.advantage, 1 - self.low, 1 + self.high)

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        return torch.maximum(*self._both(batch))

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """Tokens of rows that the clip has silenced."""
        free, bounded = self._both(batch)
        return bounded > free


@dataclass(frozen=True)
class ClippedWeight:
    """CISPO: `-A sg(clip(r, 1-low, 1+high)) log pi`; every token keeps a gradient (arXiv 2506.13585).

    `low=None` leaves the ratio without a lower bound, as the paper does. The paper gives no value for `high`; 5
    keeps the weight below 6.
    """

    low: float | None = None
    high: float = 5.0
    needs: Needs = _READS
    scope: None = None

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        ratio = ratio_of(batch).detach()
        weight = ratio.clamp(min=None if self.low is None else 1 - self.low, max=1 + self.high)
        return -batch.advantage * weight * batch.stats[Logp("now")]

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """None is silenced; a token whose weight is bounded still has a gradient."""
        return torch.zeros_like(batch.mask)
