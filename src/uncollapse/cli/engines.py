"""Where a recipe runs, engine by engine, or why not."""

from __future__ import annotations

from collections.abc import Mapping

from uncollapse.integrations.offers import TRL
from uncollapse.integrations.verl_levels import LEVELS, Level, refusals
from uncollapse.policy.batch import Stat
from uncollapse.policy.recipe import Recipe
from uncollapse.studies.testbeds.engine import OFFERS as TESTBED

OFFERS: dict[str, frozenset[str | type[Stat]]] = {"testbed": TESTBED, "TRL": TRL}
"""Engines without levels, by what they offer."""


def verl_level(recipe: Recipe) -> tuple[Level | None, Mapping[Level, list[str]]]:
    """The lowest level of verl that expresses the recipe, if any, and each level's reasons against it."""
    reasons = refusals(recipe)
    return next((level for level in LEVELS if not reasons[level]), None), reasons


def where(recipe: Recipe) -> dict[str, str]:
    """One line per engine: `runs`, with the level if the engine has several, or the reasons why not."""
    found = {}
    for name, offers in OFFERS.items():
        why = recipe.refusals(offers)
        found[name] = f"does not run: {'; '.join(why)}" if why else "runs"
    level, reasons = verl_level(recipe)
    found["verl"] = f"runs (level {level})" if level else f"does not run: {'; '.join(reasons['engine'])}"
    return found
