"""Data sets of your own as tasks: JSONL, JSON, CSV, Parquet or a Hub id with `prompt` and `answer`.

A reward written for TRL is used as it is; without one, an answer is right if it equals the row's (`same_answer`).
verl's layout, `reward_model.ground_truth` instead of `answer`, is read too.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uncollapse.errors import ConfigError, DataError, MissingExtra
from uncollapse.tasks.answers import final_answer, same_answer
from uncollapse.tasks.task import Row, check_size, check_style, conversational, judged

RewardFunction = Callable[..., list[float | None]]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HELD_OUT = 10


def is_data_source(name: str) -> bool:
    """Whether a name is a data file's (by its suffix) or a Hub id (`owner/name`)."""
    return name.lower().endswith(SUFFIXES) or "/" in name


def from_dataset(
    source: str | Path,
    *,
    reward: RewardFunction | str = "exact",
    map: Mapping[str, str] | None = None,
    hub_split: str = "train",
    config: str | None = None,
) -> DatasetTask:
    r"""A task from a data file or a data set on the Hub.

    Args:
        source: path of a `.jsonl`, `.ndjson`, `.json` (a list), `.csv` or `.parquet` file, or a Hub id.
        reward: a function in TRL's signature; "exact" (default) compares the answer in `<answer>` or in the
            last line, out of its `\boxed{}`, as an exact number or as text.
        map: names of columns in the data -> names here, for example `{"question": "prompt"}`.
        hub_split: split to load from the Hub.
        config: configuration to load from the Hub.

    Raises:
        DataError: no such file, a line that is not JSON, no rows, or no `prompt` and `answer`.
        MissingExtra: reading this source needs a package that is not installed.
        ConfigError: no such reward.
    """
    path = Path(source)
    if str(source).lower().endswith(SUFFIXES):
        records: list[Mapping[str, Any]] = list(_read_file(path))
    elif path.exists():
        raise DataError(f"{path}: not a data file; expected one of {', '.join(SUFFIXES)}")
    else:
        records = list(_read_hub(str(source), hub_split, config))
    if not records:
        raise DataError(
            f"{source}: no rows; write one JSON object or record a row, with 'prompt' and 'answer'"
        )
    rows = [_row(record, str(source), i, map or {}) for i, record in enumerate(records)]
    return DatasetTask(name=str(source), data=tuple(rows), judge_batch=_reward(reward))


@dataclass(frozen=True, kw_only=True)
class DatasetTask:
    """Rows that are given, and a reward for them.

    Args:
        name: path or Hub id.
        data: every row.
        judge_batch: reward in TRL's signature.
    """

    name: str
    data: tuple[Row, ...]
    judge_batch: RewardFunction

    @property
    def summary(self) -> str:
        """Size and source."""
        return f"{len(self.data)} rows of {self.name}"

    def rows(self, size: int, *, split: str = "train", seed: int = 0, style: str = "plain") -> list[Row]:
        """`size` rows in an order shuffled by the seed; fewer if the split has fewer.

        Every tenth row is held out for any split but "train"; below ten rows both have all of them.

        Raises:
            ConfigError: for a negative size or an unknown style.
        """
        check_size(size)
        held_out = [row for i, row in enumerate(self.data) if i % _HELD_OUT == _HELD_OUT - 1]
        kept = [row for i, row in enumerate(self.data) if i % _HELD_OUT != _HELD_OUT - 1]
        rows = list(self.data) if not held_out else kept if split == "train" else held_out
        random.Random(f"{self.name}/{seed}").shuffle(rows)
        chosen = [dict(row) for row in rows[:size]]
        return conversational(chosen) if check_style(style) == "chat" else chosen

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Scores from the data set's reward function; not-a-number counts as unscorable.

        Raises:
            DataError: the function does not return one number or None for each completion.
        """
        scores = self.judge_batch(prompts=prompts, completions=completions, **columns)
        if not isinstance(scores, Sequence) or len(scores) != len(completions):
            raise DataError(
                f"{self.name}: the reward returned {scores!r:.80}; expected a list of {len(completions)} numbers"
            )
        return [None if s is None or s != s else float(s) for s in scores]


def exact_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the answer in a completion equals the column `answer` (`same_answer`), else 0.0."""
    return judged(
        "exact",
        lambda text, row: float(same_answer(final_answer(text), str(row["answer"]))),
        completions,
        columns,
        needed=("answer",),
    )


def _reward(reward: RewardFunction | str) -> RewardFunction:
    if callable(reward):
        return reward
    if reward == "exact":
        return exact_reward
    raise ConfigError(f"reward is {reward!r}; expected a function in TRL's signature or 'exact'")


def _row(record: Mapping[str, Any], source: str, index: int, names: Mapping[str, str]) -> Row:
    where = f"{source}: row {index + 1}"
    unknown = [name for name in names if name not in record]
    if unknown:
        raise DataError(
            f"{where} has no column {unknown[0]!r} to map; columns: {', '.join(map(str, record))}"
        )
    row = {names.get(column, column): value for column, value in record.items()}
    verl = row.get("reward_model")
    if "answer" not in row and isinstance(verl, Mapping) and "ground_truth" in verl:
        row["answer"] = verl["ground_truth"]
    for column in ("prompt", "answer"):
        if column not in row:
            hint = f"--map COLUMN={column}"
            raise DataError(
                f"{where} has no {column!r}; columns: {', '.join(map(str, row))}; name the one to use with {hint}"
            )
    if row["answer"] is None or isinstance(row["answer"], (list, dict)):
        raise DataError(f"{where}: 'answer' is {row['answer']!r:.60}; expected text or a number")
    row["answer"] = str(row["answer"])
    row["prompt"] = _prompt(row["prompt"], where)
    return row


def _prompt(prompt: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        return prompt
    messages = list(prompt) if isinstance(prompt, Sequence) or hasattr(prompt, "tolist") else []
    if not messages or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        raise DataError(
            f"{where}: 'prompt' is {prompt!r:.60}; expected text or a list of messages with role and content"
        )
    return [dict(message) for message in messages]


def _read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as stream:
            if suffix == ".csv":
                yield from csv.DictReader(stream, restkey="(more)")
            elif suffix == ".json":
                yield from _read_json(stream.read(), path)
            else:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield _record(line, f"{path}: line {number}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as {suffix[1:]} in UTF-8: {error}") from error


def _record(text: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({str(error)[:80]}); write one JSON object a line") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: {type(record).__name__}, expected a JSON object with 'prompt' and 'answer'"
        )
    return record


def _read_json(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({str(error)[:80]})") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: expected a JSON list of objects with 'prompt' and 'answer'")
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "rl") from error
    try:
        records: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
    return records


def _read_hub(name: str, split: str, config: str | None) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "rl") from error
    try:
        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # the library raises many kinds, for a wrong id as for a lost network
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{name}: no such file, and not loadable from the Hub ({reason})") from error
