"""Features of a running model: what its head reads, with the classes they belong to, and the spread of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.inspection.attention import padding_of
from uncollapse.inspection.attention_calls import recomputing
from uncollapse.measure.spectra import SecondMoment, effective_rank, participation_ratio

Classes = Int[Tensor, "*row"]


def head_of(model: nn.Module) -> nn.Module:
    """The layer that turns features into logits: the output embeddings, a classifier by name, or the last linear layer.

    Raises:
        ConfigError: none of them is there.
    """
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    for name in ("classifier", "score", "fc", "head"):
        found = getattr(model, name, None)
        if head is None and isinstance(found, nn.Linear):
            head = found
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if head is None and linear:
        head = linear[-1]
    if head is None:
        raise ConfigError(
            f"{type(model).__name__} has no head that can be found; looked for get_output_embeddings(), a linear layer named "
            "classifier, score, fc or head, and the last torch.nn.Linear; pass head="
        )
    return head


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a deep model by name: the members of its longest list of modules with one class, or nothing."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    if not lists:
        return {}
    name, longest = max(lists, key=lambda pair: len(pair[1]))
    return {f"{name}.{index}" if name else str(index): block for index, block in enumerate(longest)}


@contextmanager
def head_inputs(
    model: nn.Module,
    seen: Callable[[Float[Tensor, "row feature"], Int[Tensor, " row"]], Any],
    *,
    classes: Callable[[], Classes | None] | None = None,
    head: nn.Module | None = None,
) -> Iterator[None]:
    """Within the context, call `seen` with the features that the head reads and their classes, for every forward pass.

    Of a causal language model (features of as many tokens as `input_ids`), the class of a feature is the next token; the
    last position and padding are left out. Otherwise classes are what `classes()` gives, or the argument `labels`;
    negative ones (-100) are left out, and without any nothing is seen.
    """
    head = head_of(model) if head is None else head
    given: dict[str, Tensor | None] = {"ids": None, "labels": None}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given["ids"] = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        labels = kwargs.get("labels")
        given["labels"] = labels if isinstance(labels, Tensor) else None

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        if recomputing():
            return
        features = args[0].detach()
        named = classes() if classes is not None else None
        pair = _pair(features, named, given["ids"], given["labels"], padding.tokens)
        if pair is not None:
            seen(*pair)

    with padding_of(model) as padding, ExitStack() as stack:
        for handle in (
            model.register_forward_pre_hook(before, with_kwargs=True),
            head.register_forward_pre_hook(read),
        ):
            stack.callback(handle.remove)
        yield


def _pair(
    features: Tensor, named: Tensor | None, ids: Tensor | None, labels: Tensor | None, tokens: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if named is not None or ids is None or features.shape[:-1] != ids.shape or features.ndim != 3:
        found = named if named is not None else labels
        if found is None or found.shape != features.shape[:-1] or found.is_floating_point():
            return None
        kept = found >= 0
        return features[kept], found[kept].to(features.device)
    kept = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    if tokens is not None and tokens.shape == ids.shape:
        kept = tokens[:, 1:] & tokens[:, :-1]
    return features[:, :-1][kept], ids[:, 1:][kept]


@dataclass(frozen=True)
class FeatureSpread:
    """How many dimensions features use, about their mean.

    Attributes:
        rows: vectors seen.
        width: their length.
        effective_rank: of the matrix of all vectors; 1 to width.
        participation: participation ratio of the covariance; 1 to width.
    """

    rows: int
    width: int
    effective_rank: float
    participation: float


class SpreadTally:
    """Second moments of the outputs of blocks, streamed; holds one width x width matrix a block."""

    def __init__(self) -> None:
        self._moments: dict[str, SecondMoment] = {}

    def add(self, name: str, features: Float[Tensor, "row feature"]) -> None:
        """Take rows of features of one block."""
        moment = self._moments.get(name) or SecondMoment.empty(features.shape[-1], features.device)
        self._moments[name] = moment.add(features)

    @property
    def blocks(self) -> dict[str, FeatureSpread]:
        """The spread of each block that has seen two vectors or more."""
        found = {}
        for name, moment in self._moments.items():
            if moment.count > 1:
                values = moment.singular_values()
                spread = float(effective_rank(values)), float(participation_ratio(values))
                found[name] = FeatureSpread(moment.count, len(values), *spread)
        return found

    def clear(self) -> None:
        """Forget what was seen."""
        self._moments.clear()


@contextmanager
def block_outputs(
    model: nn.Module, seen: Callable[[str, Float[Tensor, "row feature"]], Any]
) -> Iterator[None]:
    """Within the context, call `seen` with the output of every block, as rows; padding tokens are left out."""

    def reading(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if recomputing() or not isinstance(hidden, Tensor) or not hidden.is_floating_point():
                return
            if hidden.ndim == 4:  # images: one vector a pixel
                hidden = hidden.movedim(1, -1)
            hidden = hidden.detach()
            tokens = padding.tokens
            if tokens is not None and hidden.shape[:-1] == tokens.shape:
                seen(name, hidden[tokens])
            elif hidden.ndim >= 2:
                seen(name, hidden.reshape(-1, hidden.shape[-1]))

        return read

    with padding_of(model) as padding, ExitStack() as stack:
        for name, block in blocks_of(model).items():
            stack.callback(block.register_forward_hook(reading(name)).remove)
        yield
