"""How much of verl a recipe needs; light to import, so that a recipe can be checked without verl.

- `registry`: an advantage estimator and a policy loss in verl's registries; verl's own trainer and launcher.
- `trainer`: our subclass of verl's trainer, and the recipe's loss on the workers.
- `engine`: as `trainer`, and our engine in the workers, which measures other statistics of the logits.

The lowest level that expresses the recipe exactly is taken. verl alone, for comparison, has none of: several means
in one loss, decisions over an optimiser step, saved state of a method, dropped rows, exact divergences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Literal, TypeAlias, get_args

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.integrations.offers import VERL_ENGINE, VERL_TRAINER
from uncollapse.policy.protocols import Memory, Stage
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stats import Logp

Level: TypeAlias = Literal["registry", "trainer", "engine"]

LEVELS: tuple[Level, ...] = get_args(Level)

_ADVANTAGE_READS = frozenset({"reward", "group", "length", "advantage"})
_LOSS_READS = frozenset({"old_logp", "advantage", Logp("now")})


def refusals(recipe: Recipe) -> Mapping[Level, list[str]]:
    """Why each level cannot express the recipe; an empty list where it can."""
    sampling = _sampling(recipe)
    rest = replace(recipe, sampler=PlainSampler()) if sampling else recipe
    return {
        "registry": sampling + _registry(rest),
        "trainer": sampling + rest.refusals(VERL_TRAINER),
        "engine": sampling + rest.refusals(VERL_ENGINE),
    }


def level_for(recipe: Recipe, asked: str = "auto") -> Level:
    """The lowest level that expresses the recipe exactly, or the one asked for.

    Raises:
        UnknownName: `asked` is neither a level nor `auto`.
        ConfigError: that level (or every level) cannot express the recipe; carries the reasons.
    """
    if asked not in (*LEVELS, "auto"):
        raise UnknownName("level of verl", asked, (*LEVELS, "auto"))
    reasons = refusals(recipe)
    wanted = [level for level in LEVELS if asked in ("auto", level)]
    for level in wanted:
        if not reasons[level]:
            return level
    where = "verl" if asked == "auto" else f"verl at level {asked!r}"
    raise ConfigError(f"recipe {recipe.name!r} cannot run on {where}: {'; '.join(reasons[wanted[-1]])}")


def _sampling(recipe: Recipe) -> list[str]:
    if isinstance(recipe.sampler, PlainSampler):
        return []
    return [
        f"its loop hands out each prompt once with the same number of answers, which {type(recipe.sampler).__name__} "
        "does not keep to (with the sampler plain-sampler the rest runs)"
    ]


def _registry(recipe: Recipe) -> list[str]:
    """A registered advantage sees rewards, mask and groups; a registered loss log-probabilities, advantage, mask."""
    found = []
    if recipe.filters:
        found.append("it cannot drop rows")
    if recipe.weights:
        found.append("its loss receives no weights")
    if any(weighted.active for weighted in recipe.regularizers):
        found.append("a registered loss has no regularizers of its own mean")
    if recipe.replay is not None:
        found.append("it has no place for replay")
    for name, stage in recipe.stages():
        if isinstance(stage, Memory):
            found.append(f"it does not save the state of {type(stage).__name__}")
        if _reads_the_clock(stage):
            found.append(f"it knows no step, which {type(stage).__name__} reads")
        if name.partition(".")[0] in ("rewards", "advantage"):
            found += _unreadable(stage, _ADVANTAGE_READS, "rollout")
    found += _unreadable(recipe.surrogate, _LOSS_READS, None)
    if not isinstance(recipe.mean, Sum) and recipe.mean not in (
        Mean(),
        Mean(("row",)),
        Mean(("row",), "all"),
    ):
        found.append("it has no means over anything but tokens and rows")
    return found


def _reads_the_clock(stage: Stage) -> bool:
    return is_dataclass(stage) and any(callable(getattr(stage, field.name)) for field in fields(stage))


def _unreadable(stage: Stage, reads: frozenset[object], scope: str | None) -> list[str]:
    name = type(stage).__name__
    missing = sorted(str(need) for need in stage.needs - reads)
    found = [f"it does not show {', '.join(missing)} to {name}"] if missing else []
    if getattr(stage, "scope", scope) != scope:
        found.append(f"it has no place for what {name} decides")
    return found
