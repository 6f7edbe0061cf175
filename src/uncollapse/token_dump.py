"""Tokens of a run as Parquet: what every sampled token was, how likely, how rewarded; written by a trainer, read anywhere.

A dump is a directory with one file `step-<number>.parquet` for each rollout step (`docs/token-dump.md` tells other
trainers how to write one). A file appears whole or not at all, and writing a step again replaces it, so that a resumed
run mends its own dump. The schema has a version in the file's metadata; a reader refuses a later one.

Pure I/O: no torch; pyarrow is imported when a dump is written or read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from uncollapse.errors import ConfigError, DataError, MissingExtra

SCHEMA = 1
"""Version of the columns and of what they mean; a reader refuses a larger one."""
KEY = b"uncollapse.token_dump"
"""Key in the file's metadata; its value is JSON with `schema` and, if known, `temperature`."""
LARGEST = 1 << 28
"""Most tokens of one file: a file is held in memory."""


class Column(NamedTuple):
    """A column of the dump: its Arrow type, whether a file must have it, its unit and what it is."""

    name: str
    type: str
    required: bool
    unit: str
    meaning: str


COLUMNS = (
    Column("step", "int64", True, "rollout steps", "the rollout that sampled the token, from 0"),
    Column("uid", "int64", True, "", "the answer; the same number in every step and process never means two answers of one step"),
    Column("group", "int64", False, "", "the prompt: answers of one group share it"),
    Column("row", "int32", False, "", "place of the answer in the rollout batch"),
    Column("position", "int32", True, "tokens", "place of the token in its answer, from 0"),
    Column("token", "int32", True, "", "id of the token in the vocabulary"),
    Column("text", "string", False, "", "the token as text; model output, to be escaped where it is shown"),
    Column("logp", "float32", False, "nats", "log-probability under the policy being trained, at the last update of the step"),
    Column("old_logp", "float32", True, "nats", "log-probability under the policy that sampled, at the sampling temperature"),
    Column("entropy", "float32", False, "nats", "entropy of the sampling policy's distribution at this place"),
    Column("advantage", "float32", True, "reward", "advantage of the token, as the loss uses it"),
    Column("weight", "float32", False, "", "factor of the token's term in the loss, 1 if nothing weights it"),
    Column("mask", "bool", True, "", "whether the token is trained on; false for a tool's output, say"),
    Column("reward", "float32", False, "reward", "reward of the whole answer, the same at each of its tokens"),
)  # fmt: skip
"""The schema, in the order of the columns."""
_KINDS = {"int64": np.int64, "int32": np.int32, "float32": np.float32, "bool": np.bool_, "string": np.object_}
_PER_ROW = ("uid", "group", "row", "reward")


@dataclass(frozen=True)
class Tokens:
    """All tokens of one step. A column that the file lacks is NaN, -1 or empty text throughout."""

    step: int
    columns: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns["token"])

    def number(self, name: str) -> Float[np.ndarray, " token"]:
        """A column of floats as float64."""
        return np.asarray(self.columns[name], dtype=np.float64)

    def integer(self, name: str) -> Int[np.ndarray, " token"]:
        """A column of integers."""
        return np.asarray(self.columns[name], dtype=np.int64)

    @property
    def mask(self) -> Bool[np.ndarray, " token"]:
        """Which tokens are trained on."""
        return np.asarray(self.columns["mask"], dtype=bool)

    @property
    def text(self) -> list[str]:
        """The tokens as text, empty where unknown."""
        return list(self.columns["text"])


