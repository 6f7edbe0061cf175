"""Families: an original and the branches that share its beginning, hence part of its luck."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.policy.batch import Batch, Columns
from uncollapse.policy.protocols import Needs, Scope
from uncollapse.policy.stages.segments import group_index, group_sum, scorable_stats


def _family_index(
    groups: Int[Tensor, " row"], family: Int[Tensor, " row"]
) -> tuple[Int[Tensor, " row"], int]:
    """Families of all groups as consecutive numbers, and how many there are; `family` numbers them per group."""
    return group_index(groups * (family.max() + 1) + family) if len(family) else (groups, 0)


def family_variance(
    reward: Float[Tensor, " row"], group: Int[Tensor, " row"], family: Int[Tensor, " row"]
) -> tuple[Float[Tensor, " group"], Float[Tensor, " group"]]:
    """Variance of the reward within and between the families of each group, in float64, ordered by group id.

    A family is an original with its branches (`family` numbers them within the group). Within: mean over rows of
    (R - family mean)^2; between: mean over rows of (family mean - group mean)^2. They add up to the variance of the
    group (with 1/n). Rows with reward NaN are not counted.
    """
    groups, number = group_index(group)
    families, kinds = _family_index(groups, family)
    known = ~torch.isnan(reward)
    count, mean, _ = scorable_stats(reward, groups, number)
    _, own_mean, _ = scorable_stats(reward, families, kinds)
    zero = torch.zeros(len(reward), dtype=torch.float64, device=reward.device)
    within = torch.where(known, (reward.double() - own_mean[families]) ** 2, zero)
    between = torch.where(known, (own_mean[families] - mean[groups]) ** 2, zero)
    size = count.clamp(min=1)
    return group_sum(within, groups, number) / size, group_sum(between, groups, number) / size


def effective_samples(within: float, between: float, families: int, size: int) -> float:
    """How many independent rewards are worth as much as `families` families of `size` members, in [families, all].

    n / (1 + (size - 1) rho) with n = families x size and rho the intraclass correlation from the analysis of variance,
    not below 0. `within` and `between` are `family_variance`, averaged over groups: a single group is too small.
    """
    n = families * size
    if size == 1 or families == 1:
        return float(families)
    inside, outside = within * n / (n - families), between * n / (families - 1)
    total = outside + (size - 1) * inside
    rho = max((outside - inside) / total, 0.0) if total > 0 else 0.0
    return n / (1 + (size - 1) * rho)


@dataclass(frozen=True)
class FamilyAdvantage:
    """A branch against the mean of its family, an original against the mean of its group, over the group's deviation.

    A_i = (R_i - baseline_i) / (std_group R + eps), `eps` as in verl. All members of a family start from the same prefix, so
    their mean is a baseline for what comes after it. For an original it would be none: it has the original's own first
    tokens in it and would take away what they earned. Needs the columns of a sampler that branches. Ours, not the
    paper's, which compares all members with the group.
    """

    std: bool = True
    eps: float = 1e-6
    needs: Needs = frozenset({"reward", "group", "family", "branch"})
    gives: frozenset[str] = frozenset({"advantage"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`advantage`."""
        family, branch = batch.columns["family"], batch.columns["branch"]
        groups, number = group_index(batch.group)
        families, kinds = _family_index(groups, family)
        _, mean, std = scorable_stats(batch.reward, groups, number)
        _, own_mean, own_std = scorable_stats(batch.reward, families, kinds)
        is_branch = branch > 0
        baseline = torch.where(is_branch, own_mean[families], mean[groups])
        alive = torch.where(is_branch, own_std[families], std[groups]) > 0
        advantage = batch.reward - baseline
        if self.std:
            advantage = advantage / (std[groups] + self.eps)
        counted = alive & ~torch.isnan(batch.reward)
        advantage = torch.where(counted, advantage, 0.0).to(batch.reward.dtype)
        return {"advantage": advantage[:, None] * batch.mask}
