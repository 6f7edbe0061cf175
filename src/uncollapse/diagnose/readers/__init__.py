"""Read the log of a run, whatever wrote it: `read(path)`.

Formats are told by content and not by name: TRL's and Transformers' trainer states, TensorBoard, W&B (offline runs and
exports), trackio, verl (console and file logger), our own runs and comparisons, and any table or JSON Lines. Only NumPy
is needed. Logs are never written to, and nothing is written beside them; what cannot be read is skipped and told in the
log's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uncollapse.diagnose.log import Log
from uncollapse.diagnose.readers import console, json_rows, table, tensorboard, trackio, wandb_offline
from uncollapse.diagnose.readers.aliases import RUN, STEP, full_mapping
from uncollapse.diagnose.readers.collect import Collector
from uncollapse.diagnose.readers.flat import flat
from uncollapse.diagnose.readers.named import log_of
from uncollapse.diagnose.readers.places import ANYTHING, STATE, Place, places
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import head, lines, unreadable
from uncollapse.errors import DataError, UncollapseError
from uncollapse.runs import CONFIG, METRICS

__all__ = ["read"]

Found = tuple[str, list[Collector]]
"""Name of the format, and the runs in it."""
_KNOWN = "trainer_state.json, TensorBoard, W&B, trackio, verl, uncollapse run, CSV, JSON Lines"


def read(path: str | Path, *, mapping: Mapping[str, str] = {}) -> list[Log]:
    """The logs at a path, one for each run.

    A file may hold several runs, told apart by a column such as `run_id`, or because the step counter begins again; a
    counter that goes back less is a resume. In a directory, all logs below it are read, each run in one format.
    The run that was written last comes first; those of a comparison stand in its order.

    Args:
        path: a file or a directory.
        mapping: what to read known columns from, such as `{"entropy/token/mean": "my_entropy"}`; the short names of
            `aliases.SHORT` do as well (`entropy`, `reward`), and `step` and `run` name the columns that count steps and
            that tell runs apart.

    Raises:
        DataError: there is no log, or none that can be read, or no log has a column of `mapping`.
        UnknownName: `mapping` names a column that is not known.
    """
    target, chosen = Path(path), full_mapping(mapping)
    try:
        directory = target.is_dir()
        exists = directory or target.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{target!s:.300} is no path that can be read; check it") from error
    if not exists:
        raise DataError(f"{target} does not exist; give the file or the directory of a log")
    logs = _directory(target, chosen) if directory else _file(target, chosen)
    missing = [
        column
        for name, column in chosen.items()
        if name not in (STEP, RUN) and not any(log.origin.get(name) == column for log in logs)
    ]
    if missing:
        names = sorted({name for log in logs for name in [*log.origin.values(), *log.other]})
        raise DataError(f"{target} has no column {missing[0]!r}; it has: {', '.join(names[:40])}")
    return logs


def _directory(directory: Path, mapping: Mapping[str, str]) -> list[Log]:
    found = places(directory)
    logs: list[Log] = []
    strange: list[Log] = []
    failures: list[UncollapseError] = []
    for place in found:
        try:
            read_here = _place(place, mapping)
        except DataError as error:
            failures.append(error)
            continue
        # A table or a text that lies about, such as a data set, is a log only if it has a column of one.
        for log in read_here:
            (logs if log.columns or place.kind not in ANYTHING else strange).append(log)
    if logs or strange:
        return logs or strange
    if failures and len(found) == 1:
        raise failures[0]
    told = (
        f"none of its {len(found)} files can be read: {failures[0]}" if failures else f"looked for {_KNOWN}"
    )
    raise DataError(f"{directory} holds no log; {told}")


def _place(place: Place, mapping: Mapping[str, str]) -> list[Log]:
    if place.kind == "tensorboard":
        return _logs(place.home, (tensorboard.FORMAT, tensorboard.read(place.files)), mapping)
    if place.kind == "state":
        return _newest_state(place, mapping)
    return _file(place.files[0], mapping)


def _newest_state(place: Place, mapping: Mapping[str, str]) -> list[Log]:
    """The newest trainer state that can be read; each holds the whole history up to its step."""
    failures: list[DataError] = []
    for file in place.files:
        try:
            kind, runs = json_rows.read_document(file, _runs(mapping))
        except DataError as error:
            failures.append(error)
            continue
        for collector in runs:
            for failure in failures:
                collector.note("broken", f"an earlier checkpoint was read instead: {failure}")
        return _logs(file, (kind, runs), mapping)
    raise failures[0]


def _file(path: Path, mapping: Mapping[str, str]) -> list[Log]:
    """The runs of one file, read as its content says."""
    if path.name == METRICS and (path.parent / CONFIG).is_file():
        return _own(path.parent, mapping)
    start = head(path)
    if not start.strip(b"\0 \t\r\n"):
        raise DataError(f"{path} is empty; the run has not logged anything yet")
    return _logs(path, _reader(path, start)(path, _runs(mapping)), mapping)


def _own(directory: Path, mapping: Mapping[str, str]) -> list[Log]:
    """A run of ours: its metrics and its configuration."""
    kind, runs = json_rows.read_lines(
        directory / METRICS, Runs(mapping.get(STEP, "step"), "", restarts=False), null_is_nan=True
    )
    for collector in runs:
        try:
            collector.settings.update(flat(_yaml(directory / CONFIG)))
        except (DataError, RecursionError, ValueError) as error:
            collector.note("broken", f"{CONFIG} cannot be read: {' '.join(str(error).split())[:200]}")
    return _logs(directory, (kind, runs), mapping)


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise unreadable(path, error) from error
    except yaml.YAMLError as error:
        raise DataError(str(error)) from error


def _reader(path: Path, start: bytes) -> Callable[[Path, Runs], Found]:
    """Who reads a file that starts so. Raises `DataError`."""
    if start.startswith(trackio.MAGIC):
        return lambda file, runs: (trackio.FORMAT, trackio.read(file, runs))
    if start.startswith(wandb_offline.MAGIC):
        return lambda file, runs: (wandb_offline.FORMAT, wandb_offline.read(file, runs))
    if tensorboard.looks_like(start) or "tfevents" in path.name:
        return lambda file, runs: (tensorboard.FORMAT, tensorboard.read([file]))
    if start.lstrip()[:1] in (b"{", b"[") and not start.lstrip().startswith(b"{'"):
        return json_rows.read_lines if _is_lines(path, start) else json_rows.read_document
    return _text_reader(path, start)


def _is_lines(path: Path, start: bytes) -> bool:
    """Whether a JSON file holds a row on every line, rather than one document."""
    import json

    if path.name == STATE:
        return False
    first, end, _ = start.lstrip().partition(b"\n")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return (
            start.lstrip()[:1] == b"{" and first.strip() not in (b"{", b"") and first.rstrip().endswith(b"}")
        )
    return isinstance(row, dict) and "log_history" not in row and (bool(end) or not _columnar(row))


def _columnar(row: dict[str, Any]) -> bool:
    return bool(row) and all(isinstance(value, list) for value in row.values())


def _text_reader(path: Path, start: bytes) -> Callable[[Path, Runs], Found]:
    if start.count(b"\0") > len(start) // 100:
        raise DataError(f"{path} is binary and no log that is known; known: {_KNOWN}")
    kind = console.format_of(start.split(b"\n"))
    mark = None if kind else table.separator_of(start.decode("utf-8", "replace"))
    if kind is None and mark is None:
        # The first rows of a console may come late, after pages of what libraries print at their start.
        kind = console.format_of(line for _, line in lines(path) if b"step:" in line or b"{'" in line)
    if kind == console.VERL:
        return lambda file, runs: (console.VERL, console.read_verl(file, runs))
    if kind == console.TRANSFORMERS:
        return lambda file, runs: (console.TRANSFORMERS, console.read_transformers(file, runs))
    if mark is not None:
        return lambda file, runs: table.read(file, runs, mark)
    raise DataError(f"{path} is no log that is known; known: {_KNOWN}")


def _runs(mapping: Mapping[str, str]) -> Runs:
    return Runs(step=mapping.get(STEP), run=mapping.get(RUN))


def _logs(source: Path, found: Found, mapping: Mapping[str, str]) -> list[Log]:
    kind, collectors = found
    logs = [log_of(collector, str(source), kind, mapping) for collector in collectors]
    logs = [log for log in logs if len(log)]
    if not logs:
        raise DataError(f"{source} ({kind}) holds no row with a number; the run has not logged anything yet")
    return logs
