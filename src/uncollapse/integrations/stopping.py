"""Ends a run between two rollouts, with a checkpoint, when one of its processes was asked to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from uncollapse.integrations.interrupts import StopRequest
from uncollapse.integrations.processes import Processes


@dataclass
class StopBetweenRollouts(TrainerCallback):
    """The trainer's callback, in every process, that makes all of them stop at the same optimiser step.

    `updates` is the number of optimiser steps per rollout.
    """

    stop: StopRequest
    updates: int
    processes: Processes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where it was asked for."""
        self._obey(state, control)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Stop also where it was asked for while the step was written down and evaluated."""
        if logs and "train_runtime" not in logs:
            self._obey(state, control)

    def _obey(self, state: Any, control: Any) -> None:
        if state.global_step % self.updates:
            return
        self.stop.requested = self.processes.anyone(self.stop.requested)
        if self.stop.requested:
            control.should_training_stop = True
            control.should_save = True
