"""Experimental, ours: the layers of a real network read as implicit steps of the central path.

The theory ties the features of a layer to those of a shallower one; 1/beta stands for what the layers in between can do. Turned
round: which 1/beta would make of these features ones as collapsed as those of the next layer? A number to compare layers and
networks by. No theorem says that a layer is such a step, and the answer depends on `lam_w`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Integer
from scipy.optimize import brentq
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.nc_perturbation.moments import PooledMoments, pooled_moments
from uncollapse.representation.nc_perturbation.proximal import proximal_moments

_BETAS = (1e-4, 1e8)
"""Ties so weak or so strong that nothing further can be told."""


@dataclass(frozen=True)
class LayerwiseNC1:
    """NC1~ by layer: `measured`, and `predicted` from the first two; `steps`, the effective 1/beta of each pair of layers.

    `predicted` repeats the implicit step of the first pair, so its first two values are the measured ones and all
    others are predictions. Where NC1~ does not fall from one layer to the next the step is 0, where no step of the theory
    falls as far it is inf, and predictions from such a first pair are NaN.
    """

    layers: tuple[str, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    steps: tuple[float, ...]


def effective_step(
    features: Float[Tensor, "sample feature"],
    following: Float[Tensor, "sample next"],
    y: Integer[Tensor, " sample"],
    *,
    lam_w: float = 0.01,
    lam_h: float = 0.0,
    num_classes: int | None = None,
) -> float:
    """Effective 1/beta (experimental): how long an implicit step from `features` is as collapsed as `following`.

    Solves NC1~(H_{1/beta}(features)) = NC1~(following), features scaled to a mean squared length of 1, which makes the
    answer independent of their scale. 0 if NC1~ does not fall, inf if no step falls as far. `lam_h` only adds
    a shrinkage that NC1~ does not see to first order.

    Raises:
        DataError: NaN, a class without samples, one sample in every class, class means that coincide.
        ConfigError: penalties that the theorems exclude.
    """
    start, target = (pooled_moments(x, y, num_classes).normalised() for x in (features, following))
    return _step_to(start, _checked(target), lam_w, lam_h)


def predict_layerwise_nc1(
    features_by_layer: Mapping[str, Float[Tensor, "sample _"]] | Sequence[Float[Tensor, "sample _"]],
    y: Integer[Tensor, " sample"],
    *,
    lam_w: float = 0.01,
    lam_h: float = 0.0,
    num_classes: int | None = None,
) -> LayerwiseNC1:
    """NC1~ along the layers, the effective 1/beta of each, and what steps as long as the first would give (experimental).

    `features_by_layer` from shallow to deep, of any widths, with or without names: rows are the same samples in all.

    Raises:
        ConfigError: fewer than two layers, or penalties that the theorems exclude.
        DataError: NaN, a class without samples, one sample in every class, class means that coincide.
    """
    named = (
        dict(features_by_layer)
        if isinstance(features_by_layer, Mapping)
        else {str(layer): x for layer, x in enumerate(features_by_layer)}
    )
    if len(named) < 2:
        raise ConfigError(f"predict_layerwise_nc1: {len(named)} layers; give the features of at least two")
    moments = [pooled_moments(x, y, num_classes).normalised() for x in named.values()]
    measured = [_checked(one) for one in moments]
    steps = [_step_to(one, after, lam_w, lam_h) for one, after in zip(moments, measured[1:], strict=False)]
    return LayerwiseNC1(
        tuple(named),
        tuple(measured),
        tuple(_repeat(moments[0], steps[0], len(measured), lam_w, lam_h)),
        tuple(steps),
    )


def _repeat(start: PooledMoments, step: float, count: int, lam_w: float, lam_h: float) -> list[float]:
    """NC1~ of `count` features, each one implicit step from those before."""
    course, now = [float(start.nc1)], start
    for _ in range(count - 1):
        if 0 < step < math.inf:
            now = proximal_moments(now, lam_w, lam_h, 1 / step).moments
        course.append(float(now.nc1) if 0 < step < math.inf else math.nan)
    return course


def _step_to(start: PooledMoments, target: float, lam_w: float, lam_h: float) -> float:
    goal = math.log(target) if target > 0 else -math.inf

    def above(log_beta: float) -> float:
        found = proximal_moments(start, lam_w, lam_h, math.exp(log_beta)).moments.nc1
        return float(found.clamp(min=1e-300).log()) - goal

    if _checked(start) <= target:
        return 0.0
    weak, strong = (math.log(beta) for beta in _BETAS)
    high = 0.0
    while above(high) < 0:
        high += math.log(10)
        if high > strong:
            return 0.0
    low = high - math.log(10)
    while above(low) > 0:
        low -= math.log(10)
        if low < weak:
            return math.inf
    return math.exp(-brentq(above, low, low + math.log(10), xtol=1e-9))


def _checked(moments: PooledMoments) -> float:
    if moments.samples == len(moments.counts):
        raise DataError(
            "near-collapse: every class has a single sample, so there is no within-class variability"
        )
    value = float(moments.nc1)
    if math.isnan(value):
        raise DataError("near-collapse: the class means coincide, so NC1~ is not defined for this layer")
    return value
