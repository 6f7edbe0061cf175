"""What a task is: rows with `prompt` and `answer`, and a reward in TRL's signature.

Rows are plain dictionaries in TRL's column convention, so `Dataset.from_list(task.rows(64))` and
`GRPOTrainer(reward_funcs=task.reward, ...)` work as they are. A reward is called with lists, one entry a
completion, and returns one number each: 1.0 right, 0.0 wrong, None where nothing can be said
(TRL leaves such a row out of that reward).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from uncollapse.errors import ConfigError, DataError
from uncollapse.tasks.answers import MAX_COMPLETION, completion_text

Row = dict[str, Any]


@runtime_checkable
class Task(Protocol):
    """Anything that draws rows and scores completions."""

    @property
    def name(self) -> str:
        """The name it is registered under, or where its data come from."""

    @property
    def summary(self) -> str:
        """One line for a list of tasks."""

    def rows(self, size: int, *, split: str = "train", seed: int = 0, style: str = "plain") -> list[Row]:
        """`size` rows with `prompt`, `answer` and the columns that the reward needs."""

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """One score a completion, in TRL's signature."""


@dataclass(frozen=True, kw_only=True)
class GeneratedTask:
    """A task whose rows are drawn at random and whose answers are judged row by row.

    Args:
        name: registered name.
        summary: one line.
        draw: a generator of random numbers -> a row with a plain-text `prompt`, an `answer` and further columns.
        judge: (text of the completion, row) -> score in [0, 1], or None if it cannot be judged. The text
            is hostile.
        question: row -> the same task in words, for a model that follows instructions.
        columns: names of the columns that `judge` reads.
    """

    name: str
    summary: str
    draw: Callable[[random.Random], Row]
    judge: Callable[[str, Row], float | None]
    question: Callable[[Row], str]
    columns: tuple[str, ...] = field(default=("answer",))

    def rows(self, size: int, *, split: str = "train", seed: int = 0, style: str = "plain") -> list[Row]:
        """Draw `size` rows; row i depends on (name, split, seed, i) and on nothing else.

        Splits are independent draws: where a task has few distinct prompts (`modsum` has ten), the same
        prompt is in all of them.

        Raises:
            ConfigError: for a negative size or an unknown style.
        """
        check_size(size)
        rows = [self.draw(random.Random(f"{self.name}/{split}/{seed}/{i}")) for i in range(size)]
        return conversational(rows, question=self.question) if check_style(style) == "chat" else rows

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Score completions; see `judged`."""
        return judged(self.name, self.judge, completions, columns, needed=self.columns)


def judged(
    name: str,
    judge: Callable[[str, Row], float | None],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    *,
    needed: Sequence[str],
) -> list[float | None]:
    """Apply a row-wise judge to a batch in TRL's convention.

    Args:
        name: of the task, for messages.
        judge: (text, row) -> score.
        completions: strings or lists of messages; None is unscorable, more than `MAX_COMPLETION` characters
            is wrong.
        columns: one list for each column of the data set, as TRL passes them; others are ignored.
        needed: columns that the judge reads.

    Raises:
        DataError: if a needed column is missing or has another length than the completions.
    """
    for column in needed:
        values = columns.get(column)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(completions):
            have = ", ".join(sorted(columns)) or "none"
            raise DataError(
                f"task {name!r} scores with the column {column!r}, one value for each of the "
                f"{len(completions)} completions; columns given: {have}"
            )
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        text = completion_text(completion)
        if text is None:
            scores.append(None)
        elif len(text) > MAX_COMPLETION:
            scores.append(0.0)
        else:
            scores.append(judge(text, {column: columns[column][i] for column in needed}))
    return scores


def conversational(rows: Sequence[Row], *, question: Callable[[Row], str] | None = None) -> list[Row]:
    """Rows whose prompt is a conversation of one user message, for models with a chat template.

    Args:
        rows: rows with a plain-text prompt; a prompt that is already a conversation is kept.
        question: row -> text of the message (default: the prompt itself).
    """
    ask = question or (lambda row: row["prompt"])
    return [
        {**row, "prompt": [{"role": "user", "content": ask(row)}]}
        if isinstance(row["prompt"], str)
        else dict(row)
        for row in rows
    ]


def check_size(size: int) -> None:
    """Raise ConfigError unless `size` is a number of rows."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ConfigError(f"size is {size!r}; expected a number of rows, 0 or more")


def check_style(style: str) -> str:
    """The style of prompts, or ConfigError."""
    if style not in ("plain", "chat"):
        raise ConfigError(f"style is {style!r}; expected 'plain' or 'chat'")
    return style


def check_range(name: str, value: int, low: int, high: int) -> int:
    """An integer option within its bounds, or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; expected an integer from {low} to {high}")
    return value
