"""The formulas of AEPO: which temperature, what the tempered answers add to the loss, and what that does on average.

All are pure functions. Temperatures are relative to the policy's own (1: the policy itself), entropies in nats.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.batch import TokenMap
from uncollapse.policy.stages.surrogates import bounded_ratio

Mode: TypeAlias = Literal["bang", "clip"]
"""How the temperature follows the entropy: one of two values, or in proportion to the gap."""

CORRECT = 1.0
"""The reward from which an answer is right. Answers below it are never imitated."""


def check_steering(target: float, mode: str, low: float, high: float) -> None:
    """Raise `ConfigError` unless target >= 0, the mode exists and 0 < low <= 1 <= high."""
    if mode not in ("bang", "clip"):
        raise ConfigError(f"mode must be 'bang' or 'clip'; got {mode!r}")
    if not (0 < low <= 1 <= high < math.inf):
        raise ConfigError(f"temperatures need 0 < low <= 1 <= high; got low {low:g}, high {high:g}")
    if not 0 <= target < math.inf:
        raise ConfigError(f"the target entropy is in nats per token, 0 or more; got {target:g}")


def auxiliary_temperature(
    entropy: float, target: float, mode: Mode = "bang", low: float = 0.8, high: float = 1.2
) -> float:
    """Temperature of the extra answers: hot while the entropy is below its target, cold above it.

    `bang`: high if H <= H0, else low (version 1 and the released code). `clip`: clip(1 + H0 - H, low, high), proportional
    within the bounds, so it rests only where nothing else moves the entropy (SCOPE-RL). Result in [low, high].
    Raises `ConfigError` for impossible bounds, `DataError` for an entropy that is NaN.

    Source: arXiv 2510.08141; official `ray_trainer.py`, whose comparison is <=.
    """
    check_steering(target, mode, low, high)
    if math.isnan(entropy):
        raise DataError(
            "the entropy is NaN, so no temperature follows from it; measure it on at least one token"
        )
    if mode == "bang":
        return high if entropy <= target else low
    return min(max(1 + target - entropy, low), high)


def is_right(reward: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Rows that count as positives: 1[R = 1]. An unscorable row (NaN) is none."""
    return reward >= CORRECT


def tempered_positive_loss(
    logp: Float[Tensor, "row time"],
    old_logp: Float[Tensor, "row time"],
    rewards: Float[Tensor, " row"],
    mask: Bool[Tensor, "row time"],
    alpha: float,
    clip: float | None = None,
    agg: Literal["row", "token"] = "row",
) -> Float[Tensor, ""]:
    """What tempered answers add to the loss: -alpha times the mean over all of them of what the right ones gain.

    `agg="row"`: -(alpha / G') sum_i 1[R_i = 1] (1 / |o_i|) sum_t g_it over all G' rows that have tokens, right or wrong, so
    the term shrinks with the success rate. `agg="token"`: the same sum over tokens divided by the tokens of all rows;
    long answers then weigh more. g is log pi (REINFORCE, version 1), or min(r, clip(r, 1 - clip, 1 + clip)) with
    r = exp(logp - old_logp), whose gradient vanishes once r > 1 + clip; its logarithm is bounded at +-20, as in `PPOClip`.

    Both log-probabilities are at the policy's temperature, although the tokens were sampled at another: the tempered
    policy is what is imitated, hence no importance weight. No right answer, or no token at all: 0 with zero gradient.

    Source: arXiv 2510.08141, the auxiliary term.
    """
    if agg not in ("row", "token"):
        raise ConfigError(f"agg must be 'row' or 'token'; got {agg!r}")
    learnt = mask & is_right(rewards)[:, None]
    if clip is None:
        gain = torch.where(learnt, logp, 0.0)
    else:
        # Clipped or not, an infinite ratio would have the gradient 0 x inf.
        ratio = bounded_ratio(torch.where(learnt, logp - old_logp, 0.0))
        gain = torch.where(learnt, torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip)), 0.0)
    length = mask.sum(1)
    if agg == "token":
        return -alpha * gain.sum() / length.sum().clamp(min=1)
    return -alpha * (gain.sum(1) / length.clamp(min=1)).sum() / (length > 0).sum().clamp(min=1)


