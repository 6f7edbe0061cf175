"""Levels, noise and change of one column."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.diagnose.log import Log
from uncollapse.diagnose.series import BINS, HEAD, Series, series


def made(values, step=None):
    values = np.asarray(values, dtype=np.float64)
    return Series(
        "x", np.arange(1.0, len(values) + 1) if step is None else np.asarray(step, dtype=np.float64), values
    )


def test_gaps_and_nan_are_left_out():
    log = Log("", "", np.array([1, 5, 9, 12]), {"x": np.array([1.0, np.nan, np.inf, 4.0])})
    found = series(log, "x")
    assert found is not None
    assert found.step.tolist() == [1, 12]
    assert found.value.tolist() == [1, 4]
    assert series(log, "x", at_least=3) is None
    assert series(log, "absent") is None


def test_levels_are_medians_of_the_first_and_last_steps():
    found = made([1, 1, 9, *[5] * 54, 2, 2, 2])  # 60 values: 3 first, 6 last
    assert found.start == 1
    assert found.end == 3.5


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 11, 47])
def test_short_series_have_levels_and_no_surprises(n):
    found = made(np.linspace(1, 2, n))
    assert np.isfinite([found.start, found.end, found.noise, found.repeats]).all()
    assert found.smooth.shape == (n,)
    assert found.binned().value.shape == (n,)


def test_noise_is_that_of_the_noise_not_of_the_trend():
    rng = np.random.default_rng(0)
    found = made(50 * np.linspace(0, 1, 2000) + 0.3 * rng.standard_normal(2000))
    assert found.noise == pytest.approx(0.3, rel=0.1)
    assert found.repeats < 1.3


def test_autocorrelated_steps_count_as_few():
    rng, value, values = np.random.default_rng(1), 0.0, []
    for _ in range(3000):
        value = 0.6 * value + 0.8 * rng.standard_normal()
        values.append(value)
    assert made(values).repeats == pytest.approx((1 + 0.6) / (1 - 0.6), rel=0.25)


def test_score_of_no_change_is_small_and_of_a_step_large():
    rng = np.random.default_rng(2)
    noise = rng.standard_normal(400)
    assert abs(made(noise).score) < 4
    assert made(noise + 5 * (np.arange(400) > 200)).score > 8
    assert made(np.ones(50)).score == 0
    assert made([*np.ones(25), *np.zeros(25)]).score < -8


def test_since_is_the_first_step_from_which_it_holds_to_the_end():
    found = made(np.arange(10), step=np.arange(0, 100, 10))
    flags = np.array([1, 1, 0, 0, 1, 1, 1, 1, 1, 1], dtype=bool)
    assert found.since(flags) == 40
    assert found.since(np.zeros(10, dtype=bool)) == 90


@pytest.mark.parametrize("n", [HEAD + BINS, HEAD + BINS + 1, 12_345])
def test_bins_bound_the_length_and_keep_the_head_and_the_mean_course(n):
    found = made(np.linspace(0, 1, n))
    short = found.binned()
    assert len(short) == min(n, HEAD + BINS)
    assert short.value[:HEAD].tolist() == found.value[:HEAD].tolist()
    assert np.all(np.diff(short.step) > 0)
    assert short.at(found.step) == pytest.approx(found.value, abs=3 / BINS)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_and_shift_of_the_unit_change_no_judgement(values, scale, shift):
    one, other = made(values), made(scale * np.asarray(values) + shift)
    assert other.start == pytest.approx(scale * one.start + shift, abs=1e-6 * scale + 1e-6)
    if one.noise > 1e-3 * (1 + abs(np.asarray(values)).max()) and len(set(values)) == len(values):
        assert other.score == pytest.approx(one.score, rel=1e-3, abs=1e-6)
