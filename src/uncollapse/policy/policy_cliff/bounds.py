"""What theory says in advance: how far values and policies can move when the reward moves by at most delta."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def tanh_bound(delta: float, alpha: float) -> float:
    """Largest TV between softmax(Q1 / alpha) and softmax(Q2 / alpha) for |Q1 - Q2| <= delta: tanh(delta / (2 alpha)).

    Attained by two actions at probability 1 / (1 + exp(delta / alpha)). On a token tree without discount a change of
    at most delta in the answers' rewards moves every Q by at most delta, so the bound holds for every token and for
    the law of whole answers, however long. Temperature 0: 1 for any delta above 0.

    Derived here; not in the paper, whose bound is its linear part (see `soft_policy_bound`).
    """
    if alpha == 0:
        return float(delta > 0)
    return float(np.tanh(delta / (2 * alpha)))


def span_bound(
    Q1: Float[np.ndarray, "state action"], Q2: Float[np.ndarray, "state action"], alpha: float
) -> Float[np.ndarray, " state"]:
    """`tanh_bound` per state from the change itself: half the span of Q1 - Q2 in place of its largest entry.

    A constant per state moves no policy, so this is never looser. Actions that do not exist (-inf in both) are
    left out. Derived here.
    """
    legal = np.isfinite(Q1) & np.isfinite(Q2)
    change = np.subtract(Q1, Q2, where=legal, out=np.zeros_like(Q1))
    high = np.where(legal, change, -np.inf).max(1)
    low = np.where(legal, change, np.inf).min(1)
    return np.tanh((high - low) / (4 * alpha))


def value_bound(delta: float, gamma: float) -> float:
    """Largest change of Q* for a reward change of at most delta: delta / (1 - gamma). Source: arXiv 2507.20150, section 2."""
    return delta / (1 - gamma)


def soft_policy_bound(delta: float, alpha: float, gamma: float) -> float:
    """The paper's bound on TV per state between soft policies: delta / (2 alpha (1 - gamma)), or 1 if that is more.

    Also for KL regularisation, with alpha the paper's beta. Source: arXiv 2507.20150, section 2.
    """
    return min(1.0, delta / (2 * alpha * (1 - gamma)))


def regularisation_price(alpha: float, actions: int, gamma: float) -> float:
    """Most that temperature alpha can cost: alpha log A / (1 - gamma), in units of the return.

    Bounds V_soft - V* from above (reached when all actions tie everywhere) and V* - V^pi, the return lost by following
    the soft policy. Source: arXiv 2507.20150, section 2.
    """
    return alpha * float(np.log(actions)) / (1 - gamma)
