"""Conflict tokens: what good and bad answers of a prompt have in common at their beginning and at their end."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.policy.stages.segments import equal_groups, group_index, scorable_stats

Normalise: TypeAlias = Literal["none", "count", "released"]
"""What an answer's loss is divided by: nothing, its conflict tokens, or the official miscount of them."""

_ROUNDING = 1e-6
"""Share of a group's reward range within which a reward counts as the mean: float32 rewards err by about 1e-7."""


@torch.no_grad()
def advantage_sign(reward: Float[Tensor, " row"], group: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Sign of R_i - mean of its group: 1, -1, or 0 for the mean up to rounding, equal groups and unscorable rows."""
    index, groups = group_index(group)
    _, mean, _ = scorable_stats(reward, index, groups)
    centred = reward.double() - mean[index]
    known = ~torch.isnan(reward)
    size = torch.zeros(groups, dtype=torch.float64, device=reward.device)
    size = size.scatter_reduce(0, index[known], centred[known].abs(), "amax")
    decided = known & ~equal_groups(reward, index, groups)[index] & (centred.abs() > _ROUNDING * size[index])
    return torch.where(decided, centred.sign(), 0.0).to(reward.dtype)


@torch.no_grad()
def conflict_weights(
    ids: Int[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    advantages: Float[Tensor, " row"],
    group: Int[Tensor, " row"] | None = None,
    *,
    amplify: float = 2.0,
    suppress: float = 0.0,
    truncated_mask: Bool[Tensor, " row"] | None = None,
) -> tuple[Float[Tensor, "row time"], Bool[Tensor, "row time"], Bool[Tensor, "row time"]]:
    """Weights lambda on the tokens, and the leading and trailing runs of conflict tokens that they come from.

    A token (position, id) is in conflict if it occurs at that position in an answer with positive and in one with
    negative advantage of the same group. The test is per position: the partner may change along a run. `forward` is the
    leading run of conflict tokens of each answer; `backward` the trailing run, with all answers aligned at their last
    token. lambda = f b, where f and b are `amplify` (A > 0) or `suppress` (A < 0) on their run and 1 elsewhere, and 0
    outside `mask`: where both runs of a positive answer overlap it is amplify^2. Answers with A = 0 keep weight 1 and
    create no conflict.

    `group` labels the prompts (default: one group). Rows of `truncated_mask` were cut off by the token limit; their last
    token is not an end, so they have no trailing run and cause none (the official code aligns them all the same).
    Give the unshaped advantages. Values: {0, 1, amplify, amplify^2} at the default `suppress`, in the dtype of `advantages`.

    Cost: two sorts of the trainable tokens, O(n log n) time and O(n) memory, whatever the vocabulary.
    Source: arXiv 2508.03772, conflict tokens; official `build_conflict_mask`.
    """
    if group is None:
        group = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    decided = (advantages != 0)[:, None] & mask
    ending = decided if truncated_mask is None else decided & ~truncated_mask[:, None]
    before = mask.cumsum(1) - mask.long()
    after = mask.sum(1, keepdim=True) - 1 - before
    forward = _leading(_in_conflict(ids, before, decided, advantages, group), mask)
    backward = _leading(_in_conflict(ids, after, ending, advantages, group).flip(1), mask.flip(1)).flip(1)
    on_run = torch.where(advantages > 0, amplify, suppress).to(advantages.dtype)[:, None]
    weight = torch.where(forward, on_run, 1.0) * torch.where(backward, on_run, 1.0) * mask
    return weight, forward, backward


def _in_conflict(ids: Tensor, position: Tensor, where: Tensor, advantages: Tensor, group: Tensor) -> Tensor:
    """Tokens whose (group, position, id) occurs with both signs. Keys are exact: no two tokens share one by accident."""
    found = torch.zeros_like(where).flatten()
    at = where.flatten().nonzero()[:, 0]
    if not len(at):
        return found.view_as(where)
    row = at // where.shape[1]
    token = ids.flatten()[at].long()
    token -= token.min()
    _, label = group.unique(return_inverse=True)
    place = label[row] * where.shape[1] + position.flatten()[at]
    _, key = torch.unique(place * (token.max() + 1) + token, return_inverse=True)
    positive = (advantages > 0)[row]
    seen = torch.zeros(2, len(key), dtype=torch.bool, device=ids.device)  # never more keys than tokens
    seen[positive.long(), key] = True
    found[at] = (seen[0] & seen[1])[key]
    return found.view_as(where)


def _leading(conflict: Tensor, mask: Tensor) -> Tensor:
    """The part of each row before its first trainable token without conflict."""
    return conflict & ((mask & ~conflict).cumsum(1) == 0)


def conflict_count(
    forward: Bool[Tensor, "row time"], backward: Bool[Tensor, "row time"], *, released: bool = False
) -> Int[Tensor, " row"]:
    """Number of conflict tokens per answer: of the union of both runs.

    `released` is what the official code arrives at: it joins the trailing run while that is still reversed, so that
    both runs start at the first token and the count is the length of the longer one.
    """
    if released:
        return torch.maximum(forward.sum(1), backward.sum(1))
    return (forward | backward).sum(1)


def per_conflict(
    weight: Float[Tensor, "row time"],
    forward: Bool[Tensor, "row time"],
    backward: Bool[Tensor, "row time"],
    normalise: Normalise,
) -> Float[Tensor, "row time"]:
    """The weights, divided by max(1, number of conflict tokens of the answer) unless `normalise` is `none`."""
    if normalise == "none":
        return weight
    count = conflict_count(forward, backward, released=normalise == "released")
    return weight / count.clamp(min=1)[:, None]
