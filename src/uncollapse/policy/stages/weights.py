"""Weights on the tokens of the surrogate, decided without gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Columns
from uncollapse.policy.protocols import Needs, Scope
from uncollapse.policy.stats import Entropy


@dataclass(frozen=True)
class TopEntropyTokens:
    """Train only on the `fraction` of tokens with the highest entropy (the 80/20 rule, arXiv 2506.01939).

    The threshold is taken over all trainable tokens of the rollout batch, at the old policy. The dropped tokens
    still count in the mean.
    """

    fraction: float = 0.2
    needs: Needs = frozenset({Entropy("old")})
    gives: frozenset[str] = frozenset({"weight"})
    scope: Scope = "rollout"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"top-entropy-tokens: fraction must be in (0, 1]; got {self.fraction}")

    def __call__(self, batch: Batch) -> Columns:
        """`weight`: 1 on the selected tokens, 0 elsewhere."""
        entropy = batch.stats[Entropy("old")]
        values = entropy[batch.mask]
        if not len(values):
            return {"weight": torch.zeros_like(entropy)}
        kept = max(1, round(self.fraction * len(values)))
        threshold = values.topk(kept).values[-1]
        return {"weight": ((entropy >= threshold) & batch.mask).to(entropy.dtype)}
