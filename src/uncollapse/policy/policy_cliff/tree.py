"""Token trees: every answer of T tokens out of V, solved by backward induction, without discount if wished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.policy_cliff.dynamics import softmax
from uncollapse.policy.policy_cliff.mdp import TIE

Leaves = Float[np.ndarray, "*batch leaf"]
"""One number per answer; answer number sum_t token_t V^(T-1-t), so that the first token is the leading digit."""

_HUGE = np.finfo(np.float64).max


@dataclass(frozen=True)
class TreeSolution:
    """A policy on the tree, and the law of whole answers that it gives.

    `V[t]`: value of each prefix of t tokens, (*batch, V^t), t = 0..T. `policy[t]`: law of the next token after each
    prefix, (*batch, V^t, V). `law`: probability of each answer, (*batch, V^T).
    """

    V: tuple[np.ndarray, ...]
    policy: tuple[np.ndarray, ...]
    law: Leaves


@dataclass(frozen=True)
class TokenTree:
    """All answers of `depth` tokens out of a vocabulary of `vocab`; rewards come in batches of any leading shape.

    An answer with reward -inf does not exist (that is how shorter answers fit in: let one token end them).
    """

    vocab: int
    depth: int

    def __post_init__(self) -> None:
        if self.vocab < 1 or self.depth < 1:
            raise ConfigError(f"{self}: needs at least 1 token and a depth of 1")

    @property
    def leaves(self) -> int:
        """Number of answers, V^T."""
        return self.vocab**self.depth

    def gibbs(self, leaf_reward: Leaves, alpha: float, base_logprobs: Leaves | None = None) -> TreeSolution:
        """The regularised optimum for a reward of whole answers, without discount.

        V = alpha log sum_token pi0 exp(V' / alpha) from the leaves to the root; the law of answers is the Gibbs law,
        p(y) proportional to pi0(y) exp(R(y) / alpha). Without `base_logprobs` (log pi0 of each answer, nats) the bonus is
        the policy's entropy. `alpha` > 0, in units of reward per nat (the paper's beta with a base policy).
        """
        log_base = np.zeros(self.leaves) if base_logprobs is None else base_logprobs
        leaves = self._checked(leaf_reward) + alpha * log_base
        return self.soft([0.0] * (self.depth - 1) + [leaves], alpha)

    def soft(self, rewards: Sequence[np.ndarray | float], alpha: float, gamma: float = 1.0) -> TreeSolution:
        """The entropy-regularised optimum for rewards per token: `rewards[t]` is (*batch, V^(t+1)), or one number.

        Q_t = rewards[t] + gamma V_(t+1), V_t = alpha log sum exp(Q_t / alpha); gamma may be 1.
        """
        if not (alpha > 0 and np.isfinite(alpha)):
            raise ConfigError(f"temperature {alpha:g} has to be above 0; for temperature 0 use hard or cold")
        values = [self._ends(rewards)]
        policies: list[np.ndarray] = []
        for t in reversed(range(self.depth)):
            ahead = np.where(np.isneginf(values[0]), -np.inf, gamma * np.maximum(values[0], -_HUGE))
            Q = self._split(rewards[t] + ahead)
            policy, scaled = softmax(Q / alpha)
            policies.insert(0, policy)
            values.insert(0, alpha * scaled)
        return TreeSolution(tuple(values), tuple(policies), self._answers(policies))

    def hard(self, leaf_reward: Leaves, *, tolerance: float | None = None) -> TreeSolution:
        """The optimum that is uniform over the tied *tokens* at each prefix. See `cold` for the other reading of a tie."""
        leaves = self._checked(leaf_reward)
        slack = _slack(leaves) if tolerance is None else tolerance
        values = [leaves]
        policies: list[np.ndarray] = []
        for _ in range(self.depth):
            Q = self._split(values[0])
            V = Q.max(-1)
            tied = (V[..., None] - slack <= Q) & np.isfinite(Q)
            policies.insert(0, tied / np.maximum(tied.sum(-1, keepdims=True), 1))
            values.insert(0, V)
        return TreeSolution(tuple(values), tuple(policies), self._answers(policies))

    def cold(
        self,
        leaf_reward: Leaves,
        base_logprobs: Leaves | None = None,
        *,
        tolerance: float | None = None,
    ) -> TreeSolution:
        """The limit of `gibbs` at temperature 0: pi0 restricted to the optimal *answers*.

        A token's probability is the share of optimal answers below it, not one over the number of tied tokens.
        Derived here.
        """
        leaves = self._checked(leaf_reward)
        slack = _slack(leaves) if tolerance is None else tolerance
        best = leaves >= leaves.max(-1, keepdims=True) - slack
        log_base = (
            np.zeros_like(leaves) if base_logprobs is None else np.broadcast_to(base_logprobs, leaves.shape)
        )
        weights = self.soft([0.0] * (self.depth - 1) + [np.where(best, log_base, -np.inf)], 1.0)
        values = [leaves]
        for _ in range(self.depth):
            values.insert(0, self._split(values[0]).max(-1))
        return TreeSolution(tuple(values), weights.policy, weights.law)

    def optimal_answers(
        self, leaf_reward: Leaves, *, tolerance: float | None = None
    ) -> Int[np.ndarray, "*batch"]:
        """Number n of best answers; breaking the tie moves the uniform law over them by (n - 1) / n in TV."""
        leaves = self._checked(leaf_reward)
        slack = _slack(leaves) if tolerance is None else tolerance
        return np.asarray((leaves >= leaves.max(-1, keepdims=True) - slack).sum(-1))

    def value_constants(self, gamma: float = 1.0) -> Float[np.ndarray, " time"]:
        """Largest change of Q at each position per unit change of the rewards per token: sum_{k >= t} gamma^(k - t).

        A change of the rewards of whole answers alone moves every Q by at most as much, whatever the depth.
        """
        return np.cumsum(gamma ** np.arange(self.depth))[::-1].copy()

    def _checked(self, leaf_reward: np.ndarray) -> np.ndarray:
        if leaf_reward.shape[-1:] != (self.leaves,):
            raise DataError(
                f"rewards have shape {leaf_reward.shape}; {self} has {self.leaves} answers on the last axis"
            )
        if np.isnan(leaf_reward).any() or np.isposinf(leaf_reward).any():
            raise DataError(
                "rewards hold NaN or +inf; they are finite, and -inf where an answer does not exist"
            )
        if not np.isfinite(leaf_reward).any(-1).all():
            raise DataError("a tree has no answer with a finite reward")
        return np.asarray(leaf_reward, dtype=np.float64)

    def _ends(self, rewards: Sequence[np.ndarray | float]) -> np.ndarray:
        """Value 0 of every answer, in the batch's shape."""
        if len(rewards) != self.depth:
            raise DataError(
                f"{len(rewards)} rewards per token for {self.depth} tokens; give one array for each position"
            )
        for t, reward in enumerate(rewards):
            if np.ndim(reward) and np.shape(reward)[-1] != self.vocab ** (t + 1):
                raise DataError(
                    f"rewards[{t}] has shape {np.shape(reward)}; {self.vocab ** (t + 1)} prefixes end there"
                )
        batch = np.broadcast_shapes(*(np.shape(reward)[:-1] for reward in rewards))
        return np.zeros((*batch, self.leaves))

    def _split(self, values: np.ndarray) -> np.ndarray:
        """(*batch, V^(t+1)) as (*batch, V^t, V)."""
        return values.reshape(*values.shape[:-1], -1, self.vocab)

    @staticmethod
    def _answers(policies: Sequence[np.ndarray]) -> np.ndarray:
        law = policies[0].reshape(*policies[0].shape[:-2], -1)
        for policy in policies[1:]:
            law = (law[..., None] * policy).reshape(*law.shape[:-1], -1)
        return law


def _slack(leaves: np.ndarray) -> float:
    return TIE * max(1.0, float(np.abs(leaves[np.isfinite(leaves)]).max()))
