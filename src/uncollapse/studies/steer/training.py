"""E2 and E3: STEER on modsum, with the entropy of every visited state measured before and after every optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.policy.batch import Batch, Columns
from uncollapse.policy.entropy_mechanism import entropy_change_first_order
from uncollapse.policy.recipe import LossReport, Recipe
from uncollapse.policy.reduction import Mean
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip
from uncollapse.policy.steer import Steer
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.modsum import (
    ModSum,
    ModSumLab,
    TablePolicy,
    distinct_correct,
    exact_entropy,
    exact_reward,
)
from uncollapse.studies.testbeds.training import Curves

STRONG = 0.1
"""The smallest weight at which the specification saw an effect at this scale; the paper's is 0.7."""
LOOK = 5
"""Steps between two exact looks at entropy and reward."""
_EXAMINATION = 1_000_000


@dataclass(frozen=True)
class Shuffled(Steer):
    """Control: STEER's weights, dealt out among the valid tokens at random."""

    def __call__(self, batch: Batch) -> Columns:
        """The columns of `Steer` with other tokens' weights."""
        columns = dict(super().__call__(batch))
        keys = batch.clock.uniform(batch.uid, batch.mask.shape[1], "shuffled")[batch.mask]
        dealt = columns["weight"].clone()
        dealt[batch.mask] = columns["weight"][batch.mask][keys.argsort()]
        return {**columns, "weight": dealt, "steer_weight": dealt}


def arms() -> dict[str, Recipe]:
    """The recipes of E2: they differ from `ppo` in the weights alone (16 samples, token mean, clips 0.2 and 0.28, dual 10)."""
    base = replace(recipe("steer"), name="ppo", sampler=PlainSampler(samples=16), weights=())
    stages = {
        "steer": Steer(),
        "steer-strong": Steer(w_min=STRONG),
        "theorem-strong": Steer(w_min=STRONG, estimator="theorem"),
        "exact-strong": Steer(w_min=STRONG, estimator="exact"),
        "shuffled-strong": Shuffled(w_min=STRONG),
        "micro-strong": Steer(w_min=STRONG, scope="microbatch"),
    }
    return {"ppo": base} | {name: replace(base, name=name, weights=(one,)) for name, one in stages.items()}


def extreme_arms() -> dict[str, Recipe]:
    """The recipes of E3: the paper's "extreme" clips 0.99 and 5, with and without weights."""
    surrogate, chosen = PPOClip(low=0.99, high=5.0, dual=10.0), arms()
    return {
        f"extreme-{name}": replace(chosen[name], name=f"extreme-{name}", surrogate=surrogate, mean=Mean())
        for name in ("ppo", "steer", "steer-strong")
    }


class Watch:
    """Notes |dH| of every state that an optimiser step has a gradient for; hangs on the optimiser's hooks."""

    def __init__(self, table: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        self.table, self.changes = table, list[Tensor]()
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _entropy(self) -> Tensor:
        return shannon_entropy_from_logits(self.table.detach()[self._visited].double())

    def _before(self, *_: Any) -> None:
        assert self.table.grad is not None
        self._visited = (self.table.grad != 0).any(-1)
        self._start = self._entropy()

    def _after(self, *_: Any) -> None:
        self.changes.append((self._entropy() - self._start).abs())

    def summary(self) -> dict[str, list[float]]:
        """Mean, median, 95th and 99th percentile of |dH| (nats) over all visited states and optimiser steps."""
        return {f"change/{name}": [value] for name, value in _spread(self.changes).items()}


def _spread(changes: Sequence[Tensor]) -> dict[str, float]:
    every = torch.cat(list(changes)).numpy()
    quantiles = {f"p{q}": float(np.quantile(every, q / 100)) for q in (50, 95, 99)}
    return {"mean": float(every.mean()), **quantiles}


def _trainer(
    recipe: Recipe, seed: int, steps: int, task: ModSum, *, lr: float, minibatches: int, microbatches: int = 1
) -> Trainer:
    """As in `train_modsum`: Adam, gradient norm at most 1; `seed` decides the initial table and all sampling."""
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(seed)))
    return Trainer(
        recipe, LogitsEngine(ModSumLab(task), policy), torch.optim.Adam(policy.parameters(), lr=lr),
        seed=seed, total=steps, minibatches=minibatches, microbatches=microbatches,
    )  # fmt: skip


def train(
    recipe: Recipe,
    seed: int,
    steps: int,
    *,
    minibatches: int = 4,
    microbatches: int = 1,
    lr: float = 0.05,
    task: ModSum | None = None,
) -> Curves:
    """Train on modsum with all prompts every step.

    Returns `entropy` (nats per token) and `reward`, exact, at every `LOOK`-th step from 0; the summary of `Watch`; the mean
    `weight` and the share of `damped` tokens per step, where there are weights; `distinct` right answers per prompt at the end.
    """
    task = task or ModSum()
    trainer = _trainer(recipe, seed, steps, task, lr=lr, minibatches=minibatches, microbatches=microbatches)
    policy = trainer.engine.policy
    assert isinstance(policy, TablePolicy)
    watch = Watch(policy.table, trainer.optimizer)
    curves: Curves = {name: [] for name in ("entropy", "reward", "weight", "damped")}
    for step in range(steps + 1):
        if step % LOOK == 0:
            table = policy.table.detach().double()
            curves["entropy"].append(float(exact_entropy(task, table).mean()))
            curves["reward"].append(float(exact_reward(task, table).mean()))
        if step < steps:
            _, reports = trainer.step(list(range(task.prompts)))
            for name, metric in (("weight", "steer/weight/mean"), ("damped", "steer/damped/frac")):
                if metric in reports[0].metrics:
                    curves[name].append(_mean(reports, metric))
    generator = torch.Generator().manual_seed(seed + _EXAMINATION)
    distinct = distinct_correct(task, policy.table.detach(), generator)
    return curves | watch.summary() | {"distinct": [float(count) for count in distinct]}


