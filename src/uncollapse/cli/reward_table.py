"""Scored completions from files: tables (CSV, JSON, Parquet), token dumps and run directories.

What models wrote is only ever compared: a completion is kept as a digest, a prompt as text without control characters.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uncollapse.errors import DataError, MissingExtra

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "prompts", "input", "question", "query", "problem", "prompt_id"),
    "completion": ("completion", "completions", "response", "output", "generation", "answer"),
    "logp": ("logp", "logprob", "log_prob"),
}
"""Names that a column may have: TRL's, verl's and common ones."""
_TOTAL = ("reward", "score")
_REWARD = re.compile(r"(?:^|[_/. -])(?:rewards?|scores?)(?:$|[_/. -])", re.IGNORECASE)
_LONGEST = 2000
"""Characters that are kept of a prompt for showing it."""
_FIELD = 1 << 30


@dataclass
class RewardTable:
    """Completions with their rewards, row by row: which prompt, which answer, how likely.

    `names` are the reward columns, `prompts` the texts (or names) of the prompts; `answer` is None where the table does
    not tell what the completions are, `logp` (nats) where it does not tell how likely. `notes` says what was left out.
    """

    source: str
    names: tuple[str, ...]
    prompts: list[str]
    prompt: np.ndarray
    rewards: np.ndarray
    answer: np.ndarray | None
    logp: np.ndarray | None
    notes: list[str] = field(default_factory=list)

    @property
    def unscored(self) -> int:
        """Completions without any reward."""
        return int(np.isnan(self.rewards).all(1).sum())

    @property
    def partly_scored(self) -> int:
        """Completions with some rewards and some missing, as where each domain has rewards of its own."""
        return int(np.isnan(self.rewards).any(1).sum()) - self.unscored


def read_rewards(
    path: Path, rewards: Sequence[str] = (), names: Mapping[str, str] | None = None
) -> RewardTable:
    """Read a table, a directory of tables, a token dump or a run directory.

    `rewards`: the reward columns, if not `reward` or `score` or every column with such a word in its name. `names`: the
    columns of the table that are `prompt`, `completion` and `logp`, where they have unusual names. Rows that are cut off
    or not readable are left out, which `notes` tells. Raises `DataError` if there is nothing to read.
    """
    from uncollapse.runs import CONFIG, DUMP

    wanted = dict(names or {})
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir() and (path / CONFIG).is_file():
        dump = path / DUMP
        return _dump(dump) if dump.is_dir() else _probes(path)
    if _holds_dump(path):
        return _dump(path)
    files = _tables(path)
    rows = _Rows(str(path), rewards, wanted)
    for file in files:
        rows.take(file)
    return rows.finish()


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is no reward table; give one of {', '.join(SUFFIXES)}, or a directory")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{path} holds no reward table, token dump or run; give one of {', '.join(SUFFIXES)}")
    return files


# ---- tables ------------------------------------------------------------------------------------------------


class _Rows:
    """Collects rows of one or more files into arrays."""

    def __init__(self, source: str, rewards: Sequence[str], wanted: Mapping[str, str]) -> None:
        self.source, self.chosen, self.wanted = source, tuple(rewards), wanted
        self.names: tuple[str, ...] = self.chosen
        self.columns: dict[str, str | None] = {}
        self.prompts: dict[str, int] = {}
        self.prompt: list[int] = []
        self.answers: dict[bytes, int] = {}
        self.answer: list[int] = []
        self.logp: list[float] = []
        self.rewards: list[list[float]] = []
        self.broken = self.not_numbers = 0
        self.notes: list[str] = []

    def take(self, file: Path) -> None:
        """Add the rows of a file."""
        known = False
        for record in _records(file, self._cut):
            row = _unfolded(record)
            if not known:
                self._know(file, row)
                known = True
            self._add(row)
        if not known and not self.rewards:
            raise DataError(f"{file} holds no row that can be read")

    def _cut(self, count: int = 1) -> None:
        self.broken += count

    def _know(self, file: Path, row: Mapping[str, Any]) -> None:
        """Which columns are what, from the first row of a file."""
        for what, usual in COLUMNS.items():
            asked = self.wanted.get(what)
            if asked is not None and asked not in row:
                raise DataError(f"{file} has no column {asked!r}; it has {_listed(row)}")
            self.columns[what] = asked or next((name for name in usual if name in row), None)
        if self.columns["prompt"] is None:
            raise DataError(
                f"{file} has no column prompt; it has {_listed(row)}: name it with --map prompt=NAME"
            )
        if not self.chosen:
            found = _reward_columns(row, set(self.columns.values()))
            if self.names and found != self.names:
                raise DataError(f"{file} has other reward columns than the files before it; read it alone")
            self.names = found
        missing = [name for name in self.names if name not in row]
        if missing:
            raise DataError(f"{file} has no column {missing[0]!r}; it has {_listed(row)}")
        if not self.names:
            raise DataError(
                f"{file} has no column reward or score; it has {_listed(row)}: name rewards with --weights NAME=1"
            )

    def _add(self, row: Mapping[str, Any]) -> None:
        column = self.columns["prompt"]
        if column is None or column not in row or any(name not in row for name in self.names):
            self._cut()
            return
        prompt = _text(row[column])
        self.prompt.append(self.prompts.setdefault(prompt, len(self.prompts)))
        self.rewards.append([self._number(row[name]) for name in self.names])
        if self.columns["completion"] is not None:
            text = _text(row.get(self.columns["completion"]))
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            self.answer.append(self.answers.setdefault(digest, len(self.answers)))
        if self.columns["logp"] is not None:
            likely = _number(row.get(self.columns["logp"]))
            self.logp.append(math.nan if likely is None else likely)

    def _number(self, value: Any) -> float:
        number = _number(value)
        if number is None:
            self.not_numbers += 1
        return math.nan if number is None else number

    def finish(self) -> RewardTable:
        """The table."""
        rewards = np.array(self.rewards, dtype=np.float64).reshape(-1, len(self.names))
        if not len(rewards):
            raise DataError(f"{self.source} holds no row that can be read")
        empty = [name for name, column in zip(self.names, rewards.T, strict=True) if np.isnan(column).all()]
        if len(empty) == len(self.names):
            raise DataError(
                f"{self.source}: the column {empty[0]!r} holds no number in {len(rewards):,} rows; "
                "choose others with --weights NAME=1"
            )
        self.notes.extend(f"the column {shown(name, 60)!r} holds no number" for name in empty)
        logp = np.array(self.logp) if self.logp and len(self.logp) == len(rewards) else None
        if logp is not None and not np.isfinite(logp[~np.isnan(rewards).all(1)]).all():
            logp = None
            self.notes.append("the log-probabilities are not all finite and were left out")
        if len(self.answer) != len(rewards):
            self.notes.append("there is no column completion: every row counts as an answer of its own")
        if self.broken:
            self.notes.append(f"left out {self.broken:,} broken or incomplete row{'s' * (self.broken > 1)}")
        if self.not_numbers:
            self.notes.append(
                f"{self.not_numbers:,} reward{'s' * (self.not_numbers > 1)} could not be read as a number; "
                "they count as missing"
            )
        return RewardTable(
            source=self.source,
            names=self.names,
            prompts=[shown(text, _LONGEST) for text in self.prompts],
            prompt=np.array(self.prompt),
            rewards=rewards,
            answer=np.array(self.answer) if len(self.answer) == len(rewards) else None,
            logp=logp,
            notes=self.notes,
        )


def _reward_columns(row: Mapping[str, Any], taken: set[str | None]) -> tuple[str, ...]:
    """`reward` or `score` alone, being the total, else all columns with such a word in their name."""
    for name in _TOTAL:
        if name in row and name not in taken:
            return (name,)
    return tuple(name for name in row if name not in taken and _REWARD.search(name))


def _records(file: Path, cut: Callable[..., None]) -> Iterator[Mapping[str, Any]]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(file)
        elif suffix == ".json":
            yield from _document(file, cut)
        elif suffix in (".csv", ".tsv"):
            yield from _separated(file, "\t" if suffix == ".tsv" else ",", cut)
        else:
            yield from _lines(file, cut)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _lines(file: Path, cut: Callable[..., None]) -> Iterator[Mapping[str, Any]]:
    with file.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            else:
                cut()


def _document(file: Path, cut: Callable[..., None]) -> Iterator[Mapping[str, Any]]:
    try:
        records = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:100]
        raise DataError(
            f"{file} is no JSON document ({told}); is it cut off? JSON Lines survive that"
        ) from error
    if not isinstance(records, list):
        raise DataError(f"{file} holds no list of rows")
    for record in records:
        if isinstance(record, dict):
            yield record
        else:
            cut()


def _separated(file: Path, mark: str, cut: Callable[..., None]) -> Iterator[Mapping[str, Any]]:
    before = csv.field_size_limit(_FIELD)  # completions are longer than what csv takes for a cell
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            rows = csv.reader(stream, delimiter=mark)
            head = [name.strip() for name in next(rows, [])]
            for row in rows:
                if len(row) == len(head):
                    yield dict(zip(head, row, strict=True))
                elif row:
                    cut()
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "rl") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as content:
            for batch in content.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(f"{file} is no readable Parquet file: {told}") from error


def _unfolded(record: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of rewards inside a row as columns of their own, `rewards/format`."""
    row: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping) and _REWARD.search(str(name)):
            row.update({f"{name}/{inner}": one for inner, one in value.items()})
        else:
            row[str(name)] = value
    return row


