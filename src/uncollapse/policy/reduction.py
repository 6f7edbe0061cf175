"""Reductions as weight maps: fixed before the backward pass, over all rows of an optimiser step.

A loss is the sum of (weight map x term). Because the map is made once from all rows of all processes, the loss
does not depend on how the step is split into micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, TokenMap, TokenMask


@dataclass(frozen=True)
class Mean:
    """A nested mean: `Mean()` over tokens; `Mean(("row",))` over rows of the mean over their tokens.

    `levels` are read from the outside in: `Mean(("trajectory", "turn"))` is the mean over trajectories of the
    mean over their turns of the mean over a turn's tokens. A level is `"row"` or a column of shape `(row,)` or
    `(row, time)`.

    `rows` says what the outermost level counts: its members that have a selected token (`"nonempty"`), or all
    that have a trainable one (`"all"`).

    Each part of the batch (column `part`) has a mean of its own, which its `scale` weighs. With `joint` there is one mean
    over the rows of all parts: rows that take the place of others count as those did.
    """

    levels: tuple[str, ...] = ()
    rows: Literal["nonempty", "all"] = "nonempty"
    joint: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the levels are read from."""
        return frozenset(self.levels) - {"row"}

    def weights(self, where: TokenMask, batch: Batch) -> TokenMap:
        """The weight map: non-negative, 0 outside `where`; adds up to 1 unless a counted member is empty."""
        if not self.levels:
            return where.double() / where.sum().clamp(min=1)
        weights = where.double()
        # Members keep the shape (row, 1) as long as no level tells tokens of one row apart.
        parent = torch.zeros(len(where), 1, dtype=torch.long, device=where.device)
        for depth, level in enumerate(self.levels):
            member = _members(parent, level, batch)
            counted = batch.mask if self.rows == "all" and depth == 0 else where
            weights = weights / _children(parent, member, counted)[parent].clamp(min=1)
            parent = member
        inside = parent.expand_as(where)[where]
        tokens = torch.bincount(inside, minlength=int(parent.max()) + 1 if parent.numel() else 1)
        return weights / tokens[parent].clamp(min=1)


def _members(parent: Int[Tensor, "row place"], level: str, batch: Batch) -> Int[Tensor, "row place2"]:
    """Number the members of a level, so that equal labels under different parents are different members."""
    if level == "row":
        label = torch.arange(len(batch), device=batch.mask.device)
    elif level in batch.columns:
        label = batch.columns[level].long()
    else:
        raise ConfigError(f"the mean runs over {level!r}, but the batch has no such column")
    if label.ndim == 1:
        label = label[:, None]
    if not label.numel():
        return parent
    values, label = torch.unique(label, return_inverse=True)
    _, member = torch.unique(parent * len(values) + label, return_inverse=True)
    return member


def _children(
    parent: Int[Tensor, "row place"], member: Int[Tensor, "row place2"], counted: TokenMask
) -> Int[Tensor, " parents"]:
    """How many members with a counted token each parent has."""
    size = int(parent.max()) + 1 if parent.numel() else 1
    above = torch.zeros(
        int(member.max()) + 1 if member.numel() else 1, dtype=torch.long, device=parent.device
    )
    above[member] = parent.expand_as(member)
    present = torch.zeros_like(above, dtype=torch.bool)
    present[member.expand_as(counted)[counted]] = True
    return torch.bincount(above[present], minlength=size)


@dataclass(frozen=True)
class Sum:
    """The sum over tokens divided by a constant, and by the number of rows as well if `per_row`.

    `divisor` defaults to the engine's limit on completion tokens (Dr. GRPO); one below it is refused, since the
    loss of a long row would then exceed its mean.
    """

    divisor: float | None = None
    per_row: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """The engine's limit on completion tokens."""
        return frozenset({"token_limit"})

    def weights(self, where: TokenMask, batch: Batch) -> TokenMap:
        """The weight map: constant on `where`. Rows without a trainable token are not counted."""
        limit = float(batch.columns["token_limit"])
        divisor = limit if self.divisor is None else self.divisor
        if divisor < limit:
            raise ConfigError(
                f"sum: divisor {divisor:g} is below the token limit {limit:g}; raise it to at least that"
            )
        rows = batch.mask.any(dim=1).sum().clamp(min=1) if self.per_row else 1
        return where.to(torch.float64) / (divisor * rows)
