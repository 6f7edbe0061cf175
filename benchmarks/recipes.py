"""What each recipe adds to a step of plain GRPO on SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Case, Goal
from benchmarks.trainers import settings, steps, trainer

SUMMARY = (
    "One rollout of two reasoning-gym prompts (60 tokens) with 8 completions of 24 tokens each, in two optimiser steps, on "
    "SmolLM2-135M, by recipe; the goals leave out recipes that sample in a way of their own, whose tokens per useful answer the "
    "comparison of recipes tells. Plain SGD in place of AdamW: what all share is left out, so that the shares are upper bounds."
)
BASELINE = "grpo"
PLAIN, WITH_ENTROPY = 1.05, 1.15


def cost(rows: Mapping[str, Mapping[str, Any]], names: set[str]) -> float:
    return max(row["time_over_ours"] for name, row in rows.items() if name in names and name != BASELINE)


def case() -> Case:
    """One trainer per recipe, all on one model."""
    from uncollapse.integrations import offers
    from uncollapse.integrations.trl import GRPOTrainer
    from uncollapse.models import load
    from uncollapse.policy.registry import recipes
    from uncollapse.policy.stages.samplers import PlainSampler
    from uncollapse.policy.stats import Logp

    args = settings(24, optim="sgd", steps_per_generation=2)
    known = {name: recipe for name, recipe in recipes().items() if not recipe.refusals(offers.TRL)}
    model = load("smollm2-135m")[0]
    built = {name: trainer(GRPOTrainer, 60, args, model, recipe=name) for name in known}
    vocabulary = {
        name
        for name, recipe in known.items()
        if recipe.stats("loss") - {Logp("now")} or recipe.stats("plan") - {Logp("now")}
    }
    sampling = {name for name, recipe in known.items() if not isinstance(recipe.sampler, PlainSampler)}
    return Case(
        size="2 prompts of 60 tokens, G=8, T=24, two steps per rollout, float32",
        contestants={name: steps(one) for name, one in built.items()},
        check=dict,
        baseline=BASELINE,
        versions=("torch", "trl", "transformers"),
        goals=(
            Goal(
                "dearest recipe without statistics of the whole vocabulary, over grpo",
                lambda rows: cost(rows, set(known) - vocabulary - sampling),
                PLAIN,
                False,
            ),
            Goal(
                "dearest recipe with them, over grpo",
                lambda rows: cost(rows, vocabulary - sampling),
                WITH_ENTROPY,
                False,
            ),
        ),
    )
