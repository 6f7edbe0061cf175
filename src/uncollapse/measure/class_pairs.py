"""What needs every pair of classes: class-distance-normalised variance and hyperspherical uniformity, without C x C.

All pairs are visited in tiles, or a random sample of them, which is unbiased and comes with standard errors: at
C = 49,152 there are 1.2 billion pairs, and a million of them give three digits.

Squared distances come from directions, ||u - u'||^2 = 2 (1 - cos) and ||mu - mu'||^2 = (r - r')^2 + 2 r r' (1 - cos), and for
pairs that nearly coincide (1 - cos < 1e-4) from the differences themselves, so that nothing cancels.

Symbols and names of metrics: `class_statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure._blocks import BLOCK_ELEMENTS
from uncollapse.measure.class_geometry import ClassMeans, coefficient_of_variation

_NEAR = 1e-4
"""1 - cos below which a pair is computed again from the difference of its directions, in float64."""

_ROUNDS = 10
"""Independent rounds of sampled pairs, from which their standard errors come."""

_OF_ALL_PAIRS = frozenset({"gnc2/riesz/cov"})
"""What a sample cannot tell: the few nearest pairs decide it."""

_LEAST = 1e-12
"""Least squared distance of two directions that the logarithm sees."""


class Kernels(NamedTuple):
    """Values of some pairs; NaN or inf where a pair has none."""

    cdnv: Tensor
    log_kernel: Tensor
    distance: Tensor


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
        if kept.numel():
            mean = kept.mean()
            self.merge(Spread(kept.numel(), float(mean), float((kept - mean).square().sum())))

    def merge(self, other: Spread) -> None:
        """Take the values of another."""
        if not other.count:
            return
        gap = other.mean - self.mean if self.count else 0.0
        total = self.count + other.count
        self.scatter += other.scatter + gap**2 * self.count * other.count / total
        self.mean = other.mean - gap * self.count / total
        self.count = total

    @property
    def variance(self) -> float:
        """Over the values themselves: divided by their number."""
        return self.scatter / self.count if self.count else math.nan


@dataclass
class Exponentials:
    """Mean and scatter of exp(x) over values x that come in pieces, whatever their size; NaN is left out.

    `total` is the logarithm of the sum of exp(x), `squares` that of exp(2 x).
    """

    count: int = 0
    total: float = -math.inf
    squares: float = -math.inf

    def add(self, values: Tensor) -> None:
        """Take more values."""
        kept = values[~values.isnan()]
        if len(kept):
            high = kept.max()
            powers = (kept - high).exp()
            total, squares = (float(part.sum().log()) for part in (powers, powers.square()))
            self.merge(Exponentials(len(kept), float(high) + total, 2 * float(high) + squares))

    def merge(self, other: Exponentials) -> None:
        """Take the values of another."""
        if not other.count:
            return
        self.total = float(np.logaddexp(self.total, other.total))
        self.squares = float(np.logaddexp(self.squares, other.squares))
        self.count += other.count

    @property
    def log_mean(self) -> float:
        """The logarithm of the mean, in nats; NaN for no value."""
        return self.total - math.log(self.count) if self.count else math.nan

    @property
    def variation(self) -> float:
        """Standard deviation over mean, at most the square root of the number of values; NaN for no value."""
        if not self.count:
            return math.nan
        return math.sqrt(math.expm1(max(self.squares - self.total - self.log_mean, 0.0)))


@dataclass
class Averages:
    """What is averaged over pairs, so far."""

    riesz: float
    cdnv: Spread = field(default_factory=Spread)
    log_kernel: Spread = field(default_factory=Spread)
    distance: Spread = field(default_factory=Spread)
    power: Exponentials = field(default_factory=Exponentials)

    def add(self, found: Kernels) -> None:
        """Take the values of more pairs."""
        self.cdnv.add(found.cdnv)
        self.log_kernel.add(found.log_kernel)
        self.distance.add(found.distance)
        self.power.add(found.log_kernel.flatten() * self.riesz)

    def merge(self, other: Averages) -> None:
        """Take all pairs of another."""
        for mine, theirs in (
            (self.cdnv, other.cdnv),
            (self.log_kernel, other.log_kernel),
            (self.distance, other.distance),
        ):
            mine.merge(theirs)
        self.power.merge(other.power)

    def values(self) -> dict[str, float]:
        """The metrics."""
        log_kernel, distance = self.log_kernel, self.distance
        return {
            "nc1/cdnv/mean": self.cdnv.mean,
            "gnc2/log_kernel/mean": log_kernel.mean,
            "gnc2/log_kernel/var": log_kernel.variance,
            "gnc2/log_kernel/cov": coefficient_of_variation(log_kernel.mean, log_kernel.variance),
            "gnc2/distance/mean": distance.mean,
            "gnc2/distance/cov": coefficient_of_variation(distance.mean, distance.variance),
            "gnc2/riesz/log_mean": self.power.log_mean,
            "gnc2/riesz/cov": self.power.variation,
        }


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
    usual s = d - 2; `gnc2/riesz/cov` of the kernel, over all pairs only. Pairs with a class at the centre have no directions and are left out of the last three.

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
        every = Averages(self.riesz)
        for found in self._tiles(tile, dtype):
            every.add(found)
        return PairReport(every.values(), {}, self.total, self.total - every.cdnv.count)

    def sampled(self, count: int, seed: int) -> PairReport:
        """Over at most about `count` pairs, in rounds: all pairs within groups into which the classes are dealt at random.

        Every pair is as likely as any other, so means are unbiased; and every class of a round is in as many pairs, so what one
        class adds to all of its pairs cancels, which independent pairs would leave as noise. Standard errors: delete-one
        jackknife over the rounds, which are independent.
        """
        generator = torch.Generator().manual_seed(seed)
        size = len(self.means)
        group = min(size, max(2, 1 + 2 * count // (_ROUNDS * size)))
        groups = min(size // group, max(1, round(2 * count / (_ROUNDS * group * (group - 1)))))
        rounds = [Averages(self.riesz) for _ in range(_ROUNDS)]
        for one in rounds:
            dealt = torch.randperm(size, generator=generator)[: groups * group].view(groups, group)
            for rows in dealt.to(self.means.mean.device).split(
                max(1, BLOCK_ELEMENTS // self.means.mean.shape[1] // group)
            ):
                one.add(self._within(rows))
        values = self._merged(rounds)
        without = [self._merged(rounds[:i] + rounds[i + 1 :]) for i in range(_ROUNDS)]
        errors = {name: _jackknife([left[name] for left in without]) for name in values}
        pairs = _ROUNDS * groups * group * (group - 1) // 2
        return PairReport(values, errors, pairs, pairs - sum(one.cdnv.count for one in rounds))

    def _merged(self, rounds: Sequence[Averages]) -> dict[str, float]:
        every = Averages(self.riesz)
        for one in rounds:
            every.merge(one)
        return {name: value for name, value in every.values().items() if name not in _OF_ALL_PAIRS}

    def _within(self, rows: Int[Tensor, "group member"]) -> Kernels:
        """Kernels of all pairs of members of a group."""
        u = self.means.directions(rows.flatten()).view(*rows.shape, -1)
        apart = 1 - u @ u.mT
        i, j = torch.triu_indices(rows.shape[1], rows.shape[1], 1, device=rows.device)
        first, second, between = rows[:, i].flatten(), rows[:, j].flatten(), apart[:, i, j].flatten()
        near = (between < _NEAR).nonzero()[:, 0]
        for part in near.split(len(rows) * rows.shape[1]):
            between[part] = self._apart(first[part], second[part])
        return self._kernels(first, second, between)

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


def _jackknife(without: Sequence[float]) -> float:
    """Standard error of a statistic from its values without each of n independent parts."""
    mean = sum(without) / len(without)
    square = sum((value - mean) * (value - mean) for value in without)
    return math.sqrt(square * (1 - 1 / len(without)))
