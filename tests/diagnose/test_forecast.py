"""When the entropy is spent, and the ceiling of the law."""

import numpy as np
import pytest

from uncollapse.diagnose.forecast import EXPLAINED, HORIZON, ceiling, forecast
from uncollapse.diagnose.phases import SPENT, course
from uncollapse.diagnose.series import Series


def made(values):
    values = np.asarray(values, dtype=np.float64)
    return Series("x", np.arange(1.0, len(values) + 1), values)


def falling(rate, n, noise=0.03, seed=0):
    t = np.arange(1, n + 1)
    return made(0.9 * np.exp(-rate * t + noise * np.random.default_rng(seed).standard_normal(n)))


def test_the_forecast_is_the_step_at_which_the_line_meets_the_target():
    entropy = falling(0.008, 120)
    found = forecast(entropy, course(entropy, None))
    assert found is not None
    assert found.step is not None
    truth = -np.log(SPENT) / 0.008
    assert found.low <= truth <= found.high
    assert found.step == pytest.approx(truth, rel=0.1)
    assert found.decay == pytest.approx(0.008, rel=0.1)
    middle, low, high = found.line(np.array([float(found.step)]))
    assert middle[0] == pytest.approx(found.target, rel=0.02)
    assert low[0] < middle[0] < high[0]


def test_a_slow_fall_is_not_spent_within_the_horizon():
    entropy = falling(0.0031, 150, noise=0.02)
    found = forecast(entropy, course(entropy, None))
    assert found is not None
    assert found.horizon == pytest.approx((1 + HORIZON) * 150, abs=5)
    far = falling(0.0009, 500, noise=0.02)
    later = forecast(far, course(far, None))
    assert later is None or later.step is None or later.step > 1500


def test_more_noise_makes_a_wider_interval():
    widths = []
    for noise in (0.02, 0.1):
        entropy = falling(0.008, 120, noise=noise)
        found = forecast(entropy, course(entropy, None))
        assert found is not None
        widths.append((found.high or found.horizon) - found.low)
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("curve", [np.full(100, 0.5), np.linspace(0.3, 0.9, 100), np.exp(-np.arange(100.0))])
def test_there_is_no_forecast_for_a_run_that_does_not_fall_or_is_spent(curve):
    entropy = made(curve)
    assert forecast(entropy, course(entropy, None)) is None


def test_the_ceiling_of_a_run_that_pays_with_entropy():
    h = np.linspace(1.2, 0.2, 80)
    rng = np.random.default_rng(0)
    found = ceiling(made(h), made(0.9 - 0.2 * np.exp(h) + 0.005 * rng.standard_normal(80)))
    assert found is not None
    assert found.holds
    assert found.laws.verdict.value == "exponential"
    assert found.value == pytest.approx(0.7, abs=0.02)
    assert found.low < 0.7 < found.high
    assert 0.8 < found.used < 1


def test_a_reward_that_does_not_follow_entropy_has_no_ceiling():
    rng = np.random.default_rng(1)
    found = ceiling(made(0.5 + 0.02 * rng.standard_normal(100)), made(np.linspace(0, 1, 100)))
    assert found is not None
    assert not found.holds
    assert np.isnan(found.used)
    assert found.laws.exponential.r2 < EXPLAINED


def test_what_cannot_be_fitted_is_none():
    assert ceiling(made([1, 2, 3]), made([1, 2, 3])) is None
    assert ceiling(made(np.linspace(1, 2, 20)), made(np.ones(20))) is None
    assert ceiling(made(np.ones(20)), made(np.linspace(1, 2, 20))) is None
    assert ceiling(made(np.linspace(300, 400, 20)), made(np.linspace(1, 2, 20))) is None