def _number(value: Any) -> float | None:
    """The number in a cell: NaN for an empty one, None for what is none."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("", "nan", "none", "null", "na"):
            return math.nan
        if text in ("true", "false"):
            return float(text == "true")
        value = text
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _text(value: Any) -> str:
    """A prompt or completion as one text; a list of messages as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def shown(text: str, longest: int) -> str:
    """Text on one line, at most `longest` characters, without control characters, which a terminal would obey."""
    line = " ".join(text[: 2 * longest].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return line if len(line) <= longest else line[: longest - 1] + "\u2026"


def _listed(names: Iterable[str]) -> str:
    return shown(", ".join(names) or "none", 200)


# ---- dumps and runs ----------------------------------------------------------------------------------------


def _holds_dump(path: Path) -> bool:
    """Whether a directory holds a token dump, or a Parquet file is one."""
    from uncollapse.token_dump import KEY, is_dump

    if path.is_dir() or not is_dump(path):
        return path.is_dir() and is_dump(path)
    try:
        import pyarrow
        import pyarrow.parquet

        return KEY in (pyarrow.parquet.read_schema(path).metadata or {})
    except ImportError as error:
        raise MissingExtra("pyarrow", "rl") from error
    except (pyarrow.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no readable Parquet file: {told}") from error


def _dump(path: Path) -> RewardTable:
    """The answers of a token dump; a prompt is a group of a step."""
    from uncollapse.token_dump import read_dump

    prompts: dict[str, int] = {}
    prompt, answer = [], []
    rewards: list[float] = []
    logp: list[float] = []
    answers: dict[bytes, int] = {}
    for tokens in read_dump(path):
        uid, group = tokens.integer("uid"), tokens.integer("group")
        order = np.lexsort((tokens.integer("position"), uid))
        starts = np.flatnonzero(np.diff(uid[order], prepend=uid[order][:1] - 1))
        ids = tokens.integer("token")[order]
        masked = np.where(tokens.mask, tokens.number("old_logp"), 0.0)[order]
        if (group < 0).any():
            raise DataError(f"{path} does not say which answers belong to one prompt: it has no column group")
        logp.extend(np.add.reduceat(masked, starts).tolist() if len(starts) else [])
        rewards.extend(tokens.number("reward")[order][starts].tolist())
        for number, row in zip(group[order][starts].tolist(), np.split(ids, starts[1:]), strict=True):
            name = f"step {tokens.step}, group {number}"
            prompt.append(prompts.setdefault(name, len(prompts)))
            digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            answer.append(answers.setdefault(digest, len(answers)))
    return _table(path, prompts, prompt, rewards, answer, logp)


def _probes(path: Path) -> RewardTable:
    """The probe completions of a run, as last scored."""
    from uncollapse.runs import TOKENS, Run

    last = {str(record["sample"]): record for record in Run.open(path).tokens() if "sample" in record}
    if not last:
        raise DataError(
            f"{path} has neither a token dump nor {TOKENS}: train with --dump-tokens, or give a table of completions"
        )
    prompts: dict[str, int] = {}
    answers: dict[str, int] = {}
    prompt, rewards, answer, logp = [], [], [], []
    for record in last.values():
        prompt.append(prompts.setdefault(_text(record.get("prompt")), len(prompts)))
        written = "".join(map(str, record.get("tokens") or ()))
        answer.append(answers.setdefault(written, len(answers)))
        number = _number(record.get("reward"))
        rewards.append(math.nan if number is None else number)
        each = [_number(value) for value in record.get("logp") or ()]
        logp.append(sum(math.nan if one is None else one for one in each) if each else math.nan)
    return _table(path, prompts, prompt, rewards, answer, logp)


def _table(
    path: Path,
    prompts: Mapping[str, int],
    prompt: list[int],
    rewards: list[float],
    answer: list[int],
    logp: list[float],
) -> RewardTable:
    scores = np.array(rewards, dtype=np.float64)
    if not len(scores) or np.isnan(scores).all():
        raise DataError(f"{path} holds no rewards")
    likely = np.array(logp)
    finite = bool(np.isfinite(likely[~np.isnan(scores)]).all())
    return RewardTable(
        source=str(path),
        names=("reward",),
        prompts=[shown(name, _LONGEST) for name in prompts],
        prompt=np.array(prompt),
        rewards=scores[:, None],
        answer=np.array(answer),
        logp=likely if finite else None,
        notes=[] if finite else ["the log-probabilities are not all finite and were left out"],
    )
