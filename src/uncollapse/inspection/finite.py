"""Leave out what is not finite, and count it, so that a model that diverges can be watched like any other."""

from __future__ import annotations

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
