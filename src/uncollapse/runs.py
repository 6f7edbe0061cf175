"""The run directory: what a training run leaves behind, written so that a kill or a full disk loses nothing.

A run is a directory:

- `config.yaml`     the resolved configuration, with `schema: 1`
- `metrics.jsonl`   one JSON object per rollout step; keys are `step` and `area/name/statistic`
- `tokens.jsonl`    the same probe completions re-scored at several steps (see `Run.append_tokens`)
- `token-dump/`     every sampled token as Parquet, if asked for (see `uncollapse.token_dump`)
- `checkpoints/`    whatever the trainer needs to resume
- `report.html`     written by `uncollapse.report`

A comparison is a directory of runs: `compare.yaml` (what was compared), `runs/<recipe>-seed<k>/`, and
`comparison.json` (its summary).

Format of the `.jsonl` files: strict JSON, so that any reader can take them. A number that is not finite is written
as `null`, and reads back as NaN; infinities at the top level of a row are kept apart in the row's `nonfinite` object
(`{"grad/norm": null, "nonfinite": {"grad/norm": "inf"}}`), and read back as infinities. Lines are appended with one
write on an `O_APPEND` descriptor, followed by fsync; nothing is ever rewritten. Text files are replaced atomically.

Pure I/O: no torch, no plotting.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from uncollapse.errors import ConfigError, DataError

SCHEMA = 1
"""Version of the directory layout and of the files in it; a reader refuses a larger one."""

CONFIG, METRICS, TOKENS, CHECKPOINTS, REPORT = (
    "config.yaml",
    "metrics.jsonl",
    "tokens.jsonl",
    "checkpoints",
    "report.html",
)
DUMP = "token-dump"
COMPARE, RUNS, SUMMARY = "compare.yaml", "runs", "comparison.json"

_NONFINITE = "nonfinite"
_RUN_NAME = re.compile(r"(?P<recipe>.+)-seed(?P<seed>\d+)")
_RECIPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class BrokenLines(UserWarning):
    """Lines of a log, or run directories of a comparison, that could not be read and were left out."""


@dataclass(frozen=True)
class Run:
    """One training run on disk. Make it with `Run.create` or `Run.open`."""

    path: Path
    config: dict[str, Any] = field(repr=False)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> Run:
        """Start a run at `path` with the resolved `config` (plain YAML values).

        Raises `DataError` if a run is there already (nothing is overwritten) or the directory cannot be written,
        `ConfigError` if `config` holds something that YAML cannot.
        """
        target = Path(path)
        if any((target / name).exists() for name in (CONFIG, METRICS, COMPARE)):
            raise DataError(
                f"{target} already holds a run; continue it with --resume or choose another --output"
            )
        run = cls(target, _start(target, CONFIG, config))
        _make_directory(run.checkpoints)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open the run at `path`. Raises `DataError` if there is none or it cannot be read."""
        target = Path(path)
        return cls(target, _load(target, CONFIG, "run"))

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / CHECKPOINTS

    def append(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of one rollout step; `row["step"]` is its number, from 0.

        Raises `DataError` if `step` is missing or negative, a value is no JSON value, or the disk is full.
        """
        _require_step(row, METRICS)
        _append(self.path / METRICS, _strict(row))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows in the order of `step`, one per step: where a resume rewound, the last one written counts.

        Broken lines are skipped with one `BrokenLines` warning that names the file and the lines.
        """
        rows = {row["step"]: row for row in _read(self.path / METRICS)}
        return [rows[step] for step in sorted(rows)]

    def append_tokens(self, record: Mapping[str, Any]) -> None:
        """Append one probe completion as scored at one step.

        `record`: `step`; `sample`, the name of the probe, the same at every step; `prompt`; `tokens`, decoded texts;
        `entropy` (nats) and `logp` (nats) of each token; `reward`. Raises `DataError` as `append` does, and if the
        lists differ in length.
        """
        _require_step(record, TOKENS)
        size = len(record.get("tokens", ()))
        for name in ("entropy", "logp"):
            if name in record and len(record[name]) != size:
                raise DataError(
                    f"token record of step {record['step']}: {size} tokens but {len(record[name])} values of {name}"
                )
        if "sample" not in record:
            raise DataError(
                f"token record of step {record['step']} has no `sample`; name the probe it belongs to"
            )
        _append(self.path / TOKENS, _strict(record))

    def tokens(self) -> list[dict[str, Any]]:
        """All token records in the order of `step`, one per step and sample; broken lines as in `metrics`."""
        records = {(row["step"], str(row.get("sample"))): row for row in _read(self.path / TOKENS)}
        return [records[key] for key in sorted(records)]

    def broken_lines(self) -> dict[str, list[int]]:
        """Line numbers (from 1) that cannot be read, by file name; empty if all is well."""
        found = {name: _parse(self.path / name)[1] for name in (METRICS, TOKENS)}
        return {name: lines for name, lines in found.items() if lines}

    def write_text(self, name: str, text: str) -> Path:
        """Write or replace the file `name` of the run atomically; see `write_text`."""
        return write_text(self.path / name, text)


@dataclass(frozen=True)
class Comparison:
    """Several recipes, each with one or more seeds. Make it with `Comparison.create` or `Comparison.open`."""

    path: Path
    config: dict[str, Any] = field(repr=False)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> Comparison:
        """Start a comparison at `path`; `config` says what is compared. Raises as `Run.create`."""
        target = Path(path)
        if any((target / name).exists() for name in (COMPARE, CONFIG)):
            raise DataError(
                f"{target} already holds a comparison or a run; continue it with --resume or choose another --output"
            )
        comparison = cls(target, _start(target, COMPARE, config))
        _make_directory(target / RUNS)
        return comparison

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Comparison:
        """Open the comparison at `path`. Raises `DataError` if there is none or it cannot be read."""
        target = Path(path)
        return cls(target, _load(target, COMPARE, "comparison"))

    def run_path(self, recipe: str, seed: int) -> Path:
        """Where the run of `recipe` with `seed` lives. Raises `ConfigError` on a name that is no file name."""
        if not _RECIPE.fullmatch(recipe) or seed < 0:
            raise ConfigError(
                f"recipe {recipe!r} with seed {seed} makes no directory name; use letters, digits, . _ + -"
            )
        return self.path / RUNS / f"{recipe}-seed{seed}"

    def runs(self) -> dict[str, list[Run]]:
        """The runs by recipe: recipes in the order of `config["recipes"]` and then of the alphabet, seeds ascending.

        A directory that holds no readable run yet is left out with a `BrokenLines` warning.
        """
        found: dict[str, list[tuple[int, Run]]] = {}
        for directory in sorted((self.path / RUNS).glob("*-seed*")):
            match = _RUN_NAME.fullmatch(directory.name)
            if match is None or not directory.is_dir():
                continue
            try:
                run = Run.open(directory)
            except DataError as error:
                warnings.warn(f"left out of the comparison: {error}", BrokenLines, stacklevel=2)
                continue
            found.setdefault(match["recipe"], []).append((int(match["seed"]), run))
        listed = self.config.get("recipes")
        order = [name for name in (listed if isinstance(listed, list) else ()) if name in found]
        names = dict.fromkeys([*order, *sorted(found)])
        return {name: [run for _, run in sorted(found[name], key=lambda pair: pair[0])] for name in names}

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write or replace `comparison.json`; numbers that are not finite become null."""
        text = json.dumps(
            {"schema": SCHEMA, **_finite(summary, SUMMARY)}, indent=2, ensure_ascii=False, allow_nan=False
        )
        return write_text(self.path / SUMMARY, text + "\n")

    def summary(self) -> dict[str, Any] | None:
        """What `comparison.json` holds, or None if it was not written yet."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({_brief(error)}); delete it and compare again"
            ) from error
        return data if isinstance(data, dict) else None

    def write_text(self, name: str, text: str) -> Path:
        """Write or replace the file `name` of the comparison atomically; see `write_text`."""
        return write_text(self.path / name, text)


