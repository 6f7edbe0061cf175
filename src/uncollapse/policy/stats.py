"""Statistics per position that stages may ask for, at the policy temperature. In nats, masses in [0, 1].

Each names the instrument of `uncollapse.measure` that measures it; an engine measures all that are asked for in one
pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.measure import statistics
from uncollapse.measure.token_stats import token_stats_from_logits
from uncollapse.policy.batch import Stat


@dataclass(frozen=True)
class Measured(Stat):
    """A statistic of one policy's next-token distribution."""

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        raise NotImplementedError

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The statistic at `n` positions."""
        return token_stats_from_logits(logits, token, stats=(self.statistic,))[self.statistic]


@dataclass(frozen=True)
class Logp(Measured):
    """log pi of the sampled token."""

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.Logp()


@dataclass(frozen=True)
class Entropy(Measured):
    """Shannon entropy of the next-token distribution."""

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.Entropy()


@dataclass(frozen=True)
class KL(Stat):
    """KL(pi || other) over the whole vocabulary; `against` names the other policy."""

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The divergence; needs `other`."""
        if other is None:
            raise ValueError("an exact divergence needs the other policy's logits")
        logp, logq = torch.log_softmax(logits, dim=-1), torch.log_softmax(other, dim=-1)
        return (logp.exp() * (logp - logq)).sum(dim=-1)
