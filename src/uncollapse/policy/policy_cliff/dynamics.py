"""The linear algebra below the solvers: transitions, dense or sparse, and policy evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from uncollapse.errors import ConfigError, DataError

Transitions: TypeAlias = Any
"""Probabilities P[s, a, t]: an array of shape (S, A, S), or a SciPy sparse matrix of shape (S A, S), row s A + a."""

Policy: TypeAlias = Float[np.ndarray, "state action"]

_ROW_SUM = 1e-8
"""Slack of a row of probabilities."""
_RESIDUAL = 1e-13
"""Relative residual above which an iterative solution is thrown away for a factorisation."""
_RESTARTS = 20


@dataclass(frozen=True)
class Dynamics:
    """A checked MDP without its rewards. Make it with `Dynamics.of`.

    `rows` is P as (S A, S); `legal` says which actions exist (the others have reward -inf).
    """

    rows: Any
    gamma: float
    legal: Bool[np.ndarray, "state action"]

    @classmethod
    def of(cls, R: Float[np.ndarray, "state action"], P: Transitions, gamma: float) -> Dynamics:
        """Check shapes, probabilities, rewards and discount.

        Raises `ConfigError` for gamma outside [0, 1), `DataError` for anything else that is no finite MDP.
        """
        if not 0 <= gamma < 1:
            raise ConfigError(
                f"gamma {gamma:g} is outside [0, 1); without discount use TokenTree, whose horizon is finite"
            )
        states, actions = R.shape
        sparse = hasattr(P, "tocsr")
        wanted = (states * actions, states) if sparse else (states, actions, states)
        if P.shape != wanted:
            raise DataError(f"P has shape {tuple(P.shape)}, R says {wanted}; give P[s, a, t] and R[s, a]")
        if np.isnan(R).any() or np.isposinf(R).any():
            raise DataError(
                "R holds NaN or +inf; rewards are finite, and -inf where an action does not exist"
            )
        legal = np.isfinite(R)
        if not legal.any(1).all():
            raise DataError(f"state {int(np.argmin(legal.any(1)))} has no action with a finite reward")
        rows = _rows(P, legal) if sparse else np.where(legal[..., None], P, 0.0).reshape(-1, states)
        totals = np.asarray(rows.sum(1)).reshape(states, actions)
        if not (rows.min() >= 0 and (np.abs(totals - 1) <= _ROW_SUM)[legal].all()):
            raise DataError(
                "P[s, a] is no distribution for some legal action; its entries are >= 0 and add up to 1"
            )
        return cls(rows, float(gamma), legal)

    @property
    def states(self) -> int:
        """Number of states."""
        return self.legal.shape[0]

    @property
    def actions(self) -> int:
        """Number of actions."""
        return self.legal.shape[1]

    def backup(
        self, R: Float[np.ndarray, "state action"], V: Float[np.ndarray, " state"]
    ) -> Float[np.ndarray, "state action"]:
        """R + gamma P V; -inf where the action does not exist."""
        return R + self.gamma * np.asarray(self.rows @ V).reshape(R.shape)

    def under(self, policy: Policy) -> Any:
        """Transitions P_pi[s, t] of a policy, as dense or sparse as P."""
        if isinstance(self.rows, np.ndarray):
            return np.einsum("sa,sat->st", policy, self.rows.reshape(*policy.shape, -1))
        from scipy.sparse import csr_matrix

        starts = np.arange(0, policy.size + 1, self.actions)
        return csr_matrix((policy.ravel(), np.arange(policy.size), starts)) @ self.rows

    def reached(self, policy: Policy, mu: Float[np.ndarray, " start"]) -> Bool[np.ndarray, " state"]:
        """States that the policy can come to from the start distribution `mu`, however late or unlikely."""
        if mu.shape != (self.states,):
            raise DataError(
                f"mu has shape {mu.shape}; give one start probability for each of {self.states} states"
            )
        moves, seen = self.under(policy), np.asarray(mu > 0)
        while True:
            wider = seen | (moves.T @ seen.astype(np.float64) > 0)
            if (wider == seen).all():
                return seen
            seen = wider

    def evaluation(self, policy: Policy) -> Evaluation:
        """The solver of (I - gamma P_pi) x = b."""
        return Evaluation(self.under(policy), self.gamma)

    def successors(self, pairs: np.ndarray) -> Float[np.ndarray, "pair state"]:
        """P[s, a, .] of pairs given by their number s A + a."""
        chosen = self.rows[pairs]
        return chosen if isinstance(chosen, np.ndarray) else chosen.toarray()


@dataclass(frozen=True)
class Evaluation:
    """Solves with I - gamma P_pi and its transpose; factorised at most once, and only if that is needed.

    Sparse systems are solved by BiCGSTAB, which takes a few dozen products even at gamma 0.999; a factorisation, whose
    fill-in is hopeless on random graphs of 10^4 states, is the fallback when the residual is not at rounding.
    """

    transitions: Any
    gamma: float

    @cached_property
    def _system(self) -> Any:
        if isinstance(self.transitions, np.ndarray):
            return np.eye(len(self.transitions)) - self.gamma * self.transitions
        from scipy.sparse import identity

        return (identity(self.transitions.shape[0], format="csr") - self.gamma * self.transitions).tocsr()

    @cached_property
    def _factors(self) -> Any:
        if isinstance(self._system, np.ndarray):
            from scipy.linalg import lu_factor

            return lu_factor(self._system, check_finite=False)
        from scipy.sparse.linalg import splu

        return splu(self._system.tocsc())

    def solve(self, b: Float[np.ndarray, " state"]) -> Float[np.ndarray, " state"]:
        """x with (I - gamma P_pi) x = b: the value of the policy if b is its reward."""
        return self._solve(b, transposed=False)

    def occupancy(self, weights: Float[np.ndarray, "row state"]) -> Float[np.ndarray, "row state"]:
        """weights (I - gamma P_pi)^-1: expected discounted visits of each state, started from each row."""
        if isinstance(self._system, np.ndarray):
            return np.ascontiguousarray(self._direct(weights.T, transposed=True).T)
        return np.stack([self._solve(row, transposed=True) for row in weights])

    def _solve(self, b: np.ndarray, *, transposed: bool) -> np.ndarray:
        if isinstance(self._system, np.ndarray):
            return self._direct(b, transposed=transposed)
        from scipy.sparse.linalg import bicgstab

        system = self._system.T if transposed else self._system
        x = np.zeros_like(b)
        for _ in range(_RESTARTS):
            # One step of x = b + gamma P x each time: BiCGSTAB breaks down where the residual is all but empty.
            x, _ = bicgstab(system, b, x0=x + (b - system @ x), rtol=1e-15, atol=0.0, maxiter=400)
            if np.abs(system @ x - b).max() <= _RESIDUAL * max(np.abs(x).max(), np.abs(b).max()):
                return x
        return self._direct(b, transposed=transposed)

    def _direct(self, b: np.ndarray, *, transposed: bool) -> np.ndarray:
        if isinstance(self._system, np.ndarray):
            from scipy.linalg import lu_solve

            return lu_solve(self._factors, b, trans=int(transposed), check_finite=False)
        return self._factors.solve(b, trans="T" if transposed else "N")


def _rows(P: Any, legal: np.ndarray) -> Any:
    """A sparse P in float64, without the rows of actions that do not exist."""
    rows = P.tocsr().astype(np.float64)
    rows.data[np.repeat(~legal.ravel(), np.diff(rows.indptr))] = 0.0
    return rows


def softmax(
    x: Float[np.ndarray, "*state n"],
) -> tuple[Float[np.ndarray, "*state n"], Float[np.ndarray, "*state"]]:
    """Probabilities exp(x) / sum exp(x) over the last axis, and log sum exp(x); 0 and -inf where all of x is -inf.

    The probabilities are ratios of weights, not exp(x - log sum exp): at x of 10^3, usual at low temperature, that difference
    would be known to 10^-13 only, and so would every probability near 1.
    """
    largest = x.max(-1, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(x - shift)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights / np.where(total > 0, total, 1.0), (np.log(total) + shift)[..., 0]


def finite_products(policy: Policy, values: Float[np.ndarray, "state action"]) -> Float[np.ndarray, " state"]:
    """sum_a pi(a|s) x(s, a), where actions of probability 0 do not count even at -inf."""
    return (policy * np.where(policy > 0, values, 0.0)).sum(1)
