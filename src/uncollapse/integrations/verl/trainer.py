"""Level `trainer` (and `engine`): verl's `RayPPOTrainer` with a recipe in the place of its advantages and loss.

Sampling, rewards, checkpoints of the model, validation and logging stay verl's. `fit` measures the old policy before
it knows the advantages and drops what it does not know, so `_compute_old_log_prob` records the statistics under our
names and everything else happens in `_update_actor`.

verl 0.9.1 calls this trainer deprecated and chooses another (`trainer.use_v1`, on TransferQueue) by default; at level
`registry` a recipe runs in either, at the others in this one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer

from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations.verl.driver import Driver
from uncollapse.integrations.verl.loss import RecipeLoss
from uncollapse.integrations.verl.names import OLD, ROW
from uncollapse.integrations.verl_levels import level_for
from uncollapse.measure.statistics import Entropy, Logp
from uncollapse.policy.config import resolve
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.stages.samplers import PlainSampler

STATE_FILE = "uncollapse_recipe.pt"

_ACTOR = "actor_rollout_ref.actor"
OWNED: Mapping[str, Any] = {
    f"{_ACTOR}.entropy_coeff": 0,
    f"{_ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{_ACTOR}.loss_agg_mode": "token-mean",
    f"{_ACTOR}.loss_scale_factor": None,
    f"{_ACTOR}.clip_ratio": 0.2,
    f"{_ACTOR}.clip_ratio_low": 0.2,
    f"{_ACTOR}.clip_ratio_high": 0.2,
    f"{_ACTOR}.clip_ratio_c": 3.0,
    f"{_ACTOR}.shuffle": False,
    f"{_ACTOR}.use_prefix_grouper": False,
    f"{_ACTOR}.calculate_sum_pi_squared": False,
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.bypass_mode": False,
    "trainer.critic_warmup": 0,
    "trainer.use_legacy_worker_impl": "disable",
}
"""Options of verl that the recipe decides or that would change its loss; anything but these values is refused."""


def chosen_recipe(config: Any) -> Recipe:
    """The recipe that `config.uncollapse.recipe` names, with verl's group size and temperature in its sampler."""
    name = OmegaConf.select(config, "uncollapse.recipe")
    if not name:
        raise ConfigError("no recipe: give uncollapse.recipe=NAME or a YAML file")
    recipe = copy.deepcopy(resolve(str(name)))
    if not isinstance(recipe.sampler, PlainSampler):  # no level has a place for another
        return recipe
    rollout = config.actor_rollout_ref.rollout
    return replace(
        recipe, sampler=replace(recipe.sampler, samples=rollout.n, temperature=rollout.temperature)
    )


def reads_reference(recipe: Recipe) -> bool:
    """Whether the recipe needs a reference policy."""
    return any(stat.whose == "ref" for stat in recipe.stats("rollout"))


def refuse(config: Any, recipe: Recipe) -> None:
    """Raise `ConfigError` for options of verl that ask for another loss, or that the recipe cannot run on."""
    groups = any("group" in stage.needs for stage in recipe.advantage)
    if groups and config.actor_rollout_ref.rollout.n < 2:
        raise ConfigError(
            f"recipe {recipe.name!r} compares the answers to one prompt; set actor_rollout_ref.rollout.n to 2 or more"
        )
    changed = {
        key: value
        for key, default in OWNED.items()
        if (value := OmegaConf.select(config, key)) is not None and value != default
    }
    if changed:
        told = ", ".join(f"{key}={value}" for key, value in changed.items())
        raise ConfigError(
            f"{told}: the recipe {recipe.name!r} decides this; leave the default and change the recipe"
        )
    if bool(OmegaConf.select(config, "critic.enable")) or config.algorithm.adv_estimator == "gae":
        raise ConfigError(
            "recipes train without a critic; set algorithm.adv_estimator=grpo and critic.enable=false"
        )
    if bool(OmegaConf.select(config, "distillation.enabled")):
        raise ConfigError("distillation has a loss of its own; leave distillation off")
    wanted = reads_reference(recipe)
    if bool(OmegaConf.select(config, f"{_ACTOR}.use_kl_loss")) != wanted:
        reason = "reads a reference policy" if wanted else "reads no reference policy"
        raise ConfigError(f"recipe {recipe.name!r} {reason}: set {_ACTOR}.use_kl_loss={str(wanted).lower()}")


