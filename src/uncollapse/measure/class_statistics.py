"""Means and spreads of features by class in one pass, and how far they have collapsed; made for vocabularies.

`StreamingNC` keeps a count, a mean and a scalar scatter per class: C d numbers, whatever the number of samples, and
O(B d) work for a batch of B. `compute` turns them into the neural-collapse metrics of next-token prediction, where
C >> d classes are unbalanced and a simplex ETF cannot exist (Wu and Papyan 2024, arXiv 2405.17767). Nothing of size
C x C is ever held: sums over all pairs that are polynomials of inner products come from d x d moments, the others from
tiles or from sampled pairs with standard errors (`class_pairs`).

Symbols: n_c samples of class c; mu_c their mean; v_c = (1/n_c) sum ||h - mu_c||^2; mu_G the unweighted mean of the
class means; m_c = mu_c - mu_G, r_c = ||m_c||, u_c = m_c / r_c; C' the classes with n_c >= n_min, over which, or over whose
unordered pairs, everything is averaged. CoV is the standard deviation over the absolute mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure._blocks import BLOCK_ELEMENTS, blocks
from uncollapse.measure._samples import Features, Labels, Mask, finite, rows_inside
from uncollapse.measure.class_geometry import (
    ClassMeans,
    duality,
    mean_geometry,
    mean_gram,
    variability,
)
from uncollapse.measure.class_pairs import ClassPairs

Head: TypeAlias = Float[Tensor, "class feature"] | Float[np.ndarray, "class feature"]


@dataclass(frozen=True)
class CollapseReport:
    """Neural-collapse metrics of one set of class statistics; `report["nc1/cdnv/mean"]` reads one.

    NaN where a metric is not defined: pairs of fewer than two classes, directions where all means coincide.

    Attributes:
        values: the metrics by name, see `StreamingNC.compute`.
        standard_errors: of the metrics that come from sampled pairs, by the same names; empty where all pairs were used.
        classes: C', the classes that count.
        seen: classes with a sample.
        singletons: classes that count and have one sample, whose v_c is 0 whatever their spread.
        samples: samples of the classes that count.
        pairs: pairs of classes that the pairwise metrics used.
        coincident: pairs among them whose means are equal; CDNV leaves them out.
    """

    values: dict[str, float]
    standard_errors: dict[str, float]
    classes: int
    seen: int
    singletons: int
    samples: int
    pairs: int
    coincident: int

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclass(eq=False)
class StreamingNC:
    """Counts, means and scatters of features by class, gathered batch by batch in O(B d), and their collapse.

    Batches, their order and their split over processes do not matter: moments are merged about their own means (Welford;
    Chan et al. 1979), so that a large common offset does not drown the spread. Half precision is summed in `dtype`.

    Args:
        num_classes: C, the vocabulary; most of it may never be seen.
        dim: d, the width of the features.
        dtype: of means and scatters; float64 needs 8 C d bytes, float32 half of it and loses digits after 1e7 samples.
        pooled_cov: also gather the pooled within-class covariance, d x d, for NC1 by pseudo-inverse.
        device: where the statistics live; features are moved there.

    Attributes:
        count: samples per class.
        mean: mean of each class, 0 where no sample was seen.
        scatter: sum of squared distances to the class mean.
        within: sum of (h - mu_c)(h - mu_c)^T over all samples, None without `pooled_cov`.
    """

    num_classes: int
    dim: int
    dtype: torch.dtype = torch.float64
    pooled_cov: bool = False
    device: torch.device | str = "cpu"
    count: Int[Tensor, " class"] = field(init=False, repr=False)
    mean: Float[Tensor, "class feature"] = field(init=False, repr=False)
    scatter: Float[Tensor, " class"] = field(init=False, repr=False)
    within: Float[Tensor, "feature feature"] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.dim < 1:
            raise ConfigError(
                f"StreamingNC: {self.num_classes} classes of {self.dim} features; give at least 1 of each"
            )
        if self.dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"StreamingNC: dtype is {self.dtype}; give torch.float64 or torch.float32")
        self.count = torch.zeros(self.num_classes, dtype=torch.long, device=self.device)
        self.mean = torch.zeros(self.num_classes, self.dim, dtype=self.dtype, device=self.device)
        self.scatter = self.mean.new_zeros(self.num_classes)
        if self.pooled_cov:
            self.within = self.mean.new_zeros(self.dim, self.dim)

    @torch.no_grad()
    def update(self, h: Features, y: Labels, mask: Mask | None = None) -> StreamingNC:
        """Take features and their classes; positions outside the mask do not exist, whatever they hold. Returns itself.

        The mask is of bool, or of whole numbers that are not 0 where a position counts, as an attention mask is. A batch that
        is refused leaves the statistics as they were.

        Raises:
            DataError: another number of features, of classes or of mask entries, classes or mask that are not whole numbers,
                NaN or inf, or a class outside 0 .. num_classes - 1.
        """
        found, labels = rows_inside(
            h, y, mask, width=self.dim, num_classes=self.num_classes, name="StreamingNC"
        )
        assert labels is not None
        rows, classes = found.to(self.device), labels.to(self.device)
        for part in blocks(len(rows), self.dim):
            self._add(rows[part].to(self.dtype), classes[part])
        return self

    @torch.no_grad()
    def merge(self, other: StreamingNC) -> StreamingNC:
        """Take the samples of another accumulator, as if they had been given here. Returns itself.

        Raises:
            DataError: another number of classes or features, or only one of them gathers the pooled covariance.
        """
        mine, theirs = ((one.num_classes, one.dim, one.pooled_cov) for one in (self, other))
        if mine != theirs:
            raise DataError(f"StreamingNC: cannot merge {theirs} into {mine} (classes, features, pooled_cov)")
        for classes in other.count.nonzero()[:, 0].split(max(1, BLOCK_ELEMENTS // self.dim)):
            home = classes.to(self.device)
            self._combine(
                home,
                other.count[classes].to(self.device),
                other.mean[classes].to(self.mean),
                other.scatter[classes].to(self.mean),
            )
        if self.within is not None and other.within is not None:
            self.within += other.within.to(self.within)
        return self

    @torch.no_grad()
    def compute(
        self,
        W: Head | None = None,
        *,
        n_min: int = 1,
        cdnv_power: float | int = 1,
        pairs: Literal["exact"] | int = 1_000_000,
        tile: int = 2048,
        tile_dtype: torch.dtype = torch.float64,
        riesz: float | int | None = None,
        seed: int = 0,
    ) -> CollapseReport:
        """The metrics: `nc1/` variability, `nc2/` means, `gnc2/` uniformity; with a classifier `nc3/`, `unc3/` alignment.

        Each is defined where it is computed: `variability`, `mean_geometry`, `duality` of `class_geometry`, `ClassPairs`.

        Args:
            W: rows of the classifier (LM head), one per class, seen or not; those of classes that do not count may hold anything.
            n_min: least samples of a class that counts; 2 or more where variability matters.
            cdnv_power: p of CDNV; 2 is that of the paper's released table, which depends on the scale of features.
            pairs: "exact" visits all C'(C'-1)/2 pairs; a number draws so many, unless there are no more than that.
            tile: classes on a side of a tile of exact pairs: 8 tile^2 bytes, several times over.
            tile_dtype: of the products in tiles; float32 halves their time.
            riesz: exponent s of the Riesz kernel; d - 2 if not given.
            seed: of the drawn pairs.

        Raises:
            ConfigError: n_min, pairs or tile below 1, cdnv_power not above 0.
            DataError: no class with n_min samples; W of another shape, or with NaN or inf in a class that counts.
        """
        if isinstance(pairs, str) and pairs != "exact":
            raise ConfigError(
                f"StreamingNC: pairs is {pairs!r}; give 'exact' for all of them, or how many to draw"
            )
        if n_min < 1 or tile < 1 or not cdnv_power > 0 or (pairs != "exact" and pairs < 1):
            raise ConfigError(
                f"StreamingNC: n_min={n_min}, pairs={pairs}, tile={tile}, cdnv_power={cdnv_power}; "
                "give at least 1, 1 or 'exact', 1 and a number above 0"
            )
        index = (self.count >= n_min).nonzero()[:, 0]
        if not len(index):
            raise DataError(
                f"StreamingNC: no class has {n_min} samples, the largest has {int(self.count.amax())}"
            )
        count, scatter = self.count[index], self.scatter[index]
        means = ClassMeans.of(self.mean, index)
        gram = mean_gram(means)
        within = None if self.within is None else self.within / self.count.sum()
        values = variability(means, gram, count, scatter, within) | mean_geometry(means, gram)
        if W is not None:
            values |= duality(means, gram, self._head(W, index))
        exponent = float(self.dim - 2 if riesz is None else riesz)
        over = ClassPairs(means, scatter / count, float(cdnv_power), exponent)
        every = pairs == "exact" or over.total <= pairs
        found = over.exact(tile, tile_dtype) if every else over.sampled(int(pairs), seed)
        return CollapseReport(
            values=values | found.values,
            standard_errors=found.standard_errors,
            classes=len(index),
            seen=int((self.count > 0).sum()),
            singletons=int((count == 1).sum()),
            samples=int(count.sum()),
            pairs=found.pairs,
            coincident=found.coincident,
        )

    def _add(self, rows: Float[Tensor, "row feature"], classes: Int[Tensor, " row"]) -> None:
        """Take rows that are in order."""
        found, place, count = torch.unique(classes, return_inverse=True, return_counts=True)
        mean = rows.new_zeros(len(found), self.dim).index_add_(0, place, rows) / count[:, None]
        away = mean[place].sub_(rows)
        if self.within is not None:
            self.within.addmm_(away.T, away)
        scatter = rows.new_zeros(len(found)).index_add_(0, place, away.square_().sum(1))
        self._combine(found, count, mean, scatter)

    def _combine(
        self,
        classes: Int[Tensor, " found"],
        count: Int[Tensor, " found"],
        mean: Float[Tensor, "found feature"],
        scatter: Float[Tensor, " found"],
    ) -> None:
        """Merge moments of distinct classes: scatters add up, and so does n n'/(n + n') ||mu - mu'||^2."""
        before = self.count[classes]
        total = before + count
        gap = mean - self.mean[classes]
        share = count.to(self.dtype) / total
        weight = before * share
        self.scatter[classes] += scatter + weight * torch.linalg.vecdot(gap, gap)
        self.mean[classes] += gap * share[:, None]
        self.count[classes] = total
        if self.within is not None:
            self.within.addmm_((gap * weight[:, None]).T, gap)

    def _head(self, W: Head, counting: Int[Tensor, " used"]) -> Tensor:
        weight = torch.as_tensor(W).detach()
        if tuple(weight.shape) != (self.num_classes, self.dim):
            raise DataError(
                f"StreamingNC: W has shape {tuple(weight.shape)}, expected ({self.num_classes}, {self.dim})"
            )
        weight = weight.to(self.device)
        if not finite(weight, counting):
            raise DataError("StreamingNC: W contains NaN or inf")
        return weight
