"""The min-p filter: which tokens of a distribution are noise, and what is left of it without them.

A token is kept if its probability exceeds kappa times the largest one (min-p), or a fixed tau. The most probable
token is always kept, so that something is left. The proxy q is the rest, renormalised: q = p / Z on the kept tokens, Z their
mass. If q is built from p itself, KL(q || p) = -log Z.

Source: Nguyen et al., "Turning up the heat: min-p sampling", arXiv 2407.01082; as a proxy: Lp-Reg, arXiv 2510.03222.
Differs from them: where the strict rule would keep nothing (kappa = 1, or tau above every probability) the most
probable token stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure.precision import at_least_float32
from uncollapse.measure.statistics import Rows, _SetStatistic


def check_threshold(owner: str, kappa: float | None, tau: float | None) -> None:
    """Raise `ConfigError` unless exactly one threshold is given and lies in [0, 1]."""
    given = [value for value in (kappa, tau) if value is not None]
    if len(given) != 1 or not 0 <= given[0] <= 1:
        raise ConfigError(
            f"{owner}: give either kappa (share of the largest probability) or tau (a probability), from 0 to 1, "
            f"and None for the other; got kappa={kappa}, tau={tau}"
        )


def passes_min_p(
    logp: Float[Tensor, "*shape"],
    max_logp: Float[Tensor, "*#shape"],
    *,
    kappa: float | None = 0.02,
    tau: float | None = None,
    keep_equal: bool = False,
) -> Bool[Tensor, "*shape"]:
    """Whether log-probabilities pass the filter, given the largest one of their distribution (nats).

    p > kappa max p, or p > tau; `keep_equal` keeps equality as well. The largest passes always, an impossible token
    never. Raises `ConfigError` unless exactly one of `kappa` and `tau` is given, in [0, 1].
    """
    check_threshold("min-p", kappa, tau)
    share = tau if kappa is None else kappa
    assert share is not None
    log_share = math.log(share) if share else -math.inf
    # Differences of log-probabilities: adding a constant to all logits changes nothing, not even a tie.
    above = logp - (max_logp if tau is None else 0.0)
    kept = (above >= log_share) if keep_equal else (above > log_share)
    return (kept | (logp >= max_logp)) & (logp > -math.inf)


def min_p_proxy(
    logits: Float[Tensor, "*position vocab"],
    *,
    kappa: float | None = 0.02,
    tau: float | None = None,
    keep_equal: bool = False,
) -> tuple[Float[Tensor, "*position vocab"], Bool[Tensor, "*position vocab"], Float[Tensor, "*position"]]:
    """The proxy q of softmax(logits): log q (-inf where filtered), the kept tokens, and log Z, the log of their mass.

    Logits are those of the policy's temperature: divide them by it first. Differentiable in `logits`; memberships are
    constants. Results have the dtype of the logits, but at least float32. Raises `ConfigError` as `passes_min_p`.
    """
    check_threshold("min-p", kappa, tau)
    logits = at_least_float32(logits)
    logp = logits.log_softmax(-1) if kappa is None else logits
    keep = passes_min_p(logp, logp.amax(-1, keepdim=True), kappa=kappa, tau=tau, keep_equal=keep_equal)
    kept = torch.where(keep, logits, -math.inf)
    log_q = kept.log_softmax(-1)
    # rounding may leave the mass of all tokens a little above 1
    log_mass = (kept.logsumexp(-1) - logits.logsumexp(-1)).clamp(max=0)
    return log_q, keep, log_mass


@dataclass(frozen=True)
class LogMassAbove(_SetStatistic):
    """Log of the mass of tokens with p_v > tau (nats, <= 0); the most probable token always counts.

    `LogKeptMass` with a fixed threshold. `keep_equal` keeps p_v = tau as well.
    """

    tau: float = 0.02
    keep_equal: bool = False

    def __post_init__(self) -> None:
        check_threshold("LogMassAbove", None, self.tau)

    def members(self, rows: Rows) -> Bool[Tensor, "row vocab"]:
        """Which tokens are kept."""
        largest = rows.logp.amax(-1, keepdim=True)
        return passes_min_p(rows.logp, largest, kappa=None, tau=self.tau, keep_equal=self.keep_equal)

    def value(self, rows: Rows) -> Float[Tensor, " row"]:
        """log of the kept mass."""
        return self.mass(rows).log()

    def gradient(self, rows: Rows) -> Float[Tensor, "row vocab"]:
        """q_v - p_v with q the distribution renormalised on the kept tokens."""
        return self._mass_gradient(rows).div_(self.mass(rows).unsqueeze(-1))
