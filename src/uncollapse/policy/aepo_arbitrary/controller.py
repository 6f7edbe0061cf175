"""The temperature controller: hot below the target entropy, cold above it, and honest about a target out of reach."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uncollapse.errors import ConfigError
from uncollapse.policy.aepo_arbitrary.formulas import Mode, auxiliary_temperature, check_steering
from uncollapse.policy.reach import halves, in_reach

WINDOW = 50
"""Steps that the duty cycle is taken over."""


@dataclass
class EntropyController:
    """Chooses the temperature of the next step from the entropy of the last one; see `auxiliary_temperature`.

    `hysteresis` (nats, mode `bang` only) keeps the last temperature while the entropy is that close to the target, against
    switching at every step. `start` is the entropy assumed before any was measured: 0, as in the released code, makes
    the first step hot.

    After `patience` steps in a row at a bound of the temperature, with progress so slow that the target would take more
    than 20 times as many again, the target is out of reach. The controller says so once, sets `saturated` and stops
    pushing: it holds the level that was reached, hot below it (or cold above it), and between that level and the
    target it samples at the policy's own temperature. It takes the target up again once the entropy crosses it, or while
    recovering from below that level moves fast enough. `patience=0` never gives up, as the released code.
    """

    target: float = 0.5
    mode: Mode = "bang"
    low: float = 0.8
    high: float = 1.2
    hysteresis: float = 0.0
    patience: int = 50
    start: float = 0.0
    entropy: float | None = field(default=None, init=False)
    held: float | None = field(default=None, init=False)
    warned: bool = field(default=False, init=False)
    recent: list[tuple[float, float]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_steering(self.target, self.mode, self.low, self.high)
        if self.hysteresis < 0 or self.patience < 0 or self.patience == 1:
            raise ConfigError(
                "the controller needs hysteresis >= 0, and patience 0 (never give up) or at least 2"
            )
        if self.hysteresis and self.mode != "bang":
            raise ConfigError(
                f"hysteresis keeps one of two temperatures, mode {self.mode!r} has a range: set it to 0"
            )

    @property
    def last_entropy(self) -> float:
        """The entropy that the next temperature follows from (nats per token)."""
        return self.start if self.entropy is None else self.entropy

    @property
    def aim(self) -> float:
        """The entropy that is held now: the target, or what was reached of it (nats per token)."""
        return self.target if self.held is None else self.held

    @property
    def temperature(self) -> float:
        """Temperature of the next tempered answers, relative to the policy's."""
        if self.recent and self.hysteresis and abs(self.last_entropy - self.aim) <= self.hysteresis:
            return self.recent[-1][1]
        chosen = auxiliary_temperature(self.last_entropy, self.aim, self.mode, self.low, self.high)
        if self.held is None:
            return chosen
        return max(chosen, 1.0) if self.target > self.held else min(chosen, 1.0)

    @property
    def saturated(self) -> bool:
        """Whether the target was found to be out of reach."""
        return self.held is not None

    @property
    def duty_cycle(self) -> float:
        """Share of the last `WINDOW` steps that were hot; NaN before the first."""
        last = self.recent[-WINDOW:]
        return sum(temperature > 1 for _, temperature in last) / len(last) if last else math.nan

    def observe(self, entropy: float) -> None:
        """Take in the entropy of a step that was sampled at `temperature`. NaN, nothing measured, changes nothing."""
        if math.isnan(entropy):
            return
        self.recent = [*self.recent, (entropy, self.temperature)][-max(WINDOW, self.patience) :]
        self.entropy = entropy
        if self.held is not None:
            upwards = self.target > self.held
            crossed = entropy >= self.target if upwards else entropy <= self.target
            beyond = entropy < self.held if upwards else entropy > self.held
            if crossed or (beyond and self._in_reach()):
                self.held = None
        elif self._in_reach() is False:
            self._give_up()

    def _in_reach(self) -> bool | None:
        """Whether the pace of the last `patience` steps suffices; None unless all of them pushed as hard as they can."""
        window = self.recent[-self.patience :]
        pushes = {temperature for _, temperature in window}
        at_bound = len(pushes) == 1 and not pushes.isdisjoint({self.low, self.high} - {1.0})
        if not self.patience or len(window) < self.patience or not at_bound:
            return None
        return in_reach([entropy for entropy, _ in window], self.target)

    def _give_up(self) -> None:
        temperature = self.recent[-1][1]
        _, self.held = halves([entropy for entropy, _ in self.recent[-self.patience :]])
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"the target entropy of {self.target:g} nats is out of reach: {self.patience} steps at temperature "
                f"{temperature:g} led to {self.held:.3g} nats and hardly on; that level is held from here. Choose a target "
                "nearer to it, a larger alpha, or advantages that are not divided by the group's deviation",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learnt, as JSON values."""
        return {
            "entropy": self.entropy,
            "held": self.held,
            "warned": self.warned,
            "recent": [list(pair) for pair in self.recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.entropy, self.held, self.warned = state["entropy"], state["held"], state["warned"]
        self.recent = [(float(entropy), float(temperature)) for entropy, temperature in state["recent"]]
