"""The metrics NC1 to NC4, each alone. NC2 and NC3 take rows: class means or rows of a classifier."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.measure._blocks import blocks
from uncollapse.measure.neural_collapse.moments import (
    ZERO,
    BetweenClasses,
    ClassMoments,
    between_classes,
    class_moments,
    variance_along,
)


def nc1_pinv(
    H: Float[Tensor, "sample feature"],
    y: Int[Tensor, " sample"],
    num_classes: int | None = None,
    *,
    mean: str = "class",
    weights: str = "uniform",
) -> Float[Tensor, ""]:
    """tr(Sigma_W Sigma_B^+) / K, >= 0; NaN if all means coincide or no class has two samples."""
    moments = class_moments(H, y, num_classes)
    between = between_classes(moments, mean=mean, weights=weights)
    return pinv_of(moments, between, variance_along(H, y, moments.means, between.directions))


def nc1_quotient(
    H: Float[Tensor, "sample feature"],
    y: Int[Tensor, " sample"],
    num_classes: int | None = None,
    *,
    mean: str = "class",
    weights: str = "uniform",
) -> Float[Tensor, ""]:
    """tr Sigma_W / tr Sigma_B, >= 0; NaN if all means coincide or no class has two samples."""
    moments = class_moments(H, y, num_classes)
    return quotient_of(moments, between_classes(moments, mean=mean, weights=weights))


def pinv_of(
    moments: ClassMoments, between: BetweenClasses, along: Float[Tensor, " direction"]
) -> Float[Tensor, ""]:
    """`nc1_pinv` from class statistics and the within-class variances along the directions of `between`."""
    ratio = (along / between.variances).sum() / len(between.centred)
    return ratio.masked_fill(no_scatter(moments) | (between.trace == 0), torch.nan)


def quotient_of(moments: ClassMoments, between: BetweenClasses) -> Float[Tensor, ""]:
    """`nc1_quotient` from class statistics."""
    ratio = moments.within.double() / between.trace
    return ratio.masked_fill(no_scatter(moments) | (between.trace == 0), torch.nan)


def no_scatter(moments: ClassMoments) -> Bool[Tensor, ""]:
    """Whether no class has two samples, so that nothing is known about the spread within classes."""
    return (moments.counts <= 1).all()


def nc2_equinorm(rows: Float[Tensor, "class feature"]) -> Float[Tensor, ""]:
    """Coefficient of variation of the lengths of the rows (ddof 0), >= 0; NaN if all are 0."""
    norms = rows.double().norm(dim=-1)
    return norms.std(correction=0) / norms.mean()


def nc2_equiangular(rows: Float[Tensor, "class feature"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Over all pairs of rows: mean of |cos + 1/(K-1)|, and standard deviation of cos. 0 and 0 for a simplex ETF.

    Both NaN if a row is 0 or there is only one. O(K^2 d) time, in blocks.
    """
    x, count = rows.double(), len(rows)
    norms = x.norm(dim=-1, keepdim=True)
    if count < 2:
        return norms.new_tensor(torch.nan), norms.new_tensor(torch.nan)
    units = x / norms
    sums = x.new_zeros(3)
    for block in blocks(count, count):
        gap = units[block] @ units.T + 1 / (count - 1)
        gap = gap.masked_fill(_diagonal(gap, block), 0)
        sums = sums + torch.stack((gap.abs().sum(), gap.sum(), gap.square().sum()))
    size, middle, square = sums / (count * (count - 1))
    undefined = (norms <= ZERO * norms.amax()).any()
    spread = (square - middle.square()).clamp(min=0).sqrt()
    return size.masked_fill(undefined, torch.nan), spread.masked_fill(undefined, torch.nan)


def nc2_etf(rows: Float[Tensor, "class feature"]) -> Float[Tensor, ""]:
    """|G/|G| - (I - 11^T/K)/sqrt(K-1)|_F of the Gram matrix G of the rows, 0 to 2; NaN for zero rows.

    For classifier rows, or means about their mean. With K > d + 1 it cannot be below sqrt(2 - 2 sqrt(d/(K-1))).
    """
    return nc3_etf(rows, rows)


def nc2_of(rows: Float[Tensor, "class feature"]) -> Float[Tensor, ""]:
    """|G/|G| - I/sqrt(K)|_F of the Gram matrix G, 0 to 2: distance from orthogonal rows of one length.

    For classifier rows or means that are *not* centred: the frame of squared error without bias, balanced classes.
    """
    return nc3_of(rows, rows)


