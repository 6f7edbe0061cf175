"""When the entropy will be spent, and what reward it can still buy."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, inf, log, nan, sqrt

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from uncollapse.diagnose.phases import FEWEST, SPENT, Course
from uncollapse.diagnose.series import Series
from uncollapse.errors import DataError
from uncollapse.measure.entropy_law import LawComparison, LawVerdict, compare_laws

HORIZON = 3.0
"""How far the forecast looks, in lengths of the run so far. Further ahead a straight line in log-entropy is a guess."""

EXPLAINED = 0.5
"""R squared from which the entropy law is taken to describe the run, so that its ceiling means something."""


@dataclass(frozen=True)
class Forecast:
    """The step at which entropy falls below `target` nats if it keeps its present pace.

    `step` is None if that lies beyond `horizon` (a step) or the entropy does not fall; `low` and `high` bound it at 95 %
    (`high` None: no bound within the horizon). `start`, `decay` and `origin` give the line
    H = start * exp(-decay * (step - origin)) in nats per token and 1/steps; `variance` is that of log `start` and of `decay`,
    independent at `origin`, `quantile` the Student quantile of the band.
    """

    target: float
    horizon: int
    step: int | None
    low: int | None
    high: int | None
    start: float
    decay: float
    origin: float
    fitted_from: int
    variance: tuple[float, float]
    quantile: float

    def line(
        self, steps: Float[np.ndarray, " step"]
    ) -> tuple[Float[np.ndarray, " step"], Float[np.ndarray, " step"], Float[np.ndarray, " step"]]:
        """Middle, low and high of the forecast entropy (nats) at `steps`, 95 % band of the mean."""
        ahead = steps - self.origin
        middle = log(self.start) - self.decay * ahead
        level, slope = self.variance
        half = self.quantile * np.sqrt(level + slope * ahead**2)
        return np.exp(middle), np.exp(middle - half), np.exp(middle + half)


def forecast(entropy: Series, course: Course) -> Forecast | None:
    """Straight line in log-entropy over the phase in which it falls now, carried on; None unless the run is collapsing.

    The interval is Fieller's: all steps at which the confidence band of the line meets the target, whose own error (it is a
    share of a noisy start) counts as well. Autocorrelated steps count as few.
    """
    if course.state != "collapsing":
        return None
    binned = entropy.binned()
    part = binned.step >= course.phases[-1].first
    step, value = binned.step[part], np.maximum(binned.value[part], 1e-3 * course.start)
    if len(step) < 5:
        return None
    return _fit(
        step,
        np.log(value),
        SPENT * course.start,
        (entropy.start_error / course.start) ** 2,
        float(entropy.step[0]),
    )


def _fit(step: np.ndarray, values: np.ndarray, target: float, target_var: float, begin: float) -> Forecast:
    n, origin, now = len(step), float(step.mean()), float(step[-1])
    along = step - origin
    spread = float(along @ along)
    slope, level = -float(along @ values) / spread, float(values.mean())
    rest = values - level + slope * along
    power = float(rest @ rest)
    rho = float(rest[1:] @ rest[:-1]) / power if power > 0 else 0.0
    # About a fitted line the autocorrelation comes out too small by (2 + 4 rho) / n, which matters in short phases.
    rho = min(max((n * rho + 2) / (n - 4), 0.0), 0.95)
    repeats = (1 + rho) / (1 - rho)
    variance = power / max(n - 2, 1) * repeats
    quantile = float(stdtrit(max(n / repeats - 2, 1.0), 0.975))
    horizon = now + HORIZON * max(now - begin, 1.0)
    step_at = origin + (level - log(target)) / slope if slope > 0 else inf
    low, high = _fieller(level - log(target), slope, variance / n + target_var, variance / spread, quantile)
    return Forecast(
        target=target,
        horizon=ceil(horizon),
        step=ceil(step_at) if step_at <= horizon else None,
        low=max(floor(origin + low), ceil(now)) if origin + low <= horizon else None,
        high=ceil(origin + high) if origin + high <= horizon else None,
        start=float(np.exp(level)),
        decay=slope,
        origin=origin,
        fitted_from=int(step[0]),
        variance=(variance / n, variance / spread),
        quantile=quantile,
    )


def _fieller(
    level: float, slope: float, level_var: float, slope_var: float, quantile: float
) -> tuple[float, float]:
    """Bounds of level / slope, independent estimates: (level - slope x)^2 = q^2 (level_var + slope_var x^2)."""
    q2 = quantile**2
    a, c = slope**2 - q2 * slope_var, level**2 - q2 * level_var
    if slope <= 0:
        return inf, inf
    root = (level * slope) ** 2 - a * c
    if a <= 0:  # the slope may be zero: no upper bound
        return (c / (level * slope + sqrt(max(root, 0.0))) if level > 0 else -inf), inf
    return (level * slope - sqrt(max(root, 0.0))) / a, (level * slope + sqrt(max(root, 0.0))) / a


@dataclass(frozen=True)
class Ceiling:
    """What the entropy law says about the run.

    `laws` are both fits; `reward_column` the reward they were fitted to. `holds`: reward is bought with entropy and the
    better law explains half of its variation or more. `value` (with `low`, `high`, 95 %) is the reward at zero entropy of
    the better law, the exponential one where they cannot be told apart. `used` is the share of the way from the first
    reward to `value` that the run has gone; nan where the law does not hold.
    """

    laws: LawComparison
    reward_column: str
    holds: bool
    value: float
    low: float
    high: float
    used: float


def ceiling(entropy: Series, reward: Series) -> Ceiling | None:
    """Fit the laws to the steps that have both; None if they cannot be fitted or there are fewer than `FEWEST`."""
    common, mine, theirs = np.intersect1d(entropy.step, reward.step, return_indices=True)
    if common.size < FEWEST:
        return None
    pair = (Series("", common, column).binned() for column in (entropy.value[mine], reward.value[theirs]))
    h, r = (one.value for one in pair)
    if np.ptp(r) == 0 or h.max() > 50:  # exp(H) of a sum over tokens, mistaken for a mean, would overflow
        return None
    try:
        laws = compare_laws(h, r)
    except DataError:
        return None
    better = laws.straight_line if laws.verdict is LawVerdict.straight_line else laws.exponential
    low, high = (float(edge) for edge in better.interval(0.0))
    gone, way = reward.end - reward.start, better.ceiling - reward.start
    holds = better.a > SIGNIFICANT_A * better.a_se and better.r2 >= EXPLAINED and way > 0
    return Ceiling(laws, reward.name, bool(holds), better.ceiling, low, high, gone / way if holds else nan)


SIGNIFICANT_A = 3.0
"""Standard errors by which the law's slope has to be positive: reward is paid for with entropy, not with time alone."""
