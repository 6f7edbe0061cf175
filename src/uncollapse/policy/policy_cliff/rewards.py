"""Rewards and what they decide: tie-breakers, rewards with a part missing, mixtures of several rewards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.policy_cliff.dynamics import Dynamics, Transitions
from uncollapse.policy.policy_cliff.mdp import inverse_bellman, policy_value, solve_mdp


def tie_break_reward(
    R: Float[np.ndarray, "state action"],
    P: Transitions,
    gamma: float,
    state: int,
    action: int,
    eps: float,
    *,
    tolerance: float | None = None,
) -> Float[np.ndarray, "state action"]:
    """A reward within (1 + gamma) eps of `R` under which `action`, tied at `state`, is the only best one there.

    The paper's construction: raise Q* by eps at (state, action), and take the reward of which that is the optimum. So
    a deterministic policy jumps by 1 in TV, one uniform over m tied actions by (m - 1) / m, however small eps is.

    Raises `ConfigError` for eps <= 0, or if `action` is not tied at `state` (then a small change may do nothing).
    Source: arXiv 2507.20150, section 2 (discontinuity), proof.
    """
    if not eps > 0:
        raise ConfigError(f"eps {eps:g} has to be above 0; it is by how much the tie is broken")
    solved = solve_mdp(R, P, gamma, tolerance=tolerance)
    if not solved.tie_sets[state, action] or solved.tie_sizes[state] < 2:
        tied = ", ".join(map(str, np.flatnonzero(solved.tie_sets[state])))
        raise ConfigError(
            f"action {action} is not tied at state {state}, where the best is {tied}; choose a tie"
        )
    Q = solved.Q.copy()
    Q[state, action] = solved.V[state] + eps
    return inverse_bellman(Q, P, gamma)


@dataclass(frozen=True)
class IncompleteReward:
    """What a reward that leaves something out costs the policy trained on it.

    `advantage[s, a]`: of the missing part alone, under the trained policy. `improves`: actions that the training reward
    finds as good as its policy's, that the missing part prefers, in states that are reached. If there is one, the
    trained policy is strictly worse under the true reward than it need be. `regret`: true optimum minus the trained
    policy's true return, per state.
    """

    advantage: Float[np.ndarray, "state action"]
    improves: Bool[np.ndarray, "state action"]
    regret: Float[np.ndarray, " state"]


def incomplete_reward(
    R_train: Float[np.ndarray, "state action"],
    R_missing: Float[np.ndarray, "state action"],
    P: Transitions,
    gamma: float,
    mu: Float[np.ndarray, " start"] | None = None,
) -> IncompleteReward:
    """Compare training on `R_train` with the true reward R_train + R_missing; `mu` says where episodes start (anywhere).

    The trained policy is the deterministic one of `solve_mdp`. Source: arXiv 2507.20150, section 3 (incomplete reward).
    """
    solved = solve_mdp(R_train, P, gamma)
    dynamics = Dynamics.of(R_train, P, gamma)
    policy = solved.deterministic
    missing = np.where(dynamics.legal, R_missing, -np.inf)
    V = policy_value(missing, P, gamma, policy)
    advantage = dynamics.backup(missing, V) - V[:, None]
    start = np.full(len(R_train), 1 / len(R_train)) if mu is None else mu
    reached = dynamics.reached(policy, start)
    improves = solved.tie_sets & (advantage > solved.tolerance) & reached[:, None]
    true = R_train + missing
    regret = solve_mdp(true, P, gamma).V - policy_value(true, P, gamma, policy)
    return IncompleteReward(advantage, improves, np.maximum(regret, 0.0))


def effective_reward(
    rewards: Float[np.ndarray, "reward state action"], weights: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "state action"]:
    """R_eff(s, a) = sum_k w_k(s) R_k(s, a): what a policy trained with several rewards at once really optimises.

    `weights` are (K,) or (S, K), non-negative, adding up to 1 per state, and independent of the rewards. The map from
    (R_k) to R_eff is 1-Lipschitz from max_k |R_k| to |R_eff|. R_eff is the true multi-task objective only if
    all tasks share their start distribution and the weights are their constant shares. An action is missing (-inf) where
    a reward with weight above 0 says so; one with weight 0 has no say, so that a one-hot weight gives that reward.

    Raises `DataError` for weights that are no mixture. Source: arXiv 2507.20150, section 4.
    """
    mixture = _mixture(rewards, weights)
    missing = np.isneginf(rewards)
    mixed = np.einsum("sk,ksa->sa", mixture, np.where(missing, 0.0, rewards))
    return np.where(_missing(missing, mixture), -np.inf, mixed)


def weight_bound(
    rewards: Float[np.ndarray, "reward state action"],
    weights1: Float[np.ndarray, "..."],
    weights2: Float[np.ndarray, "..."],
) -> float:
    """Bound on the sup norm of the change of R_eff when the weights change: max_s TV(w1(s), w2(s)) max_a range_k R_k(s, a).

    Weights add up to 1, so what all rewards share at (s, a) cancels; the bound is reached where the weight moves from
    the smallest reward to the largest. Derived here (the product of norms, sum_k |dw_k| max_k |R_k|, is looser by far
    if rewards share an offset). Infinite where an action is missing (-inf) under one of the weights alone.
    """
    one, two = _mixture(rewards, weights1), _mixture(rewards, weights2)
    absent = np.isneginf(rewards)
    gone = _missing(absent, one)
    if (gone != _missing(absent, two)).any():
        return float("inf")
    largest, smallest = np.where(absent, -np.inf, rewards).max(0), np.where(absent, np.inf, rewards).min(0)
    spread = np.subtract(largest, smallest, where=~gone, out=np.zeros_like(largest))
    distance = 0.5 * np.abs(one - two).sum(1)
    return float((distance * spread.max(1)).max())


def _missing(absent: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """Actions, (state, action), that a reward with weight above 0 marks as missing."""
    return np.asarray((absent & (mixture.T[:, :, None] > 0)).any(0))


def _mixture(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    count, states, _ = rewards.shape
    if weights.shape not in ((count,), (states, count)):
        raise DataError(
            f"weights have shape {weights.shape}; give ({count},) or ({states}, {count}), one for each reward"
        )
    if not ((weights >= 0).all() and np.abs(weights.sum(-1) - 1).max() <= 1e-8):
        raise DataError(
            "weights of an effective reward are >= 0 and add up to 1 in each state; divide by their sum"
        )
    return np.broadcast_to(weights, (states, count))