def nc2_gof(rows: Float[Tensor, "class feature"], squares: Float[Tensor, " class"]) -> Float[Tensor, ""]:
    """|G/|G| - diag(q)/|q||_F of the Gram matrix G, 0 to 2: distance from orthogonal rows of squared lengths q.

    Only ratios of q count. The frame of squared error without bias; `representation.nc_deep_linear` has its lengths.
    """
    return nc3_gof(rows, rows, squares)


def nc3_etf(W: Float[Tensor, "class feature"], centred: Float[Tensor, "class feature"]) -> Float[Tensor, ""]:
    """|P/|P| - (I - 11^T/K)/sqrt(K-1)|_F of the logits P = W M^T of the centred means, 0 to 2; NaN if P = 0."""
    left, right = W.double(), centred.double()
    count = len(left)
    if count < 2:
        return left.new_tensor(torch.nan)
    if count > left.shape[1] + 1:
        overlap = (left * right).sum() - left.sum(0) @ right.sum(0) / count
        return _distance_from_overlap(left, right, overlap / math.sqrt(count - 1))
    centring = torch.eye(count, dtype=left.dtype, device=left.device) - 1 / count
    return _distance(left @ right.T, centring)


def nc3_of(W: Float[Tensor, "class feature"], means: Float[Tensor, "class feature"]) -> Float[Tensor, ""]:
    """|P/|P| - I/sqrt(K)|_F of the logits P = W M^T of the means (not centred), 0 to 2; NaN if P = 0."""
    left, right = W.double(), means.double()
    count = len(left)
    if count > left.shape[1] + 1:
        return _distance_from_overlap(left, right, (left * right).sum() / math.sqrt(count))
    return _distance(left @ right.T, torch.eye(count, dtype=left.dtype, device=left.device))


def nc3_gof(
    W: Float[Tensor, "class feature"],
    means: Float[Tensor, "class feature"],
    diagonal: Float[Tensor, " class"],
) -> Float[Tensor, ""]:
    """|P/|P| - diag(z)/|z||_F of the logits P = W M^T of the means (not centred), 0 to 2; NaN if P or z is 0."""
    return _distance(W.double() @ means.double().T, diagonal.double().diag())


def nc3_dist(W: Float[Tensor, "class feature"], centred: Float[Tensor, "class feature"]) -> Float[Tensor, ""]:
    """|W/|W| - M/|M||_F of classifier and centred means, 0 to 2: self-duality; NaN if either is 0."""
    return _distance(W.double(), centred.double())


def nc4(
    H: Float[Tensor, "sample feature"],
    means: Float[Tensor, "class feature"],
    W: Float[Tensor, "class feature"],
    b: Float[Tensor, " class"] | None = None,
) -> Float[Tensor, ""]:
    """Share of samples, 0 to 1, that argmax_k w_k h + b_k and argmin_k |h - mu_k| put into different classes.

    Both choose among the classes given; leave out those that have no mean. Ties go to the first class.
    """
    head, centre = W.double(), means.double().mean(0)
    moved = means.double() - centre
    near = moved.square().sum(-1) / 2
    shift = head @ centre if b is None else head @ centre + b.double()
    differ = head.new_zeros(())
    for rows in blocks(len(H), len(means) + H.shape[1]):
        h = H[rows].double() - centre
        differ = differ + ((h @ head.T + shift).argmax(-1) != (h @ moved.T - near).argmax(-1)).sum()
    return differ / len(H)


def _distance(matrix: Tensor, target: Tensor) -> Tensor:
    """Frobenius distance of two matrices scaled to norm 1, 0 to 2; NaN where one is 0."""
    distance: Tensor = torch.linalg.matrix_norm(matrix / matrix.norm() - target / target.norm())
    return distance


def _distance_from_overlap(left: Tensor, right: Tensor, overlap: Tensor) -> Tensor:
    """The same for `left @ right.T` from its inner product with a target of norm 1, without the (class, class) matrix.

    sqrt(2 - 2 cos) cancels near 0, hence only where no frame fits: there the distance is bounded away from 0.
    """
    norm = ((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt()
    return (2 - 2 * overlap / norm).clamp(min=0).sqrt()


def _diagonal(block: Tensor, rows: slice) -> Tensor:
    """Where a block of rows of a square matrix meets its diagonal."""
    place = torch.arange(rows.start, rows.start + len(block), device=block.device)
    return place[:, None] == torch.arange(block.shape[1], device=block.device)
