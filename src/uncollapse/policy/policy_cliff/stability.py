"""How stable a policy is: the exact radius of a hard one, the exact local Lipschitz constant of a soft one.

Both are derived here; the paper proves existence (a cliff at every tie) and worst-case constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from uncollapse.policy.policy_cliff.dynamics import Dynamics, Transitions
from uncollapse.policy.policy_cliff.mdp import Solution, soft_solve, solve_mdp

EXHAUSTIVE = 14
"""Most actions of a state whose subsets are all tried (8,192 of them); beyond, a local search."""
_BLOCK = 64
_CELLS = 1 << 22
"""Numbers held at once by a blocked computation."""


@dataclass(frozen=True)
class StabilityRadius:
    """Largest sup-norm change of the reward that cannot move the optimal policy; unpacks as (rho, pair, witness).

    `rho` (units of reward) is exact: every change smaller than it leaves the policy optimal, and `witness`, a reward at
    distance rho, makes action `pair[1]` in state `pair[0]` as good as the policy's, so that any step further changes
    the policy. 0 and the tied pair if the optimum is not unique; inf without pair if no state has a second action.

    `reachable` is the same minimum over the states that the policy reaches from `mu` (None without mu). For what the
    policy *does* from there, rho is a lower bound of the radius and `reachable` an upper one: a detour through a state
    that is not reached now may become better sooner.
    """

    rho: float
    pair: tuple[int, int] | None
    witness: Float[np.ndarray, "state action"]
    reachable: float | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.rho, self.pair, self.witness))


def stability_radius(
    R: Float[np.ndarray, "state action"],
    P: Transitions,
    gamma: float,
    mu: Float[np.ndarray, " start"] | None = None,
    *,
    tolerance: float | None = None,
) -> StabilityRadius:
    """Exact stability radius of the optimal policy, with the reward that reaches it.

    For b != pi(s) the advantage of pi is linear in R: V(s) - Q(s, b) = <c, R> with c = occ(s, pi) - (e_(s,b) + gamma
    P(.|s, b) occ(., pi)), so a change of size |c|_1^-1 <c, R> closes that gap and no smaller one does; rho is the least of
    these. Since 2 <= |c|_1 <= 2 / (1 - gamma), pairs are tried in the order of their gaps and the search ends as soon as
    no larger gap can be closed sooner: a few dozen solves at 10^4 states instead of S A.

    `tolerance` as in `solve_mdp`. Raises as `Dynamics.of`, and `DataError` for a start distribution of another length.
    """
    dynamics = Dynamics.of(R, P, gamma)
    solved = solve_mdp(R, P, gamma, tolerance=tolerance)
    rho, pair, witness = _smallest(R, dynamics, solved, np.ones(len(R), dtype=bool))
    if mu is None:
        return StabilityRadius(rho, pair, witness)
    visited = dynamics.reached(solved.deterministic, mu)
    return StabilityRadius(rho, pair, witness, _smallest(R, dynamics, solved, visited)[0])


def _smallest(
    R: np.ndarray, dynamics: Dynamics, solved: Solution, among: Bool[np.ndarray, " state"]
) -> tuple[float, tuple[int, int] | None, np.ndarray]:
    """The least ratio of gap to |c|_1 over pairs of these states, where it is, and the reward that reaches it."""
    actions = dynamics.actions
    rivals = dynamics.legal & among[:, None]
    rivals[np.arange(len(R)), solved.policy] = False
    pairs = np.flatnonzero(rivals)
    gap = np.where(solved.tie_sets, 0.0, solved.V[:, None] - solved.Q).ravel()[pairs]
    order = np.argsort(gap, kind="stable")
    pairs, gap = pairs[order], gap[order]
    best, where, visits = np.inf, -1, np.zeros(len(R))
    evaluation = dynamics.evaluation(solved.deterministic)
    for start in range(0, len(pairs), _BLOCK):
        if (1 - dynamics.gamma) / 2 * gap[start] >= best:
            break
        block = pairs[start : start + _BLOCK]
        state = block // actions
        moved = -dynamics.gamma * dynamics.successors(block)
        moved[np.arange(len(block)), state] += 1.0
        difference = evaluation.occupancy(moved)
        ratio = gap[start : start + _BLOCK] / (1.0 + np.abs(difference).sum(1))
        least = int(ratio.argmin())
        if ratio[least] < best:
            best, where, visits = float(ratio[least]), int(block[least]), difference[least]
    witness = np.array(R, dtype=np.float64)
    if where < 0:
        return np.inf, None, witness
    witness[np.arange(len(R)), solved.policy] -= best * np.sign(visits)
    witness.ravel()[where] += best
    return best, (where // actions, where % actions), witness


@dataclass(frozen=True)
class PolicyLipschitz:
    """Local Lipschitz constants of the soft policy; unpacks as (per_state, bound).

    `per_state`: limit of TV(s) / |dR| over all small changes, the exact constant where `exact`, else a lower bound of it.
    `bound`: the paper's 1 / (2 alpha (1 - gamma)), which holds everywhere. Unit: 1 / reward.
    """

    per_state: Float[np.ndarray, " state"]
    bound: float
    exact: Bool[np.ndarray, " state"]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.per_state, self.bound))


def policy_lipschitz(
    R: Float[np.ndarray, "state action"], P: Transitions, gamma: float, alpha: float
) -> PolicyLipschitz:
    """Exact local Lipschitz constant, per state in TV against the sup norm of R, of the soft policy at R.

    The constant at s is the largest L1 norm of sum_{i in U} J_i over subsets U of the actions, with J = d pi(.|s) / dR =
    diag(pi) (I - 1 pi^T) M / alpha and M the rows (s, .) of (I - gamma P^pi)^-1. Elsewhere than at s, M is visits of a
    state times pi there, so a subset costs S numbers and not S A. States with at most 14 actions are searched
    exhaustively; larger ones from single actions and the likeliest sets, flipping one or two actions at a time: a
    lower bound. Cost: S A transposed solves, and 2^13 S numbers at once at most.
    """
    soft = soft_solve(R, P, gamma, alpha)
    dynamics = Dynamics.of(R, P, gamma)
    states, actions = R.shape
    evaluation = dynamics.evaluation(soft.policy)
    most = int(dynamics.legal.sum(1).max())
    exhaustive = most <= EXHAUSTIVE
    # actions that do not exist go last and are cut off: they would double the subsets
    first = np.argsort(~dynamics.legal, axis=1, kind="stable")[:, :most]
    found = np.empty(states)
    subsets = _subsets(most) if exhaustive else None
    size = max(1, _CELLS // ((len(subsets) if subsets is not None else most * most) * states))
    for start in range(0, states, size):
        here = np.arange(start, min(start + size, states))
        pairs = (here[:, None] * actions + first[here]).ravel()
        ahead = evaluation.occupancy(gamma * dynamics.successors(pairs)).reshape(len(here), most, states)
        pi = np.take_along_axis(soft.policy[here], first[here], 1)
        pull = pi[..., None] * (ahead - np.einsum("sa,sat->st", pi, ahead)[:, None])
        search = _every if subsets is not None else _climb
        found[here] = search(pi, pull, here, subsets)
    exact = np.full(states, exhaustive)
    return PolicyLipschitz(found / alpha, 1 / (2 * alpha * (1 - gamma)), exact)


def _subsets(count: int) -> Float[np.ndarray, "subset action"]:
    """Half of all subsets: a subset and its complement have the same norm, since probabilities add up to 1."""
    numbers = np.arange(2 ** (count - 1))
    return ((numbers[:, None] >> np.arange(count)) & 1).astype(np.float64)


def _norms(chosen: np.ndarray, pi: np.ndarray, pull: np.ndarray, here: np.ndarray) -> np.ndarray:
    """alpha |sum_{i in U} J_i|_1 of subsets U, (state, subset): far states by their visits, the own state by hand."""
    moved = np.einsum("sua,sat->sut", chosen, pull)
    mass = np.einsum("sua,sa->su", chosen, pi)
    own = np.take_along_axis(moved, here[:, None, None], 2)[..., 0]
    inside = mass * np.abs(1 - mass + own) + (1 - mass) * np.abs(own - mass)
    return np.abs(moved).sum(2) - np.abs(own) + inside


def _every(pi: np.ndarray, pull: np.ndarray, here: np.ndarray, subsets: Any) -> np.ndarray:
    return _norms(np.broadcast_to(subsets, (len(here), *subsets.shape)), pi, pull, here).max(1)


def _climb(pi: np.ndarray, pull: np.ndarray, here: np.ndarray, _: Any) -> np.ndarray:
    """Local search over subsets from single actions and from the likeliest ones; a lower bound of the maximum."""
    count = pi.shape[1]
    rank = np.argsort(np.argsort(-pi, axis=1), axis=1)
    likeliest = (rank[:, None] <= np.arange(count)[None, :, None]).astype(np.float64)
    single = np.broadcast_to(np.eye(count), likeliest.shape)
    starts = np.concatenate([single, likeliest], 1)
    norms = _norms(starts, pi, pull, here)
    best = norms.max(1)
    chosen = np.take_along_axis(starts, norms.argmax(1)[:, None, None], 1)[:, 0]
    one = np.eye(count, dtype=bool)
    two = np.array([one[i] ^ one[j] for i in range(count) for j in range(i)])
    flips = np.concatenate([one, two])
    while True:
        near = np.abs(chosen[:, None] - flips)
        norms = _norms(near, pi, pull, here)
        better = norms.max(1) > best * (1 + 1e-12)
        if not better.any():
            return best
        best = np.maximum(best, norms.max(1))
        step = np.take_along_axis(near, norms.argmax(1)[:, None, None], 1)[:, 0]
        chosen = np.where(better[:, None], step, chosen)
