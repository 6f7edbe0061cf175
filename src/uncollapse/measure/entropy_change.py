"""The first-order entropy change of one sampled token: exact, with the token's own logit alone, and as STEER released it.

At one state with probabilities p and entropy H a token a is drawn, and the logits follow the surrogate r A, with
r = p_a / pold_a, for a step of size eta: dz = eta r A (e_a - p). Then, to first order in eta, dH = -eta Omega with

    exact     Omega = r A [p_a (log p_a + H) - S2],  S2 = sum_v p_v^2 (log p_v + H)
    theorem   Omega = r A  p_a (1 - p_a) (log p_a + H)
    released  Omega = r A      (1 - p_a) (log p_a + H)

`theorem` lets only the logit of the sampled token move (Theorem 1 of STEER). `released` is what its code evaluates: the
integrand of that theorem's expectation over a, hence the theorem divided by p_a. It has the theorem's sign, but not the
scale of any one token's change: a token of probability p_a is inflated by 1 / p_a. `exact` needs one more statistic of the
distribution, S2, which costs as much as the entropy.

Units: advantage x nats, that is, nats per unit of step size. Omega > 0 lowers entropy.

Paper: Hao and others, "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective", arXiv 2510.10150, Theorem
1; official code zz-haooo/STEER, `verl/trainer/ppo/core_algos.py`. The exact form and the four quadrants follow from the
derivative of the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.measure.precision import at_least_float32
from uncollapse.measure.statistics import FLOOR, Collision, Entropy, Logp
from uncollapse.measure.token_stats import token_stats_from_logits

Estimator: TypeAlias = Literal["released", "theorem", "exact"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

LOG_RATIO = 20.0
"""Largest |log p - log pold| that enters a ratio, as in the released loss."""
SMALLEST = 1e-8
"""Clamp of the released code: probabilities lie in [1e-8, 1 - 1e-8]."""

QUADRANTS = ("probable rewarded", "probable punished", "rare rewarded", "rare punished")
"""By surprisal below or above the entropy of the token's state, and by the sign of the advantage. The first and the last
lower entropy, the other two raise it."""


@torch.no_grad()
def token_entropy_change(
    log_prob: Float[Tensor, "*pool"],
    old_log_prob: Float[Tensor, "*pool"],
    entropy: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    *,
    estimator: str = "released",
    collision: Float[Tensor, "*pool"] | None = None,
    clip: tuple[float, float] | None = None,
) -> Float[Tensor, "*pool"]:
    """Omega of every token from its numbers: dH = -eta Omega to first order; the formulas are those of the module.

    Args:
        log_prob: log-probability of the sampled token under the current policy (nats).
        old_log_prob: the same under the policy that the ratio is taken against.
        entropy: H of the token's state (nats). STEER takes the sampling policy's.
        advantages: A.
        estimator: `released`, `theorem` or `exact`.
        collision: S2 of the state, for `exact` only; see `collision_term`.
        clip: PPO's (low, high). Tokens that it silences, r > 1 + high with A > 0 or r < 1 - low with A < 0, have no gradient
            and get Omega = 0. None, as released, ignores clipping.

    Returns Omega, detached, in the input's dtype but at least float32; where a number is not finite it is 0, as released.
    `released` clamps both probabilities to at least 1e-8, so its ratio is at most 1e8; the others clamp |log r| to 20.

    Raises `UnknownName` for an estimator that does not exist, `ConfigError` for `exact` without `collision`.
    """
    if estimator not in ESTIMATORS:
        raise UnknownName("estimator", estimator, ESTIMATORS)
    logp, old, h, a = (at_least_float32(t) for t in (log_prob, old_log_prob, entropy, advantages))
    silenced = None if clip is None else _silenced(logp, old, a, clip)
    if estimator == "released":
        # 1 - p is taken as -expm1(log p), which keeps its digits where the difference in float32 is 0.
        logp = logp.clamp(math.log(SMALLEST), math.log1p(-SMALLEST))
        push = a * (logp - old.clamp(math.log(SMALLEST), 0.0)).exp()
        omega = push * -torch.expm1(logp) * (logp + h)
    else:
        push = a * (logp - old).clamp(-LOG_RATIO, LOG_RATIO).exp()
        logp = logp.clamp(min=FLOOR)
        own = logp.exp() * (logp + h)
        omega = push * (own * -torch.expm1(logp) if estimator == "theorem" else own - _given(collision))
    if silenced is not None:
        omega = torch.where(silenced, 0.0, omega)
    return torch.where(omega.isfinite(), omega, 0.0)


def _given(collision: Tensor | None) -> Tensor:
    if collision is None:
        raise ConfigError("the exact entropy change needs collision=, the statistic Collision of the state")
    return collision


def _silenced(logp: Tensor, old: Tensor, advantage: Tensor, clip: tuple[float, float]) -> Tensor:
    ratio = (logp - old).exp()
    return ((advantage > 0) & (ratio > 1 + clip[1])) | ((advantage < 0) & (ratio < 1 - clip[0]))


@torch.no_grad()
def compare_estimators(
    logits: Float[Tensor, "*state vocab"],
    token: Int[Tensor, "*state"],
    advantages: Float[Tensor, "*state"],
    *,
    old_log_prob: Float[Tensor, "*state"] | None = None,
    clip: tuple[float, float] | None = None,
) -> Mapping[str, Float[Tensor, "*state"]]:
    """Omega by all three estimators, side by side, from the logits of the states.

    `old_log_prob` defaults to the current policy's: ratio 1. Otherwise as `token_entropy_change`. Never holds more than a
    block of the logits beside what is given.
    """
    found = token_stats_from_logits(logits, token, stats=(Logp(), Entropy(), Collision()))
    logp = found[Logp()]
    return {
        estimator: token_entropy_change(
            logp, logp if old_log_prob is None else old_log_prob, found[Entropy()], advantages,
            estimator=estimator, collision=found[Collision()], clip=clip,
        )
        for estimator in ESTIMATORS
    }  # fmt: skip


@torch.no_grad()
def exact_entropy_change(
    logits: Float[Tensor, "*state vocab"],
    token: Int[Tensor, "*state"],
    weight: Float[Tensor, "*state"],
    lr: float,
) -> Float[Tensor, "*state"]:
    """dH (nats) of a step of size `lr` on the surrogate `weight` = r A of one sampled token, to first order in `lr`.

    -lr w [p_a (log p_a + H) - S2], the derivative of H along dz = lr w (e_a - p); the remainder is O(lr^2). Averaged over
    a ~ p with a constant w it is 0: a shift of all advantages alone leaves the entropy where it is.
    """
    found = token_stats_from_logits(logits, token, stats=(Logp(), Entropy(), Collision()))
    logp = found[Logp()].clamp(min=FLOOR)
    return -lr * weight * (logp.exp() * (logp + found[Entropy()]) - found[Collision()])


@torch.no_grad()
def collision_term(logits: Float[Tensor, "*state vocab"]) -> Float[Tensor, "*state"]:
    """S2 = sum_v p_v^2 (log p_v + H), in nats: the part of the exact change that no sampled token decides.

    In a training loop ask for the statistic `Collision` beside `Entropy` instead: one pass gives both.
    """
    anything = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_stats_from_logits(logits, anything, stats=(Collision(),))[Collision()]


@dataclass(frozen=True)
class EntropyQuadrants:
    """What each of the four `QUADRANTS` of tokens does to entropy.

    `tokens`: its share of all valid tokens; `share`: of the sum of |Omega|; both in [0, 1]. `change`: its part of the mean
    entropy change per unit of step size, -sum Omega / N (advantage x nats): negative in the first and the last quadrant.
    """

    tokens: Float[Tensor, "quadrant=4"]
    share: Float[Tensor, "quadrant=4"]
    change: Float[Tensor, "quadrant=4"]


@torch.no_grad()
def entropy_quadrants(
    log_prob: Float[Tensor, "*pool"],
    entropy: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
) -> EntropyQuadrants:
    """Which kinds of tokens move entropy, and which way: `theorem` at ratio 1, summed over the four quadrants.

    A token is probable if its surprisal -log p is below the entropy H of its state. Rewarding a probable token or punishing
    a rare one sharpens the distribution; the other two flatten it. Tokens with A = 0 or with surprisal H exactly change
    nothing and are in no quadrant. Without a valid token all is 0.

    Source: the sign of Omega in arXiv 2510.10150.
    """
    omega = token_entropy_change(log_prob, log_prob, entropy, advantages, estimator="theorem")
    omega = torch.where(mask, omega, 0.0)
    inside = quadrant_of(log_prob, entropy, advantages)[..., None] == torch.arange(4, device=mask.device)
    inside = (inside & mask[..., None]).reshape(-1, 4).to(omega.dtype)
    count, size = mask.sum().clamp(min=1), omega.abs().sum()
    return EntropyQuadrants(
        tokens=inside.sum(0) / count,
        share=(omega.abs().reshape(-1) @ inside) / torch.where(size > 0, size, 1.0),
        change=-(omega.reshape(-1) @ inside) / count,
    )


@torch.no_grad()
def quadrant_of(
    log_prob: Float[Tensor, "*pool"], entropy: Float[Tensor, "*pool"], advantages: Float[Tensor, "*pool"]
) -> Int[Tensor, "*pool"]:
    """Number of each token's quadrant in `QUADRANTS`, -1 for a token in none of them."""
    excess = log_prob + entropy
    number = 2 * (excess < 0).long() + (advantages < 0).long()
    return torch.where((excess != 0) & (advantages != 0) & excess.isfinite(), number, -1)
