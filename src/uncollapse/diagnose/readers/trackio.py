"""trackio's local database: SQLite, opened so that neither it nor its directory changes.

A database whose write-ahead log is not empty belongs to a run in progress; SQLite could read it only by writing beside
it, so that a copy in a temporary directory is read instead.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from uncollapse.diagnose.readers.collect import Collector
from uncollapse.diagnose.readers.flat import flat
from uncollapse.diagnose.readers.runs import Runs
from uncollapse.diagnose.readers.text import unreadable
from uncollapse.errors import DataError

FORMAT = "trackio database"
MAGIC = b"SQLite format 3\x00"
_COUNTER = "train/global_step"


def read(path: Path, runs: Runs) -> list[Collector]:
    """The runs of a database, the most recent first."""
    runs.restarts = False
    names: dict[str, str] = {}
    broken = 0
    with _database(path) as base:
        try:
            key = "run_id" if "run_id" in _columns(base, "metrics") else "run_name"
            runs.run = "\0run"
            runs.step = runs.step or (_COUNTER if _has_counter(base) else "\0step")
            rows = base.execute(f"SELECT {key}, run_name, step, metrics FROM metrics ORDER BY id")
            for run, name, step, metrics in rows:
                row = _row(metrics)
                if row is None:
                    broken += 1
                    continue
                names.setdefault(str(run)[:200], str(name))
                runs.add(
                    {"\0run": run, "\0step": step, **row} if runs.step == "\0step" else {"\0run": run, **row}
                )
            settings = _settings(base, key)
        except (sqlite3.Error, OverflowError) as error:
            if not runs.found:
                raise DataError(
                    f"{path} is no trackio database that can be read ({error}); give the .db file of a project"
                ) from error
            settings, broken = {}, broken + 1
    found = runs.collectors()
    for collector in found:
        collector.settings.update(settings.get(collector.name, {}))
        collector.name = names.get(collector.name, collector.name)
        if broken:
            collector.note("broken", f"{broken} broken rows were skipped")
    return found


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    log = path.with_name(path.name + "-wal")
    try:
        live = log.is_file() and log.stat().st_size > 0
        with tempfile.TemporaryDirectory() if live else contextlib.nullcontext() as copy:
            if copy is None:
                where, how = path, "mode=ro&immutable=1"
            else:
                where, how = Path(copy, "copy.db"), "mode=rw"
                shutil.copyfile(path, where)
                shutil.copyfile(log, where.with_name("copy.db-wal"))
            base = sqlite3.connect(f"file:{quote(str(where.resolve()))}?{how}", uri=True)
            # A name that is no text must not end the reading of the others.
            base.text_factory = lambda data: data.decode("utf-8", "replace")
            try:
                yield base
            finally:
                base.close()
    except OSError as error:
        raise unreadable(path, error) from error
    except sqlite3.Error as error:
        raise DataError(f"{path} is no database that can be read: {error}") from error


def _columns(base: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in base.execute(f"PRAGMA table_info({table})")}


def _has_counter(base: sqlite3.Connection) -> bool:
    """Whether Transformers logged its own counter: trackio's grows by one with every call, whatever it logs."""
    query = "SELECT 1 FROM metrics WHERE instr(CAST(metrics AS TEXT), ?) LIMIT 1"
    return base.execute(query, (f'"{_COUNTER}"',)).fetchone() is not None


def _row(metrics: Any) -> dict[str, Any] | None:
    try:
        row = json.loads(metrics)
    except (ValueError, TypeError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _settings(base: sqlite3.Connection, key: str) -> dict[str, dict[str, Any]]:
    """The configuration of each run; a database of an old version may have none."""
    if not {key, "config"} <= _columns(base, "configs"):
        return {}
    found = {}
    for run, config in base.execute(f"SELECT {key}, config FROM configs"):
        row = _row(config)
        if row is not None:
            found[str(run)[:200]] = {
                name: value for name, value in flat(row).items() if not name.startswith("_")
            }
    return found
