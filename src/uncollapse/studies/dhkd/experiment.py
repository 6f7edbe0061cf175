"""The experiment of the DHKD study: every arm at its own learning rate, on the same teacher and rows for each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from uncollapse.studies.dhkd.calibration import RATES
from uncollapse.studies.dhkd.students import COLLAPSED, LOOK, METRICS, NAMES, QUICK, WATCHED, Size, train
from uncollapse.studies.statistics import Estimate, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.distillation import Setting, Task, taught_task, train_teacher

FIRST_SEED = 20
"""Two runs before, with other learning rates, used the seeds from 0 to 19."""


def measure(quick: bool, trials: Trials) -> Measurements:
    """One teacher per seed, all arms on its logits; differences are paired by seed."""
    size = QUICK if quick else Size()
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + size.seeds))
    trials.plan(len(seeds) * (1 + len(NAMES)))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    teachers = []
    for seed in seeds:
        kept = trials.trial(f"teacher/{seed}", partial(train_teacher, size.setting, seed))
        teachers.append(kept)
        task = _remembered(partial(taught_task, size.setting, seed, kept))
        for name in NAMES:
            runs[name].append(trials.trial(f"{name}/{seed}", partial(_train, name, task, size.setting, seed)))
    estimates = {f"teacher/{key}": _mean(teachers, key, seeds) for key in ("test", "train")}
    return Measurements(estimates | _estimates(runs, seeds), _details(runs), seeds)


def _train(name: str, task: Callable[[], Task], setting: Setting, seed: int) -> dict[str, Any]:
    return train(name, task(), replace(setting, lr=RATES[name]), seed)


def _remembered(make: Callable[[], Task]) -> Callable[[], Task]:
    """Made at the first call only: not at all if every arm has run before."""
    return lru_cache(maxsize=1)(make)


def _mean(runs: Sequence[Mapping[str, Any]], key: str, seeds: Sequence[int]) -> Estimate:
    return mean_over_seeds([run[key] for run in runs], seeds)


PAIRS = (
    ("dual-norm", "single-norm"), ("dual-binary", "single-binary"), ("dual-mse", "single-mse"),
    ("single-binary", "binary"), ("single-norm", "norm"),
    ("dual-mlp", "dual-norm"), ("aligned-shared", "dual-norm"), ("aligned-all", "dual-norm"),
    ("aligned-shared", "aligned-all"), ("dual-norm", "dual-mse"), ("dual-norm", "dual-binary"), ("dual-norm", "kd"),
)  # fmt: skip
"""Differences of test accuracy that are reported, besides that of every arm and cross-entropy."""


def _estimates(runs: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> dict[str, Estimate]:
    found = {f"{name}/{key}": _mean(runs[name], key, seeds) for name in runs for key in ("accuracy", "train")}
    scores = {name: [run["accuracy"] for run in several] for name, several in runs.items()}
    for one, other in (*PAIRS, *((name, "ce") for name in runs if name != "ce")):
        found[f"{one}-minus-{other}/accuracy"] = paired_difference(scores[one], scores[other], seeds)
    for name in COLLAPSED:
        for metric in METRICS:
            values = [run["collapse"][metric] for run in runs[name]]
            found[f"{name}/{metric}"] = mean_over_seeds(values, seeds)
    for name in WATCHED:
        found |= _conflicts(name, runs[name], seeds)
    return found


def _conflicts(name: str, several: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Estimate]:
    """Shares of the looks with a negative cosine: over all of training and over its second half ("late")."""
    found: dict[str, Estimate] = {}
    late: dict[str, list[float]] = {}
    for group in several[0]["cosines"]:
        for when, skipped in (("all", 0.0), ("late", 0.5)):
            kept = [part[round(skipped * len(part)) :] for part in (run["cosines"][group] for run in several)]
            late[group] = [sum(c < 0 for c in part) / len(part) for part in kept]
            found[f"{name}/{group}/conflict-{when}"] = mean_over_seeds(late[group], seeds)
        means = [sum(part) / len(part) for part in kept]
        found[f"{name}/{group}/cosine-late"] = mean_over_seeds(means, seeds)
    if "head" in late:
        gap = paired_difference(late["head"], late["backbone"], seeds)
        found[f"{name}/head-minus-backbone/conflict-late"] = gap
    return found


def _details(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Cosines for the figure: mean over seeds and over every five looks."""
    curves = {}
    for name in (one for one in WATCHED if not one.endswith("mse")):
        for group in runs[name][0]["cosines"]:
            mean = torch.tensor([run["cosines"][group] for run in runs[name]]).mean(0)
            curves[f"{name}/{group}"] = [round(float(part.mean()), 4) for part in mean.split(5)]
    return {"cosines": curves, "every": 5 * LOOK}
