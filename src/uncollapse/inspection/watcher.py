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
from typing import TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.attention import (
    HeadStatistics,
    counted_attention,
    head_table,
    marked_heads,
    no_attention,
)
from uncollapse.inspection.classes import ClassSource, head_inputs
from uncollapse.inspection.features import (
    FeatureSpread,
    SpreadTally,
    block_outputs,
    head_of,
)
from uncollapse.inspection.finite import FiniteAttention, finite_rows
from uncollapse.inspection.weights import WeightSpectrum, attention_logit_norms, weight_spectra
from uncollapse.measure.class_statistics import CollapseReport, StreamingNC
from uncollapse.measure.neural_collapse import ClassMoments, NCReport, between_classes, nc_report

_Found = TypeVar("_Found")

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
        nonfinite: rows of "attention", of "features" of the blocks and of features at the head ("classes") that were left
            out because they contain NaN or inf; 0 is told too.
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
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def scalars(self, *, by_layer: bool = False) -> dict[str, float]:
        """Numbers for a logger, `area/name/statistic`; `by_layer` adds those of each layer, block and weight."""
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
        for part, rows in self.nonfinite.items():
            found[f"{'nc' if part == 'classes' else part}/nonfinite/rows"] = float(rows)
        if by_layer:
            for layer, one in self.heads.items():
                found[f"attention/normalized/{layer}"] = float(one.normalized.nanmean())
            for layer, norm in self.logit_norms.items():
                found[f"attention/logit_norm/{layer}"] = float(norm.amax())
            for name, block in self.blocks.items():
                found[f"features/effective_rank/{name}"] = block.effective_rank
            for weight in self.weights:
                found[f"weights/spectral_norm/{weight.name}"] = weight.spectral_norm
                found[f"weights/effective_rank/{weight.name}"] = weight.effective_rank
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
        classes: ClassSource,
    ) -> None:
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._attention, self._features = attention, features
        self._head, self._classes = head, classes
        self._tally, self._spread = FiniteAttention(), SpreadTally()
        self._moments: StreamingNC | None = None
        self._left_out = 0
        self._headless = self._missed = self._refused = ""
        self._stack: ExitStack | None = None

    def __enter__(self) -> Watcher:
        if self._stack is not None:
            raise ConfigError(
                "this model is being watched already; leave the first context before entering it again"
            )
        with ExitStack() as stack:
            if self._attention:
                stack.enter_context(counted_attention(self.model, self._tally))
            if self._features:
                stack.enter_context(block_outputs(self.model, self._spread.add))
                if self._head is None:
                    try:
                        self._head = head_of(self.model)
                    except ConfigError as error:
                        self._headless = str(error)
                if self._head is not None:
                    stack.enter_context(
                        head_inputs(
                            self.model,
                            self._with_classes(self._head),
                            classes=self._classes,
                            head=self._head,
                            missed=self._miss,
                        )
                    )
            self._stack = stack.pop_all()
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
            kept = finite_rows(features)
            self._left_out += int((~kept).sum())
            features, classes = features[kept], classes[kept]
            if not len(classes):
                return
            moments = self._moments
            if moments is None:
                count = width or int(classes.max()) + 1
                moments = StreamingNC(count, features.shape[-1], device=features.device)
            try:
                self._moments = moments.update(features, classes)
            except DataError as error:  # a class that the head has no row for
                self._refused = str(error)

        return seen

    def _miss(self, reason: str) -> None:
        self._missed = reason

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._tally.clear()
        self._spread.clear()
        self._moments = None
        self._left_out = 0
        self._missed = self._refused = ""

    def result(self, *, weights: bool = False) -> Inspection:
        """What was seen so far, be it nothing; `weights` adds their spectra, seconds for a hundred million of them.

        Raises nothing, whatever the model holds: what cannot be computed is in `absent`.
        """
        blocks, heads = self._spread.blocks, self._tally.layers
        absent = self._without_attention() | self._without_features() | self._without_classes()

        def computed(part: str, compute: Callable[[], _Found]) -> _Found | None:
            try:
                return compute()
            except (DataError, RuntimeError) as error:  # eigenvalues of what is not finite are RuntimeErrors
                absent[part] = " ".join(str(error).split())
                return None

        collapse, frames = computed("classes", self._collapse) or (None, None)
        norms = computed("logit_norms", lambda: attention_logit_norms(self.model)) if heads else None
        spectra = computed("weights", lambda: weight_spectra(self.model)) if weights else None
        nonfinite = {"attention": self._tally.left_out} if self._attention else {}
        if self._features:
            nonfinite |= {"features": self._spread.left_out, "classes": self._left_out}
        for part, rows in nonfinite.items():
            if rows:
                absent[f"nonfinite {part}"] = f"{rows} rows contain NaN or inf and were left out"
        return Inspection(
            model=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            heads=heads,
            logit_norms=norms or {},
            blocks=blocks,
            collapse=collapse,
            frames=frames,
            weights=tuple(spectra or ()),
            nonfinite=nonfinite,
            absent=absent,
        )

    def scalars(self, *, by_layer: bool = False, weights: bool = False) -> dict[str, float]:
        """Numbers for a logger, see `Inspection.scalars`; `weights` adds those of the weights, as in `result`."""
        return self.result(weights=weights).scalars(by_layer=by_layer)

    def _without_attention(self) -> dict[str, str]:
        """Why the attention of some layers, or of all, is not there."""
        tally = self._tally
        if tally.refused:
            layer, reason = next(iter(tally.refused.items()))
            more = f" (and {len(tally.refused) - 1} more layers)" if len(tally.refused) > 1 else ""
            return {"attention": f"{layer}{more}: {reason}"}
        if not self._attention or tally.layers:
            return {}
        if tally.left_out:
            return {"attention": f"all {tally.left_out} rows contain NaN or inf"}
        return {"attention": str(no_attention(self.model))}

    def _without_features(self) -> dict[str, str]:
        """Why the features of some blocks, or of all, are not there."""
        spread = self._spread
        if spread.uneven:
            return {
                "features": f"{', '.join(sorted(spread.uneven))}: outputs of another width than the first were left out"
            }
        if not self._features or spread.blocks:
            return {}
        if spread.left_out:
            return {"features": f"all {spread.left_out} rows contain NaN or inf"}
        return {"features": "no blocks were seen at work: a list of layers of the same kind"}

    def _without_classes(self) -> dict[str, str]:
        """Why the features at the head, or some of them, are not there."""
        if self._refused:
            return {"classes": self._refused}
        if not self._features or self._moments is not None:
            return {}
        if self._left_out:
            return {"classes": f"all {self._left_out} features at the head contain NaN or inf"}
        return {"classes": self._headless or self._missed or "the head saw no feature with a class"}

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
    classes: ClassSource = None,
) -> Watcher:
    """Watch a PyTorch model in a `with` block: attention entropy per head, spread of features, neural collapse at the head.

    Nothing is computed with gradient, no attention matrix is kept, what the model computes does not change. Rows with NaN or
    inf are left out and counted, so that a diverging run can be watched.

    Args:
        attention: recompute the rows of every attention from its queries and keys, a few at a time.
        features: spread of the output of every block, and class statistics of what the head reads.
        head: the layer that reads the features; by default the output embeddings, a classifier by name, or the last linear
            layer outside of the blocks.
        classes: a function that gives the classes of the current batch, one a feature or one a text, or "next_token". Without
            it, causal language models of transformers take the next token, and all others the `labels=` they are called with.
    """
    return Watcher(model, attention=attention, features=features, head=head, classes=classes)


def _least(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.amin()) if len(kept) else float("nan")
