"""Filters: rows that leave the loss. Rows are never spliced; a filter only sets `keep`."""

from __future__ import annotations

from dataclasses import dataclass

from uncollapse.policy.batch import PARTS, Batch, Columns
from uncollapse.policy.protocols import Needs, Scope
from uncollapse.policy.stages.segments import equal_groups, group_index


@dataclass(frozen=True)
class DropDeadGroups:
    """Drop groups whose scorable rewards are all equal: they carry no signal but dilute the mean.

    Rewards are compared exactly, so that rounding noise is never taken for variance. Rows of part `tempered` stay: they
    are imitated one by one, and a group that is right throughout is all signal.
    """

    needs: Needs = frozenset({"reward", "group", "part"})
    gives: frozenset[str] = frozenset({"keep"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`keep`."""
        index, groups = group_index(batch.group)
        keep = ~equal_groups(batch.reward, index, groups)[index]
        if "part" in batch.columns:
            keep = keep | (batch.columns["part"] == PARTS["tempered"])
        return {"keep": keep}


@dataclass(frozen=True)
class DropUnfinished:
    """Drop rows cut off by the token limit (overlong filtering, DAPO)."""

    needs: Needs = frozenset({"finished"})
    gives: frozenset[str] = frozenset({"keep"})
    scope: Scope = "rollout"

    def __call__(self, batch: Batch) -> Columns:
        """`keep`."""
        return {"keep": batch.columns["finished"].bool()}
