"""Estimates with intervals: means over seeds, differences paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uncollapse.errors import DataError

LEVEL = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval `low`..`high` at `level`, and the values per seed that it comes from.

    `method` says how the interval was found: `exact` (a deterministic computation: the interval is the value), `t`
    (Student over seeds) or `paired t` (Student over differences paired by seed). With one seed the interval is
    infinite. `bootstrap` is the percentile bootstrap interval over the same values, None where nothing was resampled.
    """

    value: float
    low: float
    high: float
    method: str
    level: float = LEVEL
    seeds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    bootstrap: tuple[float, float] | None = None


def exact(value: float) -> Estimate:
    """A number that a repetition would give again, such as the result of an exact computation."""
    return Estimate(value, value, value, "exact")


def mean_over_seeds(values: Sequence[float], seeds: Sequence[int], *, level: float = LEVEL) -> Estimate:
    """Mean with the Student interval over seeds, and the percentile bootstrap beside it.

    Raises `DataError` for no value or another number of seeds. A NaN among the values makes the estimate NaN.
    """
    return _over_seeds(np.asarray(values, dtype=np.float64), seeds, level, "t")


def paired_difference(
    treated: Sequence[float], control: Sequence[float], seeds: Sequence[int], *, level: float = LEVEL
) -> Estimate:
    """Mean of treated - control with the paired Student interval: entry i of both comes from the same seed.

    With few seeds read the bootstrap with care: it is too narrow (below 10 pairs by a fifth and more), which is why
    verdicts use the Student interval. Raises `DataError` for unequal lengths.
    """
    if len(treated) != len(control):
        raise DataError(f"{len(treated)} treated but {len(control)} control values; pair them by seed")
    return _over_seeds(np.subtract(treated, control), seeds, level, "paired t")


def _over_seeds(values: np.ndarray, seeds: Sequence[int], level: float, method: str) -> Estimate:
    n = values.size
    if n == 0 or n != len(seeds):
        raise DataError(f"{n} values for {len(seeds)} seeds; give one value per seed and at least one")
    mean = float(values.mean())
    if n == 1:
        half, spread = np.inf, None
    else:
        from scipy import stats

        half = float(stats.t.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
        draws = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
        low, high = np.quantile(values[draws].mean(1), [0.5 - level / 2, 0.5 + level / 2])
        spread = (float(low), float(high))
    return Estimate(
        value=mean,
        low=mean - half,
        high=mean + half,
        method=method,
        level=level,
        seeds=tuple(seeds),
        values=tuple(values.tolist()),
        bootstrap=spread,
    )
