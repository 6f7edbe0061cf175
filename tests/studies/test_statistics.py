from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from uncollapse.errors import DataError
from uncollapse.studies.statistics import exact, mean_over_seeds, paired_difference

A, B = [1.0, 2.0, 4.0, 3.5, 2.2], [0.5, 1.9, 3.0, 3.6, 1.0]


def test_paired_interval_equals_scipys() -> None:
    estimate = paired_difference(A, B, range(5))
    expected = stats.ttest_rel(A, B).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    assert estimate.value == pytest.approx(np.mean(np.subtract(A, B)))
    assert estimate.values == pytest.approx(tuple(np.subtract(A, B)))
    assert estimate.method == "paired t"


def test_bootstrap_is_repeatable_and_close_to_scipys() -> None:
    estimate = mean_over_seeds(A, range(5))
    assert estimate.bootstrap == mean_over_seeds(A, range(5)).bootstrap
    reference = stats.bootstrap((A,), np.mean, method="percentile", random_state=np.random.default_rng(1))
    assert estimate.bootstrap == pytest.approx(tuple(reference.confidence_interval), abs=0.15)


def test_degenerate() -> None:
    one = mean_over_seeds([2.0], [7])
    assert (one.value, one.low, one.high, one.bootstrap) == (2.0, -math.inf, math.inf, None)
    same = mean_over_seeds([2.0, 2.0, 2.0], range(3))
    assert (same.low, same.high) == (2.0, 2.0)
    assert math.isnan(mean_over_seeds([2.0, math.nan], range(2)).value)
    assert (exact(3.0).low, exact(3.0).high) == (3.0, 3.0)
    with pytest.raises(DataError, match="pair them by seed"):
        paired_difference([1.0], [1.0, 2.0], range(2))
    with pytest.raises(DataError, match="at least one"):
        mean_over_seeds([], [])
