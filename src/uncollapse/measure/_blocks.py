"""Passes over many rows in parts of a size that stays in cache."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 19
"""Numbers that a part holds at most, unless one row has more: 4 MB in float64."""


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices that cover `count` rows of `width` numbers."""
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
