"""Reproduction of "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data" (2301.00437).

A: four classes of unequal size, gradient descent on free features below 1, 3 and 6 linear layers. B: the class size below which
a class vanishes (squared error) or groups merge (cross-entropy). C: a ReLU network on digits of unequal classes, and on
equal ones as control. D: cross-entropy below one and below several layers. Claims and seeds were fixed before the run.
Calibrated on seed 1000 (steps and penalty of C, steps of A) and on starts 0 to 11 (width and deviation of the starts of
B), none of which the study uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.representation.nc_deep_linear import ufm_mse_minimizer
from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.nc_deep_linear.experiment import (
    COUNTS,
    DEEP,
    DEPTHS,
    DIGIT_COUNTS,
    DIGIT_LAM,
    LAM,
    SWEPT,
    measure,
)
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """Lengths against theory, thresholds, the Gram matrix of digits, and what beats the ETF of deep heads."""
    from matplotlib.figure import Figure

    from uncollapse.report import geometry

    canvas = Figure(figsize=(13, 7.5), layout="constrained")
    (free, vanish, merge), (digits, gram, deep) = canvas.subplots(2, 3)
    details = measured.details
    families = [(f"depth {m}, SGD", np.array(details["lengths"][str(m)][0])) for m in DEPTHS]
    theory = [
        (f"depth {m}, theory", ufm_mse_minimizer(COUNTS, m, LAM, LAM).w_norm2.sqrt().numpy()) for m in DEPTHS
    ]
    geometry.lengths(COUNTS, families, free, expected=theory)
    free.set_title("A: rows of the head, free features")
    for depth in SWEPT:
        ratio, found, expected = np.array(details["sweeps"][str(depth)]).T
        (line,) = vanish.plot(ratio, found, "o", label=f"depth {depth}")
        vanish.plot(ratio, expected, "-", color=line.get_color(), linewidth=1)
    vanish.axvline(1, color="0.7", zorder=0)
    vanish.set(title="B: smallest class, squared error", xlabel="size over threshold", ylabel="|h|²")
    vanish.legend(fontsize=8, frameon=False)
    ratio, distance = np.array(details["sweeps"]["merging"]).T
    merge.plot(ratio, np.sqrt(np.maximum(distance, 0)), "o-")
    merge.axvline(1, color="0.7", zorder=0)
    merge.set(title="B: two small classes, cross-entropy", xlabel="size over threshold", ylabel="|w₁ - w₂|")
    runs = details["digits"]
    several = [(f"seed {seed}", np.array(values)) for seed, values in enumerate(runs["lengths"])]
    law = ufm_mse_minimizer(DIGIT_COUNTS, 1, DIGIT_LAM, DIGIT_LAM).w_norm2.sqrt().numpy()
    geometry.lengths(DIGIT_COUNTS, several, digits, expected=[("free features", law)])
    digits.set_title("C: rows of the head, digits")
    values, basis = np.linalg.eigh(np.array(runs["gram"]))
    geometry.gram(basis * np.sqrt(np.maximum(values, 0)), gram)
    gram.set_title("C: their inner products, seed 0")
    _draw_deep(deep, details["deep"])
    return canvas


def _draw_deep(axis: object, runs: dict) -> None:
    """Objectives over that of the ETF: families as marks, runs of descent as dots."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    for at, run in enumerate(runs.values()):
        descent = np.array(run["descent"]) / run["etf"]
        axis.plot(
            np.full(len(descent), at),
            descent,
            "o",
            color="0.6",
            markersize=4,
            label="L-BFGS" if not at else None,
        )
        for name, mark in (("pairs", "C1_"), ("circulant", "C2_")):
            axis.plot(at, run[name] / run["etf"], mark, markersize=16, label=name if not at else None)
    axis.axhline(1, color="0.7", zorder=0)
    axis.set(title="D: deep cross-entropy", ylabel="objective over that of the ETF", ylim=(0.6, 1.4))
    axis.set_xticks(range(len(runs)), list(runs), rotation=20, fontsize=7)
    axis.legend(fontsize=8, frameon=False)


def _frame_claim(depth: int) -> Claim:
    return Claim(
        id=f"A-frame-{depth}",
        paper_says="Unequal classes, squared error, no bias: rows of the head and class means are orthogonal, with lengths "
        "that depend on the class size.",
        measured=f"SGD, {depth} linear layers, classes of {COUNTS}: relative Frobenius error of W Wᵀ against the closed form "
        "(worst of 3 seeds), and the distance of the rows from an orthogonal frame of one length.",
        criterion=AllOf(
            (
                Bound(f"sgd-{depth}/worst-gram-error", "<=", 1e-3),
                Bound(f"sgd-{depth}/of-weights", ">=", 0.1),
            )
        ),
        effect=f"sgd-{depth}/worst-gram-error",
    )


