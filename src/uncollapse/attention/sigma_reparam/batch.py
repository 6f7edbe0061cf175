"""Power steps of many layers of one shape at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from uncollapse.attention.sigma_reparam.estimate import as_blocks, power_step

Handed: TypeAlias = tuple[Tensor, Tensor, Tensor, int]
"""Left and right vector, sigma, and the version of the weight that they were computed from."""


class PowerBatch:
    """Layers of one shape whose power steps are taken together, by the first of them that a forward pass reaches.

    The others are handed theirs and go on. A layer that is not reached keeps what it was handed until it is: the
    vectors are constants of the formula, so they may be old. Weights are stacked for it, which costs a copy: worth
    it where calls cost more than arithmetic. Not for weights that are sharded over processes.
    """

    def __init__(self, members: Sequence[ParametrizationList]) -> None:
        self.members = list(members)
        for member in self.members:
            member[0].batch = self

    def take(self, tracker: Module) -> Handed:
        """What `tracker` was handed, or a new step for everybody; it is spent then."""
        if tracker.handed is None:
            self._step()
        handed, tracker.handed = tracker.handed, None
        return handed

    def _step(self) -> None:
        members = [member for member in self.members if member[0].training]
        trackers = [member[0] for member in members]
        sizes = [tracker.blocks for tracker in trackers]
        matrices = torch.cat(
            [as_blocks(m.original.detach(), blocks) for m, blocks in zip(members, sizes, strict=True)]
        )
        u = torch.cat([tracker.u for tracker in trackers]).to(matrices.dtype)
        found = [each.split(sizes) for each in power_step(matrices, u, trackers[0].n_power_iterations)]
        for name, values in zip(("v", "u", "sigma"), found, strict=True):
            torch._foreach_copy_([getattr(tracker, name) for tracker in trackers], list(values))
        for member, v, u, sigma in zip(members, *found, strict=True):
            member[0].handed = v, u, sigma, version_of(member.original)


def version_of(weight: Tensor) -> int:
    """How often a weight was written; a compiler cannot see that, and takes every weight as it is."""
    return 0 if torch.compiler.is_compiling() else weight._version
