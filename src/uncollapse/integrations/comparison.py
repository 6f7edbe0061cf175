"""Several recipes with several seeds on the same model and task, one run after the other, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uncollapse.errors import ConfigError
from uncollapse.integrations.launch import train
from uncollapse.integrations.processes import join
from uncollapse.integrations.progress import Watch, unwatched
from uncollapse.integrations.settings import TrainConfig
from uncollapse.policy.config import recipe_to_dict
from uncollapse.policy.recipe import Recipe
from uncollapse.runs import COMPARE, CONFIG, Comparison

Next = Callable[[str, int, int, int], None]
"""Called before each run with recipe, seed, number of the run (from 1) and number of runs."""


def compare(
    base: TrainConfig,
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    *,
    progress: Watch = unwatched,
    following: Next = lambda recipe, seed, number, of: None,
) -> Comparison:
    """Train every recipe with every seed below `base.output`; all other settings are `base`'s.

    Seeds are the outer loop, so that an unfinished comparison has all recipes at equal footing. Runs that are
    finished are skipped, a started one continues; hence calling again after an interruption is a resume.

    Raises:
        ConfigError: no recipe or seed, one given twice, or the directory holds another comparison.
        Interrupted: as `train` does.
    """
    _distinct("recipe", [made.name for made in recipes])
    _distinct("seed", list(seeds))
    processes = join()
    comparison = processes.from_first(lambda: _opened(base, recipes, seeds))
    plan = [(made, seed) for seed in seeds for made in recipes]
    for number, (made, seed) in enumerate(plan, start=1):
        path = comparison.run_path(made.name, seed)
        following(made.name, seed, number, len(plan))
        settings = replace(base, recipe=made, seed=seed, output=str(path))
        started = processes.from_first((path / CONFIG).exists)
        train(settings, progress=progress, resume=started)
    return comparison


def _opened(base: TrainConfig, recipes: Sequence[Recipe], seeds: Sequence[int]) -> Comparison:
    """A new comparison, or the one that is there if it compares the same; recipes and seeds may be added."""
    shared = {k: v for k, v in base.to_dict().items() if k not in ("recipe", "seed", "output")}
    wanted: dict[str, Any] = {
        "recipes": [made.name for made in recipes],
        "seeds": list(seeds),
        **shared,
        "definitions": {made.name: recipe_to_dict(made) for made in recipes},
    }
    if not (Path(base.output) / COMPARE).exists():
        return Comparison.create(base.output, wanted)
    comparison = Comparison.open(base.output)
    for name, value in shared.items():
        was = comparison.config.get(name)
        if was != value:
            raise ConfigError(
                f"{base.output} compares with {name} {was!r}, not {value!r}; continue with that or choose another output"
            )
    return comparison


def _distinct(what: str, given: Sequence[object]) -> None:
    if not given:
        raise ConfigError(f"nothing to compare: give at least one {what}")
    for item in given:
        if given.count(item) > 1:
            raise ConfigError(f"{what} {item} is given twice")