class TokenDump:
    """Writes a dump into the directory `path`, which is made if it does not exist.

    Args:
        path: the directory.
        temperature: the temperature of the log-probabilities and entropies, kept in the metadata.
    """

    def __init__(self, path: str | os.PathLike[str], *, temperature: float | None = None) -> None:
        _arrow()
        self.path = Path(path)
        self.temperature = temperature
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def write(self, step: int, **arrays: Any) -> Path:
        """Write the tokens of one rollout step, replacing the step if it was written before.

        `arrays` are arrays or tensors by the names of `COLUMNS`, of shape (row, time), or (row,) for `uid`, `group`,
        `row` and `reward`; `advantage` and `weight` may have either. Needed are `token`, `mask`, `old_logp` and
        `advantage`; `uid` and `row` default to the row's number. `text` is a list of lists of texts. `length` (row,),
        the number of tokens of each answer, says which places exist; by default an answer ends at its last masked one.

        Raises `ConfigError` for a name that is unknown or missing or an array of the wrong shape, `DataError` if the
        file cannot be written; then the dump is as it was.
        """
        pa, pq = _arrow()
        columns = _flat(step, arrays)
        about = {"schema": SCHEMA, "temperature": self.temperature}
        types = {"string": pa.string(), "bool": pa.bool_()}
        fields = [
            pa.field(c.name, types.get(c.type) or getattr(pa, c.type)()) for c in COLUMNS if c.name in columns
        ]
        schema = pa.schema(fields, metadata={KEY: json.dumps(about).encode()})
        table = pa.table({field.name: columns[field.name] for field in fields}, schema=schema)
        target = self.path / f"step-{step:08d}.parquet"
        draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(table, draft, compression="zstd")
            draft.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise _unwritten(target, error) from error
        return target


def read_dump(path: str | os.PathLike[str]) -> Iterator[Tokens]:
    """The steps of a dump in order: of a directory of files, or of one Parquet file that may hold several steps.

    Raises `DataError` if there is none, or a file is broken, of a later schema, or without a required column.
    """
    target = Path(path)
    if target.is_dir():
        files = sorted(file for file in target.glob("*.parquet") if not file.name.startswith("."))
    else:
        files = [target] if target.is_file() else []
    if not files:
        raise DataError(f"{target} holds no token dump; give a directory of .parquet files, or one of them")
    last: int | None = None
    for file in files:
        columns = _columns(file)
        steps = np.asarray(columns["step"])
        for step in np.unique(steps):
            if last is not None and step <= last:
                raise DataError(
                    f"{file} holds step {step} after step {last} of an earlier file; name files in the order of steps"
                )
            last = int(step)
            chosen = np.flatnonzero(steps == step)
            yield Tokens(
                int(step), {name: values[chosen] for name, values in columns.items() if name != "step"}
            )


