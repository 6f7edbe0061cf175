"""The objective of GTPO: the entropy filter, and the loss of one optimiser step as a function."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import TokenMap, TokenMask
from uncollapse.policy.gtpo.conflicts import Normalise, advantage_sign, conflict_weights, per_conflict
from uncollapse.policy.stages.segments import equal_groups, group_index, scorable_stats

LN2 = math.log(2)
"""The paper's threshold (nats). Since H >= -ln max p, an entropy below ln 2 means that one token outweighs all others
together; the reverse does not hold, and the filter applies it to the mean over an answer."""

Filtered: TypeAlias = Literal["all", "negative"]
"""Which answers the entropy filter applies to."""


def trajectory_entropy(entropy: TokenMap, mask: TokenMask) -> Float[Tensor, " row"]:
    """Mean entropy <H>_i of each answer over its trainable tokens (nats); 0 for an answer without any."""
    return torch.where(mask, entropy, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def entropy_filter(
    mean_entropy: Float[Tensor, " row"],
    initial_entropy: float | Float[Tensor, ""] | None,
    threshold: float = LN2,
    scope: Filtered = "all",
    *,
    advantages: Float[Tensor, " row"] | None = None,
) -> Bool[Tensor, " row"]:
    """delta_i: which answers contribute, by their mean entropy (nats).

    All of them if the initial policy's mean entropy exceeds the threshold, for such a policy would starve; otherwise
    those with <H>_i <= threshold (equality is kept). `initial_entropy=None` leaves that exemption out, as the official
    code does. `scope="negative"` filters answers with negative advantage only and needs `advantages`.

    Raises `ConfigError` for another scope or missing advantages.
    Source: arXiv 2508.03772, delta; official README.
    """
    kept = mean_entropy <= threshold
    if scope == "negative":
        if advantages is None:
            raise ConfigError('entropy_filter: scope "negative" needs the advantages')
        kept = kept | (advantages >= 0)
    elif scope != "all":
        raise ConfigError(f'entropy_filter: scope must be "all" or "negative"; got {scope!r}')
    if initial_entropy is None:
        return kept
    start = torch.as_tensor(initial_entropy, dtype=mean_entropy.dtype, device=mean_entropy.device)
    return kept | (start > threshold)


def gtpo_loss(
    logp: Float[Tensor, "row time"],
    ids: Int[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    rewards: Float[Tensor, " row"],
    group_ids: Int[Tensor, " row"],
    mean_entropy: Float[Tensor, " row"],
    initial_entropy: float | None = None,
    *,
    gamma: float = 0.1,
    amplify: float = 2.0,
    suppress: float = 0.0,
    threshold: float = LN2,
    scope: Filtered = "all",
    normalise: Normalise = "none",
    truncated_mask: Bool[Tensor, " row"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """-J of one optimiser step, and its metrics; the gradient flows through `logp` alone.

    -J = -(1/G) sum_i delta_i (A_i - gamma <H>_i) / |o_i| sum_t exp(logp_it - sg(logp_it)) lambda_it: the mean over all
    answers with a trainable token, filtered ones included; no division of A by the deviation, no clip. The ratio has value 1
    whatever policy sampled, so this is the policy gradient only while that is the current one. `gamma` in reward per
    nat; other options as in `conflict_weights`, `entropy_filter` (no exemption unless `initial_entropy` is given) and
    `ConflictWeights.normalise`. Rows with a NaN reward, or without a trainable token, are left out, whatever their
    `mean_entropy`.

    Source: arXiv 2508.03772, the objective; official `gtpo_compute_loss`.
    """
    known = ~torch.isnan(rewards)
    mask = mask & known[:, None]
    present = mask.any(1)
    index, groups = group_index(group_ids)
    _, mean, _ = scorable_stats(rewards, index, groups)
    sign = advantage_sign(rewards, group_ids)
    weight, forward, backward = conflict_weights(
        ids, mask, sign, group_ids, amplify=amplify, suppress=suppress, truncated_mask=truncated_mask
    )
    kept = entropy_filter(mean_entropy, initial_entropy, threshold, scope, advantages=sign)
    equal = equal_groups(rewards, index, groups)[index]
    shaped = torch.where(equal, 0.0, rewards - mean[index]) - gamma * mean_entropy
    shaped = torch.where(kept & present, shaped, 0.0).to(logp.dtype)
    weight = per_conflict(weight.to(logp.dtype), forward, backward, normalise)
    answers = present.sum().clamp(min=1)
    length = mask.sum(1).clamp(min=1)
    logp = torch.where(mask, logp, 0.0)
    ratio = (logp - logp.detach()).exp()
    loss = -(weight * ratio * (shaped / length)[:, None]).sum() / answers
    conflict, tokens = forward | backward, mask.sum().clamp(min=1)
    return loss, {
        "conflict/amplified/frac": (conflict & (sign > 0)[:, None]).sum() / tokens,
        "conflict/suppressed/frac": (conflict & (sign < 0)[:, None]).sum() / tokens,
        "entropy_filter/kept/frac": (kept & present).sum() / answers,
    }
