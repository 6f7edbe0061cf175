"""What needs every pair of classes: class-distance-normalised variance and hyperspherical uniformity, without C x C.

All pairs are visited in tiles, or a uniform sample of pairs is drawn, which is unbiased for means and comes with
standard errors: at C = 49,152 there are 1.2 billion pairs, and a million of them give three digits.

Squared distances come from directions, ||u - u'||^2 = 2 (1 - cos) and ||mu - mu'||^2 = (r - r')^2 + 2 r r' (1 - cos), and for
pairs that nearly coincide (1 - cos < 1e-4) from the differences themselves, so that nothing cancels.

Symbols and names of metrics: `class_statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure.class_geometry import BLOCK_ELEMENTS, ClassMeans, coefficient_of_variation

_NEAR = 1e-4
"""1 - cos below which a pair is computed again from the difference of its directions, in float64."""

_LEAST = 1e-12
"""Least squared distance of two directions that the logarithm sees."""


class Kernels(NamedTuple):
    """Values of some pairs; NaN or inf where a pair has none."""

    cdnv: Tensor
    log_kernel: Tensor
    distance: Tensor


class Moments(NamedTuple):
    """Of values over pairs, or the standard errors of these three."""

    mean: float
    variance: float
    cov: float


@dataclass
class Spread:
    """Mean and scatter of values that come in pieces, merged about their own means; what is not finite is left out."""

    count: int = 0
    mean: float = math.nan
    scatter: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take more values."""
        finite = values.isfinite()
        kept = values if bool(finite.all()) else values[finite]
        count = kept.numel()
        if not count:
            return
        mean = kept.mean()
        gap = float(mean) - self.mean if self.count else 0.0
        total = self.count + count
        self.scatter += float((kept - mean).square().sum()) + gap**2 * self.count * count / total
        self.mean = float(mean) - gap * self.count / total
        self.count = total

    def moments(self) -> Moments:
        """Over the values themselves: divided by their number."""
        variance = self.scatter / self.count if self.count else math.nan
        return Moments(self.mean, variance, coefficient_of_variation(self.mean, variance))


@dataclass
class LogMeanExp:
    """ln of the mean of exp(x) over values x that come in pieces, whatever their size; NaN for none."""

    count: int = 0
    total: float = -math.inf

    def add(self, values: Tensor) -> None:
        """Take more values; NaN is left out."""
        kept = values[~values.isnan()]
        if not len(kept):
            return
        found = float(torch.logsumexp(kept, 0))
        high, low = max(self.total, found), min(self.total, found)
        self.total = high + math.log1p(math.exp(low - high))
        self.count += len(kept)

    def value(self) -> float:
        """The logarithm, in nats."""
        return self.total - math.log(self.count) if self.count else math.nan


@dataclass(frozen=True)
class PairReport:
    """Metrics over pairs, standard errors of those that were sampled, pairs used and pairs among them that coincide."""

    values: dict[str, float]
    standard_errors: dict[str, float]
    pairs: int
    coincident: int


