"""One study a paper: claims fixed before the run, an experiment, a verdict."""

from __future__ import annotations

from typing import Any

__all__ = ["reproduce"]


def __getattr__(name: str) -> Any:
    if name == "reproduce":
        from uncollapse.studies.study import reproduce

        return reproduce
    raise AttributeError(f"module 'uncollapse.studies' has no attribute {name!r}")
