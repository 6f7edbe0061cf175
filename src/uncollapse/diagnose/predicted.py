"""What each token of a dump is predicted to do to the entropy of its own state: the text behind an attribution.

For a small step on the logits of one state, a sampled token with probability p, advantage A and entropy H of its state
changes that entropy by -A p (1 - p) (log p + H) per unit of step size, if its own logit alone moves (arXiv 2510.10150;
`uncollapse.measure.entropy_change`). Unlike the drives of an attribution this is no share of a covariance over the step: it
compares a token with its own alternatives, so it can be read at one token. In advantage x nats; negative: it spends entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from uncollapse.token_dump import Tokens

LONGEST = 400
"""Tokens of an answer that are kept for reading."""


@dataclass(frozen=True)
class Changes:
    """Predicted change of every token, NaN where a number is missing, and its quadrant (-1: none)."""

    change: Float[np.ndarray, " token"]
    quadrant: Int[np.ndarray, " token"]

    @property
    def known(self) -> Bool[np.ndarray, " token"]:
        """Which tokens have a prediction."""
        return np.isfinite(self.change)


@dataclass(frozen=True)
class Answer:
    """One answer of a dump, token by token, at most `LONGEST` of them; `length` is how many it has."""

    uid: int
    step: int
    reward: float
    length: int
    texts: tuple[str, ...]
    logp: Float[np.ndarray, " token"]
    entropy: Float[np.ndarray, " token"]
    advantage: Float[np.ndarray, " token"]
    changes: Changes


def predict(tokens: Tokens) -> Changes:
    """The predicted change of every trained token of a step, under the policy that sampled it."""
    import torch

    from uncollapse.measure.entropy_change import quadrant_of, token_entropy_change

    logp, entropy, advantage = (
        torch.from_numpy(np.ascontiguousarray(tokens.number(name)))
        for name in ("old_logp", "entropy", "advantage")
    )
    known = torch.isfinite(logp) & torch.isfinite(entropy) & torch.isfinite(advantage)
    known &= torch.from_numpy(tokens.mask.copy())
    change = -token_entropy_change(logp, logp, entropy, advantage, estimator="theorem")
    quadrant = quadrant_of(logp, entropy, advantage)
    return Changes(torch.where(known, change, torch.nan).numpy(), torch.where(known, quadrant, -1).numpy())


def tell(tokens: Tokens, most: int = 4) -> tuple[Answer, ...]:
    """The answers of a step with the largest mean |predicted change|, at most `most`; none without texts or entropies."""
    if not {"uid", "reward", "text"} <= tokens.columns.keys():  # tokens that were made by hand
        return ()
    found = predict(tokens)
    if not found.known.any() or not any(tokens.text):
        return ()
    uids, index = np.unique(tokens.integer("uid"), return_inverse=True)
    size = np.bincount(index, weights=np.where(found.known, np.abs(found.change), 0.0))
    count = np.bincount(index, weights=found.known)
    chosen = np.argsort(-size / np.maximum(count, 1), kind="stable")[:most]
    return tuple(_answer(tokens, found, int(uids[one])) for one in chosen.tolist() if size[one] > 0)


def _answer(tokens: Tokens, found: Changes, uid: int) -> Answer:
    places = np.flatnonzero(tokens.integer("uid") == uid)
    places = places[np.argsort(tokens.integer("position")[places], kind="stable")]
    shown = places[:LONGEST]
    return Answer(
        uid=uid,
        step=tokens.step,
        reward=float(tokens.number("reward")[places[0]]),
        length=len(places),
        texts=tuple(str(text) for text in tokens.columns["text"][shown]),
        logp=tokens.number("old_logp")[shown],
        entropy=tokens.number("entropy")[shown],
        advantage=tokens.number("advantage")[shown],
        changes=Changes(found.change[shown], found.quadrant[shown]),
    )
