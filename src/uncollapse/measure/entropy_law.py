"""The entropy law: validation reward as a function of policy entropy, with its uncertainty and a rival.

Reward and entropy of an RLVR run without entropy control lie close to R = -a exp(H) + b, so that H = 0 puts a
ceiling b - a on the reward (Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models", arXiv 2505.22617). The law is linear in (a, b) with the regressor exp(H): ordinary least squares. NumPy
only, so that reading a log needs no torch.

Differs from the paper:
- Standard errors, a confidence band and a rival law (a straight line in H); the paper reports point fits only.
- Errors of neighbouring training steps are correlated, so standard errors are heteroscedasticity and
  autocorrelation consistent by default, and the comparison of the laws counts effective, not raw, observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil, exp, inf, log, nan, sqrt
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from uncollapse.errors import ConfigError, DataError

Series: TypeAlias = Sequence[float | int | None] | np.ndarray
Errors: TypeAlias = Literal["auto", "hac", "classical"]
Kind: TypeAlias = Literal["exponential", "straight line"]

INDISTINGUISHABLE = 2.0
"""|delta AIC| below which neither law has "substantial" support over the other (Burnham and Anderson, 2002)."""

_HAC_FROM = 20
"""Observations from which `errors="auto"` uses HAC errors: with fewer they are biased too far downwards."""


class LawVerdict(str, Enum):
    """Which law the data prefer; `indistinguishable` if |effective delta AIC| < 2."""

    exponential = "exponential"
    straight_line = "straight line"
    indistinguishable = "indistinguishable"


@dataclass(frozen=True)
class EntropyLaw:
    """A fitted law R = b - a x(H), with x = exp(H) (`exponential`) or x = H (`straight line`).

    `ceiling` is the reward predicted at zero entropy: b - a for the exponential law, b for the line. Rewards, `b`
    and `ceiling` share the unit of the reward; entropies are in nats. `r2` is nan when the reward is constant.
    `aic` is the Gaussian n log(RSS/n) + 2k with k = 3 (a, b and the noise variance), comparable only between laws
    fitted to the same points. `errors` says which standard errors were used, `lags` their Bartlett truncation
    (0 = classical), `df` the degrees of freedom of the Student quantiles used in `interval`.
    """

    kind: Kind
    a: float
    b: float
    ceiling: float
    a_se: float
    b_se: float
    ceiling_se: float
    r2: float
    rmse: float
    aic: float
    n: int
    dropped: int
    errors: Errors
    lags: int
    df: float
    autocorrelation: float
    covariance: Float[np.ndarray, "2 2"] = field(repr=False, compare=False)
    entropy: Float[np.ndarray, " sample"] = field(repr=False, compare=False)
    reward: Float[np.ndarray, " sample"] = field(repr=False, compare=False)

    def predict(self, entropy: Series | float | int) -> Float[np.ndarray, "*shape"]:
        """Reward that the law gives at `entropy` (nats, any shape)."""
        return np.asarray(self.b - self.a * _regressor(self.kind, np.asarray(entropy, dtype=np.float64)))

    def interval(
        self, entropy: Series | float | int, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """Pointwise confidence band (low, high) of the mean reward at `entropy`; not a band for new observations.

        At `entropy` 0 it is the interval of the ceiling. Outside the observed range it knows the uncertainty of
        a and b but not that of the law itself: compare with the rival.
        """
        if not 0 < level < 1:
            raise ConfigError(
                f"level {level:g} is no confidence level; give a number between 0 and 1, such as 0.95"
            )
        from scipy.special import stdtrit  # a lazy import keeps the reading of logs light

        x = _regressor(self.kind, np.asarray(entropy, dtype=np.float64))
        (vaa, vab), (_, vbb) = self.covariance
        half = float(stdtrit(self.df, 0.5 + level / 2)) * np.sqrt(
            np.maximum(vaa * x * x - 2 * vab * x + vbb, 0.0)
        )
        middle = self.predict(entropy)
        return np.asarray(middle - half), np.asarray(middle + half)

    def extrapolate(self, fraction: float) -> Extrapolation:
        """Fit the same law to the first `fraction` of the points (in the order given, that is time) and predict the rest.

        The paper does this with the first 15 % of the steps. Raises `DataError` when fewer than 3 points or only
        one entropy value are left to fit, or nothing to predict.
        """
        if not 0 < fraction < 1:
            raise ConfigError(
                f"fraction {fraction:g} is outside (0, 1); give the share of the points to fit, such as 0.15"
            )
        head = ceil(fraction * self.n)
        if head >= self.n:
            raise DataError(
                f"fraction {fraction} of {self.n} points leaves none to predict; take a smaller fraction"
            )
        law = _fit(self.kind, self.entropy[:head], self.reward[:head], 0, "auto")
        miss = law.predict(self.entropy[head:]) - self.reward[head:]
        return Extrapolation(
            fraction=fraction,
            law=law,
            rmse=float(np.sqrt(np.mean(miss**2))),
            max_error=float(np.max(np.abs(miss))),
            final_error=float(miss[-1]),
            predicted=self.n - head,
        )


@dataclass(frozen=True)
class Extrapolation:
    """How well a law fitted to an early part of a run predicts the rest; errors are predicted minus observed."""

    fraction: float
    law: EntropyLaw
    rmse: float
    max_error: float
    final_error: float
    predicted: int


@dataclass(frozen=True)
class LawComparison:
    """Both laws on the same points. `delta_aic` = AIC(line) - AIC(exponential): positive favours the exponential.

    Neighbouring training steps repeat each other, so AIC, which counts them as independent, overstates the
    evidence. `effective_delta_aic` scales it by `effective_n` / n with effective_n = n (1 - rho) / (1 + rho), rho
    the lag-one autocorrelation (cut to [0, 0.99]) of the residuals of the better law. The verdict is taken on it;
    `evidence_ratio` = exp(|effective_delta_aic| / 2), the relative likelihood of the better law.
    """

    exponential: EntropyLaw
    straight_line: EntropyLaw
    delta_aic: float
    effective_n: float
    effective_delta_aic: float
    evidence_ratio: float
    verdict: LawVerdict


def fit_entropy_law(entropy: Series, reward: Series, *, errors: Errors = "auto") -> EntropyLaw:
    """Fit R = -a exp(H) + b by ordinary least squares in exp(H).

    `entropy` (nats) and `reward` (any unit) are one value per logged step, in the order of time. Points where
    either is NaN or None are dropped (`dropped` counts them). `errors`: `hac` is Newey-West with the Bartlett
    kernel, ceil(1.3 sqrt(n)) lags and Student quantiles of 1.5 n / lags degrees of freedom (Lazarus, Lewis, Stock
    and Watson, 2018); `classical` assumes independent errors of equal variance, which training curves violate and
    which gives intervals that are too narrow; `auto` takes `hac` from 20 points on. Even `hac` is somewhat too
    narrow for strongly persistent curves.

    Raises `DataError` for series of unequal length, fewer than 3 points, constant or infinite entropy.
    Source: arXiv 2505.22617, the fit of section 2; standard errors are ours.
    """
    return _fit("exponential", *_points(entropy, reward), errors)


def fit_straight_line(entropy: Series, reward: Series, *, errors: Errors = "auto") -> EntropyLaw:
    """Fit the rival law R = b - a H by ordinary least squares; arguments and errors as in `fit_entropy_law`."""
    return _fit("straight line", *_points(entropy, reward), errors)


def compare_laws(entropy: Series, reward: Series, *, errors: Errors = "auto") -> LawComparison:
    """Fit both laws to the same points and say which one the data prefer, or that they cannot tell.

    The verdict is `indistinguishable` if |effective delta AIC| < 2 (see `LawComparison`), else the law with the
    smaller AIC. Where entropy spans less than about 0.7 nats the two are nearly the same curve: expect that
    verdict. Arguments and errors as in `fit_entropy_law`.
    """
    h, r, dropped = _points(entropy, reward)
    curve, line = _fit("exponential", h, r, dropped, errors), _fit("straight line", h, r, dropped, errors)
    delta = line.aic - curve.aic
    rho = min(max((curve if delta >= 0 else line).autocorrelation, 0.0), 0.99)
    effective = curve.n * (1 - rho) / (1 + rho)
    evidence = delta * effective / curve.n
    if abs(evidence) < INDISTINGUISHABLE:
        verdict = LawVerdict.indistinguishable
    else:
        verdict = LawVerdict.exponential if evidence > 0 else LawVerdict.straight_line
    ratio = exp(abs(evidence) / 2) if abs(evidence) < 1400 else inf
    return LawComparison(curve, line, delta, effective, evidence, ratio, verdict)


def _regressor(kind: Kind, entropy: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(entropy) if kind == "exponential" else entropy)


def _points(entropy: Series, reward: Series) -> tuple[np.ndarray, np.ndarray, int]:
    h, r = (np.asarray(values, dtype=np.float64).ravel() for values in (entropy, reward))
    if h.shape != r.shape:
        raise DataError(f"{h.size} entropies but {r.size} rewards; give one of each per logged step")
    known = ~(np.isnan(h) | np.isnan(r))
    return h[known], r[known], int(h.size - known.sum())


def _fit(kind: Kind, entropy: np.ndarray, reward: np.ndarray, dropped: int, errors: Errors) -> EntropyLaw:
    x, n = _usable_regressor(kind, entropy, reward), entropy.size
    centre, middle = x.mean(), reward.mean()
    deviation = x - centre
    spread = float(deviation @ deviation)
    a = -float(deviation @ (reward - middle)) / spread
    b = float(middle + a * centre)
    residual = reward - middle + a * deviation
    rss, total = float(residual @ residual), float(((reward - middle) ** 2).sum())
    if errors == "auto":
        errors = "hac" if n >= _HAC_FROM else "classical"
    lags = min(ceil(1.3 * sqrt(n)), n - 2) if errors == "hac" else 0
    # In the centred parameters (a, mean reward) the design is orthogonal, which keeps the inverse well conditioned.
    design = np.stack([-deviation, np.ones(n)], axis=1)
    inverse = np.diag([1 / spread, 1 / n])
    if errors == "hac":
        centred = inverse @ _long_run(design * residual[:, None], lags) @ inverse * (n / (n - 2))
    else:
        centred = inverse * rss / (n - 2)
    back = np.array([[1.0, 0.0], [centre, 1.0]])  # b = mean + a * centre
    covariance = back @ centred @ back.T
    at_zero = np.array([-1.0 if kind == "exponential" else 0.0, 1.0])
    a_se, b_se = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    return EntropyLaw(
        kind=kind,
        a=a,
        b=b,
        ceiling=float(at_zero @ (a, b)),
        a_se=float(a_se),
        b_se=float(b_se),
        ceiling_se=sqrt(max(float(at_zero @ covariance @ at_zero), 0.0)),
        r2=1 - rss / total if np.ptp(reward) > 0 else nan,
        rmse=sqrt(rss / n),
        aic=_aic(rss, reward),
        n=n,
        dropped=dropped,
        errors=errors,
        lags=lags,
        df=1.5 * n / lags if errors == "hac" else n - 2.0,
        autocorrelation=float(residual[1:] @ residual[:-1]) / rss if rss > 0 else 0.0,
        covariance=covariance,
        entropy=entropy,
        reward=reward,
    )


def _usable_regressor(kind: Kind, entropy: np.ndarray, reward: np.ndarray) -> np.ndarray:
    if entropy.size < 3:
        raise DataError(f"{entropy.size} points with entropy and reward; the law needs at least 3")
    with np.errstate(over="ignore"):
        x = _regressor(kind, entropy)
    if not (np.isfinite(x).all() and np.isfinite(reward).all()):
        raise DataError(
            "entropy (or its exponential) or reward is infinite; give entropies in nats and finite rewards"
        )
    if np.ptp(x) <= 1e-12 * np.abs(x).max():
        raise DataError(
            f"entropy is constant ({entropy[0]:.6g} nats); the law needs a run in which entropy moves"
        )
    return x


def _long_run(scores: np.ndarray, lags: int) -> np.ndarray:
    """Newey-West sum of autocovariances of `scores` (sample, parameter) with Bartlett weights."""
    total = scores.T @ scores
    for lag in range(1, lags + 1):
        step = scores[lag:].T @ scores[:-lag]
        total = total + (1 - lag / (lags + 1)) * (step + step.T)
    return np.asarray(total)


def _aic(rss: float, reward: np.ndarray) -> float:
    """Gaussian AIC; RSS is floored at rounding error, below which differences between laws mean nothing."""
    n = reward.size
    floor = (
        n * (16 * np.finfo(np.float64).eps * max(float(np.abs(reward).max()), np.finfo(np.float64).tiny)) ** 2
    )
    return n * log(max(rss, floor, np.finfo(np.float64).tiny) / n) + 2 * 3
