"""Every reasoning-gym generator as a task: `reasoning-gym:<data set>`, scored by reasoning-gym itself.

Rows are drawn, and model output is judged, in a child process under limits of time and memory (`sandbox`). Rows
carry `gym_seed`, `gym_size` and `gym_index`, from which the child rebuilds the entry that reasoning-gym's
`score_answer` needs. Some generators depend on the order of sets (`polynomial_multiplication`), so they repeat
only under one hash seed, which the child has. Scorers that evaluate text see only what `guards` lets through. Scores are in [0, 1] and some generators give
partial credit. Where the scorer hangs or raises, the score is None and the reason is counted.

The answer in a completion is what stands in the last `<answer>...</answer>`, else its last line. Boards and
matrices span several lines and so need the tag, which chat prompts ask for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from uncollapse.errors import ConfigError, DataError, MissingExtra, UnknownName
from uncollapse.tasks.answers import MAX_ANSWER, final_answer
from uncollapse.tasks.guards import GUARDS
from uncollapse.tasks.sandbox import Failed, Sandbox, TimedOut
from uncollapse.tasks.task import Row, check_size, check_style, conversational, judged

PREFIX = "reasoning-gym:"
COLUMNS = ("gym_seed", "gym_size", "gym_index")
PREPARE_SECONDS = 60.0
SECONDS_A_ROW = 2.0

_log = logging.getLogger(__name__)


def gym_names() -> list[str]:
    """`reasoning-gym:<data set>` for every registered data set; empty if reasoning-gym is not installed."""
    try:
        return [PREFIX + name for name in sorted(_generators())]
    except MissingExtra:
        return []


def gym_task(dataset: str, *, time_limit: float | int = 5.0, **config: Any) -> GymTask:
    """A reasoning-gym data set as a task.

    Args:
        dataset: its name in reasoning-gym, for example `chain_sum`.
        time_limit: seconds that scoring one answer may take (default 5; scorers take milliseconds).
        **config: options of the data set's own configuration.

    Raises:
        MissingExtra: reasoning-gym is not installed.
        UnknownName: it has no such data set.
        ConfigError: the data set does not accept the configuration; `seed` and `size` are arguments of `rows`.
    """
    if dataset not in _generators():
        raise UnknownName("task", PREFIX + dataset, gym_names())
    if time_limit <= 0:
        raise ConfigError(f"time_limit is {time_limit!r}; expected seconds above 0")
    for name in ("seed", "size"):
        if name in config:
            raise ConfigError(f"{PREFIX}{dataset}: {name} is an argument of rows(), not of the task")
    _build(dataset, config, seed=0, size=1)
    return GymTask(dataset=dataset, config=config, time_limit=time_limit)


@dataclass(frozen=True, kw_only=True)
class GymTask:
    """One reasoning-gym data set with its configuration.

    Args:
        dataset: name in reasoning-gym.
        config: options of the data set.
        time_limit: seconds for one answer.
        unscorable: how often an answer could not be scored, by reason.
    """

    dataset: str
    config: dict[str, Any]
    time_limit: float | int
    unscorable: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def name(self) -> str:
        """`reasoning-gym:<data set>`."""
        return PREFIX + self.dataset

    @property
    def summary(self) -> str:
        """Where the task comes from."""
        return f"reasoning-gym's {self.dataset.replace('_', ' ')}"

    def rows(self, size: int, *, split: str = "train", seed: int = 0, style: str = "plain") -> list[Row]:
        """`size` rows from the generator, seeded by a hash of (split, seed).

        The generators add the index to their seed, so neighbouring seeds would share rows; hashed seeds are apart.

        Raises:
            ConfigError: for a negative size or an unknown style.
            DataError: the generator hangs or raises.
        """
        check_size(size)
        check_style(style)
        if size == 0:
            return []
        gym_seed = int.from_bytes(hashlib.sha256(f"{split}/{seed}".encode()).digest()[:4], "big") // 2
        request = {"dataset": self.dataset, "config": self.config, "gym_seed": gym_seed, "gym_size": size}
        try:
            drawn = _child(os.getpid()).ask(request, seconds=PREPARE_SECONDS + SECONDS_A_ROW * size)
        except (TimedOut, Failed) as error:
            raise DataError(f"{self.name}: cannot draw {size} rows: {error}; ask for fewer") from error
        rows = [
            {"prompt": prompt, "answer": answer, "gym_seed": gym_seed, "gym_size": size, "gym_index": i}
            for i, (prompt, answer) in enumerate(drawn)
        ]
        return conversational(rows, question=_question) if style == "chat" else rows

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """reasoning-gym's own score of each answer, None where it hangs or raises.

        Raises:
            DataError: if the answer or a `gym_` column is missing.
        """
        return judged(self.name, self._judge, completions, columns, needed=("answer", *COLUMNS))

    def _judge(self, text: str, row: Row) -> float | None:
        answer = final_answer(text)
        entry = {"dataset": self.dataset, "config": self.config, **{c: int(row[c]) for c in COLUMNS}}
        sandbox = _child(os.getpid())
        try:
            if sandbox.ask(entry, seconds=PREPARE_SECONDS) != row["answer"]:
                raise Failed("the generator does not repeat its rows")
            given = answer if len(answer) <= MAX_ANSWER else ""
            return float(sandbox.ask({**entry, "answer": given}, seconds=self.time_limit))
        except (TimedOut, Failed) as error:
            reason = "timed out" if isinstance(error, TimedOut) else str(error).partition(":")[0]
            self.unscorable[reason] += 1
            if self.unscorable[reason] == 1:
                _log.warning(
                    "%s: an answer could not be scored (%s); counted as unscorable", self.name, error
                )
            return None


@lru_cache(maxsize=1)
def _child(owner: int) -> Sandbox:
    """One child for all tasks of a process: starting it imports reasoning-gym. `owner` tells forks apart."""
    return Sandbox(__name__, "serve")


def serve(request: dict[str, Any]) -> Any:
    """In the child: all rows; the stored answer of one, which is then ready; or a score of `request["answer"]`."""
    data = _cached_data(
        request["dataset"],
        json.dumps(request["config"], sort_keys=True),
        request["gym_seed"],
        request["gym_size"],
    )
    if "gym_index" not in request:
        entries = (data[i] for i in range(request["gym_size"]))
        return [(entry["question"], _stored_answer(entry)) for entry in entries]
    entry = _cached_entry(data, request["gym_index"])
    if "answer" not in request:
        return _stored_answer(entry)
    answer: str | None = request["answer"]
    guard = GUARDS.get(request["dataset"])
    if guard is not None and answer is not None:
        answer = guard(answer, entry)
    return float(data.score_answer("" if answer is None else answer, entry))


def _stored_answer(entry: dict[str, Any]) -> str:
    return "" if entry["answer"] is None else str(entry["answer"])


@lru_cache(maxsize=4)
def _cached_data(dataset: str, config: str, seed: int, size: int) -> Any:
    return _build(dataset, json.loads(config), seed=seed, size=size)


@lru_cache(maxsize=64)
def _cached_entry(data: Any, index: int) -> dict[str, Any]:
    entry: dict[str, Any] = data[index]
    return entry


def _question(row: Row) -> str:
    return f"{row['prompt']}\n\nGive the final answer inside <answer></answer>."


def _generators() -> Any:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingExtra("reasoning_gym", "rl") from error
    return DATASETS


def _build(dataset: str, config: dict[str, Any], *, seed: int, size: int) -> Any:
    _generators()
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(dataset, seed=seed, size=size, **config)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(f"{PREFIX}{dataset} does not accept {config}: {error}") from error
