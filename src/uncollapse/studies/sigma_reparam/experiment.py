"""The experiments of the sigma-reparam study: arms against learning rates on digits and text, and one weight alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from uncollapse.studies.sigma_reparam.mechanism import growth
from uncollapse.studies.sigma_reparam.training import ARMS, train
from uncollapse.studies.sigma_reparam.transformer import Shape, Task, digits_task, text_task
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials

Runs = dict[str, dict[float, list[dict[str, Any]]]]
"""Runs by arm and learning rate, one per seed."""

ENOUGH = 0.8
"""Share of the seeds that have to fail, or to succeed."""


@dataclass(frozen=True)
class Domain:
    """One kind of data: its nets, arms and learning rates; what counts as failing and as learning."""

    shape: Shape
    rows: int
    steps: int
    seeds: int
    arms: tuple[str, ...]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    digits: Domain = field(
        default_factory=lambda: Domain(
            Shape(32, 4, 6, 16),
            rows=32,
            steps=200,
            seeds=5,
            arms=tuple(ARMS),
            rates=tuple(1e-3 * 2**k for k in range(6)),
        )
    )
    text: Domain = field(
        default_factory=lambda: Domain(
            Shape(32, 4, 4, 64),
            rows=8,
            steps=200,
            seeds=5,
            arms=tuple(ARMS),
            rates=tuple(1e-3 * 2**k for k in range(3, 7)),
        )
    )
    widths: tuple[int, ...] = (64, 128, 256, 512)
    growth_steps: int = 20
    growth_seeds: int = 5


_TINY = Domain(Shape(8, 2, 1, 16), rows=4, steps=3, seeds=2, arms=tuple(ARMS), rates=(1e-3, 1e-1))
QUICK = Size(_TINY, _TINY, widths=(8, 16), growth_steps=3, growth_seeds=2)


# ---- digits and text ---------------------------------------------------------------------------------------------


def run_one(kind: str, domain: Domain, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """One run of `training.train` on a task that the seed splits."""
    task: Task = {"digits": digits_task, "text": text_task}[kind](domain.shape, domain.rows, seed)
    return train(task, ARMS[arm], lr, seed, domain.steps) | {"floor": task.floor}


def run_domain(kind: str, domain: Domain, trials: Trials) -> Runs:
    """Every arm at every learning rate and seed."""
    return {
        arm: {
            lr: [
                trials.trial(
                    f"{kind} {arm} lr {lr:g} seed {seed}", partial(run_one, kind, domain, arm, lr, seed)
                )
                for seed in range(domain.seeds)
            ]
            for lr in domain.rates
        }
        for arm in domain.arms
    }


def failed(kind: str, run: Mapping[str, Any]) -> bool:
    """Digits: less than half are right. Text: no better than how often bytes occur."""
    return run["accuracy"] < 0.5 if kind == "digits" else not run["loss"] < run["floor"]


def learned(kind: str, run: Mapping[str, Any]) -> bool:
    """Digits: more than 0.8 are right. Text: half a nat better than how often bytes occur."""
    return run["accuracy"] > 0.8 if kind == "digits" else run["loss"] < run["floor"] - 0.5


def trainable(kind: str, run: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Digits: at least 0.9 of the best accuracy of this seed. Text: at most a quarter nat above its best loss."""
    if kind == "digits":
        return run["accuracy"] >= 0.9 * best["accuracy"]
    return run["loss"] <= best["loss"] + 0.25


def octaves(kind: str, runs: Runs, seed: int) -> dict[str, float]:
    """Width of the trainable range of every arm: each learning rate of the grid stands for its octave.

    Trainable is measured against the best run of any arm with this seed.
    """
    every = [runs[arm][lr][seed] for arm in runs for lr in runs[arm]]
    best = min(every, key=lambda run: -run["accuracy"] if kind == "digits" else run["loss"])
    return {
        arm: float(sum(trainable(kind, by_seed[seed], best) for by_seed in by_rate.values()))
        for arm, by_rate in runs.items()
    }


def estimate_domain(kind: str, runs: Runs) -> dict[str, Estimate]:
    """Everything that claims and observations ask of one domain."""
    rates = sorted(next(iter(runs.values())))
    count = len(runs["plain"][rates[0]])
    seeds = range(count)
    found: dict[str, Estimate] = {}
    widths = [octaves(kind, runs, seed) for seed in seeds]
    for arm in runs:
        own = [width[arm] for width in widths]
        found[f"{kind}/octaves/{arm}"] = mean_over_seeds(own, seeds)
        score = [_best(kind, runs[arm], seed) for seed in seeds]
        found[f"{kind}/best/{arm}"] = mean_over_seeds(score, seeds)
    ours, plain = ([width[arm] for width in widths] for arm in ("sigma", "plain"))
    found[f"{kind}/octaves/sigma-minus-plain"] = paired_difference(ours, plain, seeds)
    found[f"{kind}/octaves/median-sigma-minus-plain"] = exact(float(np.median(np.subtract(ours, plain))))
    ours, pre_ln = ([_best(kind, runs[arm], seed) for seed in seeds] for arm in ("sigma", "pre-ln"))
    found[f"{kind}/best/sigma-minus-pre-ln"] = paired_difference(ours, pre_ln, seeds)
    found |= _at_failure(kind, runs, rates, seeds) | _ranks(kind, runs)
    return found


