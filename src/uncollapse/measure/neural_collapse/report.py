"""All metrics at once: from arrays, or from class statistics that somebody accumulated."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.neural_collapse import metrics
from uncollapse.measure.neural_collapse.moments import (
    ZERO,
    BetweenClasses,
    ClassMoments,
    between_classes,
    class_moments,
    variance_along,
)


@dataclass(frozen=True)
class NCReport:
    """All metrics of neural collapse, over the classes that were seen; 0 means collapsed, NaN not defined.

    `None` where there was no classifier, or a statistic was not given. Means are centred, except for `nc2_of_means` and
    `nc3_of`, whose frame has its origin at 0.

    Attributes:
        samples: how many.
        classes: classes with at least one sample.
        unseen: classes without any; left out of every metric, W's rows for them included.
        singletons: classes with one sample, which add nothing to Sigma_W.
        rank: directions of Sigma_B that NC1 inverts, at most min(classes - 1, features).
        degenerate: what was wrong with the input, empty if nothing: "unseen classes", "single samples" (some classes),
            "no within-class scatter" (all classes), "one class", "equal means", "zero means" (of some classes, after
            centring), "zero weights" (of some classes).
    """

    samples: int
    classes: int
    unseen: int
    singletons: int
    rank: int
    nc1_pinv: float | None
    nc1_quotient: float
    nc2_equinorm_means: float
    nc2_equiangular_means: float
    nc2_cosine_std_means: float
    nc2_etf_means: float
    nc2_of_means: float
    nc2_equinorm_weights: float | None
    nc2_equiangular_weights: float | None
    nc2_cosine_std_weights: float | None
    nc2_etf_weights: float | None
    nc2_of_weights: float | None
    nc3_etf: float | None
    nc3_of: float | None
    nc3_dist: float | None
    nc4: float | None
    degenerate: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """The metrics that were computed by name, NaN included: what a logger takes."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("nc")}
        return {name: value for name, value in values.items() if value is not None}


def nc_metrics(
    H: Float[Tensor, "sample feature"],
    y: Int[Tensor, " sample"],
    W: Float[Tensor, "class feature"] | None = None,
    b: Float[Tensor, " class"] | None = None,
    num_classes: int | None = None,
    mean: str = "class",
    weights: str = "uniform",
) -> NCReport:
    """All metrics of features H with labels y and, if given, the classifier W h + b.

    O(N d K) time, a few MB beside the input. Measure in evaluation mode: batch norm and dropout blur the features.

    Args:
        num_classes: default: rows of W, or the largest label + 1.
        mean: what means are centred by: mean of the "class" means, or of all "sample"s. The same if balanced.
        weights: of the classes in Sigma_B: "uniform", or by "sample"s.

    Raises:
        DataError: no samples, NaN or inf, labels outside the classes, shapes that do not fit.
        ConfigError: another `mean` or `weights`, or b without W.
    """
    if W is None and b is not None:
        raise ConfigError("nc_metrics: b is the bias of W; give W too")
    moments = class_moments(H, y, len(W) if num_classes is None and W is not None else num_classes)
    between = between_classes(moments, mean=mean, weights=weights)
    decided = None
    if W is not None:
        _check_classifier(W, b, moments)
        seen = moments.seen
        decided = metrics.nc4(H, moments.means[seen], W[seen], None if b is None else b[seen])
    along = variance_along(H, y, moments.means, between.directions)
    return nc_report(moments, between, within_along=along, W=W, nc4=decided)


def nc_report(
    moments: ClassMoments,
    between: BetweenClasses,
    *,
    within_along: Float[Tensor, " direction"] | None = None,
    W: Float[Tensor, "class feature"] | None = None,
    nc4: Float[Tensor, ""] | None = None,
) -> NCReport:
    """The report from class statistics, wherever they come from.

    Args:
        between: `between_classes(moments, ...)`, which fixes how means are centred and weighted.
        within_along: `variance_along` the directions of `between`; without it there is no `nc1_pinv`.
        nc4: share of samples on which the two rules differ, if somebody counted it.

    Raises:
        DataError: no samples, NaN or inf in the moments, a classifier that does not fit.
    """
    if not bool(
        (moments.counts.sum() > 0) & moments.means.isfinite().all() & moments.variances.isfinite().all()
    ):
        raise DataError("neural collapse: the class moments are empty, or contain NaN or inf")
    seen = moments.seen
    values = {
        "nc1_pinv": None if within_along is None else metrics.pinv_of(moments, between, within_along),
        "nc1_quotient": metrics.quotient_of(moments, between),
        **_frame(between.centred, moments.means[seen], "means"),
    }
    rows = None
    if W is not None:
        _check_classifier(W, None, moments)
        rows = W[seen].double()
        values |= _frame(rows, rows, "weights") | {
            "nc3_etf": metrics.nc3_etf(rows, between.centred),
            "nc3_of": metrics.nc3_of(rows, moments.means[seen]),
            "nc3_dist": metrics.nc3_dist(rows, between.centred),
        }
    values["nc4"] = nc4
    given = {name: value for name, value in values.items() if value is not None}
    numbers = torch.stack([value.detach().double() for value in given.values()]).tolist()
    found: dict[str, Any] = {f.name: None for f in fields(NCReport) if f.name.startswith("nc")}
    found |= zip(given, numbers, strict=True)
    return NCReport(
        samples=int(moments.counts.sum()),
        classes=len(between.centred),
        unseen=len(moments.counts) - len(between.centred),
        singletons=int((moments.counts == 1).sum()),
        rank=len(between.directions),
        degenerate=_reasons(moments, between, rows),
        **found,
    )


def _frame(rows: Tensor, uncentred: Tensor, name: str) -> dict[str, Tensor | None]:
    angle, spread = metrics.nc2_equiangular(rows)
    return {
        f"nc2_equinorm_{name}": metrics.nc2_equinorm(rows),
        f"nc2_equiangular_{name}": angle,
        f"nc2_cosine_std_{name}": spread,
        f"nc2_etf_{name}": metrics.nc2_etf(rows),
        f"nc2_of_{name}": metrics.nc2_of(uncentred),
    }


def _reasons(moments: ClassMoments, between: BetweenClasses, W: Tensor | None) -> tuple[str, ...]:
    single = bool(metrics.no_scatter(moments))
    equal = bool(between.trace == 0)
    found = {
        "unseen classes": bool((moments.counts == 0).any()),
        "single samples": not single and bool((moments.counts == 1).any()),
        "no within-class scatter": single,
        "one class": len(between.centred) == 1,
        "equal means": len(between.centred) > 1 and equal,
        "zero means": not equal and _has_zero_row(between.centred),
        "zero weights": W is not None and _has_zero_row(W),
    }
    return tuple(reason for reason, holds in found.items() if holds)


def _has_zero_row(rows: Tensor) -> bool:
    norms = rows.norm(dim=-1)
    return bool((norms <= ZERO * norms.amax()).any())


def _check_classifier(W: Tensor, b: Tensor | None, moments: ClassMoments) -> None:
    if W.shape != moments.means.shape or (b is not None and len(b) != len(W)):
        biases = "" if b is None else f" with {len(b)} biases"
        classes, features = moments.means.shape
        raise DataError(
            f"neural collapse: W is {tuple(W.shape)}{biases}, the class means are {(classes, features)}; "
            "rows are classes, as in torch.nn.Linear.weight"
        )
    if not bool(W.detach().isfinite().all()) or (b is not None and not bool(b.detach().isfinite().all())):
        raise DataError("neural collapse: the classifier contains NaN or inf")
