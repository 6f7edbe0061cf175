"""Classes in a hierarchy of Gaussian clouds: a classification with real dark knowledge and endless test data.

The centre of a class is the sum of the offsets of its ancestors, smaller from level to level, so that siblings are
confused more often than cousins; a teacher's wrong probabilities tell a student who is related to whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Hierarchy:
    """Centres of the classes; samples are a centre plus isotropic noise of deviation `noise`."""

    centres: Float[Tensor, "class feature"]
    noise: float

    @classmethod
    def make(
        cls,
        seed: int,
        *,
        branching: tuple[int, ...] = (5, 5, 4),
        scales: tuple[float, ...] = (1.0, 0.7, 0.5),
        features: int = 64,
        noise: float = 1.0,
    ) -> Hierarchy:
        """A tree with `branching[l]` children at level l, whose offsets have deviation `scales[l]` per feature."""
        generator = torch.Generator().manual_seed(seed)
        centres = torch.zeros(1, features)
        for children, scale in zip(branching, scales, strict=True):
            offsets = torch.randn(len(centres), children, features, generator=generator) * scale
            centres = (centres[:, None] + offsets).reshape(-1, features)
        return cls(centres, noise)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.centres)

    def draw(
        self, rows: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "row feature"], Int[Tensor, " row"]]:
        """Samples of classes drawn uniformly, and their classes."""
        classes = torch.randint(self.classes, (rows,), generator=generator)
        noise = torch.randn(rows, self.centres.shape[1], generator=generator) * self.noise
        return self.centres[classes] + noise, classes
