"""Class statistics: counts, means and spread of the classes, and the scatter between them in its own basis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure._blocks import blocks

ZERO = 1e-12
"""A vector this short beside the longest one is rounding: it has no direction."""

_CUT = 1e-8
"""Singular values of the centred means below this share of the largest are rounding."""


@dataclass(frozen=True)
class ClassMoments:
    """Counts, means and spread of the classes: what NC1 to NC3 need to know about the samples.

    Attributes:
        counts: samples of each class.
        means: mean feature of each class; 0 for a class without samples, which no metric looks at.
        variances: mean squared distance of the samples of a class from their mean (trace of its covariance, ddof 0).
    """

    counts: Int[Tensor, " class"]
    means: Float[Tensor, "class feature"]
    variances: Float[Tensor, " class"]

    @property
    def seen(self) -> Bool[Tensor, " class"]:
        """Classes with at least one sample."""
        return self.counts > 0

    @property
    def within(self) -> Float[Tensor, ""]:
        """tr Sigma_W: mean squared distance of a sample from the mean of its class."""
        return (self.counts * self.variances).sum() / self.counts.sum()


def class_moments(
    H: Float[Tensor, "sample feature"], y: Int[Tensor, " sample"], num_classes: int | None = None
) -> ClassMoments:
    """Moments of the classes 0 to `num_classes` - 1 (default: the largest label).

    Two passes, so that a large common offset does not drown the spread. O(N d) time, O(K d) memory.

    Raises:
        DataError: no samples, NaN or inf, labels outside the classes, another number of labels than samples.
    """
    classes, y = _checked_labels(H, y, num_classes), y.long()  # an index of bytes would be a mask
    counts = torch.bincount(y, minlength=classes)
    sums = H.new_zeros(classes, H.shape[1], dtype=torch.float64)
    for rows in blocks(len(H), H.shape[1]):
        sums.index_add_(0, y[rows], H[rows].double())
    means = sums / counts.clamp(min=1)[:, None]
    squares = means.new_zeros(classes)
    for rows in blocks(len(H), H.shape[1]):
        squares.index_add_(0, y[rows], (H[rows].double() - means[y[rows]]).square().sum(-1))
    return ClassMoments(counts, means, squares / counts.clamp(min=1))


@dataclass(frozen=True)
class BetweenClasses:
    """Sigma_B in its own basis, of the classes that were seen.

    Attributes:
        centred: mu_k - mu of the classes seen.
        directions: orthonormal eigenvectors of Sigma_B with eigenvalue above rounding, at most K - 1.
        variances: their eigenvalues, largest first.
        trace: tr Sigma_B.
    """

    centred: Float[Tensor, "seen feature"]
    directions: Float[Tensor, "direction feature"]
    variances: Float[Tensor, " direction"]
    trace: Float[Tensor, ""]


def between_classes(
    moments: ClassMoments, *, mean: str = "class", weights: str = "uniform"
) -> BetweenClasses:
    """Decompose Sigma_B through a thin SVD of the centred means; no (feature, feature) matrix.

    Raises:
        ConfigError: `mean` other than "class" and "sample", or `weights` other than "uniform" and "sample".
    """
    for name, value, known in (
        ("mean", mean, ("class", "sample")),
        ("weights", weights, ("uniform", "sample")),
    ):
        if value not in known:
            raise ConfigError(f"neural collapse: {name} is {value!r}; give {known[0]!r} or {known[1]!r}")
    seen = moments.seen
    means, counts = moments.means[seen].double(), moments.counts[seen].double()
    uniform, share = torch.full_like(counts, 1 / max(1, len(counts))), counts / counts.sum()
    centred = means - (uniform if mean == "class" else share) @ means
    # rounding of equal means is no direction
    centred = torch.where(centred.norm() > ZERO * means.norm(), centred, 0)
    scaled = (uniform if weights == "uniform" else share).sqrt()[:, None] * centred
    _, values, directions = torch.linalg.svd(scaled, full_matrices=False)
    kept = (values > _CUT * values[:1]) & (torch.arange(len(values), device=values.device) < len(means) - 1)
    return BetweenClasses(centred, directions[kept], values[kept].square(), scaled.square().sum())


def variance_along(
    H: Float[Tensor, "sample feature"],
    y: Int[Tensor, " sample"],
    means: Float[Tensor, "class feature"],
    directions: Float[Tensor, "direction feature"],
) -> Float[Tensor, " direction"]:
    """u^T Sigma_W u for every direction u: within-class variance along it.

    From a pooled covariance the same is `((directions @ covariance) * directions).sum(-1)`.
    """
    total, y = directions.new_zeros(len(directions)), y.long()
    for rows in blocks(len(H), H.shape[1]):
        total = total + ((H[rows].double() - means[y[rows]]) @ directions.T).square().sum(0)
    return total / len(H)


def _checked_labels(H: Tensor, y: Tensor, num_classes: int | None) -> int:
    if len(H) != len(y) or not len(H):
        raise DataError(
            f"neural collapse: {len(H)} rows of features for {len(y)} labels; give one each, at least one"
        )
    if not bool(H.detach().isfinite().all()):
        bad = int((~H.detach().isfinite()).any(-1).sum())
        raise DataError(
            f"neural collapse: {bad} of {len(H)} rows of features contain NaN or inf; leave them out"
        )
    low, high = int(y.min()), int(y.max())
    classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= classes:
        raise DataError(f"neural collapse: labels from {low} to {high} for classes 0 to {classes - 1}")
    return classes
