"""Cliff or slope: how far policies move along a direction of reward change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.policy_cliff.bounds import soft_policy_bound
from uncollapse.policy.policy_cliff.dynamics import Dynamics, Policy, Transitions
from uncollapse.policy.policy_cliff.mdp import policy_value, soft_solve, solve_mdp

ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""The grid of temperatures."""


def policy_distance(
    pi1: Policy,
    pi2: Float[np.ndarray, "state2 action2"],
    kind: Literal["tv", "occupancy"] = "tv",
    *,
    P: Transitions = None,
    gamma: float = 0.9,
    mu: Float[np.ndarray, " start"] | None = None,
) -> float:
    """Total variation between two policies, in [0, 1].

    `tv`: the largest over states; it says nothing about whether the state is ever reached. `occupancy`: between the
    normalised discounted visits of (s, a) from `mu` (uniform by default), which needs `P`; what an observer of
    episodes sees. Raises `ConfigError` for another kind or without `P`, `DataError` for policies of different shapes.
    """
    if pi1.shape != pi2.shape:
        raise DataError(f"policies of shapes {pi1.shape} and {pi2.shape} cannot be compared")
    if kind == "tv":
        return float(state_tv(pi1, pi2).max())
    if kind != "occupancy" or P is None:
        raise ConfigError(f"policy_distance: kind {kind!r} is not tv, and occupancy needs P and gamma")
    visits = [_occupancy(pi, P, gamma, mu) for pi in (pi1, pi2)]
    return float(0.5 * np.abs(visits[0] - visits[1]).sum())


def state_tv(pi1: Policy, pi2: Policy) -> Float[np.ndarray, " state"]:
    """Total variation per state: half the L1 distance."""
    return 0.5 * np.abs(pi1 - pi2).sum(1)


def _occupancy(policy: Policy, P: Transitions, gamma: float, mu: np.ndarray | None) -> Policy:
    dynamics = Dynamics.of(np.zeros_like(policy), P, gamma)
    start = np.full(len(policy), 1 / len(policy)) if mu is None else mu
    visits = (1 - gamma) * dynamics.evaluation(policy).occupancy(start[None])[0]
    return visits[:, None] * policy


@dataclass(frozen=True)
class CliffPoint:
    """One policy at R + eps direction, against the policy of the same kind at R.

    `alpha` 0 is the hard policy, uniform over ties. `tv` is the largest over states and `bound` the paper's (1 for the
    hard policy); `value` the return under R itself, without bonus, and `entropy` the policy's (nats), both from mu,
    the entropy averaged over discounted visits.
    """

    alpha: float
    eps: float
    tv: float
    bound: float
    value: float
    entropy: float


def cliff_profile(
    R: Float[np.ndarray, "state action"],
    P: Transitions,
    gamma: float,
    direction: Float[np.ndarray, "state action"],
    eps_grid: Sequence[float],
    alphas: Sequence[float] = ALPHAS,
    mu: Float[np.ndarray, " start"] | None = None,
) -> list[CliffPoint]:
    """How the hard and the soft policies move as the reward moves by eps along `direction`.

    A cliff shows as TV that does not shrink with eps, a slope as TV in proportion to it. Rows are ordered by alpha,
    0 first, then eps.
    """
    start = np.full(len(R), 1 / len(R)) if mu is None else mu
    size = float(np.abs(direction[np.isfinite(R)]).max())

    def policy_at(eps: float, alpha: float) -> Policy:
        moved = np.where(np.isfinite(R), R + eps * direction, -np.inf)
        return soft_solve(moved, P, gamma, alpha).policy if alpha else solve_mdp(moved, P, gamma).uniform

    found = []
    for alpha in (0.0, *sorted(set(alphas) - {0.0})):
        origin = policy_at(0.0, alpha)
        for eps in eps_grid:
            policy = policy_at(eps, alpha)
            visits = _occupancy(policy, P, gamma, start).sum(1)
            bound = soft_policy_bound(abs(eps) * size, alpha, gamma) if alpha else 1.0
            found.append(
                CliffPoint(
                    alpha=alpha,
                    eps=float(eps),
                    tv=policy_distance(origin, policy),
                    bound=bound,
                    value=float(start @ policy_value(R, P, gamma, policy)),
                    entropy=float(visits @ policy_entropy(policy)),
                )
            )
    return found


def policy_entropy(policy: Policy) -> Float[np.ndarray, " state"]:
    """Entropy of the policy per state, nats."""
    return -(policy * np.log(np.where(policy > 0, policy, 1.0))).sum(1)
