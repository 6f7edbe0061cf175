"""NC4: whether a classifier decides as the nearest class mean does, on samples that the means were not made of.

The classes that the nearest mean may choose are those that were seen. A class without samples has no mean; given a zero
in its place, as in the released code of Wu and Papyan (2024), it is the nearest of all to every short feature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure._blocks import blocks
from uncollapse.measure._samples import Features, Labels, Mask, finite, rows_inside
from uncollapse.measure.class_geometry import ClassMeans
from uncollapse.measure.precision import at_least_float32

_SCORES = 1 << 22
"""Elements of a block of samples x classes that is held at once."""


@dataclass(frozen=True)
class NC4Report:
    """Shares of the samples, 0 to 1; NaN without samples.

    Attributes:
        samples: how many were decided.
        full_head: the classifier's choice among all classes is the nearest mean among the seen ones.
        seen_head: the same with the classifier's choice restricted to the classes seen.
        labelled: how many of them came with their class.
        head_accuracy: the classifier's choice among all classes is the sample's class; over labelled samples.
        centre_accuracy: the nearest mean is that of the sample's class; over labelled samples.
    """

    samples: int
    full_head: float
    seen_head: float
    labelled: int
    head_accuracy: float
    centre_accuracy: float


@dataclass(frozen=True)
class _Scores:
    """Affine scores <x_k, h> + offset_k, computed in one dtype and decided in float64 where rounding could decide.

    `matrix` is what products are taken with; `exact(k)` gives rows of it in float64.
    """

    matrix: Float[Tensor, "class feature"]
    offset: Float[Tensor, " class"]
    source: Float[Tensor, "all feature"]
    index: Int[Tensor, " class"]
    centre: Float[Tensor, " feature"]
    longest: float = field(init=False)

    def __post_init__(self) -> None:
        parts = [torch.linalg.vector_norm(self.matrix[r], dim=1).amax() for r in blocks(*self.matrix.shape)]
        object.__setattr__(self, "longest", float(torch.stack(parts).amax()))

    def of(self, h: Float[Tensor, "row feature"]) -> Float[Tensor, "row class"]:
        return torch.addmm(self.offset.to(self.matrix.dtype), h.to(self.matrix.dtype), self.matrix.T)

    def best(
        self, scores: Float[Tensor, "row class"], h: Float[Tensor, "row feature"]
    ) -> Int[Tensor, " row"]:
        """Classes (of all) with the largest score."""
        top, place = scores.max(1)
        eps = 16 * torch.finfo(scores.dtype).eps
        slack = eps * (
            torch.linalg.vector_norm(h, dim=1).to(scores) * self.longest + self.offset.abs().amax().to(scores)
        )
        floor = (top - slack)[:, None]
        rows = ((scores >= floor).sum(1) > 1).nonzero()[:, 0]
        if len(rows):
            which, candidate = (scores[rows] >= floor[rows]).nonzero(as_tuple=True)
            vectors = self.source[self.index[candidate]].double() - self.centre
            exact = torch.linalg.vecdot(vectors, h[rows[which]].double()) + self.offset[candidate]
            most = exact.new_full((len(rows),), -torch.inf).scatter_reduce(0, which, exact, "amax")
            rival = torch.where(exact == most[which], candidate, len(self.index))
            place[rows] = (
                place[rows].new_full((len(rows),), len(self.index)).scatter_reduce(0, which, rival, "amin")
            )
        return self.index[place]


class NC4Accumulator:
    """Agreement of argmax_c <w_c, h> + b_c with argmin_c ||h - mu_c||, batch by batch.

    Distances are compared as <h - mu_G, m_c> - r_c^2 / 2, which has the same order and does not cancel; samples whose best
    scores are closer than rounding are decided in float64, exact ties for the lowest class. Holds the means and the
    classifier in `dtype`, and a block of scores.

    Args:
        means: mean of each class (`StreamingNC.mean`); those that cannot be chosen may hold anything.
        counts: samples per class (`StreamingNC.count`); classes with fewer than `n_min` cannot be chosen.
        W: rows of the classifier, one per class.
        b: its bias, if it has one.
        dtype: of the products.

    Raises:
        ConfigError: n_min below 1, or another dtype than float32 and float64.
        DataError: shapes that do not fit, NaN or inf, or no class to choose.
    """

    def __init__(
        self,
        means: Float[Tensor, "class feature"] | Float[np.ndarray, "class feature"],
        counts: Int[Tensor, " class"] | Int[np.ndarray, " class"],
        W: Float[Tensor, "_ _"] | Float[np.ndarray, "_ _"],
        b: Float[Tensor, " _"] | Float[np.ndarray, " _"] | None = None,
        *,
        n_min: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if n_min < 1 or dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"NC4Accumulator: n_min={n_min}, dtype={dtype}; give at least 1, and float32 or float64"
            )
        mean = torch.as_tensor(means).detach()
        weight = torch.as_tensor(W).detach().to(mean.device)
        bias = mean.new_zeros(len(mean)) if b is None else torch.as_tensor(b).detach().to(mean.device)
        if weight.shape != mean.shape or len(bias) != len(mean):
            raise DataError(
                f"NC4Accumulator: means {tuple(mean.shape)}, W {tuple(weight.shape)}, b {tuple(bias.shape)}; "
                "give one row of each per class"
            )
        seen = torch.as_tensor(counts).to(mean.device) >= n_min
        if not bool(seen.any()):
            raise DataError(f"NC4Accumulator: no class has {n_min} samples, so there is no nearest mean")
        for name, given, used in (("means", mean, seen), ("W", weight, None), ("b", bias, None)):
            if not finite(given, used):
                raise DataError(f"NC4Accumulator: {name} contains NaN or inf")
        self._unseen = ~seen
        self._head = _head_scores(weight, bias, dtype)
        self._means = _mean_scores(mean, seen.nonzero()[:, 0], dtype)
        self._samples = self._labelled = 0
        self._hits = torch.zeros(4, dtype=torch.long, device=mean.device)

    @torch.no_grad()
    def update(
        self,
        h: Features,
        y: Labels | None = None,
        mask: Mask | None = None,
    ) -> NC4Accumulator:
        """Decide samples, with their classes if known; positions outside the mask do not exist. Returns itself.

        Raises:
            DataError: as `StreamingNC.update`; in particular a class that there is not, such as -100.
        """
        device, (count, width) = self._hits.device, self._head.matrix.shape
        features, classes = rows_inside(h, y, mask, width=width, num_classes=count, name="NC4Accumulator")
        step = max(1, _SCORES // len(self._unseen))
        for start in range(0, len(features), step):
            part = features[start : start + step].to(device)
            part = at_least_float32(part)
            self._decide(part, None if classes is None else classes[start : start + step].to(device))
        return self

    def compute(self) -> NC4Report:
        """The shares so far, each sample counted once."""
        full, seen, head, centre = (int(hits) for hits in self._hits)
        return NC4Report(
            samples=self._samples,
            full_head=_share(full, self._samples),
            seen_head=_share(seen, self._samples),
            labelled=self._labelled,
            head_accuracy=_share(head, self._labelled),
            centre_accuracy=_share(centre, self._labelled),
        )

    def _decide(self, h: Float[Tensor, "row feature"], classes: Int[Tensor, " row"] | None) -> None:
        scores = self._head.of(h)
        full = self._head.best(scores, h)
        restricted = self._head.best(scores.masked_fill_(self._unseen, -torch.inf), h)
        away = (h.double() - self._means.centre).to(self._means.matrix.dtype)
        nearest = self._means.best(self._means.of(away), h.double() - self._means.centre)
        hits = [full == nearest, restricted == nearest]
        if classes is not None:
            hits += [full == classes, nearest == classes]
            self._labelled += len(h)
        self._samples += len(h)
        self._hits[: len(hits)] += torch.stack(hits).sum(1)


def _head_scores(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> _Scores:
    every = torch.arange(len(weight), device=weight.device)
    origin = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    return _Scores(weight.to(dtype), bias.double(), weight, every, origin)


def _mean_scores(mean: Tensor, seen: Tensor, dtype: torch.dtype) -> _Scores:
    means = ClassMeans.of(mean, seen)
    matrix = torch.empty(len(seen), mean.shape[1], dtype=dtype, device=mean.device)
    square = torch.empty_like(means.norm)
    for rows in blocks(*matrix.shape):
        m = means.centred(rows)
        matrix[rows] = m.to(dtype)
        square[rows] = m.square().sum(1)
    return _Scores(matrix, -square / 2, mean, seen, means.centre)


def _share(hits: int, of: int) -> float:
    return hits / of if of else math.nan