def open_directory(path: str | os.PathLike[str]) -> Run | Comparison:
    """Open what is at `path`, a comparison or a run. Raises `DataError` if it is neither."""
    return Comparison.open(path) if (Path(path) / COMPARE).exists() else Run.open(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8) to `path` so that a reader sees the old or the new file, never half of one.

    Raises `DataError` if it cannot be written (full disk, no permission); an earlier file is then intact.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", errors="replace", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(target)
    except OSError as error:
        # Removing the draft also gives back the space that it took.
        draft.unlink(missing_ok=True)
        raise _unwritten(target, error) from error
    return target


def _start(directory: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("schema", SCHEMA) != SCHEMA:
        raise ConfigError(f"schema {config['schema']} cannot be written; this version writes schema {SCHEMA}")
    full = {"schema": SCHEMA, **config}
    try:
        text = yaml.safe_dump(full, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the configuration for {directory / name} is no plain YAML: {_brief(error)}"
        ) from error
    _make_directory(directory)
    write_text(directory / name, text)
    return full


def _load(directory: Path, name: str, what: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        raise DataError(
            f"{directory} is no {what} directory (it has no {name}); give the --output of a finished command"
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {_brief(error)}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} holds {type(config).__name__}, not a mapping of settings; restore the file")
    schema = config.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise DataError(f"{path} has no valid `schema` (found {schema!r}); write schema: {SCHEMA}")
    if schema > SCHEMA:
        raise DataError(f"{path} has schema {schema}, newer than {SCHEMA}; upgrade uncollapse to read it")
    return config


def _append(path: Path, record: dict[str, Any]) -> None:
    """One write for the whole line. A partial last line, left by a kill, is closed first and stays as it is."""
    # ASCII escapes keep lone surrogates and line separators in model text from breaking other readers.
    line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, "only part of the line fitted on the disk")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unwritten(path, error, f" (step {record['step']})") from error


def _read(path: Path) -> Iterator[dict[str, Any]]:
    rows, broken = _parse(path)
    if broken:
        shown = ", ".join(map(str, broken[:8])) + (f" and {len(broken) - 8} more" if len(broken) > 8 else "")
        plural = "s" if len(broken) > 1 else ""
        warnings.warn(
            f"{path}: skipped {len(broken)} broken line{plural} ({shown})", BrokenLines, stacklevel=3
        )
    yield from rows


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    if not path.exists():
        return [], []
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_brief(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            broken.append(number)
            continue
        if isinstance(row, dict) and _is_step(row.get("step")):
            rows.append(_restore(row))
        else:
            broken.append(number)
    return rows, broken


def _require_step(row: Mapping[str, Any], name: str) -> None:
    if not _is_step(row.get("step")):
        raise DataError(
            f"{name}: `step` is {row.get('step')!r}; give the number of the rollout step, an int from 0"
        )
    if _NONFINITE in row:
        raise DataError(
            f"{name}: the key {_NONFINITE!r} is reserved for numbers that JSON cannot hold; rename it"
        )


def _is_step(step: object) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def _strict(row: Mapping[str, Any]) -> dict[str, Any]:
    record = {str(key): _finite(value, str(key)) for key, value in row.items()}
    infinite = {}
    for key, value in row.items():
        number = _plain(value)
        if isinstance(number, float) and math.isinf(number):
            infinite[str(key)] = "inf" if number > 0 else "-inf"
    return {**record, _NONFINITE: infinite} if infinite else record


def _restore(row: dict[str, Any]) -> dict[str, Any]:
    infinite = row.pop(_NONFINITE, None)
    restored = {key: _nan_for_null(value) for key, value in row.items()}
    for key, sign in infinite.items() if isinstance(infinite, dict) else ():
        restored[key] = -math.inf if sign == "-inf" else math.inf
    return restored


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan_for_null(item) for item in value]
    return math.nan if value is None else value


def _finite(value: Any, name: str) -> Any:
    """`value` as strict JSON: NaN and infinities become None; NumPy and tensor scalars become numbers."""
    value = _plain(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _finite(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, name) for item in value]
    raise DataError(f"{name} is of type {type(value).__name__}; log numbers, text, or lists of them")


def _plain(value: Any) -> Any:
    """Arrays and tensors as Python values, by their own methods, so that none of the libraries is imported."""
    if isinstance(value, (bool, int, float, str)) and type(value).__module__ == "builtins":
        return value
    return value.tolist() if hasattr(value, "tolist") else value


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError, what: str = "") -> DataError:
    reason = error.strerror or str(error)
    return DataError(
        f"could not write {path}{what}: {reason}; everything written earlier is intact - mend this and continue"
    )


def _brief(error: Exception) -> str:
    """The message in one line; a YAML error keeps the place where it happened."""
    return " ".join(str(error).split())