@dataclass(frozen=True)
class ClassPairs:
    """The pairs of C' classes, their distances and what is averaged over them.

    `nc1/cdnv/mean` of (v_c + v_c') / (2 ||mu_c - mu_c'||^(2p)), without pairs of equal means;
    `gnc2/log_kernel/mean`, `/var`, `/cov` of ln(1 / ||u_c - u_c'||), in nats; `gnc2/distance/mean`, `/cov` of ||u_c - u_c'||;
    `gnc2/riesz/log_mean`: ln of the mean of ||u_c - u_c'||^-s, for the kernel itself leaves the range of floats at the
    usual s = d - 2. Pairs with a class at the centre have no directions and are left out of the last three.

    Args:
        means: the classes.
        variance: v_c of each of them.
        power: p of CDNV: 1 has no scale (Galanti et al. 2021), 2 is that of the paper's released table.
        riesz: s.
    """

    means: ClassMeans
    variance: Float[Tensor, " used"]
    power: float
    riesz: float

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return len(self.means) * (len(self.means) - 1) // 2

    def exact(self, tile: int, dtype: torch.dtype) -> PairReport:
        """Over all pairs, `tile` x `tile` of them at a time, with products of directions in `dtype`."""
        cdnv, log_kernel, distance, riesz = Spread(), Spread(), Spread(), LogMeanExp()
        for found in self._tiles(tile, dtype):
            cdnv.add(found.cdnv)
            log_kernel.add(found.log_kernel)
            distance.add(found.distance)
            riesz.add(found.log_kernel.flatten() * self.riesz)
        values = _named(cdnv.moments(), log_kernel.moments(), distance.moments(), riesz.value())
        return PairReport(values, {}, self.total, self.total - cdnv.count)

    def sampled(self, count: int, seed: int) -> PairReport:
        """Over `count` pairs drawn uniformly with replacement: unbiased means and variances, with standard errors."""
        generator = torch.Generator().manual_seed(seed)
        device, size = self.means.mean.device, len(self.means)
        first = torch.randint(size, (count,), generator=generator)
        second = (first + torch.randint(1, size, (count,), generator=generator)) % size
        step = max(1, BLOCK_ELEMENTS // self.means.mean.shape[1])
        pieces = [
            self._kernels(i, j, self._apart(i, j))
            for i, j in zip(first.to(device).split(step), second.to(device).split(step), strict=True)
        ]
        found = Kernels(*(torch.cat(column) for column in zip(*pieces, strict=True)))
        (cdnv, cdnv_error), (log_kernel, log_kernel_error), (distance, distance_error) = map(
            _estimated, found
        )
        riesz, riesz_error = _log_mean_estimated(found.log_kernel * self.riesz)
        coincident = count - int(found.cdnv.isfinite().sum())
        return PairReport(
            _named(cdnv, log_kernel, distance, riesz),
            _named(cdnv_error, log_kernel_error, distance_error, riesz_error),
            count,
            coincident,
        )

    def _tiles(self, tile: int, dtype: torch.dtype) -> Iterator[Kernels]:
        """Kernels of every pair once."""
        place = torch.arange(len(self.means), device=self.means.mean.device)
        for rows in place.split(tile):
            mine = self.means.directions(rows).to(dtype)
            for columns in place[int(rows[0]) :].split(tile):
                diagonal = bool(columns[0] == rows[0])
                theirs = mine if diagonal else self.means.directions(columns).to(dtype)
                apart = 1 - mine @ theirs.T
                i, j = (apart < _NEAR).nonzero(as_tuple=True)
                for near, by in zip(i.split(tile), j.split(tile), strict=True):
                    apart[near, by] = self._apart(rows[near], columns[by]).to(dtype)
                if diagonal:
                    i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
                    yield self._kernels(rows[i], rows[j], apart[i, j])
                else:
                    yield self._kernels(rows[:, None], columns[None, :], apart)

    def _apart(self, i: Tensor, j: Tensor) -> Tensor:
        """1 - cos of pairs (i, j), from differences, in float64."""
        return (self.means.directions(i) - self.means.directions(j)).square().sum(-1) / 2

    def _kernels(self, i: Tensor, j: Tensor, apart: Tensor) -> Kernels:
        """What is averaged, for pairs (i, j) whose indices broadcast to the shape of `apart` = 1 - cos."""
        norm, variance = self.means.norm, self.variance.to(apart.dtype)
        product = (norm[i] * norm[j]).to(apart.dtype)
        gap = (norm[i] - norm[j]).to(apart.dtype).square_().addcmul_(product, apart, value=2)
        gap.masked_fill_(gap <= self.means.resolution**2, 0)
        square = (2 * apart).clamp_(min=_LEAST)
        if bool((norm == 0).any()):
            square.masked_fill_(product == 0, torch.nan)
        cdnv = (variance[i] + variance[j]).div_(2 * gap.pow_(self.power))
        return Kernels(cdnv, -0.5 * square.log(), square.sqrt())


def uniform_log_kernel(dim: int) -> float:
    """Mean of ln(1 / ||u - u'||) over independent uniform directions in `dim` dimensions, in nats: the floor of GNC2.

    -ln 2 - (digamma((d-1)/2) - digamma(d-1)) / 2: 0 for d = 2, 1/2 - ln 2 for d = 3, towards -ln(2)/2 for many dimensions.
    No other distribution has less; a finite set of C points can, by about 1/C.

    Raises:
        ConfigError: dim below 2, where directions have no density.
    """
    if dim < 2:
        raise ConfigError(f"uniform_log_kernel: dim is {dim}; give at least 2")
    half, whole = torch.digamma(torch.tensor([(dim - 1) / 2, dim - 1], dtype=torch.float64)).tolist()
    return -math.log(2) - (half - whole) / 2


def _named(cdnv: Moments, log_kernel: Moments, distance: Moments, riesz: float) -> dict[str, float]:
    return {
        "nc1/cdnv/mean": cdnv.mean,
        "gnc2/log_kernel/mean": log_kernel.mean,
        "gnc2/log_kernel/var": log_kernel.variance,
        "gnc2/log_kernel/cov": log_kernel.cov,
        "gnc2/distance/mean": distance.mean,
        "gnc2/distance/cov": distance.cov,
        "gnc2/riesz/log_mean": riesz,
    }


def _estimated(values: Tensor) -> tuple[Moments, Moments]:
    """Moments of a larger set from a sample of it, and their standard errors: each that of its linearisation."""
    x = values[values.isfinite()]
    count = len(x)
    if count < 2:
        none = Moments(math.nan, math.nan, math.nan)
        return none, none
    mean, variance = float(x.mean()), float(x.var())
    cov = coefficient_of_variation(mean, variance)
    off = x - mean
    square = off.square()
    relative = square / (2 * variance) - off / mean if variance > 0 and mean else torch.zeros_like(x)
    root = math.sqrt(count)
    return Moments(mean, variance, cov), Moments(
        float(off.std()) / root, float(square.std()) / root, abs(cov) * float(relative.std()) / root
    )


def _log_mean_estimated(x: Tensor) -> tuple[float, float]:
    """ln of the mean of exp(x) and its standard error: that of the mean over the mean, which a heavy tail makes too small."""
    x = x[~x.isnan()]
    if len(x) < 2:
        return math.nan, math.nan
    scaled = (x - x.amax()).exp()
    mean = float(scaled.mean())
    return float(x.amax()) + math.log(mean), float(scaled.std()) / mean / math.sqrt(len(x))
