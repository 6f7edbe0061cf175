"""Whether a target of entropy is in reach: judged by the pace at which the last steps came nearer to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOWS_AHEAD = 20
"""A target that is further away than this many times the steps looked at, at their pace, is out of reach."""


def halves(entropies: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last half of at least two values (nats)."""
    half = len(entropies) // 2
    return sum(entropies[:half]) / half, sum(entropies[-half:]) / half


def in_reach(entropies: Sequence[float], target: float) -> bool:
    """Whether `entropies`, one per step and at least two (nats), move so fast that `target` is less than 20 times as many
    steps away. The pace is the difference of their halves; a pace away from the target never suffices."""
    before, now = halves(entropies)
    count, gap = len(entropies), target - now
    toward = math.copysign(1.0, gap) * (now - before) / (count - count // 2)  # nats per step
    return toward * WINDOWS_AHEAD * count >= abs(gap)


@dataclass
class UpperTarget:
    """A target that is pulled up to, and given up where it is out of reach.

    It is out of reach if no step of the run ever had it and the last `patience` steps are not `in_reach`. Then it warns, once,
    and holds the highest level seen: below that level it is still pulled up, between level and target nothing
    is pulled. A step that has the target after all takes it up again, for good. `patience=0` never gives up.
    """

    patience: int = 50
    highest: float = field(default=-math.inf, init=False)
    held: float | None = field(default=None, init=False)
    warned: bool = field(default=False, init=False)
    recent: list[float] = field(default_factory=list, init=False, repr=False)

    def band(self, target: float) -> tuple[float, float]:
        """The lowest and the highest entropy that nothing pulls at (nats): both the target, unless it is given up."""
        return (target if self.held is None else self.held), target

    def observe(self, entropy: float, target: float) -> None:
        """Take in the entropy of a step (nats)."""
        self.highest = max(self.highest, entropy)
        if self.highest >= target:
            self.held = None
        if not self.patience or self.held is not None or self.highest >= target:
            return
        self.recent = [*self.recent, entropy][-self.patience :]
        if len(self.recent) == self.patience and not in_reach(self.recent, target):
            self.held = self.highest
            self._tell(target)

    def _tell(self, target: float) -> None:
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            f"the target entropy of {target:g} nats is out of reach: {self.patience} rollouts led to at most "
            f"{self.highest:.3g} nats and hardly on; that level is held from here. Choose a target nearer to it, or a larger "
            "coefficient",
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learnt, as plain numbers."""
        return {
            "highest": self.highest,
            "held": self.held,
            "warned": self.warned,
            "recent": list(self.recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.highest, self.held, self.warned = state["highest"], state["held"], state["warned"]
        self.recent = [float(entropy) for entropy in state["recent"]]
