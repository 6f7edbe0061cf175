"""Reward shaping: what the verifier's verdict is turned into."""

from __future__ import annotations

from dataclasses import dataclass

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Columns
from uncollapse.policy.protocols import Needs, Scope


@dataclass(frozen=True)
class SoftOverlong:
    """A penalty that grows linearly over the last `cache` tokens before `limit` (DAPO, arXiv 2503.14476, eq. 13).

    0 up to `limit - cache` tokens, then down to `-penalty` at `limit` and beyond. `limit` defaults to the engine's
    limit on completion tokens, `cache` (a fraction of the limit) to the paper's 4096 of 20480.
    """

    limit: int | None = None
    cache: float = 0.2
    penalty: float = 1.0
    needs: Needs = frozenset({"reward", "length", "token_limit"})
    gives: frozenset[str] = frozenset({"reward"})
    scope: Scope = "rollout"

    def __post_init__(self) -> None:
        if not 0 < self.cache <= 1:
            raise ConfigError(f"soft-overlong: cache is a fraction of the limit in (0, 1]; got {self.cache}")

    def __call__(self, batch: Batch) -> Columns:
        """`reward`, lowered for long completions."""
        limit = float(batch.columns["token_limit"]) if self.limit is None else float(self.limit)
        margin = self.cache * limit
        over = (batch.columns["length"].to(batch.reward.dtype) - (limit - margin)) / margin
        return {"reward": batch.reward - self.penalty * over.clamp(0, 1)}
