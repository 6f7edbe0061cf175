"""The rule by which a target of entropy is in reach, and what becomes of one that is not."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.policy.reach import WINDOWS_AHEAD, UpperTarget, halves, in_reach


@given(
    start=st.floats(0, 3),
    pace=st.floats(-0.05, 0.05),
    target=st.floats(0, 20),
    count=st.integers(2, 30).map(lambda n: 2 * n),
)
def test_a_steady_pace_reaches_what_is_less_than_twenty_windows_ahead(start, pace, target, count) -> None:
    levels = [start + pace * step for step in range(count)]
    now = halves(levels)[1]
    steps = math.inf if pace == 0 else (target - now) / pace
    if target != now and abs(steps - WINDOWS_AHEAD * count) > 1e-6 * WINDOWS_AHEAD * count:
        assert in_reach(levels, target) == (0 <= steps < WINDOWS_AHEAD * count)


def test_halves_leave_the_middle_of_an_odd_number_out() -> None:
    assert halves([1.0, 2.0, 9.0, 4.0, 6.0]) == (1.5, 5.0)


@pytest.mark.parametrize(("levels", "held"), [([1.0, 1.2, 1.1, 1.1], 1.2), ([1.0, 1.5, 2.0, 2.5], None)])
def test_a_target_is_given_up_where_nothing_comes_nearer(levels: list[float], held: float | None) -> None:
    aim = UpperTarget(patience=4)
    for step, level in enumerate(levels):
        last = held is not None and step == 3
        with pytest.warns(UserWarning, match="out of reach") if last else nullcontext():
            aim.observe(level, 3.0)
    assert aim.held == held
    assert aim.band(3.0) == (held or 3.0, 3.0)


def test_a_target_that_was_had_once_is_never_given_up() -> None:
    aim = UpperTarget(patience=2)
    for level in (3.0, *([1.0] * 10)):
        aim.observe(level, 3.0)
    assert aim.band(3.0) == (3.0, 3.0)
