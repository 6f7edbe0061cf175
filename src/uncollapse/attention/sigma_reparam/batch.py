"""Power steps of many layers of one shape at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from uncollapse.attention.sigma_reparam.estimate import as_blocks, power_step

Handed: TypeAlias = tuple[Tensor, Tensor, Tensor, int]
"""Left and right vector, sigma, and the version of the weight that they were computed from."""


@runtime_checkable
class Member(Protocol):
    """A layer's power iteration, as the batch sees it."""

    u: Tensor
    v: Tensor
    sigma: Tensor
    blocks: int
    n_power_iterations: int
    training: bool
    batch: PowerBatch | None
    handed: Handed | None


class PowerBatch:
    """Layers of one shape whose power steps are taken together, by the first of them that a forward pass reaches.

    The others are handed theirs and go on. A layer that is not reached keeps what it was handed until it is: the
    vectors are constants of the formula, so they may be old. Weights are stacked for it, which costs a copy: worth
    it where calls cost more than arithmetic. Not for weights that are sharded over processes.
    """

    def __init__(self, members: Sequence[tuple[Member, ParametrizationList]]) -> None:
        self.members = list(members)
        for tracker, _ in self.members:
            tracker.batch = self

    def take(self, tracker: Member) -> Handed:
        """What `tracker` was handed, or a new step for everybody; it is spent then."""
        if tracker.handed is None:
            self._step()
        handed, tracker.handed = tracker.handed, None
        assert handed is not None
        return handed

    def _step(self) -> None:
        members = [(tracker, found.original) for tracker, found in self.members if tracker.training]
        trackers = [tracker for tracker, _ in members]
        sizes = [tracker.blocks for tracker in trackers]
        matrices = torch.cat([as_blocks(weight.detach(), tracker.blocks) for tracker, weight in members])
        u = torch.cat([tracker.u for tracker in trackers]).to(matrices.dtype)
        found = [each.split(sizes) for each in power_step(matrices, u, trackers[0].n_power_iterations)]
        for name, values in zip(("v", "u", "sigma"), found, strict=True):
            torch._foreach_copy_([getattr(tracker, name) for tracker in trackers], list(values))
        for (tracker, weight), *mine in zip(members, *found, strict=True):
            tracker.handed = mine[0], mine[1], mine[2], version_of(weight)


def version_of(weight: Tensor) -> int:
    """How often a weight was written; a compiler cannot see that, and takes every weight as it is."""
    return 0 if torch.compiler.is_compiling() else weight._version