def _best(kind: str, by_rate: Mapping[float, Sequence[Mapping[str, Any]]], seed: int) -> float:
    scores = [by_seed[seed]["accuracy" if kind == "digits" else "loss"] for by_seed in by_rate.values()]
    return max(scores) if kind == "digits" else min(scores)


def _at_failure(kind: str, runs: Runs, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Estimate]:
    """All arms at the least and at the largest learning rate at which the plain net fails in enough seeds, if any."""
    fails = [lr for lr in rates if sum(failed(kind, r) for r in runs["plain"][lr]) >= ENOUGH * len(seeds)]
    found: dict[str, Estimate] = {}
    for place, lr in (("first", fails[0]), ("last", fails[-1])) if fails else ():
        stem = f"{kind}/{place}-failure"
        found[f"{stem}/lr"] = exact(lr)
        for arm in runs:
            found[f"{stem}/{arm}/learned"] = exact(sum(learned(kind, r) for r in runs[arm][lr]) / len(seeds))
        lowest = {arm: [r["lowest"] for r in runs[arm][lr]] for arm in ("sigma", "plain")}
        found |= {f"{stem}/{arm}/lowest": mean_over_seeds(values, seeds) for arm, values in lowest.items()}
        found[f"{stem}/sigma-minus-plain/lowest"] = paired_difference(lowest["sigma"], lowest["plain"], seeds)
        found[f"{stem}/sigma/gap"] = mean_over_seeds([r["gap"] for r in runs["sigma"][lr]], seeds)
    return found


def _ranks(kind: str, runs: Runs) -> dict[str, Estimate]:
    """Spearman correlation of the least entropy of a run with its final loss: over all, and within learning rates."""
    from scipy import stats

    rows = [
        (lr, r["lowest"], r["loss"]) for by in runs.values() for lr, several in by.items() for r in several
    ]
    rate, lowest, loss = (np.array(column) for column in zip(*rows, strict=True))
    low_rank, loss_rank = stats.rankdata(lowest), stats.rankdata(loss)
    overall = stats.spearmanr(lowest, loss)
    for one in np.unique(rate):
        same = rate == one
        low_rank[same] -= low_rank[same].mean()
        loss_rank[same] -= loss_rank[same].mean()
    within = stats.pearsonr(low_rank, loss_rank)
    return {
        f"{kind}/rank-correlation": exact(float(overall.statistic)),
        f"{kind}/rank-correlation-p": exact(float(overall.pvalue)),
        f"{kind}/rank-correlation-within-rates": exact(float(within.statistic)),
    }


# ---- one weight --------------------------------------------------------------------------------------------------


def estimate_growth(
    widths: Sequence[int], runs: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, Estimate]:
    """Changes of norms per step at every width, and their slopes against width on logarithmic axes; seeds are runs."""
    seeds = range(len(runs))
    found = {}
    for name in ("plain", "exact", "one", "gamma"):
        values = np.array([[run[str(width)][name] for width in widths] for run in runs])
        for at, width in enumerate(widths):
            found[f"growth/{name}/{width}"] = mean_over_seeds(values[:, at].tolist(), seeds)
        slopes = [float(np.polyfit(np.log(widths), np.log(row), 1)[0]) for row in values]
        found[f"growth/{name}/slope"] = mean_over_seeds(slopes, seeds)
    return found


def _growth(widths: Sequence[int], seed: int, steps: int) -> dict[str, Any]:
    return {str(width): growth(width, seed, steps) for width in widths}


# ---- the study ---------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """The weight alone, digits, text."""
    size = QUICK if quick else Size()
    domains = {"digits": size.digits, "text": size.text}
    trials.plan(size.growth_seeds + sum(len(d.arms) * len(d.rates) * d.seeds for d in domains.values()))
    grown = [
        trials.trial(f"growth seed {seed}", partial(_growth, size.widths, seed, size.growth_steps))
        for seed in range(size.growth_seeds)
    ]
    estimates = estimate_growth(size.widths, grown)
    details: dict[str, Any] = {"widths": list(size.widths)}
    for kind, domain in domains.items():
        runs = run_domain(kind, domain, trials)
        estimates |= estimate_domain(kind, runs)
        details[kind] = {
            arm: {
                f"{lr:g}": {
                    key: _median(run[key] for run in several) for key in ("loss", "accuracy", "lowest")
                }
                for lr, several in by_rate.items()
            }
            for arm, by_rate in runs.items()
        }
    return Measurements(estimates, details, tuple(range(size.digits.seeds)))


def _median(values: Iterable[float]) -> float:
    """Median over seeds to four digits, for the figure; infinite if it is one of a loss that was not finite."""
    return float(f"{np.median(list(values)):.4g}")
