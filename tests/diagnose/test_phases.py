"""Change points and the names of the stretches between them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.diagnose.phases import FEWEST, SPENT, _LineCost, course
from uncollapse.diagnose.series import Series


def made(values, every=1):
    values = np.asarray(values, dtype=np.float64)
    return Series("x", every * np.arange(1.0, len(values) + 1), values)


def noisy(curve, seed=0, size=0.04):
    return np.asarray(curve) * np.exp(size * np.random.default_rng(seed).standard_normal(len(curve)))


def names(found):
    return [phase.state for phase in found.phases]


def test_line_cost_is_the_residual_of_least_squares():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((31, 2)) + 7
    cost = _LineCost().fit(signal)
    for begin, stop in ((0, 31), (3, 6), (10, 27)):
        t = np.arange(stop - begin)
        rest = [column - np.polyval(np.polyfit(t, column, 1), t) for column in signal[begin:stop].T]
        assert cost.error(begin, stop) == pytest.approx(sum(float(r @ r) for r in rest), abs=1e-9)


def test_a_fall_through_the_threshold_is_two_phases():
    t = np.linspace(0, 1, 200)
    found = course(made(noisy(0.8 * np.exp(-6 * np.clip(t - 0.3, 0, 0.5)))), None)
    assert names(found) == ["healthy", "collapsing", "collapsed"]
    healthy, falling, spent = found.phases
    assert falling.first == pytest.approx(60, abs=8)
    assert falling.end == pytest.approx(SPENT, rel=0.15)
    assert spent.first == falling.last + 1
    assert falling.halving == pytest.approx(200 * np.log(2) / 6, rel=0.15)
    assert healthy.start == pytest.approx(1, abs=0.1)


def test_a_fall_in_the_very_first_steps_is_measured_from_where_it_began():
    found = course(made([*np.exp(-0.5 * np.arange(6)), *[0.04] * 44]), None)
    assert found.start > 0.85
    assert found.state == "collapsed"


@pytest.mark.parametrize(
    ("curve", "state"),
    [
        (np.linspace(1, 0.75, 150), "healthy"),
        (np.exp(np.linspace(0, -1.2, 150)), "collapsing"),
        (np.exp(np.clip(np.linspace(-0.5, 1.4, 150), 0, None)), "exploding"),
        (np.r_[np.linspace(1, 0.3, 60), np.full(90, 0.3)], "healthy"),
        (np.full(150, 1.0), "healthy"),
        (np.r_[np.linspace(1, 0.3, 50), np.linspace(0.3, 0.9, 50), np.full(50, 0.9)], "healthy"),
    ],
)
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_the_state_is_that_of_the_end_at_any_scale(curve, state, scale):
    assert course(made(scale * noisy(curve)), None).state == state


def test_a_plateau_needs_a_reward_that_stands_still():
    rng, t = np.random.default_rng(3), np.linspace(0, 1, 200)
    entropy = made(noisy(np.full(200, 0.6)))
    still = made(np.clip(t, 0, 0.4) + 0.02 * rng.standard_normal(200))
    rising = made(t + 0.02 * rng.standard_normal(200))
    assert names(course(entropy, still)) == ["healthy", "plateau"]
    assert course(entropy, still).phases[-1].first == pytest.approx(80, abs=15)
    assert course(entropy, rising).state == "healthy"
    assert course(entropy, None).state == "healthy"


def test_single_spikes_make_no_phase():
    values = noisy(np.full(120, 0.7))
    values[[20, 70]] = (30.0, 1e-6)
    assert names(course(made(values), None)) == ["healthy"]


def test_phases_cover_the_run_in_order():
    t = np.linspace(0, 1, 150)
    found = course(made(noisy(np.exp(-3 * np.clip(t - 0.5, 0, None))), every=10), None)
    assert found.phases[0].first == 10
    assert found.phases[-1].last == 1500
    assert all(left.last < right.first for left, right in zip(found.phases, found.phases[1:], strict=False))


@pytest.mark.parametrize("n", [0, 1, FEWEST - 1])
def test_too_few_steps_have_no_phase(n):
    found = course(made(np.full(n, 0.5)), None)
    assert found.phases == ()
    assert found.state == "unknown"


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e99])
def test_constants_of_any_size_are_one_phase(value):
    assert len(course(made(np.full(40, value)), made(np.full(40, value))).phases) == 1


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1e4), min_size=FEWEST, max_size=60), st.integers(0, 5))
def test_any_series_has_phases_that_cover_it(values, seed):
    reward = made(np.random.default_rng(seed).standard_normal(len(values)))
    found = course(made(values), reward)
    assert found.phases[0].first == 1
    assert found.phases[-1].last == len(values)
    assert all(np.isfinite((phase.start, phase.end)).all() for phase in found.phases)
