"""Advantages from the rewards of a group: how much better than its siblings a completion did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.policy.batch import Batch, Columns
from uncollapse.policy.protocols import Needs, Scope
from uncollapse.policy.stages.segments import group_index, scorable_stats


def _spread(advantage: Float[Tensor, " row"], alive: Bool[Tensor, " row"], batch: Batch) -> Columns:
    """One advantage per token, in the precision of the rewards; 0 for dead groups and unscorable rows."""
    counted = alive & ~torch.isnan(batch.reward)
    advantage = torch.where(counted, advantage, torch.zeros_like(advantage)).to(batch.reward.dtype)
    return {"advantage": advantage[:, None] * batch.mask}


@dataclass(frozen=True)
class GroupAdvantage:
    """`A_i = (R_i - mean_group R) / (std_group R + eps)`, or centred only with `std=False` (GRPO, Dr. GRPO).

    The deviation is the unbiased one. A group whose rewards are all equal gets exactly 0. `eps` is TRL's 1e-4;
    verl uses 1e-6. Source: DeepSeekMath (arXiv 2402.03300), section 4.1; Dr. GRPO (arXiv 2503.20783).
    """

    std: bool = True
    eps: float = 1e-4
    needs: Needs = frozenset({"reward", "group"})
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        index, groups = group_index(batch.group)
        _, mean, std = scorable_stats(batch.reward, index, groups)
        centred = batch.reward - mean[index]
        scaled = centred / (std[index] + self.eps) if self.std else centred
        return _spread(scaled, (std > 0)[index], batch)


@dataclass(frozen=True)
class BatchAdvantage:
    """Centred by the group, scaled by the standard deviation of all scorable rewards of the batch.

    Source: REINFORCE++ (arXiv 2501.03262) and TRL's `scale_rewards="batch"`; `eps` as there.
    """

    eps: float = 1e-4
    needs: Needs = frozenset({"reward", "group"})
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        index, groups = group_index(batch.group)
        _, mean, std = scorable_stats(batch.reward, index, groups)
        everyone = torch.zeros_like(index)
        _, _, spread = scorable_stats(batch.reward, everyone, 1)
        return _spread((batch.reward - mean[index]) / (spread + self.eps), (std > 0)[index], batch)


@dataclass(frozen=True)
class LeaveOneOut:
    """`A_i = R_i - mean of the others of its group` (RLOO, arXiv 2402.14740); 0 for a group of one."""

    needs: Needs = frozenset({"reward", "group"})
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        index, groups = group_index(batch.group)
        count, mean, std = scorable_stats(batch.reward, index, groups)
        factor = count / (count - 1).clamp(min=1)
        return _spread((batch.reward - mean[index]) * factor[index], (std > 0)[index], batch)