STUDY = Study(
    slug="nc-deep-linear",
    claims=(
        *(_frame_claim(depth) for depth in DEPTHS),
        Claim(
            id="A-layers",
            paper_says="Collapse holds at every linear layer of the head.",
            measured="SGD, 3 layers: the worst layer's within-class over between-class variance, and distance of its rows from "
            "the frame expected there.",
            criterion=AllOf((Bound("sgd-3/worst-nc1", "<=", 1e-4), Bound("sgd-3/worst-gof", "<=", 1e-3))),
            effect="sgd-3/worst-gof",
        ),
        Claim(
            id="A-minimum",
            paper_says="These frames are the global minima, at any depth.",
            measured="Best of 5 L-BFGS runs from random starts less the closed minimum, 1, 3 and 6 layers; neither above 1e-8 "
            "(not found) nor below -1e-10 (refuted).",
            criterion=AllOf(
                tuple(
                    bound
                    for depth in DEPTHS
                    for bound in (
                        Bound(f"lbfgs-{depth}/excess", "<=", 1e-8),
                        Bound(f"lbfgs-{depth}/excess", ">=", -1e-10),
                    )
                )
            ),
            effect="lbfgs-6/excess",
        ),
        Claim(
            id="B-vanish",
            paper_says="(The exact threshold is derived here.) A class too small for the penalty collapses to zero.",
            measured="Share of penalties, from half to twice the threshold and at ±2 %, at which the smallest of three classes "
            "is zero exactly if it is below: squared error, 1, 2, 3 and 6 layers.",
            criterion=AllOf(tuple(Bound(f"threshold-{depth}/right", ">=", 1.0) for depth in SWEPT)),
            effect="threshold-6/right",
        ),
        Claim(
            id="B-merge",
            paper_says="(Derived here.) With cross-entropy two small classes share one vector below the same threshold.",
            measured="The same sweep for the rows of two classes of 8 beside three of 40, one layer, by a convex program whose "
            "distance from the minimum is proven to be below 1e-12.",
            criterion=Bound("merging/right", ">=", 1.0),
            effect="merging/right",
        ),
        Claim(
            id="C-frame",
            paper_says="A trained network with unequal classes converges to the orthogonal frame with unequal lengths.",
            measured="ReLU network, ten digits with 150 to 5 images: distance of the head from the frame of free features "
            "(worst of 3 seeds), also against half its distance from the frames of equal lengths and the simplex ETF.",
            criterion=AllOf(
                (
                    Bound("digits-unequal/worst-gof", "<=", 0.15),
                    Bound("digits-unequal/gof-minus-half-of", "<", 0.0),
                    Bound("digits-unequal/gof-minus-half-etf", "<", 0.0),
                )
            ),
            effect="digits-unequal/gof-weights",
        ),
        Claim(
            id="C-order",
            paper_says="Larger classes have longer classifier rows.",
            measured="Spearman correlation of row length and class size on digits, least of 3 seeds.",
            criterion=Bound("digits-unequal/least-spearman", ">=", 1.0),
            effect="digits-unequal/least-spearman",
        ),
        Claim(
            id="D-shallow",
            paper_says="Equal classes, cross-entropy: the global minimum is a simplex ETF (here: one linear layer).",
            measured="ETF's objective less the proven minimum (largest of nine settings), and the margin to the best of two "
            "families of lower rank (least).",
            criterion=AllOf((Bound("shallow/error", "<=", 1e-11), Bound("shallow/margin", ">", 0.0))),
            effect="shallow/error",
        ),
        Claim(
            id="D-deep",
            paper_says="The same with several linear layers.",
            measured="ETF's objective, best scale, less the least that pairs, circulants or L-BFGS reach; largest of five "
            "settings with 2 to 4 layers and 4 to 10 classes. A minimum would not be above any of them.",
            criterion=Bound("deep/worst-etf-excess", "<=", 1e-9),
            effect="deep/worst-etf-excess",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "wrong-frames",
            "A: distance of the rows from the frames of equal classes, which the lengths rule out.",
            tuple(f"sgd-{depth}/{name}" for depth in DEPTHS for name in ("of-weights", "etf-weights")),
        ),
        Observation(
            "starts",
            "A: share of five L-BFGS starts that reach the closed minimum.",
            tuple(f"lbfgs-{depth}/reached" for depth in DEPTHS),
        ),
        Observation(
            "jump",
            "B: squared length of the smallest class just above its threshold, found and expected; it starts at 0 for one "
            "layer and jumps for more.",
            tuple(
                f"threshold-{depth}/{name}" for depth in SWEPT for name in ("first-length", "first-expected")
            ),
        ),
        Observation(
            "merged-but-alive",
            "B: squared length of the common row of the two merged classes just below their threshold; not 0, unlike squared "
            "error.",
            ("merging/length-below",),
        ),
        Observation(
            "digits",
            "C: distances from the frame, collapse within classes, alignment, held-out accuracy, and the objective beside the "
            "least that free features allow; unequal classes, then the control with equal ones.",
            tuple(
                f"digits-{arm}/{name}"
                for arm in ("unequal", "equal")
                for name in (
                    "gof-weights",
                    "of-weights",
                    "etf-weights",
                    "gof-means",
                    "gof-alignment",
                    "nc1",
                    "nc4",
                    "accuracy",
                    "objective",
                    "minimum",
                )
            ),
        ),
        Observation(
            "where-descent-ends",
            "D: how far above the best the ETF is; share of L-BFGS runs from random starts that end at an ETF all the same; "
            "median rank of where they end.",
            tuple(
                f"deep/K={k}, M={m}, n={n}/{name}"
                for k, m, n, _ in DEEP
                for name in ("etf-excess", "share-etf", "median-rank")
            ),
        ),
        Observation(
            "released",
            "The released solver of the scalar equation at a cost in its blind window: objective above that of collapse.",
            ("released/window-excess",),
        ),
    ),
    limits=(
        "Free features and a small network on 570 digits; the paper trains MLP, ResNet and VGG on CIFAR-10. L-BFGS and 20,000 "
        "steps of SGD instead of 30,000. That frames are global minima is checked by random starts, which can refute, not prove."
    ),
    sources=(
        "uncollapse.measure",
        "uncollapse.representation.nc_deep_linear",
        "uncollapse.studies.nc_deep_linear.experiment",
        "uncollapse.studies.testbeds",
    ),
)
