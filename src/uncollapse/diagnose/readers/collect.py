"""From rows as they stand in a file to the columns of a `Log`, in bounded memory.

What is logged several times at one step (by a resume, or training and evaluation apart) is merged: the last value of a
column at a step counts. A run of more than `ROWS` steps, or of more than `CELLS` numbers, is thinned: consecutive rows
are averaged, two and two, until it fits, whatever the length of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from uncollapse.diagnose.log import Kind, Note
from uncollapse.diagnose.readers.aliases import meaning

ROWS = 1 << 18
"""Most steps that are kept apart."""
CELLS = 1 << 23
"""Most numbers that are kept: rows times columns."""
COLUMNS = 5000
"""Most columns; further ones are left out with a note."""
PENDING = 1 << 21
"""Numbers after which what was read is merged."""
LARGEST = 1e150
"""Numbers beyond this are taken for not finite, like an overflow: their square is one."""
LAST_STEP = 1 << 53
"""Steps beyond this are no step counter."""
SHOWN = 20
"""Most steps that a note lists."""

Steps = Int[np.ndarray, " _"]
Values = Float[np.ndarray, " _"]


@dataclass
class Seen:
    """How often something was seen, and the first few steps where it was."""

    count: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, steps: Steps) -> None:
        """Count these steps."""
        self.count += len(steps)
        if len(steps) and len(self.steps) < SHOWN:
            self.steps += [int(step) for step in steps[: SHOWN - len(self.steps)]]


@dataclass
class _Series:
    """One column: sums over bins of steps (bins of one step unless thinned), and what was noticed."""

    bins: Steps = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    last: Steps = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    total: Values = field(default_factory=lambda: np.empty(0))
    count: Steps = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    pending: list[tuple[Steps, Values]] = field(default_factory=list)
    newest: int | None = None
    read: int = 0
    back: Seen = field(default_factory=Seen)
    twice: Seen = field(default_factory=Seen)
    nonfinite: Seen = field(default_factory=Seen)

    def take(self, steps: Steps, values: Values) -> None:
        """Add values in the order of the file."""
        bad = ~(np.abs(values) <= LARGEST)
        if bad.any():
            self.nonfinite.add(steps[bad])
            values = np.where(bad, np.nan, values)
        before = np.concatenate([[steps[0] - 1 if self.newest is None else self.newest], steps[:-1]])
        change = steps - before
        if (change <= 0).any():
            self.back.add(steps[change < 0])
            self.twice.add(steps[change == 0])
        self.newest, self.read = int(steps[-1]), self.read + len(steps)
        self.pending.append((steps, values))

    def merge(self, width: int) -> None:
        """Merge what is pending into the bins of `width` steps."""
        if not self.pending:
            return
        steps, values = (np.concatenate(part) for part in zip(*self.pending, strict=True))
        self.pending = []
        steps, values = _last_of_each(steps, values)
        if width == 1:
            steps = np.concatenate([self.bins, steps])
            steps, values = _last_of_each(steps, np.concatenate([self.total, values]))
            self.bins, self.last, self.total = steps, steps, values
            self.count = np.isfinite(values).astype(np.int64)
            return
        finite = np.isfinite(values)
        self._regroup(
            np.concatenate([self.bins, steps // width]),
            np.concatenate([self.last, steps]),
            np.concatenate([np.nan_to_num(self.total), np.where(finite, values, 0.0)]),
            np.concatenate([self.count, finite.astype(np.int64)]),
        )

    def widen(self) -> None:
        """Make the bins twice as wide."""
        self._regroup(self.bins // 2, self.last, np.nan_to_num(self.total), self.count)

    def _regroup(self, bins: Steps, last: Steps, total: Values, count: Steps) -> None:
        order = np.argsort(bins, kind="stable")
        bins, last, total, count = bins[order], last[order], total[order], count[order]
        first = np.flatnonzero(np.concatenate([[True], bins[1:] != bins[:-1]])) if len(bins) else order
        self.bins = bins[first]
        if len(first):
            self.last = np.maximum.reduceat(last, first)
            self.total, self.count = np.add.reduceat(total, first), np.add.reduceat(count, first)

    def values(self) -> Values:
        """Mean of each bin, NaN where nothing finite was logged."""
        return np.where(self.count > 0, self.total / np.maximum(self.count, 1), np.nan)


class Collector:
    """The columns of one run as they are read. `log_parts` gives what a `Log` needs."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.settings: dict[str, Any] = {}
        self.notes: list[Note] = []
        self.first_step: int | None = None
        self.last_step: int | None = None
        self._series: dict[str, _Series] = {}
        self._width = 1
        self._pending = 0
        self._groups: dict[tuple[str, ...], tuple[list[int], list[int], list[tuple[Any, ...]]]] = {}
        self._order = 0
        self._refused: dict[str, None] = {}

    def note(self, kind: Kind, text: str, steps: Sequence[int] = ()) -> None:
        """Keep a note; the same one only once."""
        found = Note(kind, text, tuple(steps))
        if found not in self.notes:
            self.notes.append(found)

    def restarts(self, step: int) -> bool:
        """Whether a row of this step would begin the run again rather than continue or resume it."""
        return self.last_step is not None and step < self.last_step and step <= (self.first_step or 0)

    def add_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Add what one row logs; values that are no numbers are left out, None means not logged."""
        self._seen(step, step)
        keys = tuple(row)
        group = self._groups.get(keys)
        if group is None:
            group = self._groups[keys] = ([], [], [])
        self._order += 1
        group[0].append(self._order)
        group[1].append(step)
        group[2].append(tuple(row.values()))
        self._pending += len(keys) + 1
        if self._pending > PENDING:
            self._merge()

    def add(self, steps: Steps, columns: Mapping[str, tuple[Steps, Values]]) -> None:
        """Add a block of rows at once: for each column the steps and the values where it was logged."""
        self.flush_rows()
        if len(steps):
            self._seen(int(steps[0]), int(steps[-1]))
        for name, (at, values) in columns.items():
            self._take(name, at, values)
        if self._pending > PENDING:
            self._merge()

    def flush_rows(self) -> None:
        """Turn rows into columns: rows that log the same names together, so that NumPy does the work."""
        found: dict[str, list[tuple[Steps, Steps, Values]]] = {}
        for keys, (order, steps, rows) in self._groups.items():
            at, when = np.array(steps, dtype=np.int64), np.array(order, dtype=np.int64)
            for name, (logged, values) in zip(keys, _columns(rows, len(keys)), strict=True):
                if logged is None:
                    found.setdefault(name, []).append((when, at, values))
                elif logged.any():
                    found.setdefault(name, []).append((when[logged], at[logged], values[logged]))
        self._groups = {}
        for name, parts in found.items():
            when, at, values = (np.concatenate(part) for part in zip(*parts, strict=True))
            if len(parts) > 1:
                order_of = np.argsort(when, kind="stable")
                at, values = at[order_of], values[order_of]
            self._take(name, at, values, counted=True)

    def _seen(self, first: int, last: int) -> None:
        if self.first_step is None:
            self.first_step = first
        self.last_step = last

    def _take(self, name: str, steps: Steps, values: Values, *, counted: bool = False) -> None:
        if not len(steps):
            return
        series = self._series.get(name)
        if series is None:
            if len(self._series) >= COLUMNS:
                self._refused[name[:80]] = None
                return
            series = self._series[name] = _Series()
        series.take(steps, values)
        self._pending += 0 if counted else len(steps)

    def _merge(self) -> None:
        self.flush_rows()
        for series in self._series.values():
            series.merge(self._width)
        self._pending = 0
        while len(bins := self._bins()) > min(ROWS, CELLS // max(len(self._series), 1)):
            if not len(bins) > 1:
                break
            for series in self._series.values():
                series.widen()
            self._width *= 2

    def _bins(self) -> Steps:
        """All bins that any column has."""
        if not self._series:
            return np.empty(0, dtype=np.int64)
        longest = max(self._series.values(), key=lambda series: len(series.bins)).bins
        strangers = [
            series.bins
            for series in self._series.values()
            if len(series.bins) and not np.array_equal(series.bins, longest)
        ]
        return np.unique(np.concatenate([longest, *strangers])) if strangers else longest

    def columns(self) -> tuple[Steps, dict[str, Values]]:
        """The steps, strictly increasing, and each column at them."""
        self._merge()
        bins = self._bins()
        steps = np.full(len(bins), np.iinfo(np.int64).min, dtype=np.int64)
        table = {}
        for name, series in self._series.items():
            at = np.searchsorted(bins, series.bins)
            steps[at] = np.maximum(steps[at], series.last)
            values = np.full(len(bins), np.nan)
            values[at] = series.values()
            table[name] = values
        return steps, table

    def observations(self) -> tuple[Note, ...]:
        """All notes: those of the reader, then what the columns themselves show."""
        steps, _ = self.columns()
        noticed: list[Note] = list(self.notes)
        if self._refused:
            noticed.append(
                Note(
                    "broken", f"more than {COLUMNS} columns; left out: {', '.join([*self._refused][:5])}, ..."
                )
            )
        if not self._series:
            return tuple(noticed)
        # Timers and the like are logged at moments of their own; what we know is logged once a step.
        known = [series for name, series in self._series.items() if meaning(name)] or [*self._series.values()]
        main = max(known, key=lambda series: (len(series.bins), -series.read))
        if main.back.count:
            noticed.append(
                Note(
                    "reset",
                    f"the step counter went back {_times(main.back.count)}, as after a resume; the last value of each "
                    "step counts",
                    tuple(main.back.steps),
                )
            )
        if main.twice.count:
            noticed.append(_repeated(main, len(steps)))
        noticed += _nonfinite(self._series)
        if self._width > 1:
            noticed.append(
                Note(
                    "thinned",
                    f"too long to keep every step; each row is the average of up to {self._width} steps",
                )
            )
        elif gap := _gaps(main.bins):
            noticed.append(gap)
        return tuple(noticed)


def as_step(value: Any) -> int | None:
    """A step as a log may write it (12, 12.0, "12"), or None if it is no whole number."""
    if type(value) is int:
        return value if -LAST_STEP <= value <= LAST_STEP else None
    if isinstance(value, str):
        value = as_number(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= LAST_STEP:
        return int(value)
    return None


def as_number(value: Any) -> float | None:
    """A logged value as a number, or None if it is none."""
    if isinstance(value, (int, float, str)) and not (isinstance(value, str) and len(value) > 100):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return math.inf if isinstance(value, int) else None
    return None


def _columns(rows: list[tuple[Any, ...]], width: int) -> list[tuple[Any, Values]]:
    """For each column which rows logged it (None: all of them), and the values."""
    try:
        table = np.array(rows, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        table = np.empty(0)
    if table.shape == (len(rows), width):
        if not np.isnan(table).any():
            return [(None, column) for column in table.T.copy()]
        # None became NaN as well; it means that the row has no value, as in a table with holes.
        return [
            (None, values)
            if not np.isnan(values).any()
            else (np.array([row[at] is not None for row in rows], dtype=bool), values)
            for at, values in enumerate(table.T.copy())
        ]
    found = []
    for at in range(width):
        numbers = [as_number(row[at]) for row in rows]
        logged = np.array([number is not None for number in numbers], dtype=bool)
        found.append((logged, np.array([math.nan if n is None else n for n in numbers], dtype=np.float64)))
    return found


def _last_of_each(steps: Steps, values: Values) -> tuple[Steps, Values]:
    """Steps in order, and of several values at one step the last."""
    if len(steps) < 2 or (steps[1:] > steps[:-1]).all():
        return steps, values
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.concatenate([steps[1:] != steps[:-1], [True]])
    return steps[last], values[last]


def _repeated(series: _Series, rows: int) -> Note:
    if rows > 2 and series.twice.count >= 0.5 * rows:
        return Note(
            "mixed",
            "most steps are logged more than once: several runs in one file, or several processes; the last value counts",
            tuple(series.twice.steps),
        )
    text = f"a step is logged twice {_times(series.twice.count)}; the last value counts"
    return Note("duplicate", text, tuple(series.twice.steps))


def _nonfinite(columns: Mapping[str, _Series]) -> list[Note]:
    bad = {name: series.nonfinite for name, series in columns.items() if series.nonfinite.count}
    if not bad:
        return []
    worst = sorted(bad, key=lambda name: -bad[name].count)
    steps = sorted({step for seen in bad.values() for step in seen.steps})[:SHOWN]
    named = ", ".join(f"{name[:80]} ({bad[name].count})" for name in worst[:5])
    more = f" and {len(bad) - 5} more columns" if len(bad) > 5 else ""
    return [Note("nonfinite", f"values that are not finite: {named}{more}", tuple(steps))]


def _gaps(steps: Steps) -> Note | None:
    """A note on missing steps, if steps otherwise come at one distance."""
    distance = np.diff(steps)
    if len(distance) < 3:
        return None
    usual = int(np.median(distance))
    wide = np.flatnonzero(distance > usual)
    if not len(wide) or len(wide) > 0.1 * len(distance) + 1 or (distance < usual).sum() > 0.1 * len(distance):
        return None
    missing = int((distance[wide] // max(usual, 1) - 1).sum())
    after = tuple(int(step) for step in steps[wide][:SHOWN])
    return Note("gap", f"about {missing} rows are missing in {len(wide)} gaps, after the steps named", after)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
