"""Rows of JSON: JSON Lines of any framework (verl's file logger among them), our own, and one whole document.

A document is a Transformers trainer state, a list of rows, or a mapping of columns.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from uncollapse.diagnose.readers.collect import Collector
from uncollapse.diagnose.readers.flat import flat
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import lines, numbered, opened
from uncollapse.errors import DataError

LINES, STATE, DOCUMENT, VERL, OWN = (
    "JSON Lines", "Transformers trainer state", "JSON document", "verl file logger", "uncollapse run",
)  # fmt: skip
LARGEST = 1 << 30
"""Bytes of the largest whole document; lines have no limit."""
_INSIDE = ("data", "metrics", "logs", "scalars")
"""Keys whose mapping is the row itself."""


def read_lines(path: Path, runs: Runs, *, null_is_nan: bool = False) -> tuple[str, list[Collector]]:
    """The runs of a JSON Lines file and the name of its format."""
    broken: list[int] = []
    kind = OWN if null_is_nan else LINES
    for number, line in lines(path):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            broken.append(number)
            continue
        if not isinstance(row, dict):
            broken.append(number)
            continue
        if row.keys() == {"step", "data"} and isinstance(row["data"], dict):
            kind = VERL
        if null_is_nan:
            row = _restored(row)
        elif line.find(b"{", 1) > 0:
            row = _plain(row)
        runs.add(row)
    return kind, _told(runs, broken, "line")


def read_document(path: Path, runs: Runs) -> tuple[str, list[Collector]]:
    """The runs of one JSON document and the name of its format. Raises `DataError` if it is none."""
    document = _document(path)
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        return STATE, _state(document, runs)
    if isinstance(document, dict):
        document = _rows_of_columns(document)
    if not isinstance(document, list):
        raise DataError(f"{path} is JSON but no log: neither rows nor columns nor a `log_history`")
    broken = [number for number, row in enumerate(document, start=1) if not isinstance(row, dict)]
    for row in document:
        if isinstance(row, dict):
            runs.add(_plain(row))
    return DOCUMENT, _told(runs, broken, "row")


def _document(path: Path) -> Any:
    with opened(path) as stream:
        try:
            data = stream.read(LARGEST + 1)
        except EOFError:
            data = b""
    if len(data) > LARGEST:
        raise DataError(
            f"{path} is one JSON document of more than {LARGEST >> 30} GiB; write JSON Lines instead"
        )
    try:
        return json.loads(data)
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply for a log") from error
    except ValueError as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is no JSON document ({told}); is it cut off? An earlier checkpoint may be whole"
        ) from error


def _state(state: dict[str, Any], runs: Runs) -> list[Collector]:
    """A trainer state: `log_history` and what it tells of the settings. The row that sums up training is no step."""
    runs.step, runs.run = runs.step or "step", runs.run or ""
    broken = []
    for number, row in enumerate(state["log_history"], start=1):
        if not isinstance(row, dict):
            broken.append(number)
        elif "train_runtime" not in row:
            runs.add(dict(row))
    found = _told(runs, broken, "row")
    settings = {
        name: value
        for name, value in flat({k: v for k, v in state.items() if k != "log_history"}).items()
        if value is not None
    }
    for collector in found:
        collector.settings.update(settings)
    return found


def _rows_of_columns(document: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Rows from a mapping of names to lists of one length; None if it is no such table."""
    columns = {name: values for name, values in document.items() if isinstance(values, list)}
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row without levels."""
    if not any(type(value) is dict for value in row.values()):
        return row
    plain: dict[str, Any] = {}
    for name, value in row.items():
        inside = isinstance(value, dict)
        plain.update(
            flat(value if name in _INSIDE and inside else {name: value}, "/") if inside else {name: value}
        )
    return plain


def _restored(row: dict[str, Any]) -> dict[str, Any]:
    """A row of our own log, where null stands for a number that is not finite (see `uncollapse.runs`)."""
    row.pop("nonfinite", None)
    if None in row.values():
        return {name: math.nan if value is None else value for name, value in row.items()}
    return row


def _told(runs: Runs, broken: list[int], what: str) -> list[Collector]:
    found = runs.collectors()
    for collector in found:
        if broken:
            collector.note("broken", numbered(broken, what))
    return found
