"""The experiments of the nc-deep-linear study: free features, thresholds, digits, and deep heads with cross-entropy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from uncollapse.measure.neural_collapse import nc1_quotient, nc2_etf, nc2_gof
from uncollapse.representation.nc_deep_linear import (
    best_scale,
    circulant_logits,
    cross_entropy,
    etf_logits,
    minimize_ufm,
    minority_collapse_threshold,
    paired_logits,
    released_root,
    scalar_minimum,
    squared_error,
    ufm_ce_convex,
    ufm_ce_minimizer_balanced,
    ufm_mse_minimizer,
)
from uncollapse.studies.nc_deep_linear.networks import geometry, gradient_descent, train_digits
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials

COUNTS = (200, 100, 50, 50)
LAM = 5e-4
DEPTHS = (1, 3, 6)

SWEPT = (1, 2, 3, 6)
SWEEP_COUNTS = (50, 30, 10)
CE_COUNTS = (40, 40, 40, 8, 8)
RATIOS = (0.5, 0.7, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.4, 2.0)
"""Size of the smallest class over its threshold, set through the penalty."""
VANISHED = 1e-6
"""Squared length of a class mean below which a class counts as collapsed; and of the difference of two rows of W."""

DIGIT_COUNTS = (150, 120, 90, 70, 50, 35, 25, 15, 10, 5)
EQUAL_COUNTS = (57,) * 10
DIGIT_LAM = 1e-3

STARTS = 100
"""First seed of the random starts of L-BFGS; those from 0 on were used for calibration."""

DEEP = ((4, 3, 10, 5e-4), (6, 2, 10, 5e-4), (8, 2, 10, 5e-4), (10, 4, 10, 5e-4), (10, 2, 5, 2.0**-10))
"""Classes, depth, samples per class, penalty: where logits of low rank are known to beat the simplex ETF."""
SHALLOW = tuple(itertools.product((4, 6, 10), (1e-5, 1e-3, 1e-2)))
"""Classes and penalties for one layer, 10 samples per class."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    seeds: int = 3
    iterations: int = 20_000
    width: int = 64
    restarts: int = 5
    ratios: tuple[float, ...] = RATIOS
    sweep_restarts: int = 10
    digits: int = 3
    steps: int = 2000
    polish: int = 300
    starts: int = 10


QUICK = Size(
    seeds=2, iterations=50, width=6, restarts=1, ratios=(0.5, 2.0), sweep_restarts=2, digits=2, steps=5, polish=2,
    starts=1,
)  # fmt: skip


# ---- A: four classes of unequal size -------------------------------------------------------------------------------


def descent_trial(depth: int, seed: int, iterations: int, width: int) -> dict[str, Any]:
    """SGD on free features: distances of every layer's head and features from their frame; the worst layer counts."""
    found = ufm_mse_minimizer(COUNTS, depth, LAM, LAM)
    factors = gradient_descent(found.problem, [width] * depth, seed, iterations=iterations)
    y, layers = found.problem.labels, range(1, depth + 1)
    within = [float(nc1_quotient(factors.at(layer)[0], y)) for layer in layers]
    frames = [float(nc2_gof(factors.at(layer)[1], found.sv2[layer - 1 :].prod(0))) for layer in layers]
    features, head = factors.at(1)
    return {
        **geometry(features, y, head, found),
        "worst-nc1": max(within),
        "worst-gof": max(frames),
        "excess": float(found.problem.objective(factors, squared_error)) - found.objective,
        "lengths": head.norm(dim=1).tolist(),
    }


def minimum_trial(depth: int, restarts: int, width: int) -> dict[str, Any]:
    """L-BFGS from random starts: how far each ends above the closed form."""
    found = ufm_mse_minimizer(COUNTS, depth, LAM, LAM)
    runs = minimize_ufm(COUNTS, depth, LAM, LAM, widths=[width] * depth, restarts=restarts, seed=STARTS)
    return {"excess": [run.objective - found.objective for run in runs]}


# ---- B: thresholds -------------------------------------------------------------------------------------------------


def threshold_trial(depth: int, ratio: float, restarts: int) -> dict[str, Any]:
    """Squared mean length of the smallest class at `ratio` times its threshold, best of several L-BFGS runs."""
    counts = SWEEP_COUNTS
    lam = penalty_at(ratio, counts[-1], sum(counts), depth)
    closed = ufm_mse_minimizer(counts, depth, lam, lam)
    runs = minimize_ufm(counts, depth, lam, lam, widths=[20] * depth, restarts=restarts, std=0.4, seed=STARTS)
    features = runs[0].factors.features[closed.problem.labels == len(counts) - 1]
    return {
        "found": float(features.mean(0).square().sum()),
        "expected": float(closed.h_norm2[-1]),
        "excess": runs[0].objective - closed.objective,
    }


def penalty_at(ratio: float, size: int, samples: int, depth: int) -> float:
    """Penalty of head and features at which a class of this size is `ratio` times the threshold."""
    power = depth / (depth + 1)
    return float((size / ratio / minority_collapse_threshold(samples, 1.0, 1.0, depth)) ** power)


