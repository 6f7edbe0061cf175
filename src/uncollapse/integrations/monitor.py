"""Watch a run from inside the trainer: a callback that diagnoses what the trainer logs and says what is new.

from trl import GRPOTrainer
from uncollapse import report
from uncollapse.integrations.monitor import CollapseMonitor

monitor = CollapseMonitor(stop_on="severe", at_end=report.diagnosis.writer("diagnosis.html"))
trainer = GRPOTrainer(..., callbacks=[monitor])

It reads what `Trainer.log` is given, changes nothing, and works with every trainer of Transformers and TRL.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uncollapse.diagnose.diagnosis import Diagnosis, diagnose
from uncollapse.diagnose.finding import SEVERITIES, Severity, news
from uncollapse.diagnose.log import Log
from uncollapse.diagnose.readers.aliases import full_mapping
from uncollapse.diagnose.readers.collect import Collector
from uncollapse.diagnose.readers.named import log_of
from uncollapse.errors import ConfigError


class CollapseWarning(UserWarning):
    """A finding about the run that is being trained."""


class CollapseMonitor(TrainerCallback):
    """Diagnose a run while it trains; warn once for every new finding, and again if it has become graver.

    With several processes each of them sees the same averaged logs and so comes to the same decision; only the main one
    warns and calls `at_end`.

    Args:
        every: diagnose after so many calls of `on_log` that hold a training step.
        warn_on: least severity that is worth a `CollapseWarning`.
        stop_on: least severity at which training is stopped at the end of the step, or None to let it run.
        at_end: called with the last diagnosis when training ends, such as `report.diagnosis.writer("page.html")`.
        mapping: which logged names are which columns, where the names do not say: `{"entropy": "my/entropy"}`.

    Raises:
        ConfigError: `every` is below 1, or a severity is none.
        UnknownName: `mapping` names a column that is not known.
    """

    def __init__(
        self,
        *,
        every: int = 10,
        warn_on: Severity = "warning",
        stop_on: Severity | None = None,
        at_end: Callable[[Diagnosis], object] | None = None,
        mapping: Mapping[str, str] | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"CollapseMonitor: every has to be at least 1, got {every}")
        for name, severity in (("warn_on", warn_on), ("stop_on", stop_on)):
            if severity is not None and severity not in SEVERITIES:
                raise ConfigError(
                    f"CollapseMonitor: {name} is {severity!r}; it takes one of {', '.join(SEVERITIES)}"
                )
        self.every, self.warn_on, self.stop_on, self.at_end = every, warn_on, stop_on, at_end
        self.diagnosis: Diagnosis | None = None
        self._mapping = full_mapping(mapping or {})
        self._collector = Collector()
        self._logs = 0
        self._told: dict[str, Severity] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the row; every so often look at all of them."""
        if not logs:
            return
        if "train_runtime" in logs:  # the summary at the end of training is no step
            return
        self._collector.settings.update(_scalars(args))
        self._collector.add_row(state.global_step, logs)
        if any(name.startswith("eval_") for name in logs):
            return
        self._logs += 1
        if self._logs % self.every == 0:
            self._look(control, main=state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look once more, and hand the diagnosis on."""
        if not self._logs:
            return
        self._look(control, main=state.is_world_process_zero)
        if self.at_end is not None and state.is_world_process_zero and self.diagnosis is not None:
            self.at_end(self.diagnosis)

    @property
    def log(self) -> Log:
        """What was logged so far, as a reader would give it."""
        return log_of(self._collector, "this run", "Transformers trainer", self._mapping)

    def _look(self, control: TrainerControl, *, main: bool) -> None:
        self.diagnosis = found = diagnose(self.log)
        for one in news(found.at_least(self.warn_on), self._told):
            if main:
                advice = next((a.title for a in found.advice if a.id in one.advice), "")
                hint = f" Try: {advice}." if advice else ""
                warnings.warn(
                    f"{one.title} ({one.severity}): {one.statement}{hint}", CollapseWarning, stacklevel=2
                )
        if self.stop_on is not None and found.at_least(self.stop_on):
            control.should_training_stop = True


def _scalars(args: TrainingArguments) -> dict[str, Any]:
    """The settings that a finding may ask for: plain values only."""
    return {name: value for name, value in vars(args).items() if isinstance(value, (bool, int, float, str))}
