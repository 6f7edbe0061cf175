"""Where the head and the blocks of a model are, and the spread of what every block gives out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.inspection.attention import padding_of
from uncollapse.inspection.finite import finite_rows
from uncollapse.inspection.recomputation import recomputing
from uncollapse.measure.spectra import SecondMoment, effective_rank, participation_ratio


def head_of(model: nn.Module) -> nn.Module:
    """The layer that turns features into logits: the output embeddings, a classifier by name, or the last linear layer.

    A linear layer inside one of a stack of equal blocks is none: the last one of those is what remains where the head is a
    function, such as a product with the token embedding.

    Raises:
        ConfigError: none of them is there.
    """
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    for name in ("classifier", "score", "fc", "head"):
        found = getattr(model, name, None)
        if head is None and isinstance(found, nn.Linear):
            head = found
    inner = _inside_blocks(model)
    linear = [
        module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inner
    ]
    if head is None and linear:
        head = linear[-1]
    if head is None:
        raise ConfigError(
            f"{type(model).__name__} has no head that can be found; looked for get_output_embeddings(), a linear layer named "
            "classifier, score, fc or head, and the last torch.nn.Linear outside of its blocks; pass head="
        )
    return head


def _inside_blocks(model: nn.Module) -> set[int]:
    """Ids of the modules inside stacks of blocks of one class; plain containers of this and that are no stack."""
    inside: set[int] = set()
    for stack in model.modules():
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
            continue
        kinds = {type(block) for block in stack}
        alone = isinstance(stack, nn.Sequential) and len(stack) < 2
        if len(kinds) == 1 and kinds.isdisjoint({nn.Sequential, nn.ModuleList}) and not alone:
            inside.update(id(module) for block in stack for module in block.modules() if module is not block)
    return inside


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
    """Second moments of the outputs of blocks, streamed; holds one width x width matrix a block.

    Attributes:
        left_out: rows that contained NaN or inf.
        uneven: blocks whose width changed from pass to pass; those of another width than the first are not counted.
    """

    def __init__(self) -> None:
        self._moments: dict[str, SecondMoment] = {}
        self.left_out = 0
        self.uneven: set[str] = set()

    def add(self, name: str, features: Float[Tensor, "row feature"]) -> None:
        """Take rows of features of one block; never raises."""
        moment = self._moments.get(name) or SecondMoment.empty(features.shape[-1], features.device)
        if features.shape[-1] != len(moment.mean):
            self.uneven.add(name)
            return
        kept = finite_rows(features)
        bad = int((~kept).sum())
        self.left_out += bad
        self._moments[name] = moment.add(features[kept] if bad else features)

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
        self.left_out = 0
        self.uneven.clear()


@contextmanager
def block_outputs(
    model: nn.Module, seen: Callable[[str, Float[Tensor, "row feature"]], Any]
) -> Iterator[None]:
    """Within the context, call `seen` with the output of every block, as rows; padding tokens are left out."""

    def reading(name: str, block: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        time_first = any(
            isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in block.modules()
        )

        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if recomputing() or not isinstance(hidden, Tensor) or not hidden.is_floating_point():
                return
            if hidden.is_nested:  # without padding already
                seen(name, torch.cat(hidden.detach().unbind()))
                return
            if time_first and hidden.ndim == 3:
                hidden = hidden.transpose(0, 1)
            if hidden.ndim == 4:  # images: one vector a pixel
                hidden = hidden.movedim(1, -1)
            hidden = hidden.detach()
            tokens = padding.tokens(name)
            if tokens is not None and hidden.shape[:-1] == tokens.shape:
                seen(name, hidden[tokens])
            elif hidden.ndim >= 2:
                seen(name, hidden.reshape(-1, hidden.shape[-1]))

        return read

    with padding_of(model) as padding, ExitStack() as stack:
        for name, block in blocks_of(model).items():
            stack.callback(block.register_forward_hook(reading(name, block)).remove)
        yield
