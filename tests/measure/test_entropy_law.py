from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.entropy_law import (
    LawVerdict,
    compare_laws,
    fit_entropy_law,
    fit_straight_line,
)

H = np.linspace(2.3, 0.1, 60)
coefficients = st.floats(-2, 2).filter(lambda v: abs(v) > 1e-3)


def noisy(seed: int, size: int = 60, scale: float = 0.02) -> np.ndarray:
    return 0.9 - 0.08 * np.exp(H[:size]) + scale * np.random.default_rng(seed).normal(size=size)


@settings(max_examples=50, deadline=None)
@given(a=coefficients, b=coefficients)
def test_noiseless_law_is_recovered(a: float, b: float) -> None:
    law = fit_entropy_law(H, b - a * np.exp(H))
    assert law.a == pytest.approx(a, abs=1e-10)
    assert law.b == pytest.approx(b, abs=1e-10)
    assert law.ceiling == pytest.approx(b - a, abs=1e-10)
    assert law.r2 == pytest.approx(1)
    assert law.extrapolate(0.15).rmse == pytest.approx(0, abs=1e-9)
    line = fit_straight_line(H, b - a * H)
    assert (line.a, line.b, line.ceiling) == pytest.approx((a, b, b), abs=1e-10)


def test_classical_errors_equal_the_textbook_formula() -> None:
    reward = noisy(0)
    law = fit_entropy_law(H, reward, errors="classical")
    design = np.stack([-np.exp(H), np.ones_like(H)], axis=1)
    solution, *_ = np.linalg.lstsq(design, reward, rcond=None)
    residual = reward - design @ solution
    covariance = np.linalg.inv(design.T @ design) * (residual @ residual) / (len(H) - 2)
    np.testing.assert_allclose((law.a, law.b), solution, rtol=1e-9)
    np.testing.assert_allclose(law.covariance, covariance, rtol=1e-7)
    assert (law.a_se, law.b_se) == pytest.approx(tuple(np.sqrt(np.diag(covariance))), rel=1e-7)
    gradient = np.array([-1.0, 1.0])
    assert law.ceiling_se == pytest.approx(math.sqrt(gradient @ covariance @ gradient), rel=1e-7)
    assert law.aic == pytest.approx(len(H) * math.log(residual @ residual / len(H)) + 6)


def test_hac_errors_equal_a_naive_newey_west() -> None:
    reward = noisy(1)
    law = fit_entropy_law(H, reward, errors="hac")
    n, design = len(H), np.stack([-np.exp(H), np.ones_like(H)], axis=1)
    scores = design * (reward - design @ (law.a, law.b))[:, None]
    meat = np.zeros((2, 2))
    for i in range(n):
        for j in range(n):
            meat += max(0.0, 1 - abs(i - j) / (law.lags + 1)) * np.outer(scores[i], scores[j])
    bread = np.linalg.inv(design.T @ design)
    np.testing.assert_allclose(law.covariance, bread @ meat @ bread * n / (n - 2), rtol=1e-6)
    assert law.lags == math.ceil(1.3 * math.sqrt(n))


def test_hac_intervals_cover_the_ceiling_far_more_often_when_noise_is_correlated() -> None:
    rng, covered = np.random.default_rng(3), {"hac": 0, "classical": 0}
    entropy = np.linspace(1.5, 0.1, 150)
    for _ in range(200):
        noise = np.zeros(150)
        for t in range(1, 150):
            noise[t] = 0.8 * noise[t - 1] + 0.01 * rng.normal()
        for errors in covered:
            low, high = fit_entropy_law(entropy, 0.9 - 0.1 * np.exp(entropy) + noise, errors=errors).interval(
                0.0
            )
            covered[errors] += bool(low <= 0.8 <= high)
    assert covered["hac"] > 150 > 120 > covered["classical"]


def test_automatic_errors_are_named_in_the_result() -> None:
    assert fit_entropy_law(H, noisy(0)).errors == "hac"
    short = fit_entropy_law(H[:10], noisy(0, 10))
    assert (short.errors, short.lags, short.df) == ("classical", 0, 8)


def test_band_is_the_ceiling_interval_at_zero_and_widens_with_the_level() -> None:
    law = fit_entropy_law(H, noisy(2))
    low, high = law.interval(0.0)
    assert (low + high) / 2 == pytest.approx(law.ceiling)
    wide_low, wide_high = law.interval(0.0, level=0.99)
    assert wide_low < low < high < wide_high
    band_low, band_high = law.interval(H)
    assert band_low.shape == H.shape
    assert (band_low <= law.predict(H)).all()
    assert (law.predict(H) <= band_high).all()
    with pytest.raises(ConfigError, match="level 95 is no confidence level"):
        law.interval(0.0, level=95.0)


