"""Launch verl with a recipe: `python -m uncollapse.integrations.verl.main uncollapse.recipe=clip-cov ...`.

Everything else on the command line is verl's own (Hydra). The level is chosen, verl's options are set to agree with
the recipe, and Ray's processes are told to import this package.
"""

from __future__ import annotations

import sys
from typing import Any

import hydra
import ray
from omegaconf import OmegaConf, open_dict
from verl.trainer.main_ppo import run_ppo
from verl.trainer.main_ppo_v0 import BaseTaskRunner, TaskRunner
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.device import auto_set_device

from uncollapse.errors import ConfigError, UncollapseError
from uncollapse.integrations.verl.names import PREFIX
from uncollapse.integrations.verl.registries import AGGREGATION, kind_of
from uncollapse.integrations.verl.trainer import RecipeTrainer, chosen_recipe, reads_reference, refuse
from uncollapse.integrations.verl_levels import Level, level_for
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.reduction import Sum
from uncollapse.policy.registry import recipes

MODULE = "uncollapse.integrations.verl"


def settle(config: Any) -> Level:
    """Set verl's options to what the recipe needs, and return the level it runs at.

    Raises:
        ConfigError: the recipe cannot run at the level asked for, or options of verl contradict it.
        UnknownName: no such recipe or level.
    """
    recipe = chosen_recipe(config)
    level = level_for(recipe, config.uncollapse.level)
    named = recipe.name in recipes() and str(config.uncollapse.recipe) == recipe.name
    if level == "registry" and not named:
        if config.uncollapse.level == "registry":
            raise ConfigError(
                f"level 'registry' knows recipes by name, not {str(config.uncollapse.recipe)!r}; use uncollapse.level=trainer"
            )
        level = level_for(recipe, "trainer")
    with open_dict(config):
        _everywhere(config)
        if level == "registry":
            _in_the_registries(config, recipe)
        else:
            _in_our_trainer(config, recipe, level)
    return level


def _everywhere(config: Any) -> None:
    """Let every process of Ray import the package, on whatever node it runs."""
    key = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"
    there = [name for name in str(OmegaConf.select(config, key, default="")).split(",") if name]
    modules = list(dict.fromkeys([*there, MODULE, f"{MODULE}.engine"]))
    OmegaConf.update(config, key, ",".join(modules), force_add=True)


def _in_the_registries(config: Any, recipe: Recipe) -> None:
    actor = config.actor_rollout_ref.actor
    refuse(config, recipe)
    config.algorithm.adv_estimator = actor.policy_loss.loss_mode = PREFIX + recipe.name
    actor.loss_agg_mode = AGGREGATION[kind_of(recipe.mean)]
    if isinstance(recipe.mean, Sum):
        actor.loss_scale_factor = config.data.max_response_length


def _in_our_trainer(config: Any, recipe: Recipe, level: Level) -> None:
    from uncollapse.integrations.verl.engine import STRATEGIES

    actor = config.actor_rollout_ref.actor
    config.uncollapse.level = level
    actor.use_kl_loss = bool(actor.use_kl_loss) or reads_reference(recipe)
    if level == "engine":
        if actor.strategy not in (*STRATEGIES, *STRATEGIES.values()):
            raise ConfigError(
                f"recipe {recipe.name!r} measures statistics that need whole logits, which actor.strategy={actor.strategy} "
                f"does not give; use {' or '.join(STRATEGIES)}"
            )
        actor.strategy = STRATEGIES.get(actor.strategy, actor.strategy)
    refuse(config, recipe)


class RecipeTaskRunner(BaseTaskRunner):
    """verl's task runner with our worker and trainer; runs as an actor of Ray."""

    def add_actor_rollout_worker(self, config: Any) -> Any:
        """verl's roles, filled by our worker."""
        from uncollapse.integrations.verl.workers import RecipeWorker

        _, group = super().add_actor_rollout_worker(config)
        for role in self.role_worker_mapping:
            self.role_worker_mapping[role] = ray.remote(RecipeWorker)
        return RecipeWorker, group

    def run(self, config: Any) -> None:
        """Build what verl's runner builds, and train."""
        from verl.utils.dataset.rl_dataset import collate_fn

        OmegaConf.resolve(config)
        _, group = self.add_actor_rollout_worker(config)
        self.add_reward_model_resource_pool(config)
        validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=False)
        model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        tokenizer, processor = model.tokenizer, model.processor

        def rows(split: str) -> Any:
            most = config.data.get(f"{split}_max_samples", -1)
            return create_rl_dataset(
                config.data[f"{split}_files"], config.data, tokenizer, processor,
                is_train=split == "train", max_samples=most,
            )  # fmt: skip

        train_rows = rows("train")
        trainer = RecipeTrainer(
            config=config,
            tokenizer=tokenizer,
            processor=processor,
            role_worker_mapping=self.role_worker_mapping,
            resource_pool_manager=self.init_resource_pool_mgr(config),
            ray_worker_group_cls=group,
            train_dataset=train_rows,
            val_dataset=rows("val"),
            collate_fn=collate_fn,
            train_sampler=create_rl_sampler(config.data, train_rows),
        )
        trainer.init_workers()
        trainer.fit()


@hydra.main(config_path="config", config_name="uncollapse", version_base=None)  # type: ignore[untyped-decorator]
def main(config: Any) -> None:
    """Settle the configuration and train; a setting that cannot be honoured ends in one line."""
    auto_set_device(config)
    try:
        level = settle(config)
    except UncollapseError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    runner = ray.remote(num_cpus=1)(RecipeTaskRunner)
    if level == "registry":
        runner = TaskRunner
        if config.trainer.use_v1:
            from verl.trainer.main_ppo import TaskRunnerV1

            runner = TaskRunnerV1
    run_ppo(config, task_runner_class=runner)


if __name__ == "__main__":
    main()