class RecipeTrainer(RayPPOTrainer):
    """verl's trainer with the recipe that `config.uncollapse` names: `recipe`, `level` and `seed`.

    Raises `ConfigError` for options that the recipe owns and for a recipe that verl cannot run.
    """

    def __init__(self, config: Any, *more: Any, **options: Any) -> None:
        self.recipe = chosen_recipe(config)
        level = OmegaConf.select(config, "uncollapse.level", default="auto")
        self.level = level_for(self.recipe, level)
        if self.level == "registry":
            self.level = level_for(self.recipe, "trainer")
        refuse(config, self.recipe)
        super().__init__(config, *more, **options)
        self.recipe.check_vocabulary(len(self.tokenizer))

    def init_workers(self) -> None:
        """verl's workers, then the recipe's loss on them."""
        super().init_workers()
        self.connect()

    def connect(self) -> None:
        """Hand the loss to the workers and make the driver of the recipe."""
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        self.actor_rollout_wg.set_loss_fn(RecipeLoss(self.recipe))
        end = self.tokenizer.eos_token_id
        self.driver = Driver(
            recipe=self.recipe,
            workers=self.actor_rollout_wg,
            reference=self._reference_forward if reads_reference(self.recipe) else None,
            samples=rollout.n,
            temperature=rollout.temperature,
            step_rows=actor.ppo_mini_batch_size * rollout.n,
            ranks=self._get_dp_size(self.actor_rollout_wg, "actor"),
            ends=tuple(end) if isinstance(end, list) else (end,),
            epochs=actor.ppo_epochs,
            seed=OmegaConf.select(self.config, "uncollapse.seed", default=0),
            total=self.total_training_steps,
        )

    def _reference_forward(self, inputs: Any) -> Any:
        if self.ref_in_actor:
            inputs["no_lora_adapter"] = True
            return self.actor_rollout_wg.compute_log_prob(inputs)
        return self.ref_policy_wg.compute_ref_log_prob(inputs)

    # ---- one step ------------------------------------------------------------------------------------------

    def _balance_batch(self, batch: Any, *more: Any, **options: Any) -> None:
        """Number the rows before verl reorders them: random choices hang on these numbers."""
        batch.batch[ROW] = torch.arange(len(batch.batch))
        super()._balance_batch(batch, *more, **options)

    def _compute_old_log_prob(self, batch: Any) -> tuple[Any, float]:
        """All statistics of the old policy (and the reference); returns what verl expects of them."""
        self.driver.record(batch)
        old = {
            "old_log_probs": batch.batch[f"{OLD}{Logp()!r}"].float(),
            "entropys": batch.batch[f"{OLD}{Entropy()!r}"].float(),
        }
        return DataProto.from_dict(tensors=old), 0.0

    def _compute_ref_log_prob(self, batch: Any) -> Any:
        """The reference was measured with the old policy; verl wants its log-probability under its own name."""
        return DataProto.from_dict(
            tensors={"ref_log_prob": batch.batch[f"uncollapse/ref/{Logp()!r}"].float()}
        )

    def _update_actor(self, batch: Any) -> Any:
        """All optimiser steps of this rollout batch."""
        metrics = self.driver.update(batch, step=self.global_steps - 1)
        return DataProto.from_single_dict(data={}, meta_info={"metrics": metrics})

    # ---- state ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """The recipe's state first: verl names a checkpoint the latest when it has written its own part."""
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{STATE_FILE}.part"
        torch.save(self.recipe.state_dict(), partial)
        os.replace(partial, folder / STATE_FILE)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if not self.global_steps:
            return
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if trainer.resume_mode == "resume_path":
            folder = Path(trainer.resume_from_path)
        path = folder / STATE_FILE
        if not path.exists():
            raise DataError(
                f"{folder} was not written with a recipe (no {STATE_FILE}); start a new run from its weights"
            )
        self.recipe.load_state_dict(torch.load(path, weights_only=True))
