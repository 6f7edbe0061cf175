"""Attention entropy per head and layer of a running model, streamed over any number of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.arguments import arguments_of, real_decoder_tokens, real_tokens
from uncollapse.inspection.attention_calls import LOOKED_FOR, AttentionCall, KeyMasks, attention_calls
from uncollapse.inspection.nested import padded_layers
from uncollapse.measure.attention import AttentionRows

COLLAPSED = 0.05
"""Normalised entropy below which a head has collapsed: of the spread it could have, a twentieth."""

SINK = 0.5
"""Mean probability of the first key from which a head rests on it, which is usual and no collapse."""

UNIFORM = 0.95
"""Normalised entropy above which a head hardly prefers any key."""


@dataclass(frozen=True)
class HeadStatistics:
    """The heads of one layer, each attribute of shape (head,); entropies in nats over rows that are no padding.

    Attributes:
        entropy: mean entropy of a row.
        normalized: mean of entropy over ln(allowed keys), 0 to 1, rows that see one key left out.
        lowest: smallest normalised entropy of a row.
        peak: mean largest probability.
        first: mean probability of the first key, rows that see one key left out.
        rows: rows counted.
        nonfinite: rows with NaN or inf, which are counted nowhere else.
    """

    entropy: Float[Tensor, " head"]
    normalized: Float[Tensor, " head"]
    lowest: Float[Tensor, " head"]
    peak: Float[Tensor, " head"]
    first: Float[Tensor, " head"]
    rows: Float[Tensor, " head"]
    nonfinite: Float[Tensor, " head"]

    @property
    def sink(self) -> Bool[Tensor, " head"]:
        """Heads that rest on the first key, an attention sink: low entropy there is usual."""
        return self.first >= SINK

    @property
    def collapsed(self) -> Bool[Tensor, " head"]:
        """Heads whose rows are nearly one-hot, and not on the first key."""
        return (self.normalized < COLLAPSED) & ~self.sink

    @property
    def uniform(self) -> Bool[Tensor, " head"]:
        """Heads that hardly prefer any key."""
        return self.normalized > UNIFORM


def marked_heads(layers: Mapping[str, HeadStatistics]) -> dict[str, Bool[Tensor, " head"]]:
    """Which heads are `collapsed`, `sink` or `uniform`, those of all layers in a row; empty tensors for no layer."""
    none = torch.empty(0, dtype=torch.bool)
    return {
        kind: torch.cat([getattr(one, kind) for one in layers.values()]) if layers else none
        for kind in ("collapsed", "sink", "uniform")
    }


class AttentionTally:
    """Sums over attention rows, by layer; means at any time. Holds a few numbers per head and no attention."""

    def __init__(self) -> None:
        self._sums: dict[str, Float[Tensor, "sum head"]] = {}
        self._lowest: dict[str, Float[Tensor, " head"]] = {}
        self._masks = KeyMasks()

    def add_call(self, call: AttentionCall, mask: Bool[Tensor, "batch query"] | None = None) -> None:
        """Count the rows of a call."""
        self.add(call.layer, call.rows(self._masks.read(call)), mask)

    def add(self, layer: str, rows: AttentionRows, mask: Bool[Tensor, "batch query"] | None = None) -> None:
        """Count the rows of a layer; queries outside the mask are padding."""
        asked = rows.allowed >= 1
        if mask is not None:
            asked = asked & mask[:, None]
        nonfinite = asked & rows.nonfinite
        counted = asked & ~nonfinite
        spread = counted & (rows.allowed >= 2)
        normalized = rows.normalized

        def total(values: Tensor, where: Tensor) -> Tensor:
            return torch.where(where, values, 0).sum(dim=(0, 2), dtype=torch.float64)

        ones = torch.ones_like(rows.entropy)
        sums = torch.stack(
            [
                total(rows.entropy, counted), total(rows.peak, counted), total(ones, counted),
                total(normalized, spread), total(rows.first, spread), total(ones, spread),
                total(ones, nonfinite),
            ]
        )  # fmt: skip
        lowest = torch.where(spread, normalized, torch.inf).amin(dim=(0, 2))
        if layer in self._sums:
            self._sums[layer] += sums
            self._lowest[layer] = torch.minimum(self._lowest[layer], lowest)
        else:
            self._sums[layer], self._lowest[layer] = sums, lowest

    @property
    def layers(self) -> Mapping[str, HeadStatistics]:
        """Statistics of every layer seen, in the order of their first call; NaN for heads without a row."""
        found = {}
        for layer, (entropy, peak, rows, normalized, first, spread, nonfinite) in self._sums.items():
            found[layer] = HeadStatistics(
                entropy=entropy / rows,
                normalized=normalized / spread,
                lowest=self._lowest[layer].masked_fill(spread == 0, torch.nan),
                peak=peak / rows,
                first=first / spread,
                rows=rows,
                nonfinite=nonfinite,
            )
        return found

    @property
    def nonfinite(self) -> int:
        """Rows of all heads that contain NaN or inf."""
        return int(sum(float(sums[-1].sum()) for sums in self._sums.values()))

    def clear(self) -> None:
        """Forget what was counted."""
        self._sums.clear()
        self._lowest.clear()
        self._masks = KeyMasks()


class ReadableAttention(AttentionTally):
    """Says of calls that cannot be read why, by layer in `refused`, instead of raising within the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    def add_call(self, call: AttentionCall, mask: Bool[Tensor, "batch query"] | None = None) -> None:
        """Count the rows of a call."""
        try:
            super().add_call(call, mask)
        except DataError as error:
            self.refuse(call.layer, f"{call.layer}: {error}")

    def refuse(self, layer: str, reason: str) -> None:
        """Note why the attention of a layer cannot be read."""
        self.refused[layer] = reason

    def clear(self) -> None:
        """Forget what was counted."""
        super().clear()
        self.refused.clear()


