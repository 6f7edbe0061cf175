"""Reductions over groups of rows, without a loop over rows."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def group_index(group: Int[Tensor, " row"]) -> tuple[Int[Tensor, " row"], int]:
    """Group labels as consecutive numbers, and how many there are."""
    labels, index = torch.unique(group, return_inverse=True)
    return index, len(labels)


def group_sum(
    value: Float[Tensor, " row"], index: Int[Tensor, " row"], groups: int
) -> Float[Tensor, " group"]:
    """Sum over each group."""
    return torch.zeros(groups, dtype=value.dtype, device=value.device).index_add_(0, index, value)


def scorable_stats(
    reward: Float[Tensor, " row"], index: Int[Tensor, " row"], groups: int
) -> tuple[Float[Tensor, " group"], Float[Tensor, " group"], Float[Tensor, " group"]]:
    """Number, mean and unbiased standard deviation of each group's scorable (not NaN) rewards, in float64.

    A group whose scorable rewards are all equal has deviation exactly 0, whatever rounding makes of its mean; so
    has a group of one.
    """
    known = ~torch.isnan(reward)
    value = torch.where(known, reward, torch.zeros_like(reward)).double()
    count = group_sum(known.double(), index, groups)
    mean = group_sum(value, index, groups) / count.clamp(min=1)
    square = torch.where(known, (value - mean[index]) ** 2, torch.zeros_like(value))
    std = (group_sum(square, index, groups) / (count - 1).clamp(min=1)).sqrt()
    return count, mean, torch.where(equal_groups(reward, index, groups), torch.zeros_like(std), std)


def equal_groups(reward: Float[Tensor, " row"], index: Int[Tensor, " row"], groups: int) -> torch.Tensor:
    """Which groups have no two different scorable rewards: compared exactly, not through a variance."""
    high = torch.full((groups,), -torch.inf, dtype=reward.dtype, device=reward.device)
    low = -high
    known = ~torch.isnan(reward)
    high = high.scatter_reduce(0, index[known], reward[known], "amax")
    low = low.scatter_reduce(0, index[known], reward[known], "amin")
    return low >= high
