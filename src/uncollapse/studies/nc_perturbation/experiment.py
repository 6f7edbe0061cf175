"""All parts of the near-collapse study, and the estimates that its claims are judged by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from uncollapse.studies.nc_perturbation.networks import ARMS, LOSSES, Loss, decay_trial, layerwise_trial
from uncollapse.studies.nc_perturbation.theory import (
    BETAS,
    EPS,
    PENALTIES,
    TOLERANCE,
    flow_trial,
    geometry,
    response_trial,
    spectrum_trial,
    tied_trial,
)
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds
from uncollapse.studies.study import Measurements, Trials

CHANGES = ("double", "zero")
DRAWN = 8
"""Random problems whose course is kept for the figure."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    problems: int = 50
    responses: int = 20
    penalties: tuple[float, ...] = PENALTIES
    seeds: int = 5
    depth: int = 8
    layer_steps: int = 1000
    decay_steps: int = 12_000


QUICK = Size(problems=4, responses=2, penalties=(0.1,), seeds=2, depth=3, layer_steps=20, decay_steps=20)


def _many(trial: Callable[[int], Any], count: int) -> dict[str, Any]:
    return {"runs": [trial(seed) for seed in range(count)]}


# ---- theory --------------------------------------------------------------------------------------------------------


def _flow(runs: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    def worst(name: str) -> Estimate:
        return exact(max(run[name] for run in runs))

    found = {f"flow/{name}": worst(name) for name in ("rise", "within-rise", "between-fall")}
    control = [run["control-rise"] > TOLERANCE for run in runs]
    return found | {
        "flow/violations": exact(float(sum(run["rise"] > TOLERANCE for run in runs))),
        "flow/steps": exact(float(sum(run["steps"] for run in runs))),
        "flow/ratio": exact(float(np.median([run["ratio"] for run in runs]))),
        "flow/control-violations": exact(float(np.mean(control))),
    }


def _tied(runs: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    ratio, control = (np.array([run[name] for run in runs]) for name in ("ratio", "control"))
    found = {
        f"tied/rises-{beta:g}": exact(float(np.sum(c >= 1))) for beta, c in zip(BETAS, ratio.T, strict=True)
    }
    large = np.array(BETAS) >= 100
    return found | {
        "tied/rises-large": exact(float(np.sum(ratio[:, large] >= 1))),
        "tied/ratio-100": exact(float(np.median(ratio[:, BETAS.index(100.0)]))),
        "tied/control-rises": exact(float(np.mean(control[:, large] >= 1))),
    }


def _response(runs: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    errors = np.array([run["exact"] for run in runs])
    slopes = np.log(errors[:, -2] / errors[:, -1]) / np.log(EPS[-2] / EPS[-1])
    first = np.array([run["first"] for run in runs])
    return {
        "response/slope-least": exact(float(slopes.min())),
        "response/slope-most": exact(float(slopes.max())),
        "response/error": exact(float(np.median(errors[:, -1]))),
        "response/first-order-error": exact(float(np.median(first[:, -1]))),
    }


def _spectrum(near: Sequence[Mapping[str, Any]], far: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    every = [*near, *far]
    slopes = np.log10([a["beyond-first"] / b["beyond-first"] for a, b in zip(near, far, strict=True)])
    return {
        "spectrum/error": exact(max(run["error"] for run in every)),
        "spectrum/first-error": exact(max(run["first-error"] for run in every)),
        "spectrum/largest": exact(max(abs(run["largest"] - 1) for run in every)),
        "spectrum/order-least": exact(float(slopes.min())),
        "spectrum/order-most": exact(float(slopes.max())),
        "spectrum/interaction": exact(max(run["off"] for run in near)),
    }


# ---- networks ------------------------------------------------------------------------------------------------------


def rank_correlation(course: Sequence[float]) -> float:
    """Spearman's correlation of depth and a metric over the layers, the input left out."""
    from scipy.stats import spearmanr

    return float(spearmanr(range(len(course) - 1), course[1:]).statistic)


def _layers(runs: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Estimate]:
    found = {}
    for name in ("nc1", "nc1-quotient", "test", "random"):
        values = [rank_correlation(run[name]) for run in runs]
        found[f"layers/{name}/spearman"] = mean_over_seeds(values, seeds)
        found[f"layers/{name}/spearman-worst"] = exact(max(values))
        ratio = [float(np.log(run[name][-1] / run[name][1])) for run in runs]
        found[f"layers/{name}/log-ratio"] = mean_over_seeds(ratio, seeds)
        falls = [float(np.mean(np.diff(run[name][1:]) < 0)) for run in runs]
        found[f"layers/{name}/falls"] = mean_over_seeds(falls, seeds)
    misses, straight = [], []
    for run in runs:
        measured, predicted = np.log(run["nc1-quotient"]), np.array(run["predicted"], dtype=float)
        line = measured[0] + (measured[1] - measured[0]) * np.arange(len(measured))
        misses.append(float(np.abs(np.log(predicted) - measured)[2:].mean()))
        straight.append(float(np.abs(line - measured)[2:].mean()))
    return found | {
        "layers/prediction-miss": mean_over_seeds(misses, seeds),
        "layers/geometric-miss": mean_over_seeds(straight, seeds),
        "layers/error": mean_over_seeds([run["error"] for run in runs], seeds),
    }


def _decay(
    loss: Loss, runs: Sequence[Mapping[str, Mapping[str, float]]], seeds: Sequence[int]
) -> dict[str, Estimate]:
    def change(metric: str, arm: str) -> np.ndarray:
        return np.log([run[arm][metric] / run["baseline"][metric] for run in runs])

    name = f"decay/{loss}/nc1"
    found = {f"{name}/baseline": mean_over_seeds([run["baseline"]["nc1"] for run in runs], seeds)}
    for arm in ARMS:
        if arm != "baseline":
            found[f"{name}/{arm}"] = mean_over_seeds(change("nc1", arm).tolist(), seeds)
    for how, where in itertools.product(CHANGES, ("feature", "last")):
        for other, control in (("head", f"head-{how}"), ("placebo", "placebo")):
            excess = np.abs(change("nc1", f"{where}-{how}")) - np.abs(change("nc1", control))
            found[f"{name}/{where}-{how}-over-{other}"] = mean_over_seeds(excess.tolist(), seeds)
            found[f"{name}/{where}-{how}-over-{other}/wins"] = exact(float(np.mean(excess > 0)))
    for how, metric in itertools.product(CHANGES, ("nc1-quotient", "nc2")):
        excess = np.abs(change(metric, f"feature-{how}")) - np.abs(change(metric, f"head-{how}"))
        found[f"decay/{loss}/{metric}/feature-{how}-over-head/wins"] = exact(float(np.mean(excess > 0)))
    errors = [max(arm["error"] for arm in run.values()) for run in runs]
    return found | {f"decay/{loss}/error": exact(max(errors))}


# ---- the study -----------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run A to E."""
    size = QUICK if quick else Size()
    seeds = tuple(range(size.seeds))
    trials.plan(4 + len(seeds) * (1 + len(LOSSES)))
    flow = trials.trial("A flow", partial(_many, flow_trial, size.problems))["runs"]
    tied = trials.trial("B tied", partial(_many, tied_trial, size.problems))["runs"]
    response = trials.trial("C response", partial(_many, response_trial, size.responses))["runs"]
    spectrum = trials.trial(
        "C spectrum",
        lambda: {
            name: [spectrum_trial(p, beta) for p in size.penalties]
            for name, beta in (("near", 100.0), ("far", 1e3))
        },
    )
    layers = [
        trials.trial(f"D seed {s}", partial(layerwise_trial, s, size.depth, size.layer_steps)) for s in seeds
    ]
    decay = {
        loss: [
            trials.trial(f"E {loss} seed {s}", partial(decay_trial, loss, s, size.decay_steps)) for s in seeds
        ]
        for loss in LOSSES
    }
    estimates = _flow(flow) | _tied(tied) | _response(response)
    estimates |= _spectrum(spectrum["near"], spectrum["far"]) | _layers(layers, seeds)
    for loss, runs in decay.items():
        estimates |= _decay(loss, runs, seeds)
    details = {
        "flow": [{key: _short(run[key]) for key in ("t", "nc1")} for run in flow[:DRAWN]],
        "geometry": [[_short(point) for point in points] for points in geometry()],
        "tied": np.quantile([run["ratio"] for run in tied], [0, 0.5, 1], axis=0).tolist(),
        "response": {
            name: np.median([run[name] for run in response], axis=0).tolist() for name in ("exact", "first")
        },
        "spectrum": [run["values"] | {"off": run["off"]} for run in spectrum["near"]],
        "penalties": list(size.penalties),
        "layers": layers,
        "decay": decay,
    }
    return Measurements(estimates, details, seeds)


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
