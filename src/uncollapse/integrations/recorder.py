"""Writes a run down while it trains: one row of metrics a step, evaluations, probes, the forecast ceiling."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from uncollapse.errors import DataError
from uncollapse.integrations.evaluation import Sampler, evaluate, probe_completions, score_probe
from uncollapse.integrations.progress import Progress, Watch
from uncollapse.integrations.settings import TrainConfig
from uncollapse.measure.entropy_law import fit_entropy_law
from uncollapse.runs import Run, write_text
from uncollapse.tasks.task import Row, Task

PROBES = "probes.json"
LAW_FROM = 8
"""Steps from which the entropy law is fitted."""

_RENAMED = {"grad_norm": "grad/norm", "learning_rate": "lr", "loss": "loss/total"}
_TRL_AREAS = frozenset({"rewards", "completions", "clip_ratio"})
"""TRL's own names for what we measure under ours."""


def metric_row(logs: Mapping[str, Any]) -> dict[str, float]:
    """TRL's log entry under our names: `area/name/statistic` and a few of the trainer's, numbers only."""
    row = {}
    for key, value in logs.items():
        name = _RENAMED.get(key, key)
        ours = name in _RENAMED.values() or ("/" in name and name.split("/")[0] not in _TRL_AREAS)
        if ours and isinstance(value, (int, float)):
            row[name] = float(value)
    return row


@dataclass
class Recorder(TrainerCallback):
    """The trainer's callback that writes the run directory and tells `watch` how far it is.

    The row of step s holds the metrics of its rollout, sampled before its updates, and evaluations made after them;
    the row of step 0 holds the evaluation of the untrained model instead. Token records are numbered by the
    rollouts done: 0 is the untrained model.
    """

    run: Run
    config: TrainConfig
    task: Task
    sampler: Sampler
    held_out: list[Row]
    watch: Watch

    def __post_init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._baseline: dict[str, float] = {}
        self._clock = time.perf_counter()

    # ---- the trainer's events ------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the untrained model, or pick up where the run was left."""
        done = state.global_step // self.config.updates
        for row in self.run.metrics():
            if row["step"] < done:
                self._note_point(row)
        if done == 0:
            self._baseline = self._evaluated("evaluating the untrained model", 0)
            self._start_probes()
        self._clock = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Append the row of the rollout step that has just ended."""
        if not logs or "train_runtime" in logs:
            return
        step = state.global_step // self.config.updates - 1
        row: dict[str, float] = {**metric_row(logs), "time/step": time.perf_counter() - self._clock}
        self._note_point(row)
        ceiling = self._ceiling()
        if ceiling is not None:
            row["law/ceiling"] = ceiling
        row |= self._baseline
        self._baseline = {}
        last = step + 1 == self.config.steps
        if step > 0 and (_due(self.config.eval_every, step + 1) or (self.config.eval_every and last)):
            row |= self._evaluated(f"evaluating after step {step + 1}", step + 1)
        self.run.append({"step": step, **row})
        if _due(self.config.probe_every, step + 1) or (self.config.probe_every and last):
            self._score_probes(step + 1)
        self.watch(Progress(step + 1, self.config.steps, row))
        self._clock = time.perf_counter()

    # ---- inside --------------------------------------------------------------------------------------------

    def _note_point(self, row: Mapping[str, Any]) -> None:
        point = (row.get("entropy/token/mean", math.nan), row.get("reward/mean", math.nan))
        if all(math.isfinite(value) for value in point):
            self._points.append(point)

    def _ceiling(self) -> float | None:
        """The reward that the entropy law forecasts for zero entropy, once there is something to fit."""
        if len(self._points) < LAW_FROM:
            return None
        entropy, reward = zip(*self._points, strict=True)
        try:
            return fit_entropy_law(entropy, reward).ceiling
        except DataError:  # entropy has not moved
            return None

    def _evaluated(self, what: str, done: int) -> dict[str, float]:
        if not self.config.eval_every or not self.held_out:
            return {}
        self.watch(Progress(done, self.config.steps, {}, what))
        # The same seed each time: evaluations differ by the model, not by the draw.
        return evaluate(
            self.sampler, self.task, self.held_out, samples=self.config.eval_samples, seed=self.config.seed
        )

    def _start_probes(self) -> None:
        if not self.config.probe_every or not self.config.probes:
            return
        rows = self.held_out[: self.config.probes] or self.task.rows(self.config.probes, split="test")
        probes = probe_completions(self.sampler, self.task, rows, seed=self.config.seed)
        write_text(self.run.path / PROBES, json.dumps([probe for probe in probes if probe["ids"]]))
        self._score_probes(0)

    def _score_probes(self, done: int) -> None:
        path = self.run.path / PROBES
        for probe in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
            self.run.append_tokens(score_probe(self.sampler, probe, step=done))


def _due(every: int | None, done: int) -> bool:
    return every is not None and every > 0 and done % every == 0
