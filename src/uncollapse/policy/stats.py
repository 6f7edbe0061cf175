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
class NucleusEntropy(Measured):
    """Entropy renormalised on the nucleus (top-p set); both readings of it as in `measure.statistics`."""

    p: float = 0.8
    nucleus: str = "standard"
    top_k: int | None = None

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.NucleusEntropy(self.p, self.nucleus, self.top_k)


@dataclass(frozen=True)
class Collision(Measured):
    """sum_v p_v^2 (log p_v + H): the part of the exact first-order entropy change that no sampled token decides."""

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.Collision()


@dataclass(frozen=True)
class MaxLogp(Measured):
    """log-probability of the most probable token."""

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.MaxLogp()


@dataclass(frozen=True)
class LogKeptMass(Measured):
    """log of the mass of the tokens that pass a min-p filter, p_v > kappa max p."""

    kappa: float = 0.02
    keep_equal: bool = False

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.LogKeptMass(self.kappa, self.keep_equal)


@dataclass(frozen=True)
class TemperedLogp(Measured):
    """log-probability of the sampled token at another temperature, relative to the policy's."""

    temperature: float = 1.0

    @property
    def statistic(self) -> statistics.Statistic:
        """The instrument."""
        return statistics.TemperedLogp(self.temperature)


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