def is_dump(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a dump: a Parquet file, or a directory that holds one named after a step."""
    target = Path(path)
    return target.suffix == ".parquet" or (target.is_dir() and any(target.glob("step-*.parquet")))


# ---- writing -----------------------------------------------------------------------------------------------


def _flat(step: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """One value per token, row after row, of every column that is given."""
    known = {column.name: column for column in COLUMNS if column.name not in ("step", "position")}
    for name in arrays:
        if name not in known and name != "length":
            raise ConfigError(
                f"a token dump has no column {name!r}; it has {', '.join(known)} and takes length"
            )
    for name in ("token", "mask", "old_logp", "advantage"):
        if name not in arrays:
            raise ConfigError(f"a token dump needs {name!r}; give an array of shape (row, time)")
    mask = _array(arrays["mask"]).astype(bool)
    if mask.ndim != 2:
        raise ConfigError(f"mask has shape {mask.shape}; a token dump needs (row, time)")
    rows, time = mask.shape
    exists = _exists(mask, arrays.get("length"))
    row, position = np.nonzero(exists)
    found: dict[str, Any] = {
        "step": np.full(len(row), step, dtype=np.int64),
        "position": position.astype(np.int32),
    }
    given = {"uid": np.arange(rows), "row": np.arange(rows), **arrays, "mask": mask}
    for name, value in given.items():
        if name == "length":
            continue
        if name == "text":
            found[name] = _texts(value, row, position)
            continue
        array = _array(value)
        if array.shape == (rows,) and name in (*_PER_ROW, "advantage", "weight"):
            flat = array[row]
        elif array.shape == (rows, time) and name not in _PER_ROW:
            flat = array[row, position]
        else:
            wanted = f"({rows},)" if name in _PER_ROW else f"({rows}, {time})"
            raise ConfigError(f"{name} has shape {array.shape}; a token dump needs {wanted}")
        found[name] = flat.astype(_KINDS[known[name].type])
    return found


def _exists(mask: np.ndarray, length: Any) -> np.ndarray:
    """Which places hold a token."""
    rows, time = mask.shape
    if length is None:
        ends = np.where(mask.any(axis=1), time - mask[:, ::-1].argmax(axis=1), 0) if time else np.zeros(rows)
    else:
        ends = _array(length)
        if ends.shape != (rows,):
            raise ConfigError(f"length has shape {ends.shape}; a token dump needs ({rows},)")
    return np.asarray(np.arange(time)[None] < ends[:, None])


def _array(value: Any) -> np.ndarray:
    """An array or tensor in NumPy; bfloat16, which NumPy has not, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _texts(texts: Sequence[Sequence[str]], row: np.ndarray, position: np.ndarray) -> list[str]:
    try:
        # Lone surrogates, which a tokenizer may give for half a character, are not UTF-8.
        return [texts[r][p].encode("utf-8", "replace").decode() for r, p in zip(row, position, strict=True)]
    except (IndexError, AttributeError, TypeError) as error:
        raise ConfigError("text has to be a list of texts for every row, one for each token") from error


def _unwritten(path: Path, error: OSError) -> DataError:
    return DataError(f"could not write {path}: {error.strerror or error}; what was dumped earlier is intact")


# ---- reading -----------------------------------------------------------------------------------------------


def _columns(path: Path) -> dict[str, np.ndarray]:
    """All columns of a file in the types of the schema. Raises `DataError`."""
    pa, pq = _arrow()
    try:
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            _check(path, file.schema_arrow.metadata or {}, names, rows)
            table = file.read(columns=[c.name for c in COLUMNS if c.name in names], use_threads=False)
        return {column.name: _column(table, column, rows) for column in COLUMNS}
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as a token dump: {told}") from error


def _check(path: Path, metadata: Mapping[bytes, bytes], names: Sequence[str], rows: int) -> None:
    try:
        about = json.loads(metadata.get(KEY, b"{}"))
        schema = about.get("schema")
    except (ValueError, AttributeError, RecursionError):
        schema = None
    if not isinstance(schema, int) or schema < 1:
        raise DataError(
            f"{path} is no token dump: its metadata has no {KEY.decode()} with a schema; write schema {SCHEMA}"
        )
    if schema > SCHEMA:
        raise DataError(f"{path} has schema {schema}, newer than {SCHEMA}; upgrade uncollapse to read it")
    missing = [column.name for column in COLUMNS if column.required and column.name not in names]
    if missing:
        raise DataError(
            f"{path} lacks the column {missing[0]!r} of a token dump; it has {', '.join(names)[:300]}"
        )
    if rows > LARGEST:
        raise DataError(f"{path} holds {rows} tokens, more than {LARGEST}; write one file for each step")


def _column(table: Any, column: Column, rows: int) -> np.ndarray:
    """A column in the type of the schema; a null is what stands for a column that is not there."""
    kind = _KINDS[column.type]
    absent: Any = {"string": "", "bool": False}.get(column.type, np.nan if column.type == "float32" else -1)
    if column.name not in table.column_names:
        return np.full(rows, absent, dtype=kind)
    values = table[column.name]
    if column.type == "string":
        return np.array([absent if text is None else str(text) for text in values.to_pylist()], dtype=kind)
    wide = values.cast(_type(column.type)).fill_null(absent)
    return np.asarray(wide.to_numpy(zero_copy_only=False)).astype(kind)


def _type(name: str) -> Any:
    pa, _ = _arrow()
    return getattr(pa, "bool_" if name == "bool" else name)()


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "rl") from error
    return pyarrow, pyarrow.parquet
