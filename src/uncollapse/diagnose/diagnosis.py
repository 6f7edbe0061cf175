"""From a log to a diagnosis: phases, law, forecast, findings, advice. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from uncollapse.diagnose.advice import Advice, advise
from uncollapse.diagnose.finding import (
    ENTROPY,
    REWARD,
    SEVERITIES,
    VALIDATION,
    Facts,
    Finding,
    Severity,
    worst,
)
from uncollapse.diagnose.findings import find
from uncollapse.diagnose.findings.entropy import begins_collapsed, impossible
from uncollapse.diagnose.forecast import Ceiling, Forecast, ceiling, forecast
from uncollapse.diagnose.log import Log
from uncollapse.diagnose.phases import Course, Phase, State, course
from uncollapse.diagnose.series import Series, series

SCHEMA = 1
"""Version of what `Diagnosis.to_dict` gives; it rises when a key changes its meaning or goes."""

_HEADLINES: dict[State, str] = {
    "healthy": "This run is healthy",
    "collapsing": "This run is losing its entropy",
    "collapsed": "This run has collapsed",
    "exploding": "This run is exploding",
    "plateau": "This run stands still",
    "unknown": "This log does not say how the run is",
}


@dataclass(frozen=True)
class Diagnosis:
    """What a log says about its run.

    Args:
        log: the log itself.
        state: what the run is in now.
        course: starting entropy (nats) and phases.
        ceiling: the entropy law, or None where it cannot be fitted.
        forecast: when the entropy is spent, or None where it does not fall.
        findings: the severest first.
        advice: what the findings ask for, the most asked first findings' first.
    """

    log: Log
    state: State
    course: Course
    ceiling: Ceiling | None
    forecast: Forecast | None
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]

    @property
    def worst(self) -> Severity | None:
        """The highest severity found, None if there is no finding."""
        return worst(self.findings)

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Findings of this severity or above."""
        return tuple(
            one for one in self.findings if SEVERITIES.index(one.severity) >= SEVERITIES.index(severity)
        )

    @property
    def headline(self) -> str:
        """The state in a sentence; other findings may be graver than it."""
        text = _HEADLINES[self.state]
        graver = (
            self.findings
            and self.findings[0].severity == "severe"
            and self.state in ("healthy", "plateau", "unknown")
        )
        return (
            f"{text}, but: {self.findings[0].title[0].lower()}{self.findings[0].title[1:]}"
            if graver
            else text
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is None."""
        step = self.log.step
        made = {
            "schema": SCHEMA,
            "source": self.log.source,
            "format": self.log.format,
            "steps": {"logged": len(self.log), "first": int(step[0]) if len(step) else None, "last": int(step[-1]) if len(step) else None},
            "columns": {name: self.log.origin.get(name, name) for name in self.log.columns},
            "state": self.state,
            "worst": self.worst,
            "entropy_start": self.course.start,
            "phases": [asdict(phase) for phase in self.course.phases],
            "law": None if self.ceiling is None else _law(self.ceiling),
            "forecast": None if self.forecast is None else {
                key: getattr(self.forecast, key) for key in ("target", "step", "low", "high", "horizon", "decay", "fitted_from")
            },
            "findings": [asdict(one) for one in self.findings],
            "advice": [
                {
                    "id": one.id, "title": one.title, "why": one.why, "recipe": one.recipe or None, "trl": dict(one.trl),
                    "verl": dict(one.verl), "arxiv": list(one.arxiv), "papers": list(one.slugs), "caution": one.caution,
                }
                for one in self.advice
            ],
            "notes": [{"kind": note.kind, "text": note.text, "steps": list(note.steps)} for note in self.log.notes],
        }  # fmt: skip
        plain: dict[str, Any] = _plain(made)
        return plain


def diagnose(log: Log) -> Diagnosis:
    """Say what a log shows. Never fails for what is in the log: what cannot be judged is left out and said."""
    entropy, reward = series(log, ENTROPY), series(log, REWARD)
    facts = Facts(log, *_entropy_facts(entropy, reward, series(log, VALIDATION, at_least=5)))
    if (odd := impossible(facts)) is not None and odd.evidence.numbers[1].value < 0:
        # A negative entropy has no course that could be compared with its start; a sum over tokens still has one.
        facts = Facts(log, Course(facts.course.start, ()), None, None)
    elif begins_collapsed(facts):
        first, last = int(log.step[0]), int(log.step[-1])
        facts = replace(
            facts,
            course=Course(facts.course.start, (Phase("collapsed", first, last, 1.0, 1.0),)),
            forecast=None,
        )
    findings = find(facts)
    wanted = [name for one in findings for name in one.advice]
    return Diagnosis(
        log, facts.course.state, facts.course, facts.ceiling, facts.forecast, findings, advise(wanted, facts)
    )


def _entropy_facts(
    entropy: Series | None, reward: Series | None, held_out: Series | None
) -> tuple[Course, Ceiling | None, Forecast | None]:
    if entropy is None:
        return Course(float("nan"), ()), None, None
    found = course(entropy, reward)
    law = None
    for rewards in (held_out, reward):  # the law is about validation reward; training reward stands in for it
        law = law or (ceiling(entropy, rewards) if rewards is not None else None)
    return found, law, forecast(entropy, found)


def _law(found: Ceiling) -> dict[str, Any]:
    fits = {
        fit.kind.replace(" ", "_"): {
            key: getattr(fit, key) for key in ("a", "a_se", "b", "b_se", "ceiling", "ceiling_se", "r2", "n")
        }
        for fit in (found.laws.exponential, found.laws.straight_line)
    }
    return {
        "reward": found.reward_column,
        "holds": found.holds,
        "ceiling": found.value,
        "low": found.low,
        "high": found.high,
        "used": found.used,
        "preferred": found.laws.verdict.value,
        "effective_delta_aic": found.laws.effective_delta_aic,
        **fits,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
