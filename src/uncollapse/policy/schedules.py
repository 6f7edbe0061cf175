"""Numbers that change with training: a schedule is a number or a function of the clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from uncollapse.policy.batch import Clock

Schedule: TypeAlias = float | Callable[[Clock], float]


def value_at(schedule: Schedule, clock: Clock) -> float:
    """The schedule's value at this step."""
    return float(schedule(clock)) if callable(schedule) else float(schedule)


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in `steps` rollout batches, then constant."""

    start: float = 1.0
    end: float = 0.0
    steps: int = 100

    def __call__(self, clock: Clock) -> float:
        """The value at `clock.step`."""
        done = min(clock.step / self.steps, 1.0) if self.steps else 1.0
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine in `steps` rollout batches, then constant."""

    start: float = 1.0
    end: float = 0.0
    steps: int = 100

    def __call__(self, clock: Clock) -> float:
        """The value at `clock.step`."""
        done = min(clock.step / self.steps, 1.0) if self.steps else 1.0
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))
