"""Which files below a path are logs, and which of them tell of the same run.

A directory is searched to a limited depth, without following links to directories. Each log has a home: the directory
of its run. Where several formats tell of one home, or one lies inside another's, the first of this order is read: our own
run, trainer state, W&B, TensorBoard, trackio, JSON Lines, tables, consoles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uncollapse.diagnose.readers.text import unreadable
from uncollapse.runs import COMPARE, CONFIG, METRICS, RUNS

DEEPEST, MOST = 6, 50_000
"""Levels and entries that are searched."""
STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_BY_NAME = (
    ("wandb", re.compile(r".+\.wandb")),
    ("tensorboard", re.compile(r".*tfevents.*")),
    ("trackio", re.compile(r".+\.(?:db|sqlite3?)")),
    ("lines", re.compile(r".+\.jsonl(?:\.gz)?")),
    ("table", re.compile(r".+\.(?:csv|tsv)(?:\.gz)?")),
    ("console", re.compile(r".+\.(?:log|out|txt)(?:\.gz)?")),
)
ANYTHING = ("lines", "table", "console")
"""Kinds whose names say little: the file may as well be data."""
ORDER = ("own", "state", *(kind for kind, _ in _BY_NAME))


@dataclass(frozen=True)
class Place:
    """A log: the files that hold it, in the order in which to read them, and the directory of its run."""

    kind: str
    home: Path
    files: tuple[Path, ...]

    @property
    def changed(self) -> float:
        """When it was last written, in seconds; 0 if that cannot be told."""
        try:
            return max(file.stat().st_mtime for file in self.files)
        except OSError:
            return 0.0


def places(directory: Path) -> list[Place]:
    """The logs below a directory: runs of a comparison in their order, others with the last written first.

    Raises `DataError` if the directory cannot be listed.
    """
    try:
        os.listdir(directory)
    except OSError as error:
        raise unreadable(directory, error) from error
    found = _grouped(list(_files(directory)))
    found.sort(key=lambda place: (ORDER.index(place.kind), str(place.home)))
    kept: list[Place] = []
    for place in found:
        same = (other for other in kept if other.kind != place.kind and place.home.is_relative_to(other.home))
        if not any(same):
            kept.append(place)
    if (directory / COMPARE).is_file():
        return [place for place in kept if place.home.is_relative_to(directory / RUNS)] or kept
    return sorted(kept, key=lambda place: -place.changed)


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Kind and path of every file whose name is that of a log."""
    seen, waiting = 0, [(directory, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            seen += 1
            if seen > MOST:
                return
            try:
                if entry.is_dir(follow_symlinks=False):
                    if depth < DEEPEST and not entry.name.startswith("."):
                        waiting.append((Path(entry.path), depth + 1))
                    continue
                kind = _kind(entry.name, folder) if entry.is_file() else None
            except OSError:
                continue
            if kind is not None:
                yield kind, Path(entry.path)


def _kind(name: str, folder: Path) -> str | None:
    if name == METRICS and (folder / CONFIG).is_file():
        return "own"
    if name == STATE:
        return "state"
    return next((kind for kind, pattern in _BY_NAME if pattern.fullmatch(name)), None)


def _grouped(files: list[tuple[str, Path]]) -> list[Place]:
    """One place for each run: checkpoints of one output directory, event files of one directory, are one."""
    homes: dict[tuple[str, Path], list[Path]] = {}
    for kind, path in files:
        home = path.parent
        if kind == "state" and _CHECKPOINT.fullmatch(home.name):
            home = home.parent
        elif kind not in ("own", "state", "tensorboard"):
            home = path  # each file is a run of its own
        homes.setdefault((kind, home), []).append(path)
    found = []
    for (kind, home), paths in homes.items():
        ordered = sorted(paths, key=_saved, reverse=True) if kind == "state" else sorted(paths, key=_written)
        found.append(Place(kind, home, tuple(ordered)))
    return found


def _saved(path: Path) -> tuple[int, str]:
    """The step of a checkpoint; the state beside them is that of the end."""
    match = _CHECKPOINT.fullmatch(path.parent.name)
    return (int(match[1]) if match else 1 << 60, str(path))


def _written(path: Path) -> tuple[int, str]:
    """The second in the name of an event file, which grows from one resume to the next."""
    match = re.search(r"tfevents\.(\d{1,15})", path.name)
    return (int(match[1]) if match else 0, path.name)