def _mean(reports: Sequence[LossReport], metric: str) -> float:
    total, weight = (sum(float(report.metrics[metric][k]) for report in reports) for k in (0, 1))
    return total / weight if weight else float("nan")


TWINS = ("ppo", "steer", "steer-strong", "theorem-strong", "exact-strong", "shuffled-strong")


def twins(seed: int, steps: int, *, lr: float = 0.05, task: ModSum | None = None) -> dict[str, float]:
    """One and the same optimiser step with and without weights: what each would do to the entropy of every visited state.

    Along a run without weights, at every `LOOK`-th rollout and each of its four optimiser steps, all `TWINS` get the same
    batch and the same policy. |dH| is to first order, per unit of the step size of plain gradient descent. Returns
    `<arm>/p95` and the like, over all states and steps.
    """
    task, chosen = task or ModSum(), arms()
    trainer = _trainer(chosen["ppo"], seed, steps, task, lr=lr, minibatches=4)
    engine, prompts = trainer.engine, list(range(task.prompts))
    assert isinstance(engine.policy, TablePolicy)
    table, changes = engine.policy.table, {name: list[Tensor]() for name in TWINS}
    for step in range(steps):
        if step % LOOK:
            trainer.step(prompts)
            continue
        batch = trainer.rollout(prompts)
        for mini in trainer.queue(batch):
            for name in reversed(TWINS):  # the arm without weights comes last and makes the step
                trainer.optimizer.zero_grad()
                _backward(chosen[name], engine, mini)
                changes[name].append(_first_order(table))
            torch.nn.utils.clip_grad_norm_(engine.policy.parameters(), 1.0)
            trainer.optimizer.step()
        trainer.steps_done += 1
    return {f"{arm}/{key}": value for arm, all_ in changes.items() for key, value in _spread(all_).items()}


def _backward(made: Recipe, engine: LogitsEngine, mini: Batch) -> None:
    planned = made.plan(engine.measure(mini, made.stats("plan")))
    made.loss(engine.measure(planned, made.stats("loss"), grad=True)).loss.backward()


def _first_order(table: torch.nn.Parameter) -> Tensor:
    assert table.grad is not None
    visited = (table.grad != 0).any(-1)
    logits, downhill = (t.detach()[visited].double() for t in (table, -table.grad))
    return entropy_change_first_order(logits, downhill).abs()


# ---- estimates ---------------------------------------------------------------------------------------------------


PAIRS = (
    ("theorem-strong", "steer-strong"),
    ("exact-strong", "steer-strong"),
    ("steer-strong", "shuffled-strong"),
    ("micro-strong", "steer-strong"),
)
"""Differences beside those from the arm without weights."""


def summarise(
    runs: Mapping[str, Sequence[Curves]], seeds: Sequence[int], *, base: str = "ppo"
) -> dict[str, Estimate]:
    """`modsum/<arm>/<number>` and, paired by seed, `modsum/<arm>-minus-<other>/<number>`.

    Entropy and reward are those of the end; `late-std` is the standard deviation of the exact entropy over the last half of
    training; `change/...` as in `Watch`; its `-ratio` is relative to the arm without weights.
    """
    rows = {arm: [_row(run) for run in several] for arm, several in runs.items()}
    estimates = {
        f"modsum/{arm}/{name}": mean_over_seeds([row[name] for row in several], seeds)
        for arm, several in rows.items()
        for name in several[0]
    }
    pairs = [(arm, base) for arm in rows if arm != base]
    pairs += [pair for pair in PAIRS if set(pair) <= set(rows)]
    for arm, other in pairs:
        for name in rows[other][0].keys() & rows[arm][0].keys():
            mine, theirs = ([row[name] for row in rows[one]] for one in (arm, other))
            estimates[f"modsum/{arm}-minus-{other}/{name}"] = paired_difference(mine, theirs, seeds)
    for arm in rows:
        if arm == base:
            continue
        ratios = [
            weighted["change/p95"] / plain["change/p95"]
            for weighted, plain in zip(rows[arm], rows[base], strict=True)
        ]
        estimates[f"modsum/{arm}/change/p95-ratio"] = mean_over_seeds(ratios, seeds)
    estimates["modsum/optimum/entropy"] = exact(ModSum().max_entropy_optimum)
    return estimates


def summarise_twins(runs: Sequence[Mapping[str, float]], seeds: Sequence[int]) -> dict[str, Estimate]:
    """`step/<arm>/<number>-ratio`: |dH| of the same step relative to that without weights; `p95` also to shuffled weights."""
    estimates = {
        f"step/{arm}/{key}-ratio": mean_over_seeds(
            [run[f"{arm}/{key}"] / run[f"ppo/{key}"] for run in runs], seeds
        )
        for arm in TWINS[1:]
        for key in ("mean", "p50", "p95", "p99")
    }
    against = [run["steer-strong/p95"] / run["shuffled-strong/p95"] for run in runs]
    return estimates | {"step/steer-strong-over-shuffled/p95-ratio": mean_over_seeds(against, seeds)}


def _row(run: Curves) -> dict[str, float]:
    late = run["entropy"][len(run["entropy"]) // 2 :]
    row = {
        "entropy": run["entropy"][-1],
        "reward": run["reward"][-1],
        "late-std": float(np.std(late)),
        "distinct": float(np.mean(run["distinct"])),
    }
    row |= {name: run[name][0] for name in run if name.startswith("change/")}
    return row | {name: float(np.mean(run[name])) for name in ("weight", "damped") if run[name]}
