"""Optimal policies of finite MDPs: hard, with every tie kept; soft, by entropy or by KL to a base policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.policy_cliff.dynamics import (
    Dynamics,
    Policy,
    Transitions,
    finite_products,
    softmax,
)

TIE = 1e-9
"""Tie tolerance in units of max(1, largest |Q|): rounding must not decide what is tied."""
_MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class Solution:
    """The optimum of an MDP.

    `Q` and `V` are exact up to rounding. `tie_sets` marks every action within `tolerance` of the best, and `policy` takes
    the first of them: a deterministic selection. Actions that do not exist have Q = -inf.
    """

    Q: Float[np.ndarray, "state action"]
    V: Float[np.ndarray, " state"]
    policy: Int[np.ndarray, " state"]
    tie_sets: Bool[np.ndarray, "state action"]
    tolerance: float

    @property
    def tie_sizes(self) -> Int[np.ndarray, " state"]:
        """Number m(s) of optimal actions per state."""
        return self.tie_sets.sum(1)

    @property
    def deterministic(self) -> Policy:
        """`policy` as probabilities."""
        return one_hot(self.policy, self.Q.shape[1])

    @property
    def uniform(self) -> Policy:
        """Uniform over the optimal actions of each state: the limit of the soft policy of these Q at temperature 0."""
        return self.tie_sets / self.tie_sizes[:, None]

    @property
    def gaps(self) -> Float[np.ndarray, " state"]:
        """Best minus second-best Q per state: 0 for a tie, inf where there is no second action."""
        if self.Q.shape[1] == 1:
            return np.full(len(self.Q), np.inf)
        top = -np.partition(-self.Q, 1, axis=1)[:, :2]
        return np.where(self.tie_sizes > 1, 0.0, top[:, 0] - top[:, 1])


@dataclass(frozen=True)
class SoftSolution:
    """The regularised optimum: `policy` is softmax(Q / alpha), times the base policy if there is one."""

    Q: Float[np.ndarray, "state action"]
    V: Float[np.ndarray, " state"]
    policy: Policy
    alpha: float


def one_hot(actions: Int[np.ndarray, " state"], count: int) -> Policy:
    """A deterministic policy as probabilities."""
    return np.eye(count)[actions]


def solve_mdp(
    R: Float[np.ndarray, "state action"], P: Transitions, gamma: float, *, tolerance: float | None = None
) -> Solution:
    """Solve Q = R + gamma P max_a Q by policy iteration, and find all ties.

    `R[s, a]` is -inf where an action does not exist; `P` is dense or sparse (see `Transitions`); gamma in [0, 1). An
    action replaces another only if it is better by more than rounding, so tied actions cannot make the iteration
    cycle. `tolerance` (units of reward; default 1e-9 max(1, |Q|)) decides what is tied. Raises as `Dynamics.of`.

    Source: arXiv 2507.20150, section 2 (optimal action correspondence).
    """
    dynamics = Dynamics.of(R, P, gamma)
    states = np.arange(len(R))
    policy = np.argmax(R, 1)
    for _ in range(_MOST_ROUNDS):
        V = dynamics.evaluation(one_hot(policy, R.shape[1])).solve(R[states, policy])
        Q = dynamics.backup(R, V)
        better = np.argmax(Q, 1)
        scale = max(1.0, float(np.abs(V).max()))
        change = Q[states, better] > Q[states, policy] + scale * min(1e-14 / (1 - gamma), 1e-10)
        if not change.any():
            break
        policy = np.where(change, better, policy)
    else:
        raise DataError(
            f"policy iteration found no optimum in {_MOST_ROUNDS} rounds; is gamma {gamma} meant?"
        )
    best = Q.max(1)
    slack = TIE * max(1.0, float(np.abs(Q[dynamics.legal]).max())) if tolerance is None else tolerance
    if not slack >= 0:
        raise ConfigError(
            f"tolerance {slack:g} is negative; it is the largest difference that counts as a tie"
        )
    tied = best[:, None] - slack <= Q
    return Solution(Q=Q, V=best, policy=tied.argmax(1), tie_sets=tied, tolerance=slack)


def soft_solve(
    R: Float[np.ndarray, "state action"],
    P: Transitions,
    gamma: float,
    alpha: float,
    base_policy: Policy | None = None,
) -> SoftSolution:
    """Solve Q = R + gamma P V with V = alpha log sum_a exp(Q / alpha), the entropy-regularised optimum.

    With `base_policy` V = alpha log sum_a pi0(a|s) exp(Q / alpha): KL-regularised with coefficient alpha (the paper's
    beta); a uniform base gives the policy of the entropy case. `alpha` > 0, in units of reward per nat.

    Soft policy iteration, that is Newton's method on the soft Bellman equation: exact policy evaluations, quadratic
    convergence at any gamma and alpha, down to alpha of about 1e-4 max |Q|. Raises `ConfigError` for alpha <= 0 and
    `DataError` for a base policy that is no policy; else as `Dynamics.of`.

    Source: arXiv 2507.20150, section 2 (entropy regularisation) and section 3 (RLHF).
    """
    _check_temperature(alpha)
    log_base = _log_base(R, base_policy)
    dynamics = Dynamics.of(np.where(np.isneginf(log_base), -np.inf, R), P, gamma)
    R = np.where(dynamics.legal, R, -np.inf)
    Q, change = R, np.inf
    for _ in range(_MOST_ROUNDS):
        policy, _, log_ratio = _softmax(Q, alpha, log_base)
        reward = finite_products(policy, R) - alpha * finite_products(policy, log_ratio)
        # V of this policy, bonus included; the next softmax improves on it
        after = dynamics.backup(R, dynamics.evaluation(policy).solve(reward))
        before, change = change, float(np.abs(after[dynamics.legal] - Q[dynamics.legal]).max())
        Q = after
        scale = max(float(np.abs(Q[dynamics.legal]).max()), alpha)
        if change <= 1e-14 * scale or (change >= before and change <= 1e-11 * scale):
            break
    policy, V, _ = _softmax(Q, alpha, log_base)
    return SoftSolution(Q=Q, V=V, policy=policy, alpha=alpha)


def inverse_bellman(
    Q: Float[np.ndarray, "state action"], P: Transitions, gamma: float
) -> Float[np.ndarray, "state action"]:
    """The reward whose optimal action values are `Q`: R(s, a) = Q(s, a) - gamma sum_t P(t|s, a) max_b Q(t, b)."""
    dynamics = Dynamics.of(Q, P, gamma)
    return dynamics.backup(Q, -Q.max(1))


def policy_value(
    R: Float[np.ndarray, "state action"], P: Transitions, gamma: float, policy: Policy
) -> Float[np.ndarray, " state"]:
    """Expected discounted return of a policy from every state, without any regularisation."""
    dynamics = Dynamics.of(R, P, gamma)
    check_policy(policy, dynamics.legal)
    return dynamics.evaluation(policy).solve(finite_products(policy, R))


def check_policy(policy: Policy, legal: Bool[np.ndarray, "state action"]) -> None:
    """Raise `DataError` unless every row is a distribution over legal actions."""
    if policy.shape != legal.shape:
        raise DataError(f"the policy has shape {policy.shape}, the MDP {legal.shape}")
    if not (policy >= 0).all() or np.abs(policy.sum(1) - 1).max() > 1e-8 or policy[~legal].any():
        raise DataError("the policy is no distribution over existing actions in some state")


def _check_temperature(alpha: float) -> None:
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ConfigError(f"temperature {alpha:g} has to be above 0; for temperature 0 use the hard solution")


def _log_base(R: np.ndarray, base_policy: Policy | None) -> np.ndarray:
    if base_policy is None:
        return np.zeros_like(R)
    check_policy(base_policy, np.ones_like(R, dtype=bool))
    with np.errstate(divide="ignore"):
        return np.log(base_policy)


def _softmax(Q: np.ndarray, alpha: float, log_base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pi, V and log(pi / base); base 1 stands for the entropy case."""
    policy, scaled = softmax(Q / alpha + log_base)
    return policy, alpha * scaled, Q / alpha - scaled[:, None]
