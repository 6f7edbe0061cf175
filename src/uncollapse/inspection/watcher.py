"""Everything that can be seen of a model while it runs, gathered over any number of forward passes.

with uncollapse.watch(model) as seen:
    for batch in loader:
        model(**batch)
print(seen.scalars())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.attention import ReadableAttention, counted_attention, no_attention
from uncollapse.inspection.class_tally import ClassTally
from uncollapse.inspection.classes import ClassSource, Seen, head_inputs
from uncollapse.inspection.features import SpreadTally, block_outputs, head_of
from uncollapse.inspection.result import Inspection
from uncollapse.inspection.weights import NO_PROJECTIONS, attention_logit_norms, weight_spectra

_Found = TypeVar("_Found")


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
        self._tally, self._spread = ReadableAttention(), SpreadTally()
        self._classes, self._head, self._headless = classes, head, ""
        if features and head is None:
            try:
                self._head = head_of(self.model)
            except ConfigError as error:
                self._headless = str(error)
        self._at_head = ClassTally(self._head) if features and self._head is not None else None
        self._undecided = ""
        self._stack: ExitStack | None = None

    def __enter__(self) -> Watcher:
        if self._stack is not None:
            raise ConfigError(
                "this model is being watched already; leave the first context before entering it again"
            )
        with ExitStack() as stack:
            if self._attention:
                stack.enter_context(counted_attention(self.model, self._tally, refused=self._tally.refuse))
            if self._features:
                stack.enter_context(block_outputs(self.model, self._spread.add))
                if self._at_head is not None:
                    stack.enter_context(self._reading(self._at_head.add, self._at_head.miss))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()

    def _reading(self, seen: Seen, missed: Callable[[str], None]) -> AbstractContextManager[None]:
        return head_inputs(self.model, seen, classes=self._classes, head=self._head, missed=missed)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """A context for a second pass, over the same data or others, that adds NC4 and nothing else to the result.

        Does the head decide as the nearest of the class means does that were seen before? On the samples that the means
        were made of the nearest mean knows part of the answer: a class of one sample is its own mean. What stands in the way
        is told in `absent`.
        """
        with ExitStack() as stack:
            try:
                if self._at_head is None:
                    raise DataError(self._headless or "features are not watched")
                self._at_head.begin_deciding()
                stack.enter_context(self._reading(self._at_head.decide, lambda reason: None))
            except DataError as error:
                self._undecided = str(error)
            yield

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._tally.clear()
        self._spread.clear()
        self._undecided = ""
        if self._at_head is not None:
            self._at_head.clear()

    def result(self, *, weights: bool = False) -> Inspection:
        """What was seen so far, be it nothing; `weights` adds their spectra, seconds for a hundred million of them.

        Raises nothing, whatever the model holds: what cannot be computed is in `absent`.
        """
        blocks = self._spread.blocks
        heads = {layer: one for layer, one in self._tally.layers.items() if bool(one.rows.any())}
        absent = self._without_attention() | self._without_features() | self._without_classes()

        def computed(part: str, compute: Callable[[], _Found]) -> _Found | None:
            try:
                return compute()
            except (DataError, RuntimeError) as error:  # eigenvalues of what is not finite are RuntimeErrors
                absent[part] = " ".join(str(error).split())
                return None

        at_head = self._at_head
        collapse, frames = (computed("classes", at_head.report) if at_head else None) or (None, None)
        norms = computed("logit_norms", lambda: attention_logit_norms(self.model)) if heads else None
        if norms == {}:
            absent["logit_norms"] = NO_PROJECTIONS
        spectra = computed("weights", lambda: weight_spectra(self.model)) if weights else None
        nonfinite = {"attention": self._tally.nonfinite} if self._attention else {}
        if self._features:
            nonfinite |= {"features": self._spread.left_out, "classes": at_head.left_out if at_head else 0}
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
            decisions=None if at_head is None else at_head.decisions,
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
            reason = next(iter(tally.refused.values()))
            more = f" (and {len(tally.refused) - 1} more layers)" if len(tally.refused) > 1 else ""
            return {"attention": f"{reason}{more}"}
        if not self._attention or any(bool(one.rows.any()) for one in tally.layers.values()):
            return {}
        if tally.nonfinite:
            return {"attention": f"all {tally.nonfinite} rows contain NaN or inf"}
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
        """Why the features at the head, or some of them, or their NC4 are not there."""
        reason = self._headless if self._at_head is None else self._at_head.absent()
        told = {"classes": reason, "nc4": self._undecided}
        return {part: why for part, why in told.items() if why}


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
