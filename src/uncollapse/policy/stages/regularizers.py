"""Terms added to the surrogate: entropy bonuses, fixed or steered, and penalties on leaving a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Columns, Stat, TokenMap
from uncollapse.policy.protocols import Needs, Scope
from uncollapse.policy.stats import KL, Entropy, Logp


@dataclass(frozen=True)
class EntropyBonus:
    """`-H_t`: minimising it with coefficient c rewards entropy with c per nat."""

    needs: Needs = frozenset({Entropy("now")})
    scope: None = None

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss (nats)."""
        return -batch.stats[Entropy("now")]


@dataclass
class AdaptiveEntropy:
    """An entropy bonus whose coefficient is steered towards a target (Skywork-OR1, arXiv 2505.22312).

    The coefficient rises by `step` per rollout batch while the entropy (old policy, nats per token) is below
    `target` and falls by `step` above it, within `[0, limit]`; it acts only while the entropy is at or below the
    target. Defaults: the paper's target 0.2, step 0.005 and start 0.

    The paper moves the coefficient at every optimiser step; here it moves once per rollout batch, so that the loss
    of a step can be evaluated twice. `limit` is ours: an unreachable target would otherwise let it grow for ever.
    """

    target: float = 0.2
    step: float = 0.005
    start: float = 0.0
    limit: float = 1.0
    scope: Scope = "rollout"
    coefficient: float | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.target < 0 or self.step <= 0 or not 0 <= self.start <= self.limit:
            raise ConfigError(
                f"adaptive-entropy: needs target >= 0, step > 0 and 0 <= start <= limit; got {self}"
            )

    @property
    def needs(self) -> Needs:
        """The entropy now, with gradient, and before the step."""
        return frozenset({Entropy("now"), Entropy("old")})

    def _current(self) -> float:
        return self.start if self.coefficient is None else self.coefficient

    def _entropy(self, batch: Batch) -> torch.Tensor:
        return torch.where(batch.mask, batch.stats[Entropy("old")], 0.0).sum() / batch.mask.sum().clamp(min=1)

    def decide(self, batch: Batch) -> Columns:
        """The coefficient of this step: 0 above the target."""
        entropy = self._entropy(batch)
        return {"coefficient": torch.where(entropy <= self.target, self._current(), 0.0).to(entropy.dtype)}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss (nats times coefficient)."""
        return -own["coefficient"] * batch.stats[Entropy("now")]

    def observe(self, batch: Batch) -> None:
        """Move the coefficient by one step."""
        if bool(batch.mask.any()):
            change = self.step if float(self._entropy(batch)) < self.target else -self.step
            self.coefficient = min(max(self._current() + change, 0.0), self.limit)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the coefficient."""
        self.coefficient = state["coefficient"]


@dataclass(frozen=True)
class KLPenalty:
    """An estimate of KL(pi || other), per token of the sample (nats).

    With `d = log other - log pi` of the sampled token: `k1 = -d`, `k2 = d**2 / 2`, `k3 = exp(d) - 1 - d` (Schulman,
    "Approximating KL divergence", 2020); `exact` sums over the vocabulary and needs both policies' logits. As a
    loss, k1 has a gradient of mean 0 and so does nothing on average.
    """

    against: Literal["ref", "old"] = "ref"
    estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    scope: None = None

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k2", "k3", "exact"):
            raise ConfigError(f"kl-penalty: estimator must be k1, k2, k3 or exact; got {self.estimator!r}")

    @property
    def needs(self) -> Needs:
        """Both log-probabilities of the sampled token, or the exact divergence."""
        stats: set[str | Stat] = (
            {KL("now", self.against)} if self.estimator == "exact" else {Logp("now"), Logp(self.against)}
        )
        return frozenset(stats)

    def decide(self, batch: Batch) -> Columns:
        """Nothing."""
        return {}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss (nats)."""
        if self.estimator == "exact":
            return batch.stats[KL("now", self.against)]
        difference = batch.stats[Logp(self.against)] - batch.stats[Logp("now")]
        if self.estimator == "k1":
            return -difference
        if self.estimator == "k2":
            return 0.5 * difference**2
        return difference.exp() - 1 - difference
