from __future__ import annotations

import math

import pytest

from uncollapse.studies.claims import AllOf, AnyOf, Bound, Claim, State, Verdict
from uncollapse.studies.statistics import Estimate


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(float(value), float(low), float(high), "t")


@pytest.mark.parametrize(
    ("low", "value", "high", "by_interval", "by_value"),
    [
        (1.1, 2.0, 3.0, State.met, State.met),
        (0.5, 2.0, 3.0, State.open, State.met),
        (0.0, 0.5, 3.0, State.open, State.open),
        (0.0, 0.5, 0.9, State.failed, State.failed),
        (-math.inf, 2.0, math.inf, State.open, State.met),
        (math.nan, math.nan, math.nan, State.open, State.open),
    ],
)
def test_bound(low: float, value: float, high: float, by_interval: State, by_value: State) -> None:
    estimates = {"x": estimate(value, low, high)}
    assert Bound("x", ">", 1.0).state(estimates) is by_interval
    assert Bound("x", ">", 1.0, by="value").state(estimates) is by_value
    mirrored = {"x": estimate(-value, -high, -low)}
    assert Bound("x", "<", -1.0).state(mirrored) is by_interval
    assert Bound("x", "<", -1.0, by="value").state(mirrored) is by_value


def test_missing_estimate_is_open() -> None:
    assert Bound("x", ">", 1.0).state({}) is State.open


def test_thresholds_are_inclusive_only_where_they_say_so() -> None:
    at = {"x": estimate(1.0, 1.0, 1.0)}
    states = [Bound("x", op, 1.0).state(at) for op in (">=", "<=", ">", "<")]
    assert states == [State.met, State.met, State.failed, State.failed]


MET, FAILED, OPEN = (Bound(s, ">", 0.0) for s in "mfo")
ESTIMATES = {"m": estimate(1, 1, 1), "f": estimate(-1, -1, -1), "o": estimate(0.5, -1, 1)}


@pytest.mark.parametrize(
    ("parts", "every", "some"),
    [
        ((MET, MET), State.met, State.met),
        ((MET, OPEN), State.open, State.met),
        ((MET, FAILED), State.failed, State.met),
        ((OPEN, FAILED), State.failed, State.open),
        ((FAILED, FAILED), State.failed, State.failed),
    ],
)
def test_combinations(parts: tuple[Bound, ...], every: State, some: State) -> None:
    assert AllOf(parts).state(ESTIMATES) is every
    assert AnyOf(parts).state(ESTIMATES) is some
    assert AllOf(parts).bounds == parts


def test_verdicts_and_text() -> None:
    claim = Claim("C", "says", "measured", AllOf((MET, Bound("o", ">=", 0.5, by="value"))), "m")
    assert claim.judge(ESTIMATES) is Verdict.reproduced
    assert claim.criterion_text == "reproduced if 95% interval of m > 0 and o >= 0.5"
    assert Claim("C", "", "", FAILED, "f").judge(ESTIMATES) is Verdict.not_reproduced
    assert Claim("C", "", "", OPEN, "o").judge(ESTIMATES) is Verdict.inconclusive


def test_contradiction_of_its_own() -> None:
    gentle = Claim("C", "", "", FAILED, "f", contradicted_if=Bound("f", "<", -2.0))
    assert gentle.judge(ESTIMATES) is Verdict.inconclusive
    harsh = Claim("C", "", "", FAILED, "f", contradicted_if=Bound("f", "<", -0.5))
    assert harsh.judge(ESTIMATES) is Verdict.not_reproduced
    assert "not reproduced if 95% interval of f < -0.5; else inconclusive" in harsh.criterion_text
