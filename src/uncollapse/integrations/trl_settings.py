"""Which settings of TRL a recipe can run with: what it decides itself is refused, what changes its meaning is told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields

import trl

from uncollapse.errors import ConfigError
from uncollapse.integrations import offers
from uncollapse.policy.config.describe import on_policy_only
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.stats import Logp

UNCUT: Mapping[str, tuple[float | None, ...]] = {
    "top_p": (None, 1.0), "top_k": (None, 0, -1), "min_p": (None, 0.0), "repetition_penalty": (None, 1.0),
}  # fmt: skip
"""Options of sampling, and the values at which the policy itself is sampled, not a distribution made from it."""

OWNED = (
    "beta", "delta", "epsilon", "epsilon_high", "entropy_coef", "importance_sampling_level", "loss_type",
    "mask_truncated_completions", "multi_objective_aggregation", "off_policy_mask_threshold", "scale_rewards",
    "top_entropy_quantile", "use_adaptive_entropy", "use_liger_kernel",
)  # fmt: skip
"""Options of `GRPOConfig` that a stage of the recipe decides; anything but their default is refused."""


def refuse(args: trl.GRPOConfig, recipe: Recipe) -> None:
    """Raise `ConfigError` for what the recipe owns, cannot run on, or needs in vain."""
    defaults = {field.name: field.default for field in fields(trl.GRPOConfig)}
    changed = [name for name in OWNED if getattr(args, name) != defaults[name]]
    if changed:
        told = ", ".join(f"{name}={getattr(args, name)!r}" for name in changed)
        raise ConfigError(
            f"{told}: the recipe {recipe.name!r} decides this; leave the default and change the recipe"
        )
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ConfigError(
            f"steps_per_generation={args.steps_per_generation} must be a multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: a recipe plans over all rows of an optimiser step"
        )
    recipe.check("TRL", offers.TRL)


def warn(args: trl.GRPOConfig, recipe: Recipe) -> None:
    """Warn of settings that are allowed, but under which the recipe is not what it says."""
    sampling = {name: getattr(args, name) for name in UNCUT} | (args.generation_kwargs or {})
    cut = [f"{name}={sampling[name]!r}" for name, uncut in UNCUT.items() if sampling[name] not in uncut]
    wanted = recipe.stats("rollout") | recipe.stats("plan") | recipe.stats("loss")
    read = sorted({type(stat).__name__ for stat in wanted if not isinstance(stat, Logp)})
    if cut and read:
        warnings.warn(
            f"{', '.join(cut)}: the recipe {recipe.name!r} reads {', '.join(read)} of the whole vocabulary, while answers are "
            "sampled from another distribution; leave these options at their defaults to sample from the policy itself",
            stacklevel=3,
        )
    if args.steps_per_generation * args.num_iterations > args.gradient_accumulation_steps:
        for line in on_policy_only(recipe):
            warnings.warn(f"recipe {recipe.name!r}: {line}", stacklevel=3)
