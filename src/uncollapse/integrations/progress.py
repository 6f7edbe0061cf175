"""How a training run tells somebody how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """`done` of `steps` rollouts are done; `row` holds the last one's metrics; `what` happens now, if anything special."""

    done: int
    steps: int
    row: Mapping[str, float] = field(default_factory=dict)
    what: str = ""


Watch: TypeAlias = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """Nobody looks."""
