"""Tables as text: CSV, TSV and their like, and what W&B's page exports from a chart.

A table is read in blocks of some megabytes. W&B names the columns of an export `run - metric`, with `__MIN` and `__MAX`
behind for the band; each run there is one run here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from uncollapse.diagnose.readers.aliases import RUN_COLUMNS, STEP_COLUMNS
from uncollapse.diagnose.readers.collect import LAST_STEP, Collector, Steps, Values, as_number
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import blocks, numbered
from uncollapse.errors import DataError

CSV, EXPORT = "table", "W&B export"
SEPARATORS = ",\t;|"
WIDEST = 20_000
"""Most columns of a table."""
_BAND = re.compile(r"__(?:MIN|MAX)$")

Cells = list[list[str]]
Column = tuple[Values, Bool[np.ndarray, " _"]]
"""Values, and which of them were logged."""


def separator_of(head: str) -> str | None:
    """The separator of a table that starts so: one that cuts most of its first rows into as many cells."""
    rows = [line for line in head.splitlines()[:20] if line.strip()]
    if not rows:
        return None
    for mark in sorted(SEPARATORS, key=lambda mark: -rows[0].count(mark)):
        widths = [len(row) for row in csv.reader(rows, delimiter=mark)]
        whole = widths[:-1] if len(widths) > 2 else widths
        if widths[0] > 1 and sum(width == widths[0] for width in whole) >= 0.5 * len(whole):
            return mark
    return None


def read(path: Path, runs: Runs, separator: str) -> tuple[str, list[Collector]]:
    """The runs of a table and the name of its format. Raises `DataError` if it is none."""
    table: _Table | None = None
    for block in blocks(path):
        text = block.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
        if table is None:
            first, _, text = text.lstrip("\n").partition("\n")
            table = _Table(path, _cells(first, separator)[0] if first else [], separator, runs)
            if table.headless:
                text = f"{first}\n{text}"
        table.take(text)
    if table is None:
        raise DataError(f"{path} is empty")
    return table.finish()


class _Table:
    """What the columns of one table mean, and the rows as they come."""

    def __init__(self, path: Path, head: list[str], separator: str, runs: Runs) -> None:
        if len(head) > WIDEST:
            raise DataError(
                f"{path} has {len(head)} columns, more than {WIDEST}; leave out what is not needed"
            )
        self.headless = all(as_number(name) is not None for name in head)
        names = (
            [f"column {i}" for i in range(1, len(head) + 1)] if self.headless else [n.strip() for n in head]
        )
        self.names = [
            name if name not in names[:at] else f"{name} ({at + 1})" for at, name in enumerate(names)
        ]
        self.runs, self.separator = runs, separator
        self.parts = {} if self.headless else _export(self.names)
        self.step = self._column(runs.step, STEP_COLUMNS)
        self.teller = None if runs.run == "" or self.parts else self._column(runs.run, RUN_COLUMNS)
        self.rows = 0
        self.broken: list[int] = []
        self._numbers_only = True

    def _column(self, given: str | None, usual: tuple[str, ...]) -> int | None:
        if given is not None:
            return self.names.index(given) if given in self.names else None
        spelled = {name.lower(): at for at, name in reversed(list(enumerate(self.names)))}
        return next((spelled[name] for name in usual if name in spelled), None)

    def take(self, text: str) -> None:
        """Add the rows of a block."""
        matrix = self._matrix(text)
        if matrix is not None:
            columns = {
                at: (column, np.ones(len(column), dtype=bool)) for at, column in enumerate(matrix.T.copy())
            }
            self._add(np.arange(self.rows, self.rows + len(matrix)), columns, None)
            self.rows += len(matrix)
            return
        cells = _cells(text, self.separator)
        whole = []
        for row in cells:
            self.rows += 1
            if len(row) == len(self.names):
                whole.append((self.rows, row))
            elif any(cell.strip() for cell in row):
                self.broken.append(self.rows + (not self.headless))
        if not whole:
            return
        numbers = np.array([number - 1 for number, _ in whole], dtype=np.int64)
        texts = [list(column) for column in zip(*(row for _, row in whole), strict=True)]
        tellers = texts[self.teller] if self.teller is not None else None
        self._add(numbers, {at: _floats(column) for at, column in enumerate(texts)}, tellers)

    def _matrix(self, text: str) -> Float[np.ndarray, "row column"] | None:
        """The block as numbers, if it holds nothing else: an order faster than cell by cell."""
        if not self._numbers_only or self.teller is not None or '"' in text or not text.strip():
            return None
        try:
            matrix = np.loadtxt(io.StringIO(text), delimiter=self.separator, comments=None, ndmin=2)
        except ValueError:
            self._numbers_only = False
            return None
        return matrix if matrix.shape[1] == len(self.names) else None

    def _add(self, numbers: Steps, columns: Mapping[int, Column], tellers: list[str] | None) -> None:
        """Give a block of rows to its runs."""
        steps, counted = numbers, np.ones(len(numbers), dtype=bool)
        if self.step is not None:
            raw, _ = columns[self.step]
            counted = np.abs(raw) <= LAST_STEP
            counted &= np.where(counted, raw, 0.0) % 1 == 0
            if not counted.any() and not self.runs.found:
                self.step, counted = None, np.ones(len(numbers), dtype=bool)  # a fraction counts no steps
            else:
                steps = np.where(counted, raw, 0.0).astype(np.int64)
                self.broken += [int(number) + 1 + (not self.headless) for number in numbers[~counted]]
        if self.step is None:
            self.runs.uncounted += len(numbers)
        for name, rows in _groups(tellers, len(numbers)):
            rows = rows[counted[rows]]
            for run, chosen in (self.parts or {"": dict(enumerate(self.names))}).items():
                block = {
                    metric: _logged(columns[at], rows)
                    for at, metric in chosen.items()
                    if at not in (self.step, self.teller)
                }
                present = {metric: pair for metric, pair in block.items() if len(pair[0])}
                if present:
                    self.runs.add_block(steps[rows], present, run or name)

    def finish(self) -> tuple[str, list[Collector]]:
        """The runs, with notes on the rows that could not be read."""
        found = self.runs.collectors()
        for collector in found:
            if self.broken:
                collector.note("broken", numbered(self.broken, "row"))
        return (EXPORT if self.parts else CSV), found


def _export(names: list[str]) -> dict[str, dict[int, str]]:
    """For each run of a W&B export, its columns and their metrics; empty if the table is no such export."""
    if len(names) < 2 or not any(_BAND.search(name) for name in names):
        return {}
    parts: dict[str, dict[int, str]] = {}
    for at, name in enumerate(names[1:], start=1):
        run, dash, metric = name.rpartition(" - ")
        if dash and not _BAND.search(metric) and not metric.startswith("_step"):
            parts.setdefault(run, {})[at] = metric
    return parts


def _cells(text: str, separator: str) -> Cells:
    """The cells of some lines; a quote that is never closed ends at the end of its block."""
    try:
        return list(csv.reader(io.StringIO(text), delimiter=separator))
    except csv.Error:
        return [line.split(separator) for line in text.split("\n")]


def _floats(column: list[str]) -> Column:
    """Numbers of a column, and which cells hold one: an empty cell means that the row did not log it."""
    try:
        return np.array(list(map(float, column))), np.ones(len(column), dtype=bool)
    except ValueError:
        numbers = [as_number(cell) for cell in column]
    logged = np.array([number is not None for number in numbers], dtype=bool)
    return np.array([np.nan if number is None else number for number in numbers]), logged


def _logged(column: Column, rows: Steps) -> tuple[Steps, Values]:
    """Of these rows, those that logged the column, numbered among themselves, and its values there."""
    values, logged = column
    chosen = np.flatnonzero(logged[rows])
    return chosen, values[rows][chosen]


def _groups(tellers: list[str] | None, count: int) -> list[tuple[str, Steps]]:
    """For each run the rows that name it, in the order of their first rows."""
    if tellers is None:
        return [("", np.arange(count))]
    names, first, of = np.unique(np.array(tellers), return_index=True, return_inverse=True)
    return [(str(names[i])[:200], np.flatnonzero(of.reshape(-1) == i)) for i in np.argsort(first)]