def merging_trial(ratio: float) -> dict[str, Any]:
    """Cross-entropy: squared distance of the rows of two equally small classes, from the convex program."""
    lam = penalty_at(ratio, CE_COUNTS[-1], sum(CE_COUNTS), 1)
    found = ufm_ce_convex(CE_COUNTS, lam, lam, tolerance=1e-13)
    gram = found.gram_w[-2:, -2:]
    return {
        "distance": float(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]),
        "length": float(gram[0, 0]),
        "gap": found.gap,
    }


# ---- C: digits -----------------------------------------------------------------------------------------------------


def digits_trial(counts: tuple[int, ...], seed: int, steps: int, polish: int) -> dict[str, Any]:
    """A ReLU network with unequal classes, and Spearman's rank correlation of row lengths with class sizes."""
    found = train_digits(counts, seed, lam=DIGIT_LAM, steps=steps, polish=polish)
    equal = len(set(counts)) == 1
    found["spearman"] = 0.0 if equal else float(spearmanr(found["lengths"], counts).statistic)
    return found


# ---- D: cross-entropy ----------------------------------------------------------------------------------------------


def deep_trial(classes: int, depth: int, n: int, lam: float, starts: int) -> dict[str, Any]:
    """Objectives of the ETF and of two families of lower rank, and where L-BFGS from random starts ends."""
    families = {"etf": etf_logits, "pairs": paired_logits, "circulant": circulant_logits}
    objectives = {name: best_scale(make(classes), n, depth, lam).objective for name, make in families.items()}
    runs = minimize_ufm(
        [n] * classes, depth, lam, lam, widths=[classes + 2] * depth, loss=cross_entropy, restarts=starts,
        max_iterations=5000, seed=STARTS,
    )  # fmt: skip
    heads = [run.factors.at(1)[1] for run in runs]
    return {
        **objectives,
        "descent": [run.objective for run in runs],
        "rank": [int((torch.linalg.svdvals(head) > 1e-3 * head.norm()).sum()) for head in heads],
        "etf-distance": [float(nc2_etf(head)) for head in heads],
    }


def shallow_trial(classes: int, lam: float) -> dict[str, Any]:
    """One layer: the proven minimum less the ETF's objective, and the best of the other families less it."""
    closed = ufm_ce_minimizer_balanced(10, classes, lam, lam)
    convex = ufm_ce_convex([10] * classes, lam, lam)
    others = (best_scale(make(classes), 10, 1, lam).objective for make in (paired_logits, circulant_logits))
    return {"error": abs(convex.objective - closed.objective), "margin": min(others) - closed.objective}


def released_window() -> dict[str, float]:
    """Two layers, cost 0.55: objective of the released solver's point less that of the minimum, both per class."""
    c = torch.tensor([0.55], dtype=torch.float64)
    x = released_root(c, 2)
    return {"excess": float(1 / (x**2 + 1) + c * x - scalar_minimum(c, 2)[1])}


# ---- the study -----------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run A to D."""
    size = QUICK if quick else Size()
    seeds, digit_seeds = tuple(range(size.seeds)), tuple(range(size.digits))
    trials.plan(
        len(DEPTHS) * (size.seeds + 1)
        + (len(SWEPT) + 1) * len(size.ratios)
        + 2 * size.digits
        + len(DEEP)
        + len(SHALLOW)
    )
    estimates, descents = _measure_frames(size, seeds, trials)
    more, sweeps = _measure_thresholds(size, trials)
    estimates |= more
    more, drawn = _measure_digits(size, digit_seeds, trials)
    estimates |= more
    more, deep = _measure_cross_entropy(size, trials)
    estimates |= more
    estimates["released/window-excess"] = exact(released_window()["excess"])
    details = {"lengths": descents, "sweeps": sweeps, "digits": drawn, "deep": deep}
    return Measurements(estimates, details, tuple(range(max(size.seeds, size.digits))))


