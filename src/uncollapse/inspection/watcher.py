"""Everything that can be seen of a model while it runs, gathered over any number of forward passes.

with uncollapse.watch(model) as seen:
    for batch in loader:
        model(**batch)
print(seen.scalars())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.attention import (
    AttentionTally,
    HeadStatistics,
    counted_attention,
    head_table,
    marked_heads,
    no_attention,
)
from uncollapse.inspection.features import (
    Classes,
    FeatureSpread,
    SpreadTally,
    block_outputs,
    head_inputs,
    head_of,
)
from uncollapse.inspection.weights import (
    NO_PROJECTIONS,
    WeightSpectrum,
    attention_logit_norms,
    weight_spectra,
)
from uncollapse.measure.class_statistics import CollapseReport, StreamingNC
from uncollapse.measure.neural_collapse import ClassMoments, NCReport, between_classes, nc_report

PAIRS = 200_000
"""Pairs of classes drawn for the pairwise metrics of large vocabularies."""


@dataclass(frozen=True)
class Inspection:
    """What was seen of a model. Empty or None where there was nothing; `absent` says why.

    Attributes:
        model: class name.
        parameters: how many.
        heads: statistics of the attention heads by layer.
        logit_norms: ||W_Q W_K^T||_2 / sqrt(head size) by layer and head.
        blocks: spread of the output of each block, in order.
        collapse: neural-collapse metrics of the features at the head, by class (the next token of a language model).
        frames: the classical metrics with simplex and orthogonal frames, where there are no more classes than features + 1.
        weights: spectra of the weights.
        absent: part of the inspection -> reason.
    """

    model: str
    parameters: int
    heads: Mapping[str, HeadStatistics] = field(default_factory=dict)
    logit_norms: Mapping[str, Float[Tensor, " head"]] = field(default_factory=dict)
    blocks: Mapping[str, FeatureSpread] = field(default_factory=dict)
    collapse: CollapseReport | None = None
    frames: NCReport | None = None
    weights: tuple[WeightSpectrum, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    def scalars(self, *, by_layer: bool = False) -> dict[str, float]:
        """Numbers for a logger, `area/name/statistic`; `by_layer` adds one per layer or block."""
        found: dict[str, float] = {}
        if self.heads:
            table = head_table(self.heads)
            normalized = table["normalized"]
            found |= {
                "attention/entropy/mean": float(table["entropy"].nanmean()),
                "attention/normalized/mean": float(normalized.nanmean()),
                "attention/normalized/lowest_head": _least(normalized),
                "attention/peak/mean": float(table["peak"].nanmean()),
                "attention/first_key/mean": float(table["first"].nanmean()),
            }
            for kind, heads in marked_heads(self.heads).items():
                found[f"attention/{kind}_heads/frac"] = float(heads.double().mean())
        if self.logit_norms:
            found["attention/logit_norm/max"] = max(float(norm.amax()) for norm in self.logit_norms.values())
        if self.blocks:
            ranks = [block.effective_rank for block in self.blocks.values()]
            found |= {"features/effective_rank/last": ranks[-1], "features/effective_rank/min": min(ranks)}
        if self.collapse is not None:
            found |= self.collapse.values
            found["nc/classes"] = float(self.collapse.classes)
        if self.frames is not None:
            found |= {f"nc/{name}": value for name, value in self.frames.metrics().items()}
        if self.weights:
            found["weights/spectral_norm/max"] = max(one.spectral_norm for one in self.weights)
            shares = [one.effective_rank / min(one.shape) for one in self.weights]
            found["weights/effective_rank/share"] = sum(shares) / len(shares)
        if by_layer:
            for layer, one in self.heads.items():
                found[f"attention/normalized/{layer}"] = float(one.normalized.nanmean())
            for name, block in self.blocks.items():
                found[f"features/effective_rank/{name}"] = block.effective_rank
        return found


class Watcher:
    """A context in which a model is watched; see `watch`. Entering again goes on counting, `clear` begins anew."""

    def __init__(
        self,
        model: nn.Module,
        *,
        attention: bool,
        features: bool,
        head: nn.Module | None,
        classes: Callable[[], Classes | None] | None,
    ) -> None:
        self.model = model
        self._attention, self._features = attention, features
        self._head, self._classes = head, classes
        self._tally, self._spread = AttentionTally(), SpreadTally()
        self._moments: StreamingNC | None = None
        self._absent: dict[str, str] = {}
        self._stack: ExitStack | None = None

    def __enter__(self) -> Watcher:
        if self._stack is not None:
            raise ConfigError(
                "this model is being watched already; leave the first context before entering it again"
            )
        stack = ExitStack()
        if self._attention:
            stack.enter_context(counted_attention(self.model, self._tally))
        if self._features:
            stack.enter_context(block_outputs(self.model, self._spread.add))
            if self._head is None:
                try:
                    self._head = head_of(self.model)
                except ConfigError as error:
                    self._absent["classes"] = str(error)
            if self._head is not None:
                seen = self._with_classes(self._head)
                stack.enter_context(head_inputs(self.model, seen, classes=self._classes, head=self._head))
        self._stack = stack
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()

    def _with_classes(self, head: nn.Module) -> Callable[[Tensor, Tensor], None]:
        weight = getattr(head, "weight", None)
        width = len(weight) if isinstance(weight, Tensor) else 0

        def seen(features: Float[Tensor, "row feature"], classes: Int[Tensor, " row"]) -> None:
            if not len(classes):
                return
            if self._moments is None:
                count = width or int(classes.max()) + 1
                self._moments = StreamingNC(count, features.shape[-1], device=features.device)
            self._moments.update(features, classes)

        return seen

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._tally.clear()
        self._spread.clear()
        self._moments = None

    def result(self, *, weights: bool = False) -> Inspection:
        """What was seen so far, be it nothing; `weights` adds their spectra, seconds for a hundred million of them."""
        blocks, heads = self._spread.blocks, self._tally.layers
        absent = dict(self._absent)
        if self._attention and not heads:
            absent["attention"] = str(no_attention(self.model))
        if self._features and self._moments is None:
            absent.setdefault(
                "classes",
                "no classes were given; a classifier needs labels= in its forward pass or watch(classes=...)",
            )
        norms = attention_logit_norms(self.model) if heads else {}
        if heads and not norms:
            absent["logit_norms"] = NO_PROJECTIONS
        collapse, frames = self._collapse()
        return Inspection(
            model=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            heads=heads,
            logit_norms=norms,
            blocks=blocks,
            collapse=collapse,
            frames=frames,
            weights=tuple(weight_spectra(self.model)) if weights else (),
            absent=absent,
        )

    def scalars(self, *, by_layer: bool = False) -> dict[str, float]:
        """Numbers for a logger; see `Inspection.scalars`."""
        return self.result().scalars(by_layer=by_layer)

    def _collapse(self) -> tuple[CollapseReport | None, NCReport | None]:
        moments = self._moments
        if moments is None:
            return None, None
        weight = getattr(self._head, "weight", None)
        fits = isinstance(weight, Tensor) and weight.shape == moments.mean.shape
        W = weight.detach() if isinstance(weight, Tensor) and fits else None
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
        return collapse, nc_report(per_class, between_classes(per_class), W=W)


def watch(
    model: nn.Module,
    *,
    attention: bool = True,
    features: bool = True,
    head: nn.Module | None = None,
    classes: Callable[[], Classes | None] | None = None,
) -> Watcher:
    """Watch a PyTorch model in a `with` block: attention entropy per head, spread of features, neural collapse at the head.

    Nothing is computed with gradient, no attention matrix is kept, what the model computes does not change.

    Args:
        attention: recompute the rows of every attention from its queries and keys, a few at a time.
        features: spread of the output of every block, and class statistics of what the head reads.
        head: the layer that reads the features; by default the output embeddings or the last linear layer.
        classes: gives the classes of the current batch (shape of the features without the last axis); language models
            take the next token, and models that are called with `labels=` those.
    """
    return Watcher(model, attention=attention, features=features, head=head, classes=classes)


def _least(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.amin()) if len(kept) else float("nan")
