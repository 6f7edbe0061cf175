"""Reproduction of "Rethinking Entropy Regularization in Large Reasoning Models" (2509.25133).

A plain entropy bonus, SIREN at coefficients two orders of magnitude apart, and SIREN without one of its parts, on a task with
a long-tailed vocabulary where every number is exact. The claims here were fixed before the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.siren.experiment import GROWTH, measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = {
    "none": "k-", "naive-0.005": "C3:", "naive-0.02": "C3--", "naive-0.1": "C3-",
    "siren-0.05": "C0:", "siren-0.5": "C0--", "siren-5": "C0-", "no-top-p-0.5": "C1-", "no-anchor-0.5": "C2-",
}  # fmt: skip


def figure(measured: Measurements) -> Figure:
    """Accuracy, entropy, entropy of right answers and tail mass of the arms."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7), layout="constrained")
    runs = measured.details["long_tail"]
    panels = (
        ("accuracy", "accuracy"),
        ("entropy", "entropy (nats/token)"),
        ("right_entropy", "entropy of right answers (nats/token)"),
        ("tail", "mass outside the initial nucleus"),
    )
    for axis, (name, label) in zip(canvas.subplots(2, 2).flat, panels, strict=True):
        for arm, style in DRAWN.items():
            curve = np.mean([run[name] for run in runs[arm]], axis=0)
            axis.plot(runs[arm][0]["step"], curve, style, label=arm)
        axis.set(xlabel="step", ylabel=label)
    canvas.axes[0].legend(fontsize=7)
    return canvas


def _kept(arm: str) -> Claim:
    entropy = f"{arm}-minus-{GROWTH}-times-none/entropy"
    return Claim(
        id=f"E1-{arm}",
        paper_says="SIREN keeps the policy diverse without the explosion of the plain bonus.",
        measured=f"End of training with coefficient {arm.removeprefix('siren-')}: entropy against {GROWTH} times that "
        "of no bonus, accuracy against no bonus, mass outside the initial nucleus.",
        criterion=AllOf(
            (
                Bound(entropy, ">=", 0.0, by="value"),
                Bound(f"{arm}-minus-none/entropy", ">", 0.0),
                Bound(f"{arm}-minus-none/accuracy", ">=", -0.2, by="value"),
                Bound(f"{arm}/tail", "<=", 0.03, by="value"),
            )
        ),
        effect=f"{arm}-minus-none/entropy",
    )


STUDY = Study(
    slug="siren",
    claims=(
        Claim(
            id="E1-naive",
            paper_says="A plain entropy bonus explodes over a large vocabulary and long answers.",
            measured="End of training with coefficient 0.1: mass outside the initial nucleus, accuracy against no bonus.",
            criterion=AllOf(
                (
                    Bound("naive-0.1/tail", ">=", 0.1, by="value"),
                    Bound("naive-0.1-minus-none/accuracy", "<=", -0.3, by="value"),
                    Bound("naive-0.1-minus-none/accuracy", "<", 0.0),
                )
            ),
            effect="naive-0.1-minus-none/accuracy",
        ),
        _kept("siren-0.05"),
        _kept("siren-0.5"),
        Claim(
            id="E2-coefficient",
            paper_says="The anchor makes the coefficient uncritical.",
            measured="Ten times the coefficient again, 5: accuracy against no bonus and tail; and whether the mean peak "
            "entropy ends nearer to the anchor the larger the coefficient (0.05, 0.5, 5).",
            criterion=AllOf(
                (
                    Bound("siren-5-minus-none/accuracy", ">=", -0.3, by="value"),
                    Bound("siren-5/tail", "<=", 0.03, by="value"),
                    Bound("siren-0.05-minus-siren-0.5/distance", ">", 0.0, by="value"),
                    Bound("siren-0.5-minus-siren-5/distance", ">", 0.0, by="value"),
                )
            ),
            effect="siren-5-minus-none/accuracy",
        ),
        Claim(
            id="E3-top-p",
            paper_says="The top-p mask keeps the regulariser from feeding the tail.",
            measured="Mass outside the initial nucleus without the mask minus with it, coefficient 0.5, paired by seed.",
            criterion=Bound("no-top-p-0.5-minus-siren-0.5/tail", ">", 0.0),
            effect="no-top-p-0.5-minus-siren-0.5/tail",
        ),
        Claim(
            id="E3-anchor",
            paper_says="Of its parts the anchor matters most: without it 10.3 points of maj@k and 15.5 of avg@k are lost.",
            measured="Accuracy of a bonus on the same mean (coefficient 0.5) minus that of SIREN (0.5), paired by seed.",
            criterion=AllOf(
                (
                    Bound("no-anchor-0.5-minus-siren-0.5/accuracy", "<=", -0.1, by="value"),
                    Bound("no-anchor-0.5-minus-siren-0.5/accuracy", "<", 0.0),
                )
            ),
            effect="no-anchor-0.5-minus-siren-0.5/accuracy",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "accuracy-price",
            "What SIREN costs in accuracy after the same number of steps; the paper reports a gain.",
            tuple(f"siren-{c}-minus-none/accuracy" for c in ("0.05", "0.5", "5")),
        ),
        Observation(
            "right-answers",
            "Entropy of the right answers alone (nats per token): the diversity that counts.",
            tuple(
                f"{arm}/right_entropy"
                for arm in (
                    "none",
                    "naive-0.005",
                    "naive-0.02",
                    "naive-0.1",
                    "siren-0.05",
                    "siren-0.5",
                    "siren-5",
                )
            ),
        ),
        Observation(
            "knife-edge",
            "The plain bonus at three coefficients, and steered by dual ascent towards its initial entropy.",
            tuple(
                f"{arm}/{name}"
                for arm in ("naive-0.005", "naive-0.02", "naive-0.1", "lagrangian")
                for name in ("accuracy", "entropy", "tail")
            ),
        ),
        Observation(
            "distance",
            "How far the mean peak entropy ends from its initial value (nats).",
            tuple(f"{arm}/distance" for arm in ("none", "siren-0.05", "siren-0.5", "siren-5")),
        ),
        Observation(
            "ablations",
            "SIREN (0.5) without one part, and with the released reading of the nucleus; minus SIREN, paired by seed.",
            tuple(
                f"{arm}-minus-siren-0.5/{name}"
                for arm in ("no-top-p-0.5", "no-peaks-0.5", "no-anchor-0.5", "released-0.5")
                for name in ("accuracy", "entropy", "tail")
            ),
        ),
        Observation(
            "real-model",
            "SmolLM2-135M (vocabulary 49 152), 16 answers of 64 tokens: share of the upward logit gradient that falls "
            "outside the nucleus, for the plain bonus and for SIREN's entropy; mass there; tokens inside. Left out where "
            "the weights are not installed.",
            tuple(f"smollm2-135m/{key}" for key in ("naive", "siren", "tail_mass", "nucleus_size")),
        ),
    ),
    limits=(
        "A low-rank table over 300 tokens without dependence between positions, answers of 20 tokens, 100 updates, on-policy. "
        "Coefficients are 10 to 1000 times the paper's 0.005, since Adam at learning rate 0.02 on 7000 parameters is no "
        "language model. The real model is looked at, not trained."
    ),
)
