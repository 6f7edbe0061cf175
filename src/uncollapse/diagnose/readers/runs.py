"""Gives the rows of a file to the runs that they belong to.

A column such as `run_id` tells runs apart where there is one. Otherwise a step counter that goes back to where the run
began, or before, starts another run; one that goes back less is a resume, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uncollapse.diagnose.readers.aliases import RUN_COLUMNS, STEP_COLUMNS
from uncollapse.diagnose.readers.collect import Collector, Steps, Values, as_step

MOST = 64
"""Most runs that are read from one file."""


@dataclass
class Runs:
    """The runs of one file.

    Args:
        step: the column that counts steps; None to look for one.
        run: the column that tells runs apart; None to look for one, empty for no such column.
        restarts: whether a counter that begins again begins another run.
    """

    step: str | None = None
    run: str | None = ""
    restarts: bool = True
    found: dict[str, Collector] = field(default_factory=dict)
    uncounted: int = 0
    """Rows without any counter, which were numbered."""
    _current: Collector | None = None
    _dropped: bool = False

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; the columns of its step and its run are taken out of it."""
        name = "" if self.run == "" else self._run_of(row)
        step = self._step_of(row)
        collector = self.collector(name, step)
        if step is None:
            step = self._number(collector)
        if collector is not None and row:
            collector.add_row(step, row)

    def collector(self, name: str, step: int | None = None) -> Collector | None:
        """The run of a name that a row of this step goes to; None if there are too many runs already."""
        current = self._current
        if current is not None and name == current.name.partition("\0")[0]:
            if not (self.restarts and step is not None and current.restarts(step)):
                return current
            return self._start(name)
        self._current = next(
            (found for key, found in reversed(self.found.items()) if key.partition("\0")[0] == name), None
        )
        return self.collector(name, step) if self._current is not None else self._start(name)

    def begin(self) -> None:
        """Let what follows be another run."""
        self._start("")

    def add_block(self, steps: Steps, columns: Mapping[str, tuple[Steps, Values]], name: str = "") -> None:
        """Add rows in the order of the file: steps of all rows; for each column the row numbers and values logged."""
        start = 0
        while start < len(steps):
            collector = self.collector(name, int(steps[start]))
            stop = len(steps)
            if collector is not None and self.restarts and len(self.found) < MOST:
                first = int(steps[start]) if collector.first_step is None else collector.first_step
                back = np.flatnonzero((np.diff(steps[start:]) < 0) & (steps[start + 1 :] <= first))
                stop = start + int(back[0]) + 1 if len(back) else stop
            if collector is not None:
                part = {}
                for column, (rows, values) in columns.items():
                    low, high = np.searchsorted(rows, (start, stop))
                    part[column] = (steps[rows[low:high]], values[low:high])
                collector.add(steps[start:stop], part)
            start = stop

    def collectors(self) -> list[Collector]:
        """The runs with the most recent first, each with a note if there are several."""
        runs = list(self.found.values())[::-1]
        for collector in runs:
            collector.name = collector.name.partition("\0")[0]
        if self.uncounted:
            for collector in runs:
                collector.note("unmapped", "no column counts the steps; rows are numbered in their order")
        if len(runs) > 1:
            for number, collector in enumerate(runs):
                told = f" named {collector.name}" if collector.name else ""
                collector.note(
                    "mixed",
                    f"one of {len(runs)} runs in the same file{told}, counted from the end: {number + 1}",
                )
        if self._dropped:
            for collector in runs:
                collector.note("mixed", f"more than {MOST} runs in one file; the rest of them was left out")
        return runs

    def _start(self, name: str) -> Collector | None:
        if len(self.found) >= MOST:
            self._dropped = True
            return self._current if self.restarts and self._current is not None else None
        # Parts of one name are told apart by a suffix that no name has.
        key = f"{name}\0{len(self.found)}"
        self._current = self.found[key] = Collector(key)
        return self._current

    def _number(self, collector: Collector | None) -> int:
        """A row without a counter belongs to the last counted step; without any, rows are numbered."""
        last = None if collector is None else collector.last_step
        if self.step is not None:
            return 0 if last is None else last
        self.uncounted += 1
        return 0 if last is None else last + 1

    def _step_of(self, row: dict[str, Any]) -> int | None:
        if self.step is None and not self.uncounted:
            self.step = counter(row)
        return None if self.step is None else as_step(row.pop(self.step, None))

    def _run_of(self, row: dict[str, Any]) -> str:
        if self.run is None:
            self.run = teller(row)
        return str(row.pop(self.run, ""))[:200] if self.run else ""


def counter(row: Mapping[str, Any]) -> str | None:
    """The column that counts the steps of a row, or None."""
    spelled = {name.lower(): name for name in reversed(list(row))}
    return next(
        (
            spelled[name]
            for name in STEP_COLUMNS
            if name in spelled and as_step(row[spelled[name]]) is not None
        ),
        None,
    )


def teller(row: Mapping[str, Any]) -> str:
    """The column that tells runs apart, or an empty string."""
    spelled = {name.lower(): name for name in reversed(list(row))}
    return next((spelled[name] for name in RUN_COLUMNS if name in spelled), "")
