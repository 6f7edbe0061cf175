"""How class means and a classifier lie to each other, exactly and without an array of classes x classes.

Averages over all pairs of classes of <m, m'> and <m, m'>^2 are polynomials of moments: with sum_c m_c = 0,
sum over pairs of <m_c, m_c'> is -sum ||m_c||^2 / 2, and of <m_c, m_c'>^2 is (||M^T M||_F^2 - sum ||m_c||^4) / 2, where
M^T M is d x d. So are the norms of M M^T and of W M^T: O(C d^2) instead of O(C^2 d) work, O(d^2) instead of O(C^2) memory.

Symbols and names of metrics: `class_statistics`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.measure._blocks import blocks


@dataclass(frozen=True)
class ClassMeans:
    """Means of the classes that count, about their unweighted average; read block by block, so no copy of all exists.

    Attributes:
        mean: means of all classes.
        index: the C' classes that count; everything below is over them, in this order.
        centre: mu_G, the unweighted average of their means; float64.
        norm: r_c = ||mu_c - mu_G||, exactly 0 where it is rounding; float64.
        resolution: distances up to this are rounding: 16 ulp of the longest mean.
    """

    mean: Float[Tensor, "class feature"]
    index: Int[Tensor, " used"]
    centre: Float[Tensor, " feature"]
    norm: Float[Tensor, " used"]
    resolution: float

    @classmethod
    def of(cls, mean: Float[Tensor, "class feature"], index: Int[Tensor, " used"]) -> ClassMeans:
        """Centre the means of the classes in `index`."""
        count, longest = len(index), mean.new_zeros((), dtype=torch.float64)
        centre = torch.zeros_like(mean[0], dtype=torch.float64)
        for rows in blocks(count, mean.shape[1]):
            found = mean[index[rows]].double()
            centre += found.sum(0)
            longest = torch.maximum(longest, torch.linalg.vector_norm(found, dim=1).amax())
        centre /= max(1, count)
        resolution = 16 * torch.finfo(mean.dtype).eps * float(longest)
        norm = torch.zeros(count, dtype=torch.float64, device=mean.device)
        for rows in blocks(count, mean.shape[1]):
            norm[rows] = torch.linalg.vector_norm(mean[index[rows]].double() - centre, dim=1)
        return cls(mean, index, centre, norm.masked_fill(norm <= resolution, 0), resolution)

    def __len__(self) -> int:
        return len(self.index)

    def centred(self, rows: slice | Tensor) -> Float[Tensor, "row feature"]:
        """m_c in float64; exactly 0 where it is rounding."""
        m = self.mean[self.index[rows]].double().sub_(self.centre)
        return m.masked_fill_((self.norm[rows] == 0)[:, None], 0)

    def directions(self, rows: slice | Tensor) -> Float[Tensor, "row feature"]:
        """u_c = m_c / r_c in float64; 0 for a class that lies at the centre."""
        norm = self.norm[rows]
        return self.centred(rows) / torch.where(norm > 0, norm, 1)[:, None]


def mean_gram(means: ClassMeans) -> Float[Tensor, "feature feature"]:
    """M^T M = sum of m_c m_c^T, float64."""
    width = means.mean.shape[1]
    gram = means.centre.new_zeros(width, width)
    for rows in blocks(len(means), width):
        m = means.centred(rows)
        gram.addmm_(m.T, m)
    return gram


def mean_geometry(means: ClassMeans, gram: Float[Tensor, "feature feature"]) -> dict[str, float]:
    """NC2 of the class means, given their `mean_gram`: norms, inner products, cosines, distance to a simplex ETF.

    `nc2/norm/cov`, `nc2/log_norm/cov`, `nc2/interference/mean`, `/cov` (inner products m_c . m_c'), `nc2/cosine/mean`, `/std`,
    `nc2/etf_error` = || G/||G||_F - (I - J/C')/sqrt(C'-1) ||_F with G = M M^T, 0 to 2, at least
    sqrt(2 - 2 sqrt(d/(C'-1))) where C' - 1 > d; its resolution is 1e-8, the root of rounding.
    """
    unit_gram, unit_sum = torch.zeros_like(gram), torch.zeros_like(means.centre)
    for rows in blocks(len(means), len(gram)):
        u = means.directions(rows)
        unit_gram.addmm_(u.T, u)
        unit_sum += u.sum(0)
    norm, directed = means.norm, means.norm[means.norm > 0]
    square = norm.square()
    products = _pair_moments(-square.sum(), _energy(gram) - square.square().sum(), len(norm))
    count = len(directed)
    cosines = _pair_moments(unit_sum.square().sum() - count, _energy(unit_gram) - count, count)
    return {
        "nc2/norm/cov": coefficient_of_variation(*moments(norm)),
        "nc2/log_norm/cov": coefficient_of_variation(*moments(directed.log())),
        "nc2/interference/mean": products[0],
        "nc2/interference/cov": coefficient_of_variation(*products),
        "nc2/cosine/mean": cosines[0],
        "nc2/cosine/std": math.sqrt(cosines[1]),
        "nc2/etf_error": _frame_error(float(square.sum()), float(_energy(gram)), len(norm)),
    }


def duality(
    means: ClassMeans, gram: Float[Tensor, "feature feature"], weight: Float[Tensor, "class feature"]
) -> dict[str, float]:
    """NC3 and UNC3: how the rows w_c of a classifier align with the class means m_c, and how evenly they do.

    `nc3/cosine/mean` of cos(w_c, m_c), `nc3/distance/mean` of ||w_c/||w_c|| - u_c||, `nc3/dual_error` as `nc2/etf_error` with
    W M^T; `unc3/cosine/var`, `/cov` over classes, `unc3/product/cov` of w_c . m_c. A class whose w_c or m_c is 0 has no cosine.
    """
    head_gram = torch.zeros_like(gram)
    product, head_norm = torch.empty_like(means.norm), torch.empty_like(means.norm)
    for rows in blocks(len(means), len(gram)):
        m, w = means.centred(rows), weight[means.index[rows]].to(gram)
        head_gram.addmm_(w.T, w)
        product[rows] = torch.linalg.vecdot(w, m)
        head_norm[rows] = torch.linalg.vector_norm(w, dim=1)
    scale = means.norm * head_norm
    cosine = (product / scale)[scale > 0].clamp(-1, 1)
    mean, variance = moments(cosine)
    return {
        "nc3/cosine/mean": mean,
        "nc3/distance/mean": moments((2 - 2 * cosine).sqrt())[0],
        "nc3/dual_error": _frame_error(float(product.sum()), float((gram * head_gram).sum()), len(product)),
        "unc3/cosine/var": variance,
        "unc3/cosine/cov": coefficient_of_variation(mean, variance),
        "unc3/product/cov": coefficient_of_variation(*moments(product)),
    }


def variability(
    means: ClassMeans,
    gram: Float[Tensor, "feature feature"],
    count: Int[Tensor, " used"],
    scatter: Float[Tensor, " used"],
    within: Float[Tensor, "feature feature"] | None = None,
) -> dict[str, float]:
    """NC1 without pairs: spread within classes over distance between them.

    `nc1/ratio`: mean of v_c over mean of ||mu_c - mu_c'||^2 over pairs, a CDNV whose average is taken above and below the line.
    `nc1/ratio/unbiased`: the same over classes of two samples and more, with s_c = scatter / (n_c - 1) for v_c and with
    2 mean(s_c / n_c) taken off the squared distances, by which sampling noise of the means lengthens them: numerator and
    denominator are unbiased for independent samples, and rare classes no longer look collapsed because they are rare.
    `nc1/pinv` (given `within`, the pooled covariance of all samples seen): tr(S_W S_B^+) / C' with S_B = M^T M / C', over the
    C' - 1 largest eigenvalues of S_B above 1e-10 of the largest.
    """
    width, classes = len(gram), len(means)
    twice = count >= 2
    total = torch.zeros_like(means.centre)
    for rows in blocks(classes, width):
        total += means.centred(rows)[twice[rows]].sum(0)
    square = means.norm.square()
    single = scatter[twice].double() / (count[twice] - 1)
    noise = (single / count[twice]).mean()
    k = int(twice.sum())
    spread = square[twice].sum() - total.square().sum() / k if k else square.new_tensor(torch.nan)
    found = {
        "nc1/ratio": _ratio((scatter / count).double().mean(), _per_pair(square.sum(), classes)),
        "nc1/ratio/unbiased": _ratio(single.mean(), _per_pair(spread, k) - 2 * float(noise)),
    }
    if within is not None:
        values, vectors = torch.linalg.eigh(gram / max(1, classes))
        kept = (values > 1e-10 * values[-1]) & (torch.arange(width, device=values.device) > width - classes)
        along = torch.linalg.vecdot(vectors, within.double() @ vectors, dim=0)
        found["nc1/pinv"] = float((along[kept] / values[kept]).sum()) / classes if kept.any() else math.nan
    return found


def moments(values: Float[Tensor, " value"]) -> tuple[float, float]:
    """Mean and variance over the values themselves (divided by their number); NaN for none."""
    if not len(values):
        return math.nan, math.nan
    return float(values.mean()), float(values.var(correction=0))


def coefficient_of_variation(mean: float, variance: float) -> float:
    """Standard deviation over absolute mean; inf where only the mean is 0, NaN where both are."""
    if mean == 0:
        return math.inf if variance > 0 else math.nan
    return math.sqrt(variance) / abs(mean)


def _energy(gram: Tensor) -> Tensor:
    return gram.square().sum()


def _pair_moments(total: Tensor, square: Tensor, count: int) -> tuple[float, float]:
    """Mean and variance over pairs from sums over ordered pairs of x and x^2."""
    if count < 2:
        return math.nan, math.nan
    mean = float(total) / (count * (count - 1))
    return mean, max(0.0, float(square) / (count * (count - 1)) - mean**2)


def _per_pair(spread: Tensor, count: int) -> float:
    """Mean squared distance over pairs of `count` points from their sum of squares about the mean."""
    return 2 * float(spread) / (count - 1) if count > 1 else math.nan


def _ratio(numerator: Tensor, denominator: float) -> float:
    """Their quotient; NaN where sampling noise leaves no distance."""
    return float(numerator) / denominator if denominator > 0 else math.nan


def _frame_error(trace: float, energy: float, count: int) -> float:
    """|| A/||A||_F - (I - J/C)/sqrt(C-1) ||_F of A = X M^T whose columns sum to 0, from tr A and ||A||_F^2."""
    if count < 2 or energy <= 0:
        return math.nan
    return math.sqrt(max(0.0, 2 - 2 * trace / math.sqrt(energy * (count - 1))))
