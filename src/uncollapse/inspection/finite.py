"""Which rows of features can be counted, so that a model that diverges can be watched like any other."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_LARGEST = 1e70
"""Sums of products of two squares of a number up to this size do not overflow in float64."""


def finite_rows(features: Float[Tensor, "row feature"]) -> Bool[Tensor, " row"]:
    """Rows without NaN and inf, and without numbers so large that their moments would overflow."""
    return (features.abs() <= min(_LARGEST, torch.finfo(features.dtype).max)).all(-1)