def tempered_reweighting(
    logp_T: TokenMap, logp: TokenMap, rewards: Float[Tensor, " row"], alpha: float | Tensor
) -> TokenMap:
    """alpha 1[R = 1] exp(logp_T - logp): what DCPO adds to the advantage of tokens that the policy itself sampled.

    The factor re-weights a token as if it had been sampled at temperature T, token by token; it corrects nothing for the
    tokens before. For an answer of one token its expectation is that of `tempered_positive_loss`.

    Source: the branch `DCPO` of the official code; not in the paper.
    """
    return alpha * is_right(rewards)[:, None] * bounded_ratio(logp_T - logp)


def reweighting_share(
    gap: Float[Tensor, ""], success: Float[Tensor, ""], limit: float = 0.1
) -> Float[Tensor, ""]:
    """DCPO's mixing weight alpha = a / (1 + a) in [0, 1), with a = min(|gap|, limit) / success; 0 without success.

    `gap` is target minus entropy (nats), `success` the share of right answers. The official code divides by zero when
    nothing is right; here the term is then left out.
    """
    a = gap.abs().clamp(max=limit)
    return torch.where(success > 0, a / (success + a).clamp(min=torch.finfo(a.dtype).tiny), 0.0)


def expected_aux_gradient(
    logits: Float[Tensor, "*batch answer"], R: Float[Tensor, "*#batch answer"], T: float | Tensor
) -> Float[Tensor, "*batch answer"]:
    """E_{o ~ pi^T}[R(o) grad_z log pi(o)] = s (q+ - pi), exactly, for one softmax over answers.

    s = E_{pi^T}[R] is the success rate at temperature T and q+ is pi^T given that the answer is right (R in {0, 1}; other
    rewards weigh the answers). `T` is a number or a tensor that broadcasts to `(*batch, 1)`. T = 1 gives the policy
    gradient of the success rate; T > 1 rests where the policy is uniform over the right answers.
    """
    weighed = (logits / T).softmax(-1) * R
    return weighed - weighed.sum(-1, keepdim=True) * logits.softmax(-1)


def reachable_entropy(p_correct_law: Float[Tensor, "*batch answer"]) -> Float[Tensor, "*batch"]:
    """Largest entropy (nats per answer) of a policy that makes no mistake: ln of the number of right answers.

    `p_correct_law` is any law, or 0/1 reward, over answers that is positive exactly on the right ones. Every target in
    [0, ln m] can be met without errors, none above; with no right answer the result is -inf. Divide by the length
    of the answers to compare with a target in nats per token. Raises `DataError` for NaN or a negative entry.
    """
    if not bool((p_correct_law >= 0).all()):
        raise DataError("reachable_entropy: the law of right answers has a negative or NaN entry")
    return (p_correct_law > 0).sum(-1).to(p_correct_law.dtype).log()


def group_advantage_gain(success: float, samples: int, *, std: bool) -> float:
    """By what factor GRPO's expected update exceeds the plain policy gradient of the success rate (0/1 rewards).

    For groups of `samples` answers, k of them right: E[m (1 - m) / d] / (mu (1 - mu)) with m = k / samples, mu the success
    rate, and d = 1 (`std=False`: (G - 1) / G) or the group's unbiased deviation (groups without variance give 0).
    Towards mu = 1 dividing by the deviation multiplies the update by sqrt(G), for unlimited groups by
    1 / sqrt(mu (1 - mu)), while the tempered term stays as it is. Derived here, not in the paper.
    """
    if samples < 1 or not 0 < success < 1:
        raise ConfigError(f"needs samples >= 1 and 0 < success < 1; got {samples} and {success:g}")
    k = torch.arange(samples + 1, dtype=torch.float64)
    ways = math.lgamma(samples + 1) - torch.lgamma(k + 1) - torch.lgamma(samples - k + 1)
    law = (ways + k * math.log(success) + (samples - k) * math.log1p(-success)).exp()
    variance = k / samples * (1 - k / samples)
    each = (variance * (samples - 1) / samples).sqrt() if std else variance
    return float((law * each).sum()) / (success * (1 - success))
