"""The experiments of the GTPO study: one exact step from the same state, training runs with ablations, the filter."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.gtpo import LN2, ConflictWeights, EntropyFilter, conflict_weights, trajectory_entropy
from uncollapse.policy.metrics import rollout_stats
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stats import Entropy, Logp
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.charlm import CharLM
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.tags import TAGS, TagsLab, examine, warm_up

RATES = {"format": 0.03, "reward": 0.003}
"""Smallest rates at which centred GRPO degrades in its format and in its reward: what `calibrate` chose, before the runs."""

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEEDS = (1000, 1001)
"""No seeds of the study."""

DEGRADED = 0.05
"""How much of its format, or of the largest reward, GRPO has to lose for a learning rate to be called too high for it."""

PROMPTS = 8
"""Prompts per step, with 8 answers each; one optimiser step per rollout batch, as the method demands."""

SMALL_STEP = 1e-6
"""Learning rate of the exact step of E1: small enough that only the direction counts."""

SEEN = ("format", "accuracy", "reward", "entropy", "length", "tags")
LOGGED = (
    "entropy_filter/kept/frac",
    "entropy/initial/mean",
    "conflict/amplified/frac",
    "conflict/suppressed/frac",
)
_EXAMINATION = 1_000_000


def arms() -> dict[str, Recipe]:
    """GTPO, its ablations by leaving out a stage, and GRPO centred as GTPO is and as usual.

    No two arms share a stage that remembers something: each is made from a GTPO of its own.
    """
    centred = (GroupAdvantage(std=False),)
    return {
        "grpo": replace(recipe("grpo"), name="grpo-centred", advantage=centred),
        "grpo-std": recipe("grpo"),
        "gtpo": recipe("gtpo"),
        "no-lambda": replace(recipe("gtpo"), name="no-lambda", weights=(EntropyFilter(),)),
        "no-delta": replace(recipe("gtpo"), name="no-delta", weights=(ConflictWeights(),)),
        "no-gamma": replace(recipe("gtpo"), name="no-gamma", advantage=centred),
    }


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    seeds: int = 8
    steps: int = 60
    every: int = 10
    warm_up_steps: int = 400
    looks_at: int = 512
    step_prompts: int = 32
    high_steps: int = 5


QUICK = Size(seeds=2, steps=4, every=2, warm_up_steps=60, looks_at=64, step_prompts=6, high_steps=2)


# ---- E2 and E3: training -------------------------------------------------------------------------------------------


def train(
    chosen: Recipe, seed: int, size: Size, *, lr: float, policy: CharLM | None = None
) -> dict[str, list[float]]:
    """Train the warmed-up model with Adam, gradient norm at most 1; equal seeds give equal starts and prompts.

    Returns what `examine` sees every `every` steps; what the recipe logged at every step; and per step the number of
    answers whose mean entropy is `above` ln 2, and how many of those had a weight in the loss (`contributing`).
    """
    lab = TagsLab()
    policy = warm_up(seed, steps=size.warm_up_steps) if policy is None else policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    trainer = Trainer(chosen, LogitsEngine(lab, policy), optimizer, seed=seed, total=size.steps)
    curves: dict[str, list[float]] = {name: [] for name in ("step", *SEEN, "above", "contributing")}
    for step in range(size.steps + 1):
        if step % size.every == 0:
            seen = examine(policy, seed + _EXAMINATION, count=size.looks_at)
            for name in SEEN:
                curves[name].append(getattr(seen, name))
            curves["step"].append(float(step))
        if step == size.steps:
            break
        batch, reports = trainer.step(lab.fresh_prompts(PROMPTS, seed=seed * 10_007 + step))
        for name in LOGGED:
            if name in reports[0].metrics:
                total, weight = reports[0].metrics[name]
                curves.setdefault(name, []).append(float(total / weight))
        above = trajectory_entropy(batch.stats[Entropy("old")], batch.mask) > LN2
        acts = batch.advantage * batch.columns.get("weight", torch.ones_like(batch.advantage))
        curves["above"].append(float(above.sum()))
        curves["contributing"].append(float((above & acts.any(1)).sum()))
    return curves


def calibrate(size: Size, name: str) -> float | None:
    """The smallest learning rate of the grid at which centred GRPO loses format, or reward, on every tuning seed.

    Only GRPO is looked at, so that the choice knows nothing of how the methods compare.
    """
    for lr in GRID:
        curves = [train(arms()["grpo"], seed, size, lr=lr)[name] for seed in TUNING_SEEDS]
        if all(curve[-1] <= curve[0] - DEGRADED for curve in curves):
            return lr
    return None


# ---- E1: one step --------------------------------------------------------------------------------------------------


def one_step(seed: int, size: Size) -> dict[str, list[float]]:
    """What one small exact step on one group does to the tags that it has in conflict, in float64.

    From the same warmed-up model and the same group, a gradient step of GRPO, of GTPO and of its weights alone. Looked
    at are the tags in a leading or trailing conflict run whose advantages, summed over the answers that have them in
    their run, are not positive. Returns per eligible group the change of their mean log-probability (nats)
    per unit of learning rate.
    """
    lab = TagsLab()
    policy = warm_up(seed, steps=size.warm_up_steps).double()
    engine = LogitsEngine(lab, policy)
    chosen = arms()
    recipes = {
        "grpo": chosen["grpo"],
        "gtpo": chosen["gtpo"],
        "lambda": replace(
            chosen["gtpo"], name="lambda", advantage=chosen["grpo"].advantage, weights=(ConflictWeights(),)
        ),
    }
    prompts = lab.fresh_prompts(size.step_prompts, seed=seed)
    raw = recipes["grpo"].sampler(engine, prompts, Clock(seed=seed))
    raw = engine.measure(raw, rollout_stats(recipes["gtpo"]))
    raw = raw.with_columns(reward=raw.reward.double())
    prepared = {name: made.prepare(raw) for name, made in recipes.items()}
    looked_at = _disfavoured_tags(prepared["grpo"])
    found: dict[str, list[float]] = {name: [] for name in recipes}
    for group in raw.group.unique().tolist():
        rows = (raw.group == group).nonzero()[:, 0]
        tags = looked_at[rows]
        if not bool(tags.any()):
            continue
        before = _mean_logp(engine, raw[rows], tags)
        for name, made in recipes.items():
            moved = LogitsEngine(lab, copy.deepcopy(policy))
            _gradient_step(moved, made, prepared[name][rows])
            found[name].append((_mean_logp(moved, raw[rows], tags) - before) / SMALL_STEP)
    return found


def _disfavoured_tags(batch: Batch) -> Tensor:
    """Tags in a conflict run whose summed advantage at their place is not positive."""
    advantage = batch.advantage[:, 0]  # every answer has a first token
    _, forward, backward = conflict_weights(batch.ids, batch.mask, advantage, batch.group)
    tag = torch.isin(batch.ids, torch.tensor(TAGS))
    before = batch.mask.cumsum(1) - 1
    after = batch.mask.sum(1, keepdim=True) - 1 - before
    found = torch.zeros_like(batch.mask)
    for run, place in ((forward, before), (backward, after)):
        here = run & tag
        row = here.nonzero()[:, 0]
        keys = torch.stack([batch.group[row], place[here], batch.ids[here]], 1)
        names, index = keys.unique(dim=0, return_inverse=True)
        total = torch.zeros(len(names), dtype=advantage.dtype).index_add(0, index, advantage[row])
        found[here] |= (total <= 1e-9)[index]
    return found


def _gradient_step(engine: LogitsEngine, made: Recipe, batch: Batch) -> None:
    planned = made.plan(batch)
    made.loss(engine.measure(planned, made.stats("loss"), grad=True)).loss.backward()
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            if parameter.grad is not None:
                parameter.sub_(SMALL_STEP * parameter.grad)


def _mean_logp(engine: LogitsEngine, batch: Batch, where: Tensor) -> float:
    return float(engine.measure(batch, frozenset({Logp("now")})).stats[Logp("now")][where].mean())


def _measure_step(runs: Sequence[Mapping[str, Sequence[float]]], seeds: Sequence[int]) -> dict[str, Estimate]:
    """Shares over all eligible groups, and the mean advantage of GTPO's step over GRPO's."""
    estimates = {"step/groups": exact(float(sum(len(run["grpo"]) for run in runs)))}
    for name in ("gtpo", "lambda"):
        gains = [[a - b for a, b in zip(run[name], run["grpo"], strict=True)] for run in runs]
        pooled = [gain for several in gains for gain in several]
        share = sum(gain > 0 for gain in pooled) / len(pooled) if pooled else float("nan")
        estimates[f"step/{name}-above-grpo"] = exact(share)
        means = [sum(g) / len(g) if g else float("nan") for g in gains]
        estimates[f"step/{name}-minus-grpo"] = mean_over_seeds(means, seeds)
    for name in ("grpo", "gtpo", "lambda"):
        pooled = [change for run in runs for change in run[name]]
        fallen = sum(change < 0 for change in pooled) / len(pooled) if pooled else float("nan")
        estimates[f"step/{name}/falls"] = exact(fallen)
    return estimates


# ---- E3: the filter ------------------------------------------------------------------------------------------------


def high_start(seed: int, size: Size) -> dict[str, list[float]]:
    """GTPO from the warmed-up model with all logits at a fifth of their size: an initial entropy far above ln 2."""
    policy = warm_up(seed, steps=size.warm_up_steps)
    with torch.no_grad():
        policy.head.weight *= 0.2
    short = replace(size, steps=size.high_steps, every=size.high_steps)
    return train(arms()["gtpo"], seed, short, lr=RATES["format"], policy=policy)


def _measure_filter(
    high: Sequence[Mapping[str, Sequence[float]]], low: Sequence[Mapping[str, Sequence[float]]]
) -> dict[str, Estimate]:
    """Extremes over all seeds and steps: a single exception would refute the rule."""
    return {
        "filter/high/initial-entropy": exact(min(run["entropy/initial/mean"][0] for run in high)),
        "filter/high/kept": exact(min(min(run["entropy_filter/kept/frac"]) for run in high)),
        "filter/low/initial-entropy": exact(max(run["entropy/initial/mean"][0] for run in low)),
        "filter/low/above": exact(sum(sum(run["above"]) for run in low)),
        "filter/low/contributing": exact(sum(sum(run["contributing"]) for run in low)),
    }


# ---- the study -----------------------------------------------------------------------------------------------------


def _measure_training(
    bed: str, runs: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], seeds: Sequence[int]
) -> dict[str, Estimate]:
    estimates = {}
    last = {arm: {n: [run[n][-1] for run in several] for n in SEEN} for arm, several in runs.items()}
    for arm, several in runs.items():
        for name in SEEN:
            first = [run[name][0] for run in several]
            estimates[f"{bed}/{arm}/{name}"] = mean_over_seeds(last[arm][name], seeds)
            estimates[f"{bed}/{arm}/{name}-change"] = paired_difference(last[arm][name], first, seeds)
        for name in LOGGED:
            if name in several[0]:
                means = [sum(run[name]) / len(run[name]) for run in several]
                estimates[f"{bed}/{arm}/{name}"] = mean_over_seeds(means, seeds)
    for name in SEEN:
        estimates[f"{bed}/start/{name}"] = mean_over_seeds([run[name][0] for run in runs["grpo"]], seeds)
        for arm in runs:
            for control in ("grpo", "gtpo"):
                if arm != control:
                    estimates[f"{bed}/{arm}-minus-{control}/{name}"] = paired_difference(
                        last[arm][name], last[control][name], seeds
                    )
    return estimates


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run E1, E2 and E3."""
    size = QUICK if quick else Size()
    seeds, recipes = tuple(range(size.seeds)), arms()
    trials.plan((len(RATES) * len(recipes) + 2) * size.seeds)
    steps = [trials.trial(f"E1 seed {seed}", partial(one_step, seed, size)) for seed in seeds]
    runs = {
        bed: {
            arm: [
                trials.trial(f"E2 {bed} {arm} seed {seed}", partial(train, made, seed, size, lr=lr))
                for seed in seeds
            ]
            for arm, made in recipes.items()
        }
        for bed, lr in RATES.items()
    }
    high = [trials.trial(f"E3 high seed {seed}", partial(high_start, seed, size)) for seed in seeds]
    estimates = _measure_step(steps, seeds)
    for bed, several in runs.items():
        estimates |= _measure_training(f"{bed}-rate", several, seeds)
    estimates |= _measure_filter(high, [run for several in runs.values() for run in several["gtpo"]])
    shown = ("step", *SEEN)
    details: dict[str, Any] = {
        "runs": {
            bed: {arm: [{n: run[n] for n in shown} for run in several] for arm, several in made.items()}
            for bed, made in runs.items()
        },
        "step": steps,
    }
    return Measurements(estimates, details, seeds)
