"""What every reader of logs gives: one run as columns over its steps, under the names that uncollapse itself logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

Kind = Literal[
    "broken", "duplicate", "gap", "mixed", "nonfinite", "reset", "thinned", "unmapped",
]  # fmt: skip
"""What a reader may notice: lines that cannot be read, a step logged twice, steps missing, several runs in one file,
numbers that are not finite, a step counter that went back, rows averaged to bound memory, no column known."""


@dataclass(frozen=True)
class Note:
    """Something noticed while reading; `text` is one sentence for people, `steps` where it happened (may be empty)."""

    kind: Kind
    text: str
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Log:
    """One run's log.

    Args:
        source: the file or directory that was read.
        format: name of the format, such as "TRL trainer state".
        step: strictly increasing.
        columns: by the names of `uncollapse.diagnose.names.KNOWN`, in its units; NaN where a step did not log it.
        other: numeric columns with no known name, by their own.
        origin: for each of `columns` the name it has in the file.
        settings: what the log tells about the run's configuration, flat, by the file's own names.
        notes: what was noticed while reading.
    """

    source: str
    format: str
    step: Int[np.ndarray, " step"]
    columns: Mapping[str, Float[np.ndarray, " step"]]
    other: Mapping[str, Float[np.ndarray, " step"]] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> Float[np.ndarray, " step"]:
        """The column of a known name; all NaN if the run did not log it."""
        return self.columns.get(name, np.full(len(self.step), np.nan))

    def has(self, name: str, at_least: int = 1) -> bool:
        """Whether the column holds at least so many finite numbers."""
        return int(np.isfinite(self[name]).sum()) >= at_least
