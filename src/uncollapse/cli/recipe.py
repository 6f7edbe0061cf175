"""`uncollapse recipe show` and `uncollapse recipe list`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from uncollapse.cli import catalogue
from uncollapse.cli.catalogue import AsJson
from uncollapse.cli.output import as_json, say, table


def list_(*, json_: AsJson = False) -> None:
    """List the recipes, as `uncollapse list recipes` does.

    Example: `uncollapse recipe list`
    """
    catalogue.list_("recipes", json_=json_)


def show(
    recipe: str,
    /,
    *,
    updates: Annotated[
        int | None, Parameter(help="Optimiser steps per rollout batch, to say what is inert then.")
    ] = None,
    yaml: Annotated[
        bool, Parameter(negative="", help="Print the recipe as YAML, every option spelled out.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Show what a recipe is made of, what it needs and costs, and which engines run it.

    Examples: `uncollapse recipe show clip-cov`, `uncollapse recipe show mine.yaml`,
    `uncollapse recipe show grpo --yaml > mine.yaml` to start one of your own.

    Parameters
    ----------
    recipe
        Name of a recipe, a YAML file, or `file.yaml:name` for one of several in a file.
    """
    from uncollapse.cli.engines import OFFERS, verl_level, where
    from uncollapse.policy.config import recipe_to_yaml, resolve
    from uncollapse.policy.config.describe import describe

    made = resolve(recipe)
    if yaml:
        say(recipe_to_yaml(made).rstrip())
        return
    card = describe(made, engines=OFFERS, updates=updates)
    if json_:
        level, refused = verl_level(made)
        engines = {**card.engines, "verl": [] if level else refused["engine"]}
        as_json({**asdict(card), "engines": engines, "verl": {"level": level, "refusals": refused}})
        return
    say(f"{card.name}: {card.summary or 'no summary'}")
    if card.paper:
        say(f"arXiv {card.paper}")
    say("")
    table(
        ["slot", "stage", "decides per", "memory", "options"],
        [
            [
                stage.slot,
                stage.name,
                {"minibatch": "optimiser step", "microbatch": "micro-batch"}.get(
                    str(stage.scope), stage.scope or "-"
                ),
                "yes" if stage.memory else "-",
                ", ".join(f"{name} {value}" for name, value in stage.options.items()) or "-",
            ]
            for stage in card.stages
        ],
    )
    say("")
    say(f"mean     {card.mean}")
    for whose, label in (("old", "old policy"), ("now", "current policy"), ("ref", "reference model")):
        say(f"reads    of the {label}: {', '.join(card.needs[whose]) or 'nothing'}")
    say(f"columns  {', '.join(card.columns) or 'none'}")
    for line in card.forwards:
        say(f"forward  {line}")
    for name, line in where(made).items():
        say(f"engine   {name}: {line}")
    for lower, against in verl_level(made)[1].items():
        if against:
            say(f"verl     not at level {lower}: {'; '.join(against)}")
    for line in card.warnings:
        say(f"warning  {line}")