def _measure_frames(
    size: Size, seeds: Sequence[int], trials: Trials
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    estimates: dict[str, Estimate] = {}
    drawn: dict[str, Any] = {}
    for depth in DEPTHS:
        runs = [
            trials.trial(
                f"A depth {depth} seed {seed}",
                partial(descent_trial, depth, seed, size.iterations, size.width),
            )
            for seed in seeds
        ]
        for name in (
            "gram-error",
            "worst-nc1",
            "worst-gof",
            "of-weights",
            "etf-weights",
            "gof-alignment",
            "excess",
        ):
            estimates[f"sgd-{depth}/{name}"] = mean_over_seeds([run[name] for run in runs], seeds)
        estimates[f"sgd-{depth}/worst-gram-error"] = exact(max(run["gram-error"] for run in runs))
        drawn[str(depth)] = [run["lengths"] for run in runs]
        excess = trials.trial(f"A minimum {depth}", partial(minimum_trial, depth, size.restarts, size.width))[
            "excess"
        ]
        estimates[f"lbfgs-{depth}/excess"] = exact(excess[0])
        estimates[f"lbfgs-{depth}/reached"] = exact(float(np.mean(np.less(excess, 1e-8))))
    return estimates, drawn


def _measure_thresholds(size: Size, trials: Trials) -> tuple[dict[str, Estimate], dict[str, Any]]:
    estimates: dict[str, Estimate] = {}
    drawn: dict[str, Any] = {}
    for depth in SWEPT:
        runs = [
            trials.trial(
                f"B depth {depth} ratio {r:g}", partial(threshold_trial, depth, r, size.sweep_restarts)
            )
            for r in size.ratios
        ]
        right = [(run["found"] < VANISHED) == (r < 1) for run, r in zip(runs, size.ratios, strict=True)]
        alive = [run for run, r in zip(runs, size.ratios, strict=True) if r > 1]
        estimates[f"threshold-{depth}/right"] = exact(float(np.mean(right)))
        estimates[f"threshold-{depth}/excess"] = exact(max(run["excess"] for run in runs))
        estimates[f"threshold-{depth}/first-length"] = exact(alive[0]["found"])
        estimates[f"threshold-{depth}/first-expected"] = exact(alive[0]["expected"])
        drawn[str(depth)] = [
            (r, run["found"], run["expected"]) for r, run in zip(size.ratios, runs, strict=True)
        ]
    merged = [trials.trial(f"B merging {r:g}", partial(merging_trial, r)) for r in size.ratios]
    right = [(run["distance"] < VANISHED) == (r < 1) for run, r in zip(merged, size.ratios, strict=True)]
    estimates["merging/right"] = exact(float(np.mean(right)))
    below = [run["length"] for run, r in zip(merged, size.ratios, strict=True) if r < 1]
    estimates["merging/length-below"] = exact(below[-1])
    drawn["merging"] = [(r, run["distance"]) for r, run in zip(size.ratios, merged, strict=True)]
    return estimates, drawn


def _measure_digits(
    size: Size, seeds: Sequence[int], trials: Trials
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    estimates: dict[str, Estimate] = {}
    drawn: dict[str, Any] = {}
    for name, counts in (("unequal", DIGIT_COUNTS), ("equal", EQUAL_COUNTS)):
        runs = [
            trials.trial(
                f"C {name} seed {seed}", partial(digits_trial, counts, seed, size.steps, size.polish)
            )
            for seed in seeds
        ]
        estimates |= _digit_estimates(name, runs, seeds)
        if name == "unequal":
            drawn = {"lengths": [run["lengths"] for run in runs], "gram": runs[0]["gram"]}
    return estimates, drawn


def _digit_estimates(
    name: str, runs: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, Estimate]:
    names = (
        "gof-weights", "of-weights", "etf-weights", "gof-means", "gof-alignment", "nc1", "nc4", "gram-error",
        "spearman", "accuracy", "objective", "after-adam", "minimum",
    )  # fmt: skip
    found = {f"digits-{name}/{key}": mean_over_seeds([run[key] for run in runs], seeds) for key in names}
    gof = [run["gof-weights"] for run in runs]
    for rival in ("of", "etf"):
        half = [run[f"{rival}-weights"] / 2 for run in runs]
        found[f"digits-{name}/gof-minus-half-{rival}"] = paired_difference(gof, half, seeds)
    found[f"digits-{name}/worst-gof"] = exact(max(gof))
    found[f"digits-{name}/least-spearman"] = exact(min(run["spearman"] for run in runs))
    return found


def _measure_cross_entropy(size: Size, trials: Trials) -> tuple[dict[str, Estimate], dict[str, Any]]:
    estimates: dict[str, Estimate] = {}
    drawn: dict[str, Any] = {}
    for classes, depth, n, lam in DEEP:
        name = f"K={classes}, M={depth}, n={n}"
        run = trials.trial(f"D {name}", partial(deep_trial, classes, depth, n, lam, size.starts))
        best = min(run["pairs"], run["circulant"], *run["descent"])
        ended = np.less(run["etf-distance"], 0.05)
        drawn[name] = {key: run[key] for key in ("etf", "pairs", "circulant", "descent")}
        estimates[f"deep/{name}/etf-excess"] = exact(run["etf"] - best)
        estimates[f"deep/{name}/share-etf"] = exact(float(ended.mean()))
        estimates[f"deep/{name}/median-rank"] = exact(float(np.median(run["rank"])))
    estimates["deep/worst-etf-excess"] = exact(
        max(estimates[f"deep/K={k}, M={m}, n={n}/etf-excess"].value for k, m, n, _ in DEEP)
    )
    shallow = [
        trials.trial(f"D one layer K={k} lam={lam:g}", partial(shallow_trial, k, lam)) for k, lam in SHALLOW
    ]
    estimates["shallow/error"] = exact(max(run["error"] for run in shallow))
    estimates["shallow/margin"] = exact(min(run["margin"] for run in shallow))
    return estimates, drawn
