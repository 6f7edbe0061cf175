"""Counts, means and pooled scatter of the classes: all of the features that the theory looks at.

Given the head, the gradient of every sample is the same linear map of its features plus a shift that its class decides.
So whatever the flow and the implicit step do to N samples, they do to these moments, at a cost that N does not enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.neural_collapse import class_moments


@dataclass(frozen=True)
class PooledMoments:
    """Sizes n_k and means h_k of the classes, and the scatter sum (h - h_k)(h - h_k)^T of all samples, in float64."""

    counts: Float[Tensor, " class"]
    means: Float[Tensor, "class feature"]
    scatter: Float[Tensor, "feature feature"]

    @property
    def samples(self) -> Float[Tensor, ""]:
        """N."""
        return self.counts.sum()

    @property
    def sums(self) -> Float[Tensor, "class feature"]:
        """Y^T H: n_k h_k."""
        return self.counts[:, None] * self.means

    @property
    def gram(self) -> Float[Tensor, "feature feature"]:
        """H^T H."""
        return self.scatter + self.means.T @ self.sums

    @property
    def trace_w(self) -> Float[Tensor, ""]:
        """Trace of the within-class covariance: mean squared distance of a sample from the mean of its class."""
        return self.scatter.trace() / self.samples

    @property
    def trace_b(self) -> Float[Tensor, ""]:
        """Trace of the between-class covariance: mean squared distance of the class means from their mean."""
        return (self.means - self.means.mean(0)).square().sum(1).mean()

    @property
    def nc1(self) -> Float[Tensor, ""]:
        """NC1~ = trace_w / trace_b; NaN if the means coincide."""
        return torch.where(self.trace_b > 0, self.trace_w / self.trace_b, torch.nan)

    def moved(
        self, linear: Float[Tensor, "feature feature"], means: Float[Tensor, "class feature"]
    ) -> PooledMoments:
        """The moments after h -> means[class] + (h - h_class) @ linear."""
        return PooledMoments(self.counts, means, linear.T @ self.scatter @ linear)

    def normalised(self) -> PooledMoments:
        """The moments of the features scaled to a mean squared length of 1."""
        power = self.gram.trace() / self.samples
        return PooledMoments(self.counts, self.means / power.sqrt(), self.scatter / power)


def pooled_moments(
    H: Float[Tensor, "sample feature"], y: Integer[Tensor, " sample"], num_classes: int | None = None
) -> PooledMoments:
    """The moments of features `H` with classes `y`, of any integer dtype, from 0 to `num_classes` - 1 (default: the largest label).

    Raises:
        DataError: no samples, NaN or inf, labels outside the classes, a class without samples.
    """
    y = y.long()  # an index of bytes would be a mask
    found = class_moments(H.detach(), y, num_classes)
    if not bool(found.seen.all()):
        missing = (~found.seen).nonzero()[:10, 0].tolist()
        raise DataError(f"near-collapse: no samples of classes {missing}; renumber the labels without gaps")
    within = H.detach().double() - found.means[y]
    return PooledMoments(found.counts.double(), found.means, within.T @ within)


def one_hot(
    y: Integer[Tensor, " sample"], num_classes: int | None = None, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "sample class"]:
    """Targets Y: row i is the unit vector of class y_i.

    Raises:
        DataError: no labels, or one outside 0 to `num_classes` - 1.
    """
    if not len(y) or bool(y.min() < 0) or (num_classes is not None and bool(y.max() >= num_classes)):
        top = "K - 1" if num_classes is None else num_classes - 1
        raise DataError(f"near-collapse: labels must be integers from 0 to {top}, at least one")
    return torch.nn.functional.one_hot(y.long(), num_classes or -1).to(dtype)


def check_penalties(lam_w: float, lam_h: float, beta: float | None = None) -> None:
    """Refuse what the theorems exclude.

    Raises:
        ConfigError: lam_w <= 0, lam_h < 0, beta <= 0, or not finite.
    """
    if not 0 < lam_w < float("inf"):
        raise ConfigError(f"lam_w is {lam_w:g}; give a positive number (only optimal_head takes 0)")
    if not 0 <= lam_h < float("inf"):
        raise ConfigError(f"lam_h is {lam_h:g}; give 0 or more")
    if beta is not None and not 0 < beta < float("inf"):
        raise ConfigError(f"beta is {beta:g}; give a positive number: it ties the features to H0")
