"""Class statistics of what a head reads, streamed, and the neural collapse that they show."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.errors import DataError
from uncollapse.inspection.finite import finite_rows
from uncollapse.inspection.weights import effective_weight
from uncollapse.measure.class_statistics import CollapseReport, StreamingNC
from uncollapse.measure.nearest_class import NC4Accumulator, NC4Report
from uncollapse.measure.neural_collapse import ClassMoments, NCReport, between_classes, nc_report

PAIRS = 200_000
"""Pairs of classes drawn for the pairwise metrics of large vocabularies."""


class ClassTally:
    """Counts, means and scatters of features by class; of as many classes as the head has rows.

    Attributes:
        left_out: rows that contained NaN or inf.
    """

    def __init__(self, head: nn.Module) -> None:
        self._head = head
        self._moments: StreamingNC | None = None
        self._decisions: NC4Accumulator | None = None
        self._missed = self._refused = ""
        self.left_out = 0

    @property
    def seen(self) -> bool:
        """Whether there was a feature with a class."""
        return self._moments is not None

    def add(self, features: Float[Tensor, "row feature"], classes: Int[Tensor, " row"]) -> None:
        """Take features with their classes; never raises."""
        kept = finite_rows(features)
        self.left_out += int((~kept).sum())
        features, classes = features[kept], classes[kept]
        if not len(classes):
            return
        moments = self._moments
        if moments is None:
            weight = self._head_weight()
            count = int(classes.max()) + 1 if weight is None else len(weight)
            width = features.shape[-1]
            moments = StreamingNC(count, width, pooled_cov=count <= width + 1, device=features.device)
        try:
            self._moments = moments.update(features, classes)
        except DataError as error:  # a class that the head has no row for
            self._refused = str(error)

    def miss(self, reason: str) -> None:
        """A forward pass gave no feature with a class."""
        self._missed = reason

    def absent(self) -> str:
        """Why features, or some of them, are not there; empty if they are."""
        if self._refused or self.seen:
            return self._refused
        if self.left_out:
            return f"all {self.left_out} features at the head contain NaN or inf"
        return self._missed or "the head saw no feature with a class"

    def report(self) -> tuple[CollapseReport | None, NCReport | None]:
        """Neural collapse over all classes, and the classical metrics where a frame can exist; None without features."""
        moments = self._moments
        if moments is None:
            return None, None
        W = self._weight(moments)
        try:
            collapse = moments.compute(W=W, pairs=PAIRS)
        except DataError:  # NaN in the head: told of by name where weights are inspected
            collapse = moments.compute(pairs=PAIRS)
            W = None
        if int((moments.count > 0).sum()) > moments.dim + 1:
            return collapse, None
        per_class = ClassMoments(
            moments.count, moments.mean.double(), moments.scatter.double() / moments.count.clamp(min=1)
        )
        between = between_classes(per_class)
        along = None
        if moments.within is not None:
            covariance = moments.within.double() / moments.count.sum()
            along = ((between.directions @ covariance) * between.directions).sum(-1)
        decided = self.decisions
        differ = None if decided is None else between.trace.new_tensor(1 - decided.seen_head)
        return collapse, nc_report(per_class, between, within_along=along, W=W, nc4=differ)

    def begin_deciding(self) -> None:
        """From here on `decide` compares the head with the class means seen so far.

        Raises:
            DataError: there are no class means, or no head to compare them with.
        """
        moments = self._moments
        W = None if moments is None else self._weight(moments)
        if moments is None or W is None:
            raise DataError("NC4 needs class means from a first pass, and a linear head with one row a class")
        bias = getattr(self._head, "bias", None)
        self._decisions = NC4Accumulator(
            moments.mean, moments.count, W, bias.detach() if isinstance(bias, Tensor) else None
        )

    def decide(self, features: Float[Tensor, "row feature"], classes: Int[Tensor, " row"]) -> None:
        """Compare the choice of the head with the nearest class mean; features that are not finite are left out."""
        assert self._decisions is not None
        kept = finite_rows(features)
        self._decisions.update(features[kept], classes[kept])

    @property
    def decisions(self) -> NC4Report | None:
        """NC4 so far, None if nothing was decided."""
        found = None if self._decisions is None else self._decisions.compute()
        return found if found is not None and found.samples else None

    def clear(self) -> None:
        """Forget what was seen."""
        self._moments = self._decisions = None
        self._missed = self._refused = ""
        self.left_out = 0

    def _weight(self, moments: StreamingNC) -> Tensor | None:
        weight = self._head_weight()
        return weight.detach() if weight is not None and weight.shape == moments.mean.shape else None

    def _head_weight(self) -> Tensor | None:
        try:
            return effective_weight(self._head, "weight")
        except AttributeError:  # a head of another kind
            return None
