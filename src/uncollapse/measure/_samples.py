"""Features with their classes as instruments take them: any leading axes, a mask of positions, Torch or NumPy; what is refused."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from uncollapse.errors import DataError

Features: TypeAlias = Float[Tensor, "*position feature"] | Float[np.ndarray, "*position feature"]
Labels: TypeAlias = Int[Tensor, "*position"] | Int[np.ndarray, "*position"]
Mask: TypeAlias = (
    Bool[Tensor, "*position"]
    | Bool[np.ndarray, "*position"]
    | Integer[Tensor, "*position"]
    | Integer[np.ndarray, "*position"]
)
"""Positions that exist: True, or not 0, as in the attention mask of a tokenizer."""


def rows_inside(
    h: Any, y: Any, mask: Any, *, width: int, num_classes: int, name: str
) -> tuple[Tensor, Tensor | None]:
    """Features (row, feature) and classes (row,) int64 of the positions inside the mask, each where it was.

    Args:
        h: `Features`. y: `Labels`, or None where classes are not known. mask: `Mask`, or None for all positions.
        width: features that a row must have.
        num_classes: classes are 0 to one less than this.
        name: of who asks, for messages.

    Raises:
        DataError: another width, a mask or classes of another shape or kind of number, a class that there is not, NaN or inf.
    """
    features = torch.as_tensor(h).detach()
    if not features.ndim or features.shape[-1] != width:
        found = features.shape[-1] if features.ndim else "none"
        raise DataError(f"{name}: features of width {found}, expected {width}")
    classes = None if y is None else _of_positions(y, features, name, "classes")
    inside = None if mask is None else _of_positions(mask, features, name, "mask")
    features = features.reshape(-1, width)
    if inside is not None:
        # as numbers they would be read as row numbers
        inside = inside.bool()
        features = features[inside.to(features.device)]
        classes = None if classes is None else classes[inside.to(classes.device)]
    if not len(features):
        return features, None if classes is None else classes.long()
    if classes is not None:
        low, high = (int(end) for end in classes.aminmax())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"{name}: classes from {low} to {high}, expected 0 to {num_classes - 1}; "
                "leave positions without a class out with mask"
            )
        classes = classes.long()
    if not finite(features):
        bad = int((~features.isfinite()).any(1).sum())
        raise DataError(
            f"{name}: {bad} of {len(features)} feature rows contain NaN or inf; leave them out with mask"
        )
    return features, classes


def finite(values: Tensor, rows: Tensor | None = None) -> bool:
    """Whether all numbers are finite, or all in some rows; rows are copied only where others are not."""

    def all_of(part: Tensor) -> bool:
        return not part.numel() or bool(torch.stack(part.aminmax()).isfinite().all())

    return all_of(values) or (rows is not None and all_of(values[rows]))


def _of_positions(given: Any, features: Tensor, name: str, what: str) -> Tensor:
    """One whole number, or truth value, for each position of the features, in one row."""
    values = torch.as_tensor(given)
    if values.shape != features.shape[:-1]:
        raise DataError(
            f"{name}: features {tuple(features.shape)} for {what} {tuple(values.shape)}; give one entry a row"
        )
    if (
        values.is_floating_point()
        or values.is_complex()
        or (what == "classes" and values.dtype == torch.bool)
    ):
        raise DataError(
            f"{name}: {what} of {values.dtype}; give whole numbers" + " or bool" * (what == "mask")
        )
    return values.reshape(-1)
