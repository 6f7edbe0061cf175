"""Nested settings and rows as flat mappings, with bounds that a hostile file cannot pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST, DEEPEST, LONGEST = 5000, 12, 2000


def flat(value: Any, joint: str = ".") -> dict[str, Any]:
    """Leaves of nested mappings under joined names; lists as they are, texts cut at `LONGEST` characters.

    At most `MOST` leaves and `DEEPEST` levels; what lies beyond is left out.
    """
    leaves: dict[str, Any] = {}
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting and len(leaves) < MOST:
        name, item, depth = waiting.pop()
        if isinstance(item, Mapping):
            if depth < DEEPEST:
                children = list(item.items())[:MOST]
                waiting += [
                    (f"{name}{joint}{key}" if name else str(key), child, depth + 1)
                    for key, child in reversed(children)
                ]
        elif isinstance(item, str):
            leaves[name[:LONGEST]] = item[:LONGEST]
        elif isinstance(item, (list, tuple)):
            leaves[name[:LONGEST]] = [
                part for part in item[:100] if isinstance(part, (bool, int, float, str))
            ]
        else:
            leaves[name[:LONGEST]] = item
    return leaves
