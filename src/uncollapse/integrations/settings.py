"""What a training run is told: one flat list of settings, from YAML, flags or Python, checked before anything starts.

recipe: clip-cov          # a name, a file, or a recipe spelled out
model: tiny
task: modsum              # or dataset: problems.jsonl, with columns: {question: prompt, gold: answer}
steps: 100
seed: 0
output: runs/clip-cov
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from uncollapse.errors import ConfigError, UncollapseError, UnknownName
from uncollapse.policy.config import read_recipe, recipe_to_dict, resolve
from uncollapse.policy.config.coerce import coerce
from uncollapse.policy.config.document import Located, locate, read_document
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.registry import recipe

SMALL, MEDIUM = 20_000_000, 500_000_000
"""Numbers of parameters below which the defaults are those of a toy and of a small language model."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. A step is one rollout: sample, score, `updates` optimiser steps.

    What is None is chosen when the model is known (`resolved`): by its number of parameters and by `steps`.

    Args:
        recipe: what is trained with; samples per prompt and temperature are its sampler's.
        model: `tiny`, `smollm2-135m`, a Hub id or a directory.
        task: name of a task; `dataset` (JSONL, Parquet, Hub id) takes its place, `columns` maps names in the
            data to `prompt` and `answer`.
        steps: rollouts.
        prompts: prompts per rollout.
        updates: optimiser steps per rollout. With one, clips and KL-Cov have nothing to act on.
        micro_batch: rows per forward pass with gradient, in each process; the result does not depend on it.
        share_prompts: compute a prompt once for all its completions, where the model supports it; the result is the
            same up to rounding.
        learning_rate: constant, AdamW.
        max_tokens: limit on the tokens of a completion.
        rows: different training prompts to draw from a task.
        checkpoint_every, eval_every, probe_every: in steps; 0 for never (a last checkpoint is always written).
        eval_prompts, eval_samples: held-out prompts, and completions of each, for pass@k and distinct answers.
        probes: completions of the untrained model that are scored again during training.
        dump_tokens: write every sampled token as Parquet into the run directory, for `uncollapse diagnose --tokens`.
    """

    recipe: Recipe = field(default_factory=lambda: recipe("grpo"))
    model: str = "tiny"
    task: str | None = None
    dataset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    steps: int = 100
    seed: int = 0
    output: str = "runs/train"
    prompts: int = 16
    updates: int = 4
    micro_batch: int | None = None
    share_prompts: bool = True
    learning_rate: float | None = None
    max_tokens: int | None = None
    rows: int = 1024
    checkpoint_every: int | None = None
    eval_every: int | None = None
    eval_prompts: int | None = None
    eval_samples: int = 8
    probe_every: int | None = None
    probes: int = 4
    dump_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "updates", "rows", "micro_batch", "max_tokens", "eval_samples"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "probes", "checkpoint_every", "eval_every", "eval_prompts", "probe_every"):
            _at_least(name, getattr(self, name), 0)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate has to be above 0, got {self.learning_rate}")
        if self.task is not None and self.dataset is not None:
            raise ConfigError("task and dataset are both given; keep one")
        if self.columns and self.dataset is None:
            raise ConfigError(
                "columns belong to a dataset, and none is given; add dataset or leave columns out"
            )
        if self.samples < 2:
            raise ConfigError(
                f"the sampler draws {self.samples} completion per prompt; a group needs at least 2"
            )
        if self.rollout_rows % self.updates:
            raise ConfigError(
                f"{self.rollout_rows} rows per rollout ({self.prompts} prompts x {self.samples} samples) cannot be split "
                f"into {self.updates} equal updates; change prompts or updates"
            )
        if self.micro_batch is not None and self.update_rows % self.micro_batch:
            raise ConfigError(
                f"micro_batch {self.micro_batch} does not divide the {self.update_rows} rows of an optimiser step; "
                f"try {_divisor(self.update_rows, self.micro_batch)}"
            )

    @property
    def samples(self) -> int:
        """Completions per prompt."""
        return self.recipe.sampler.samples

    @property
    def rollout_rows(self) -> int:
        """Completions per rollout."""
        return self.prompts * self.samples

    @property
    def update_rows(self) -> int:
        """Completions per optimiser step."""
        return self.rollout_rows // self.updates

    def resolved(self, parameters: int, processes: int = 1) -> TrainConfig:
        """The same with every None decided, for a model with this many parameters, trained by so many processes.

        Raises `ConfigError` if the rows of an optimiser step cannot be split equally over the processes.
        """
        scale = 0 if parameters < SMALL else 1 if parameters < MEDIUM else 2
        rows = self._rows_each(processes)
        chosen = {
            "task": "modsum" if self.dataset is None else None,
            "micro_batch": rows if scale == 0 else _divisor(rows, 8),
            "learning_rate": (1e-3, 1e-5, 1e-6)[scale],
            "max_tokens": (48, 128, 512)[scale],
            "checkpoint_every": max(self.steps // 4, 1),
            "eval_every": max(self.steps // 10, 1) if scale == 0 else max(self.steps // 4, 1),
            "eval_prompts": (64, 16, 32)[scale],
            "probe_every": max(self.steps // 20, 1),
        }
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})  # type: ignore[arg-type]

    def _rows_each(self, processes: int) -> int:
        """Completions per optimiser step in each process."""
        rows, rest = divmod(self.update_rows, processes)
        if rest:
            raise ConfigError(
                f"{self.update_rows} rows of an optimiser step ({self.prompts} prompts x {self.samples} samples / "
                f"{self.updates} updates) cannot be split over {processes} processes; change prompts, updates or processes"
            )
        if self.micro_batch is not None and rows % self.micro_batch:
            raise ConfigError(
                f"micro_batch {self.micro_batch} does not divide the {rows} rows of an optimiser step that each of "
                f"{processes} processes has; try {_divisor(rows, self.micro_batch)}"
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values, the recipe spelled out; `read_settings` reads them back equal."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**plain, "recipe": recipe_to_dict(self.recipe), "columns": dict(self.columns)}


def settings_from_file(path: str | Path, **given: Any) -> TrainConfig:
    """Settings from a YAML file; `given` (flags, say) take precedence. Raises `ConfigError` with file and line."""
    return read_settings(read_document(path), **given)


def settings(**given: Any) -> TrainConfig:
    """Settings from plain values, such as flags; a recipe may be a name, a file or a mapping."""
    return read_settings(locate({}), **given)


def read_settings(node: Located, **given: Any) -> TrainConfig:
    """Settings from a document, where `given` take precedence; None among them means not given."""
    known = [item.name for item in fields(TrainConfig)]
    hints = get_type_hints(TrainConfig)
    values: dict[str, Any] = {}
    for name, member in node.mapping("the settings").items():
        if name not in known:
            raise replace(member, path=node.path).error(str(UnknownName("setting", name, known)))
        values[name] = _recipe(member) if name == "recipe" else coerce(member, hints[name])
    for name, value in given.items():
        if value is not None:
            values[name] = (
                resolve(value) if name == "recipe" else coerce(locate(value, path=name), hints[name])
            )
    # A flag that names the data replaces the file's other way of naming it.
    for name, other in (("task", "dataset"), ("dataset", "task")):
        if given.get(name) is not None and given.get(other) is None:
            values.pop(other, None)
    try:
        return TrainConfig(**values)
    except UncollapseError as error:
        raise Located(None, node.source).error(str(error)) from error


def _recipe(node: Located) -> Recipe:
    if isinstance(node.value, dict):
        return read_recipe(node)
    try:
        return resolve(coerce(node, str))
    except UnknownName as error:
        raise node.error(str(error)) from error


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} has to be at least {low}, got {value}")


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
