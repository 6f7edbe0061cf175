"""A whole optimiser step (generate, score, update) on SmolLM2-135M, against TRL's own GRPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import OURS, Case, Goal
from benchmarks.profile_step import profiled
from benchmarks.trainers import settings, steps, trainer

SUMMARY = (
    "Two optimiser steps of `train()` on SmolLM2-135M, each of one reasoning-gym prompt with 8 completions of T tokens: "
    "generation, rewards, statistics, loss, gradient, AdamW. Same prompts, settings and seed. *not shared* is our "
    "trainer with `share_prompts=False`."
)
SIZES = {"P100 T24": (100, 24), "P40 T20": (40, 20), "P60 T64": (60, 64)}
AT_LEAST = {"P100 T24": 2.0, "P40 T20": 1.0, "P60 T64": 1.0}
PROFILED = "P100 T24"
"""The size whose profile the page on speed shows; making one takes minutes."""
TRL, PADDED = "TRL GRPOTrainer", "not shared"


def ratio(name: str) -> Any:
    def value(rows: Mapping[str, Mapping[str, Any]]) -> float:
        return rows[name]["time_over_ours"]

    return value


def case(size: str) -> Case:
    """The trainers of one size."""
    import trl

    from uncollapse.integrations.trl import GRPOTrainer

    prompt_tokens, completion_tokens = SIZES[size]
    args = settings(completion_tokens)
    trainers = {
        OURS: trainer(GRPOTrainer, prompt_tokens, args, recipe="grpo"),
        PADDED: trainer(GRPOTrainer, prompt_tokens, args, recipe="grpo", share_prompts=False),
        TRL: trainer(trl.GRPOTrainer, prompt_tokens, settings(completion_tokens, loss_type="grpo")),
    }
    contestants = {name: steps(built) for name, built in trainers.items()}

    return Case(
        size=f"P={prompt_tokens}, T={completion_tokens}, G=8, two steps, float32",
        contestants=contestants,
        check=dict,  # one rounding difference in a logit, and the sampled texts are others; the losses are tested equal
        versions=("torch", "trl", "transformers"),
        goals=(
            Goal("time of TRL's own trainer over ours", ratio(TRL), AT_LEAST[size], True),
            Goal(
                "our extra peak memory over that of TRL's own trainer",
                lambda rows: rows[OURS]["extra_peak_mb"] / rows[TRL]["extra_peak_mb"],
                1.0,
                False,
            ),
        ),
        score=lambda: {
            "profile": {name: profiled(trainers[name], contestants[name]) for name in (OURS, TRL)}
            if size == PROFILED
            else {}
        },
    )
