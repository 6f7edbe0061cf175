"""What a finding is, and the facts that every finding is drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import numpy as np

from uncollapse.diagnose.forecast import Ceiling, Forecast
from uncollapse.diagnose.log import Log
from uncollapse.diagnose.phases import FEWEST, SIGNIFICANT, Course
from uncollapse.diagnose.series import Series, series

ENTROPY, REWARD, VALIDATION, DEAD = (
    "entropy/token/mean",
    "reward/mean",
    "eval/reward",
    "reward/zero_variance_groups",
)

Severity = Literal["info", "warning", "severe"]
"""`severe`: the run as it is will not get better, stop it. `warning`: look at it today. `info`: worth knowing."""

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "severe")

Confidence = Literal["low", "medium", "high"]
"""`high`: a direct reading, or a change beyond 8 standard errors. `medium`: a change beyond `SIGNIFICANT` standard errors.
`low`: a sign that has other explanations."""


@dataclass(frozen=True)
class Number:
    """One figure of the evidence, with its unit."""

    label: str
    value: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.label} {short(self.value)}{f' {self.unit}' if self.unit else ''}"


@dataclass(frozen=True)
class Evidence:
    """What a finding rests on: columns of the log to plot, steps to mark, numbers to quote."""

    columns: tuple[str, ...] = ()
    marks: tuple[int, ...] = ()
    numbers: tuple[Number, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something the log shows. `since` is the step from which it holds; `advice` are ids of `uncollapse.diagnose.advice`."""

    id: str
    title: str
    severity: Severity
    statement: str
    evidence: Evidence = Evidence()
    since: int | None = None
    confidence: Confidence = "medium"
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """The log with what was computed from it once; findings are pure functions of this."""

    log: Log
    course: Course
    ceiling: Ceiling | None
    forecast: Forecast | None
    _known: dict[tuple[str, int], Series | None] = field(default_factory=dict, repr=False, compare=False)

    def series(self, name: str, at_least: int = FEWEST) -> Series | None:
        """A column's finite values, or None if there are fewer than `at_least`."""
        key = name, at_least
        if key not in self._known:
            self._known[key] = series(self.log, name, at_least=at_least)
        return self._known[key]

    @property
    def span(self) -> int:
        """Steps from the first to the last."""
        return int(self.log.step[-1] - self.log.step[0]) if len(self.log) else 0

    @property
    def inert(self) -> bool:
        """Whether the log shows that the policy never left the one that sampled: nothing clipped, no distance."""
        clips = [found for name in CLIPS if (found := self.series(name))]
        moved = [found for name in ("kl/old/k3", "kl/old/k1") if (found := self.series(name))]
        return bool(clips) and not any(np.any(one.value > 0) for one in clips) and not any(
            np.any(np.abs(one.value) > 1e-6) for one in moved
        )  # fmt: skip

    def uses(self, *words: str) -> bool:
        """Whether the run's settings name one of these methods."""
        said = {
            str(value).lower().replace("_", "-")
            for value in self.log.settings.values()
            if isinstance(value, str)
        }
        return any(word in said for word in words)

    def pass_at(self) -> list[tuple[int, str]]:
        """The columns `eval/pass@k` that hold numbers, by k."""
        head = "eval/pass@"
        names = [name for name in self.log.columns if name.startswith(head) and name[len(head) :].isdigit()]
        return sorted((int(name[len(head) :]), name) for name in names if self.series(name, 5))


ROUNDING = 1e-5
"""Nats: a KL to the sampling policy that is below this at nine steps of ten is rounding."""

CLIPS = ("clip/high/frac", "clip/low/frac", "clip/ppo/frac")


def short(value: float) -> str:
    """A number to three digits, as people write it."""
    if not isfinite(value):
        return "unknown" if value != value else ("infinite" if value > 0 else "-infinite")
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def sentence(text: str) -> str:
    """A note of a reader as a sentence."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def sure(*scores: float) -> Confidence:
    """Confidence of a change from its size in standard errors."""
    return "high" if min(abs(score) for score in scores) >= 2 * SIGNIFICANT else "medium"


def ends(one: Series, unit: str = "") -> tuple[Number, Number]:
    """The first and last level of a series as evidence."""
    return Number("from", one.start, unit), Number("to", one.end, unit)


def news(findings: Iterable[Finding], told: dict[str, Severity]) -> list[Finding]:
    """Findings that were not told before, or less gravely; `told`, by their ids, then knows them."""
    found = []
    for one in findings:
        before = told.get(one.id)
        if before is None or SEVERITIES.index(before) < SEVERITIES.index(one.severity):
            told[one.id] = one.severity
            found.append(one)
    return found


def worst(findings: Sequence[Finding]) -> Severity | None:
    """The highest severity among findings, None if there are none."""
    return max((one.severity for one in findings), key=SEVERITIES.index, default=None)