@contextmanager
def attention_statistics(model: nn.Module) -> Iterator[AttentionTally]:
    """Watch every attention of `model` within the context; padding is left out where the model is given its mask.

    Raises:
        ConfigError: on leaving, if forward passes ran and no attention was seen; says what was looked for.
    """
    tally = AttentionTally()
    with counted_attention(model, tally) as padding:
        yield tally
    if padding.passes and not tally.layers:
        raise no_attention(model)


@contextmanager
def counted_attention(
    model: nn.Module, tally: AttentionTally, *, refused: Callable[[str, str], Any] | None = None
) -> Iterator[PaddingMask]:
    """Within the context, count every attention of `model` in `tally`, without the queries that are padding.

    `refused` as of `attention_calls`.
    """

    def seen(call: AttentionCall) -> None:
        tally.add_call(call, padding.queries(call))

    with padding_of(model) as padding, attention_calls(model, seen, refused=refused):
        yield padding


class PaddingMask:
    """Which tokens of the forward pass of `model` are none, from its arguments (`real_tokens`, `real_decoder_tokens`)."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        self._tokens: Bool[Tensor, "batch token"] | None = None
        self._decoder_tokens: Bool[Tensor, "batch token"] | None = None
        self._decoders = _decoders(model)

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the masks of a call of the model, those of two axes."""
        arguments = arguments_of(module, args, kwargs)
        self.passes += 1
        self._tokens, self._decoder_tokens = real_tokens(arguments), real_decoder_tokens(arguments)

    def tokens(self, module: str) -> Bool[Tensor, "batch token"] | None:
        """The mask of what the module of this name reads; None without one."""
        return self._decoder_tokens if module.startswith(self._decoders) else self._tokens

    def queries(self, call: AttentionCall) -> Bool[Tensor, "batch query"] | None:
        """The mask of the queries of a call: the last ones of the tokens, or None if it is of another shape."""
        tokens = self.tokens(call.layer)
        rows, count = call.query.shape[0], call.query.shape[2]
        if tokens is None or tokens.shape[0] != rows or tokens.shape[1] < count:
            return None
        return tokens[:, tokens.shape[1] - count :]


def _decoders(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of modules within a `decoder` that has an `encoder` beside it."""
    names = {name for name, _ in model.named_modules()}
    parents = (name.removesuffix("decoder") for name in names if name.rpartition(".")[2] == "decoder")
    return tuple(sorted(f"{parent}decoder." for parent in parents if f"{parent}encoder" in names))


@contextmanager
def padding_of(model: nn.Module) -> Iterator[PaddingMask]:
    """The padding mask of whichever forward pass of `model` is running within the context."""
    padding = PaddingMask(model)
    handle = model.register_forward_pre_hook(padding.read, with_kwargs=True)
    try:
        with padded_layers(model):
            yield padding
    finally:
        handle.remove()


def no_attention(model: nn.Module) -> ConfigError:
    """What to say of a model in which no attention was seen."""
    return ConfigError(
        f"no attention was seen in {type(model).__name__}; looked for " + "; ".join(LOOKED_FOR)
    )


def head_table(layers: Mapping[str, HeadStatistics]) -> dict[str, Float[Tensor, "layer head"]]:
    """Every statistic as one matrix of layers and heads, NaN where a layer has fewer heads than others."""
    most = max((len(one.entropy) for one in layers.values()), default=0)
    return {
        field.name: torch.stack(
            [
                torch.nn.functional.pad(
                    getattr(one, field.name), (0, most - len(one.entropy)), value=torch.nan
                )
                for one in layers.values()
            ]
        )
        if layers
        else torch.empty(0, 0)
        for field in fields(HeadStatistics)
    }
