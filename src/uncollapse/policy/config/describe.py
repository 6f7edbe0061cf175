"""What a recipe is, needs, costs and where it runs, as data: `uncollapse recipe show` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Stat
from uncollapse.policy.config import mean_to_plain, options_of, stage_to_plain
from uncollapse.policy.protocols import Memory, Stage
from uncollapse.policy.recipe import TRANSFORM_SLOTS, Recipe
from uncollapse.policy.schedules import Schedule

_ON_POLICY_INERT = {
    "kl-cov": "its penalty |logp - old_logp| and its gradient are 0 while the policy is the one that sampled",
    "balanced-clip": "the ratio is 1, so no bound silences anything, whatever the search finds",
    "ppo-clip": "the ratio is 1, so its clip silences nothing",
    "sequence-clip": "the ratio is 1, so its clip silences nothing",
}
"""Stages that do nothing in the first optimiser step after a rollout, and why."""

_ON_POLICY_ONLY = {
    "reinforce": "its ratio stays 1: answers of an older policy count as the current one's, and no clip bounds the step",
    "lp-reg with kl: own": "its proxy follows the policy instead of holding to the one that sampled, and pulls nothing back",
}
"""Stages, or options of them, that are right in the first optimiser step after a rollout only, and what happens in the
others."""


@dataclass(frozen=True)
class StageCard:
    """One stage in its place: name, options, when it decides, what it reads, whether it has memory."""

    slot: str
    name: str
    options: Mapping[str, Any]
    scope: str | None
    reads: tuple[str, ...]
    memory: bool


@dataclass(frozen=True)
class RecipeCard:
    """A recipe described; `engines` maps a name to the reasons why the recipe does not run there (none: it runs)."""

    name: str
    paper: str
    summary: str
    stages: tuple[StageCard, ...]
    mean: str | dict[str, Any]
    needs: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    split_dependent: bool
    forwards: tuple[str, ...]
    engines: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]


def describe(
    recipe: Recipe, *, engines: Mapping[str, frozenset[str | type[Stat]]], updates: int | None = None
) -> RecipeCard:
    """Describe a recipe for engines with these offers and, if given, `updates` optimiser steps per rollout batch."""
    cards = tuple(_cards(recipe))
    wanted = recipe.stats("rollout") | recipe.stats("plan") | recipe.stats("loss")
    needs = {
        whose: tuple(sorted(stat_name(stat) for stat in wanted if whose in (stat.whose, stat.against)))
        for whose in ("old", "now", "ref")
    }
    return RecipeCard(
        name=recipe.name,
        paper=recipe.paper,
        summary=recipe.summary,
        stages=cards,
        mean=mean_to_plain(recipe.mean),
        needs=needs,
        columns=tuple(sorted(recipe.columns)),
        split_dependent=recipe.split_dependent,
        forwards=_forwards(recipe, needs, updates),
        engines={name: tuple(recipe.refusals(offers)) for name, offers in engines.items()},
        warnings=_warnings(recipe, cards, updates),
    )


def stat_name(stat: Stat) -> str:
    """A statistic as a person reads it: `Entropy`, `KL against ref`."""
    name = type(stat).__name__
    return f"{name} against {stat.against}" if stat.against else name


def _cards(recipe: Recipe) -> list[StageCard]:
    placed: list[tuple[str, Stage, Schedule | None]] = [("sampler", recipe.sampler, None)]
    placed += [(slot, stage, None) for slot in TRANSFORM_SLOTS for stage in getattr(recipe, slot)]
    placed.append(("surrogate", recipe.surrogate, None))
    placed += [("regularizers", weighted.term, weighted.coef) for weighted in recipe.regularizers]
    if recipe.replay is not None:
        placed.append(("replay", recipe.replay, None))
    return [_card(slot, stage, coef) for slot, stage, coef in placed]


def _card(slot: str, stage: Stage, coef: Schedule | None) -> StageCard:
    try:
        plain = stage_to_plain(slot, stage)
    except ConfigError:  # a stage made in Python needs no name in YAML
        plain = {type(stage).__name__: {item: repr(getattr(stage, item)) for item in options_of(type(stage))}}
    name = plain if isinstance(plain, str) else next(iter(plain))
    options: dict[str, Any] = {} if isinstance(plain, str) else dict(plain[name])
    if coef is not None:
        options = {"coef": stage_to_plain("schedule", coef) if callable(coef) else coef, **options}
    reads = sorted(
        need if isinstance(need, str) else f"{stat_name(need)} ({need.whose})" for need in stage.needs
    )
    options.pop("scope", None)
    return StageCard(
        slot, name, options, getattr(stage, "scope", None), tuple(reads), isinstance(stage, Memory)
    )


def _forwards(recipe: Recipe, needs: Mapping[str, tuple[str, ...]], updates: int | None) -> tuple[str, ...]:
    """Forward passes beside the one with gradient."""
    passes = ["old policy: one per rollout batch, for the ratio"]
    if needs["ref"]:
        passes.append("reference model: one per rollout batch, and its weights in memory")
    if recipe.has("minibatch") and recipe.stats("plan"):
        share = "(n-1)/n" if updates is None else f"{updates - 1}/{updates}"
        passes.append(
            f"current policy: {share} of one per rollout batch, for decisions per optimiser step"
            + (" (n optimiser steps per rollout batch)" if updates is None else "")
            + "; in TRL none where a step is one micro-batch"
        )
    return tuple(passes)


def _on_policy_only(card: StageCard) -> list[str]:
    kinds = (card.name, *(f"{card.name} with {option}: {value}" for option, value in card.options.items()))
    return [
        f"{kind} is for one optimiser step per rollout batch; with more {_ON_POLICY_ONLY[kind]}"
        for kind in kinds
        if kind in _ON_POLICY_ONLY
    ]


def on_policy_only(recipe: Recipe) -> tuple[str, ...]:
    """What is wrong with more than one optimiser step per rollout batch, one line each; empty for most recipes."""
    return tuple(line for card in _cards(recipe) for line in _on_policy_only(card))


def _warnings(recipe: Recipe, cards: tuple[StageCard, ...], updates: int | None) -> tuple[str, ...]:
    found = []
    for card in cards:
        if card.name in _ON_POLICY_INERT:
            when = "with one optimiser step per rollout batch"
            verb = {None: "would do", 1: "does"}.get(updates)
            if verb:
                found.append(f"{card.name} {verb} nothing {when}: {_ON_POLICY_INERT[card.name]}")
        if updates != 1:
            found += _on_policy_only(card)
        if card.slot == "regularizers" and card.options.get("coef") == 0:
            found.append(f"{card.name} has coefficient 0: it is left out")
    if recipe.split_dependent:
        found.append(
            "decides per micro-batch: the loss depends on how a step is split (parity with released code)"
        )
    return tuple(found)
