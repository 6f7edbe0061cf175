"""What `uncollapse.watch` sees of a model in training, as scalars in the trainer's own log.

from uncollapse.integrations.watch_callback import WatchCallback

trainer = Trainer(...)  # or TRL's, with any report_to
WatchCallback(every=50).attach(trainer)
"""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uncollapse.errors import ConfigError
from uncollapse.inspection import Watcher, watch


class WatchCallback(TrainerCallback):
    """Watch every so-manieth optimiser step and put what was seen into the log: TensorBoard, W&B, trackio and the history.

    Attach it rather than passing it as `callbacks=`: it has to stand before the loggers, which read what it adds, and to
    know when training breaks off. It never ends a run itself: NaN and inf are left out and counted
    (`features/nonfinite/rows`), what cannot be computed is not logged.

    Args:
        every: optimiser steps from one look to the next.
        by_layer: numbers of each layer, block and weight as well.
        attention: look at attention.
        features: look at features and their classes.
        weights: compute the spectra of the weights; seconds a look for a hundred million of them.

    Raises:
        ConfigError: `every` below 1.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        by_layer: bool = False,
        attention: bool = True,
        features: bool = True,
        weights: bool = False,
    ) -> None:
        if every < 1:
            raise ConfigError(f"WatchCallback: every has to be at least 1, got {every}")
        self.every, self.by_layer = every, by_layer
        self.attention, self.features, self.weights = attention, features, weights
        self._watcher: Watcher | None = None
        self._scalars: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> WatchCallback:
        """Join the callbacks of a trainer, before its loggers, and leave its model alone however `train` ends. Returns itself."""
        trainer.callback_handler.callbacks.insert(0, self)
        train = trainer.train

        @wraps(train)
        def leaving(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self._leave()

        trainer.train = leaving
        return self

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin to watch if this step is looked at."""
        self._leave()  # of a step that broke off and was tried again
        if model is not None and state.global_step % self.every == 0:
            self._watcher = watch(model, attention=self.attention, features=self.features)
            self._watcher.__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model alone again, and ask for a log."""
        watcher = self._watcher
        if watcher is not None:
            self._leave()
            found = watcher.scalars(by_layer=self.by_layer, weights=self.weights)
            self._scalars = {name: value for name, value in found.items() if math.isfinite(value)}
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to what is being logged."""
        if logs is None or not self._scalars or "train_runtime" in logs:
            return
        logs.update(self._scalars)
        if state.log_history:
            state.log_history[-1].update(self._scalars)
        self._scalars = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook behind."""
        self._leave()

    def _leave(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.__exit__(None, None, None)
