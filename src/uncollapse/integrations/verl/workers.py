"""verl's workers with the learning-rate schedule counted once per rollout batch.

verl 0.9.1 steps the schedule at the end of every `update_actor` call, of which a recipe makes one per optimiser step;
its own trainer makes one per rollout batch.
"""

from __future__ import annotations

from typing import Any

from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from uncollapse.integrations.verl.names import LAST_UPDATE


class RecipeTrainingWorker(TrainingWorker):
    """Steps the learning-rate schedule only with the last optimiser step of a rollout batch."""

    def train_batch(self, data: Any) -> Any:
        """One optimiser step."""
        if not tu.get(data, LAST_UPDATE, default=True):
            tu.assign_non_tensor(data, update_lr_scheduler=False)
        return super().train_batch(data)


class RecipeWorker(ActorRolloutRefWorker):
    """verl's worker for actor, rollout and reference, with our training worker as its actor."""

    actor_worker_cls = RecipeTrainingWorker
