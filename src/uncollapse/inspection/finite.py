"""Leave out what is not finite, and count it, so that a model that diverges can be watched like any other."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import DataError
from uncollapse.inspection.attention import AttentionTally
from uncollapse.inspection.attention_calls import AttentionCall

_LARGEST = 1e70
"""Sums of products of two squares of a number up to this size do not overflow in float64."""


def finite_rows(features: Float[Tensor, "row feature"]) -> Bool[Tensor, " row"]:
    """Rows without NaN and inf, and without numbers so large that their moments would overflow."""
    return (features.abs() <= min(_LARGEST, torch.finfo(features.dtype).max)).all(-1)


class FiniteAttention(AttentionTally):
    """Leaves sequences out whose queries or keys are not finite, and counts their rows, instead of raising.

    Attributes:
        left_out: rows that were left out.
        refused: layer -> why a call with finite queries and keys could not be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out = 0
        self.refused: dict[str, str] = {}

    def add_call(self, call: AttentionCall, mask: Bool[Tensor, "batch query"] | None = None) -> None:
        """Count the rows of a call."""
        try:
            super().add_call(call, mask)
        except DataError as error:
            self._add_finite(call, mask, error)

    def _add_finite(
        self, call: AttentionCall, mask: Bool[Tensor, "batch query"] | None, error: DataError
    ) -> None:
        kept = call.query.isfinite().flatten(1).all(1) & call.key.isfinite().flatten(1).all(1)
        batch, rows = len(kept), call.query[0, ..., 0].numel()
        if bool(kept.all()):  # the scores overflow, or the call is of a kind that is not understood
            self.left_out += batch * rows
            self.refused[call.layer] = str(error)
            return
        self.left_out += rows * int((~kept).sum())
        if not bool(kept.any()):
            return
        own = call.mask is not None and len(call.mask) == batch
        finite = replace(
            call,
            query=call.query[kept],
            key=call.key[kept],
            mask=call.mask[kept] if own and call.mask is not None else call.mask,
            weights=None if call.weights is None else call.weights[kept],
        )
        self.add_call(finite, None if mask is None else mask[kept])

    def clear(self) -> None:
        """Forget what was counted."""
        super().clear()
        self.left_out = 0
        self.refused.clear()
