"""Training curves of any recipe on the testbeds, with the settings that the studies share."""

from __future__ import annotations

from typing import TypeAlias

import torch

from uncollapse.measure.covariance import covariance_profile, token_covariance
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.stats import Logp
from uncollapse.studies.testbeds.charlm import CharLMLab, examine, warm_up
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.modsum import (
    ModSum,
    ModSumLab,
    TablePolicy,
    distinct_correct,
    exact_entropy,
    exact_reward,
)

Curves: TypeAlias = dict[str, list[float]]

MINIBATCHES = 4
"""Optimiser steps per rollout batch in both testbeds."""

_EXAMINATION = 1_000_000
"""Offset of the seeds of evaluation prompts, so that no training prompt shares one."""


def train_modsum(
    recipe: Recipe, seed: int, steps: int, *, task: ModSum | None = None, lr: float = 0.05
) -> Curves:
    """Train on modsum: all prompts every step, Adam, gradient norm at most 1.

    `seed` decides the initial table and all sampling, so two recipes with the same seed start from the same policy and
    see the same random numbers. Returns per step 0..`steps` the exact `entropy` (nats per token) and `reward`; per
    step 1..`steps` its change at `fixed` states, the `covariance` of log-probability and advantage over the rollout
    batch and the `share` of positive covariance in its top fifth; and at the end, as one number per prompt, the
    `distinct` right answers among 32 samples.
    """
    task = task or ModSum()
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(seed)))
    engine = LogitsEngine(ModSumLab(task), policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    trainer = Trainer(recipe, engine, optimizer, seed=seed, total=steps, minibatches=MINIBATCHES)
    curves: Curves = {name: [] for name in ("entropy", "reward", "fixed", "covariance", "share")}

    def look() -> torch.Tensor:
        table = policy.table.detach().double()
        curves["entropy"].append(float(exact_entropy(task, table).mean()))
        curves["reward"].append(float(exact_reward(task, table).mean()))
        return table

    before = look()
    for _ in range(steps):
        batch, _ = trainer.step(list(range(task.prompts)))
        c = token_covariance(batch.stats[Logp("old")], batch.advantage, batch.mask)
        profile = covariance_profile(c, batch.mask, (0.2, 1.0))
        curves["covariance"].append(float(profile.mean[1]))
        curves["share"].append(float(profile.share[0]))
        after = look()
        held = exact_entropy(task, after, visited_by=before).mean() - exact_entropy(task, before).mean()
        curves["fixed"].append(float(held))
        before = after
    distinct = distinct_correct(
        task, policy.table.detach(), torch.Generator().manual_seed(seed + _EXAMINATION)
    )
    return curves | {"distinct": [float(count) for count in distinct]}


def train_charlm(
    recipe: Recipe,
    seed: int,
    steps: int,
    *,
    prompts: int = 16,
    every: int = 2,
    lr: float = 2e-4,
    warm_up_steps: int = 220,
    looks_at: int = 512,
) -> Curves:
    """Train a warmed-up character model: `prompts` fresh prompts a step, Adam, gradient norm at most 1.

    `seed` decides the warm-up, the prompts and all sampling. Returns `step`, `accuracy`, `length` (tokens) and
    `entropy` (nats per token, temperature 1) on `looks_at` evaluation prompts, the same ones at every look, before the
    first step and after every `every` steps.
    """
    lab = CharLMLab()
    policy = warm_up(seed, steps=warm_up_steps)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    engine = LogitsEngine(lab, policy)
    trainer = Trainer(recipe, engine, optimizer, seed=seed, total=steps, minibatches=MINIBATCHES)
    curves: Curves = {name: [] for name in ("step", "accuracy", "length", "entropy")}
    for step in range(steps + 1):
        if step % every == 0:
            seen = examine(policy, seed + _EXAMINATION, count=looks_at)
            for name, value in vars(seen).items():
                curves[name].append(value)
            curves["step"].append(float(step))
        if step < steps:
            trainer.step(lab.fresh_prompts(prompts, seed=seed * 10_007 + step))
    return curves
