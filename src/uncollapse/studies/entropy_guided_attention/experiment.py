"""The experiment of the entropy-guided-attention study: every arm on every seed, and what the claims compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from uncollapse.studies.entropy_guided_attention.arms import (
    ARMS,
    QUICK,
    Run,
    Size,
    held_out_rows,
    train,
)
from uncollapse.studies.entropy_guided_attention.calibration import RATES
from uncollapse.studies.statistics import Estimate, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials

FIRST_SEED = 10
"""The first run, at one learning rate for all arms, had seeds 0 to 2."""

WORSE = 1.1
"""How many times the baseline's loss counts as a failure of the plain softmax-only decoder."""

ENDS = ("loss", "lowest_layer", "overload_causal")
"""What is estimated of every arm."""

HISTOGRAM = ("SM+G", "SM+R", "SM+ScFuFFN", "SM(t)+ScFuFFN", "EReg")
"""Arms of which overload by the paper's own histogram is estimated too, since the paper speaks of it."""


def ends(run: Run) -> dict[str, float]:
    """The numbers that a run is judged by."""
    return {
        "loss": math.inf if run["diverged"] else run["loss"][-1],
        "lowest_layer": run["lowest_layer"][-1],
        "overload": run["bins"]["max_observed"][3],
        "overload_causal": run["bins"]["causal"][3],
    }


def summarize(runs: Mapping[str, Sequence[Run]], seeds: Sequence[int]) -> dict[str, Estimate]:
    """Every number of every arm, and the comparisons of the claims, paired by seed."""
    column: dict[str, dict[str, list[float]]] = {}
    for arm, several in runs.items():
        table = [ends(run) for run in several]
        column[arm] = {name: [row[name] for row in table] for name in table[0]}
    estimates = {
        f"{arm}/{name}": mean_over_seeds(values, seeds)
        for arm, one in column.items()
        for name, values in one.items()
        if all(map(math.isfinite, values)) and (name in ENDS or (name == "overload" and arm in HISTOGRAM))
    }
    diverged = [run["diverged"] for run in runs["SM+ScFuFFN"]]
    estimates["SM+ScFuFFN/diverged"] = mean_over_seeds(diverged, seeds)
    for statistic in DIFFERENCES:
        arms, name = statistic.split("/")
        treated, control = (column[arm][name] for arm in arms.split("-minus-"))
        if all(map(math.isfinite, (*treated, *control))):
            estimates[statistic] = paired_difference(treated, control, seeds)
    plain, normal = column["SM"], column["SM+LN+G"]
    lower = [float(a < b) for a, b in zip(plain["lowest_layer"], normal["lowest_layer"], strict=True)]
    failed = [float(a >= WORSE * b) for a, b in zip(plain["loss"], normal["loss"], strict=True)]
    estimates["SM-below-SM+LN+G/lowest_layer"] = mean_over_seeds(lower, seeds)
    estimates["SM-fails/loss"] = mean_over_seeds(failed, seeds)
    for name in ("overload", "overload_causal"):
        kept = [0.7 * value for value in column["SM+ScFuFFN"][name]]
        found = paired_difference(column["EReg"][name], kept, seeds)
        estimates[f"EReg-minus-0.7-times-SM+ScFuFFN/{name}"] = found
    return estimates


PAIRS = (
    ("SM", "SM+LN+G"),
    ("SM+G", "SM+LN+G"),
    ("SM+R", "SM+LN+R"),
    ("SM+G", "SM+R"),
    ("SM+ScFuFFN", "SM"),
    ("SM(t)+ScFuFFN", "SM+ScFuFFN"),
    ("EReg", "SM(t)+ScFuFFN"),
    ("EReg", "SM+ScFuFFN"),
    ("EReg-without-t", "SM+ScFuFFN"),
    ("EReg-frozen", "SM(t)+ScFuFFN"),
    ("EReg-heads", "SM(t)+ScFuFFN"),
    ("L2", "EReg"),
    ("SM(t=0.1)+ScFuFFN", "SM(t)+ScFuFFN"),
    ("SM(t=0.01)+ScFuFFN", "SM(t)+ScFuFFN"),
)
"""Comparisons, paired by seed: the first minus the second."""

DIFFERENCES = (
    *(f"{a}-minus-{b}/{name}" for a, b in PAIRS for name in ("loss", "overload_causal")),
    "SM-minus-SM+LN+G/lowest_layer",
    "SM+ScFuFFN-minus-SM/lowest_layer",
    "SM(t)+ScFuFFN-minus-SM+ScFuFFN/lowest_layer",
    "EReg-minus-SM(t)+ScFuFFN/lowest_layer",
    "EReg-minus-SM+ScFuFFN/lowest_layer",
    "EReg-without-t-minus-SM+ScFuFFN/lowest_layer",
    "SM+G-minus-SM+R/overload",
    "EReg-minus-SM(t)+ScFuFFN/overload",
    "EReg-minus-SM+ScFuFFN/overload",
)
"""All differences that are reported."""


def details(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Every arm's curves, heads and parameters: means over the seeds that trained to the end, or over all if none did."""
    return {arm: _mean_run(several) for arm, several in runs.items()}


def _mean_run(several: Sequence[Run]) -> dict[str, Any]:
    kept = [run for run in several if not run["diverged"]] or several
    looks = min(len(run["step"]) for run in kept)
    first = kept[0]

    def mean(lists: Sequence[Sequence[float]]) -> list[float]:
        return [round(float(value), 4) for value in np.mean(lists, axis=0)]

    return {
        "losses": [None if run["diverged"] else run["loss"][-1] for run in several],
        "step": first["step"][:looks],
        **{name: mean([run[name][:looks] for run in kept]) for name in ("loss", "lowest_layer")},
        "bins": {name: mean([run["bins"][name] for run in kept]) for name in first["bins"]},
        "sink": mean([[run["sink"]] for run in kept])[0],
        "layers": mean([run["layers"] for run in kept]),
        **{
            name: mean([run[name] for run in kept])
            for name in ("theta", "temperature")
            if first[name] is not None
        },
    }


def measure(quick: bool, trials: Trials) -> Measurements:
    """All arms over all seeds, each arm at the learning rate that calibration gave it."""
    size = QUICK if quick else Size()
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + size.seeds))
    trials.plan(len(ARMS) * size.seeds)
    rows = held_out_rows(size, 0)
    runs = {
        name: [
            trials.trial(f"{name} seed {seed}", partial(train, arm, seed, RATES[name], size, rows))
            for seed in seeds
        ]
        for name, arm in ARMS.items()
    }
    return Measurements(summarize(runs, seeds), details(runs), seeds)