def test_extrapolation_fits_the_head_and_judges_the_tail() -> None:
    reward = noisy(4)
    result = fit_entropy_law(H, reward).extrapolate(0.5)
    head = fit_entropy_law(H[:30], reward[:30])
    miss = head.predict(H[30:]) - reward[30:]
    assert (result.law.a, result.law.b, result.predicted) == (head.a, head.b, 30)
    assert result.rmse == pytest.approx(math.sqrt((miss**2).mean()))
    assert result.max_error == pytest.approx(abs(miss).max())
    assert result.final_error == pytest.approx(miss[-1])
    with pytest.raises(DataError, match="needs at least 3"):
        fit_entropy_law(H, reward).extrapolate(0.01)
    with pytest.raises(DataError, match="leaves none to predict"):
        fit_entropy_law(H, reward).extrapolate(0.999)
    with pytest.raises(ConfigError, match="fraction 15 is outside"):
        fit_entropy_law(H, reward).extrapolate(15.0)


def test_verdicts() -> None:
    rng = np.random.default_rng(5)
    noise = 0.01 * rng.normal(size=60)
    curved = compare_laws(H, 0.9 - 0.08 * np.exp(H) + noise)
    assert curved.verdict is LawVerdict.exponential
    assert curved.delta_aic > curved.effective_delta_aic > 2
    straight = compare_laws(H, 0.9 - 0.3 * H + noise)
    assert straight.verdict is LawVerdict.straight_line
    assert straight.effective_delta_aic < -2
    low = 0.3 * H / H.max()
    assert compare_laws(low, 0.9 - 0.3 * low + 2 * noise).verdict is LawVerdict.indistinguishable
    assert curved.evidence_ratio == pytest.approx(math.exp(curved.effective_delta_aic / 2))


def test_constant_reward_prefers_no_law() -> None:
    comparison = compare_laws(H, np.full(60, 0.7))
    assert comparison.verdict is LawVerdict.indistinguishable
    assert math.isnan(comparison.exponential.r2)
    assert comparison.exponential.ceiling == pytest.approx(0.7)
    assert compare_laws(H, np.zeros(60)).verdict is LawVerdict.indistinguishable


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 100))
def test_fit_follows_the_unit_of_the_reward(scale: float, shift: float, seed: int) -> None:
    law, other = fit_entropy_law(H, noisy(seed)), fit_entropy_law(H, scale * noisy(seed) + shift)
    assert other.a == pytest.approx(scale * law.a, rel=1e-6)
    assert other.ceiling == pytest.approx(scale * law.ceiling + shift, rel=1e-6, abs=1e-9)
    assert other.ceiling_se == pytest.approx(scale * law.ceiling_se, rel=1e-5)
    assert other.r2 == pytest.approx(law.r2, rel=1e-6)


def test_missing_points_are_dropped_pairwise_and_counted() -> None:
    entropy, reward = list(H), list(noisy(6))
    entropy[3], reward[7], reward[8] = float("nan"), None, float("nan")
    law = fit_entropy_law(entropy, reward)
    keep = [i for i in range(60) if i not in (3, 7, 8)]
    assert (law.n, law.dropped) == (57, 3)
    assert law.a == pytest.approx(fit_entropy_law(H[keep], noisy(6)[keep]).a)


@pytest.mark.parametrize(
    ("entropy", "reward", "message"),
    [
        ([1.0, 2.0], [0.1, 0.2], "2 points with entropy and reward"),
        ([], [], "0 points"),
        ([1.0, 2.0, float("nan")], [0.1, 0.2, 0.3], "2 points"),
        ([1.0, 1.0, 1.0], [0.1, 0.2, 0.3], "entropy is constant"),
        ([1.0, 2.0, 3.0], [0.1, 0.2], "3 entropies but 2 rewards"),
        ([1.0, 2.0, 1e4], [0.1, 0.2, 0.3], "infinite"),
        ([1.0, 2.0, 3.0], [0.1, 0.2, float("inf")], "infinite"),
    ],
)
def test_bad_input_is_named(entropy: list[float], reward: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_entropy_law(entropy, reward)


def test_three_points_are_enough() -> None:
    law = fit_entropy_law([1.0, 0.5, 0.2], [0.1, 0.4, 0.45])
    assert law.n == 3
    assert math.isfinite(law.ceiling_se)
    assert all(math.isfinite(float(v)) for v in law.interval(0.0))
    fit_entropy_law([1.0, 0.5, 0.2], [0.1, 0.4, 0.45], errors="hac")
