"""Level `registry`: a recipe as an entry in verl's registries of advantage estimators and policy losses.

Both are called by verl's own trainer: the estimator once per rollout batch on the driver, the loss per micro-batch
on the workers. The loss is exact at any split, because verl 0.9.1 tells it the tokens and rows of the whole
optimiser step (`config.global_batch_info`); verl's own Clip-Cov and KL-Cov select within the micro-batch all the same.

`register_policy_loss` overwrites a name silently and `register_adv_est` refuses one only if the function differs;
here a name that is taken is refused in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from verl.trainer.ppo import core_algos

from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations.verl.names import PREFIX
from uncollapse.integrations.verl_levels import refusals
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.registry import recipes
from uncollapse.policy.stats import Logp

AGGREGATION = {"token": "token-mean", "row": "seq-mean-token-mean", "sum": "seq-mean-token-sum-norm"}
"""verl's `loss_agg_mode` for each mean of a recipe; another one is refused, since verl logs by it."""

_OWNED = {"entropy_coeff": 0, "use_kl_loss": False, "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2,
          "clip_ratio_c": 3.0}  # fmt: skip


def kind_of(mean: Mean | Sum) -> str:
    """`token`, `row` or `sum`."""
    if isinstance(mean, Sum):
        return "sum"
    return "row" if mean.levels else "token"


class _NoClock(Clock):
    """verl's registries know no step: whoever reads one is told."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("step", "total", "seed", "update", "uniform"):
            raise ConfigError(
                "verl's registries know no step and no seed; run this recipe at level 'trainer' (uncollapse.level=trainer)"
            )
        return super().__getattribute__(name)


@dataclass(frozen=True)
class RegistryAdvantage:
    """A recipe's rewards and advantage as verl's estimator: `(advantages, returns)`, both (row, time)."""

    recipe: Recipe

    def __call__(
        self,
        token_level_rewards: Float[Tensor, "row time"],
        response_mask: Tensor,
        index: np.ndarray | None = None,
        config: Any = None,
        **more: Any,
    ) -> tuple[Float[Tensor, "row time"], Float[Tensor, "row time"]]:
        """Raises `DataError` without group ids or with NaN rewards, whose rows only level `trainer` can drop."""
        if index is None:
            raise DataError("verl passed no uid: without groups there is no group advantage")
        reward = token_level_rewards.sum(dim=1)
        if bool(torch.isnan(reward).any()):
            raise DataError(
                f"{int(torch.isnan(reward).sum())} of {len(reward)} rewards are NaN; level 'registry' cannot drop rows: "
                "run with uncollapse.level=trainer"
            )
        mask = response_mask.bool()
        group = torch.from_numpy(np.unique(index, return_inverse=True)[1].reshape(-1)).to(mask.device)
        batch = Batch(
            uid=torch.arange(len(mask), device=mask.device),
            mask=mask,
            columns={"reward": reward, "group": group, "length": mask.sum(dim=1)},
            stats={Logp("old"): torch.zeros_like(token_level_rewards)},
            clock=_NoClock(),
        )
        advantage = self.recipe.prepare(batch).advantage
        return advantage, advantage


@dataclass(frozen=True)
class RegistryLoss:
    """A recipe's surrogate and mean as verl's policy loss: `(loss, metrics)` of one micro-batch."""

    recipe: Recipe

    @cached_property
    def _aggregation(self) -> str:
        return AGGREGATION[kind_of(self.recipe.mean)]

    def __call__(
        self,
        old_log_prob: Float[Tensor, "row time"],
        log_prob: Float[Tensor, "row time"],
        advantages: Float[Tensor, "row time"],
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Raises `ConfigError` for options of verl's actor that ask for another loss than the recipe's."""
        self._refuse(loss_agg_mode, config)
        mask = response_mask.bool()
        columns: dict[str, Any] = {
            "advantage": advantages,
            "old_logp": old_log_prob,
            "map/surrogate": self._map(mask, config.global_batch_info).to(advantages.dtype),
        }
        if rollout_is_weights is not None:
            columns["weight"] = rollout_is_weights
        batch = Batch(
            uid=torch.arange(len(mask), device=mask.device),
            mask=mask,
            columns=columns,
            stats={Logp("now"): torch.where(mask, log_prob, 0.0)},
            clock=_NoClock(),
        )
        report = self.recipe.loss(batch)
        metrics = {
            f"actor/{name}": float(total / weight.clamp(min=1))
            for name, (total, weight) in report.metrics.items()
        }
        return report.loss * config.global_batch_info["dp_size"], metrics

    def _refuse(self, loss_agg_mode: str, config: Any) -> None:
        wanted = self._aggregation
        if loss_agg_mode != wanted:
            raise ConfigError(
                f"recipe {self.recipe.name!r} means actor_rollout_ref.actor.loss_agg_mode={wanted}, not {loss_agg_mode}; set that"
            )
        changed = [name for name, value in _OWNED.items() if config.get(name, value) != value]
        if changed:
            told = ", ".join(f"actor.{name}={config.get(name)!r}" for name in changed)
            raise ConfigError(f"{told}: the recipe {self.recipe.name!r} decides this; leave the default")

    def _map(self, mask: Tensor, info: Any) -> Float[Tensor, "row time"]:
        """The weight map over all rows of the optimiser step, from the totals that verl gives."""
        inside = mask.double()
        if self._aggregation == AGGREGATION["token"]:
            return inside / max(int(info["batch_num_tokens"]), 1)
        rows = int(info["global_batch_size"])
        if self._aggregation == AGGREGATION["row"]:
            return inside / (rows * inside.sum(dim=1, keepdim=True).clamp(min=1))
        limit = info["loss_scale_factor"]
        if limit is None:
            raise ConfigError(
                f"recipe {self.recipe.name!r} divides by the token limit; set actor_rollout_ref.actor.loss_scale_factor to it"
            )
        mean = self.recipe.mean
        assert isinstance(mean, Sum)
        divisor = float(limit) if mean.divisor is None else mean.divisor
        if divisor < float(limit):
            raise ConfigError(f"sum: divisor {divisor:g} is below the token limit {float(limit):g}; raise it")
        return inside / (divisor * (rows if mean.per_row else 1))


def register_recipe(recipe: Recipe) -> str:
    """Register a recipe in both registries and return its name there, `uncollapse/<recipe>`.

    Registering the same recipe again does nothing. Raises `ConfigError` if the registries cannot express the recipe
    or if the name is taken.
    """
    reasons = refusals(recipe)["registry"]
    if reasons:
        raise ConfigError(f"recipe {recipe.name!r} cannot run in verl's registries: {'; '.join(reasons)}")
    name = PREFIX + recipe.name
    _enter(core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.register_adv_est, name, RegistryAdvantage(recipe))
    _enter(core_algos.POLICY_LOSS_REGISTRY, core_algos.register_policy_loss, name, RegistryLoss(recipe))
    return name


def _enter(registry: dict[str, Any], register: Any, name: str, function: Any) -> None:
    there = registry.get(name)
    if there is not None and there != function:
        raise ConfigError(
            f"verl has something else registered as {name!r}; choose another name for the recipe"
        )
    register(name)(function)


def register_all() -> tuple[str, ...]:
    """Register every recipe that the registries express; returns their names there."""
    able = [made for made in recipes().values() if not refusals(made)["registry"]]
    return tuple(register_recipe(made) for made in able)
