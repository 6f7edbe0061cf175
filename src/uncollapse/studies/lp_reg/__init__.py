"""Reproduction of "Low-probability Tokens Sustain Exploration in RLVR" (2510.03222), on the character LM with a spark.

A: the mechanism, on one token and in one update. B: what an entropy bonus does to noise and Lp-Reg does not. C: the outcome of
training, reported as it comes, null or not. The claims here were fixed before the run; the share of tokens, the learning rates
and the world were calibrated on seeds from 1000 on, which the run does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.lp_reg.experiment import FIXED_POINTS, KAPPAS, PAIRS, RHOS, measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = ("success", "spark", "checked", "entropy")


def figure(measured: Measurements) -> Figure:
    """Success, spark probability and entropy of the arms, and what happens to noise in one update."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7), layout="constrained")
    axes = canvas.subplots(2, 2)
    curves = measured.details["outcome"]
    for axis, name, label in (
        (axes[0, 0], "success", "accepted answers"),
        (axes[0, 1], "spark", "probability of the re-check token"),
        (axes[1, 0], "entropy", "entropy (nats/token)"),
    ):
        for arm, runs in curves.items():
            style = "--" if arm.endswith("-on") else "-"
            mean = np.mean([run[name] for run in runs], axis=0)
            axis.plot(runs[0]["step"], mean, style, label=arm)
        axis.set(xlabel="rollout batch", title=label)
    axes[0, 1].set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    noise = [[1e3 * row[f"{arm}-noise"] for row in measured.details["scenes"]] for arm in ("bonus", "lp-reg")]
    axes[1, 1].axhline(0, color="grey", lw=0.8)
    axes[1, 1].boxplot(noise)
    axes[1, 1].set_xticks((1, 2), ("entropy bonus", "Lp-Reg"))
    axes[1, 1].set(title="change of the noise mass in one update, same entropy gain", ylabel="1/1000")
    return canvas


STUDY = Study(
    slug="lp-reg",
    claims=(
        Claim(
            id="A-fixed-point",
            paper_says="The regulariser keeps the probability of a punished token up (derived: it stops at r*).",
            measured="Gradient descent on one token of three, p_old = 0.02; largest distance of the ratio from r*.",
            criterion=Bound("fixed-point/error", "<=", 1e-6),
            effect="fixed-point/error",
        ),
        Claim(
            id="A-identity",
            paper_says="The proxy differs from the policy by the noise alone (derived: KL(q || pi) = -log Z).",
            measured="Largest absolute difference over all tokens and five kappas, warmed-up character LM, float64.",
            criterion=Bound("mechanism/identity-error", "<=", 1e-12),
            effect="mechanism/identity-error",
        ),
        Claim(
            id="A-loss",
            paper_says="Low-probability tokens that are not noise are protected, noise is not.",
            measured="One gradient step on the logits themselves with and without the term, same state and rollout, r < 1: "
            "share of the selected tokens whose log-probability ends higher; change of the mass of filtered tokens there.",
            criterion=AllOf(
                (Bound("mechanism/lifted-free", ">=", 0.95), Bound("mechanism/noise-free", "<=", 0.0))
            ),
            effect="mechanism/lifted-free",
        ),
        Claim(
            id="A-update",
            paper_says="Low-probability tokens that are not noise are protected, noise is not.",
            measured="The same for one gradient step on the weights of the character LM, which all positions share.",
            criterion=AllOf(
                (Bound("mechanism/lifted", ">=", 0.95), Bound("mechanism/noise-at-chosen", "<=", 0.0))
            ),
            effect="mechanism/lifted",
        ),
        Claim(
            id="B-noise",
            paper_says="An entropy bonus lifts irrelevant noise tokens, Lp-Reg does not.",
            measured="Change of the noise mass over all tokens in one update, at the same gain of entropy; sign tests over "
            "20 seeds.",
            criterion=AllOf(
                (
                    Bound("noise/bonus-up/p", "<", 0.01),
                    Bound("noise/bonus-above-lp-reg/p", "<", 0.01),
                    Bound("mechanism/lp-reg-noise", "<=", 0.0),
                )
            ),
            effect="noise/bonus-minus-lp-reg",
        ),
        Claim(
            id="C-spark",
            paper_says="Lp-Reg keeps exploratory tokens alive where GRPO eliminates them.",
            measured="Probability of the re-check token after 80 rollouts, Lp-Reg minus the same clip without the term, paired.",
            criterion=AllOf(
                (
                    Bound("lp-reg-minus-capped/spark", ">=", 0.01, by="value"),
                    Bound("lp-reg-minus-capped/spark", ">", 0.0),
                )
            ),
            contradicted_if=Bound("lp-reg-minus-capped/spark", "<", 0.01),
            effect="lp-reg-minus-capped/spark",
        ),
        Claim(
            id="C-success",
            paper_says="Lp-Reg ends with the better policy (60.2 against 57.4 on-policy; 57.1 against 51.1 off-policy).",
            measured="Accepted answers after 80 rollouts, Lp-Reg minus the same clip without the term, paired.",
            criterion=AllOf(
                (
                    Bound("lp-reg-minus-capped/success", ">=", 0.02, by="value"),
                    Bound("lp-reg-minus-capped/success", ">", 0.0),
                )
            ),
            contradicted_if=Bound("lp-reg-minus-capped/success", "<", 0.02),
            effect="lp-reg-minus-capped/success",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "fixed-points",
            "Ratio reached, by size of the advantage and kept mass; predicted: 0.618034, 0.5, 0.666667.",
            tuple(f"fixed-point/{size:g}/{mass:g}" for size, mass in FIXED_POINTS),
        ),
        Observation(
            "filter",
            "Warmed-up policy, by kappa: kept mass, and share of sampled tokens that are noise.",
            tuple(f"mechanism/{name}/{kappa:g}" for name in ("kept-mass", "filtered") for kappa in KAPPAS),
        ),
        Observation(
            "selection",
            "By rho at kappa 0.02: probability at the quantile, share of the tokens under it that are no noise, share of all "
            "tokens selected.",
            tuple(f"mechanism/{name}/{rho:g}" for name in ("quantile", "low-kept") for rho in RHOS)
            + tuple(f"mechanism/selected/0.02/{rho:g}" for rho in RHOS),
        ),
        Observation(
            "update",
            "The compared update: number and mean ratio of the tokens looked at, their mean gain in log-probability, the "
            "share that gains, and that share in logits of their own.",
            (
                "mechanism/chosen",
                "mechanism/ratio",
                "mechanism/lift",
                "mechanism/lifted",
                "mechanism/lifted-free",
                "mechanism/noise-at-chosen",
                "mechanism/noise-free",
            ),
        ),
        Observation(
            "noise",
            "Entropy gained by Lp-Reg and by the matched bonus (nats per token), its coefficient, noise mass before and "
            "changes of it; sign test that Lp-Reg lowers it.",
            (
                "mechanism/entropy-gain",
                "mechanism/bonus-gain",
                "mechanism/bonus-coef",
                "mechanism/noise",
                "mechanism/bonus-noise",
                "mechanism/lp-reg-noise",
                "noise/lp-reg-up/p",
                "noise/lp-reg-down/p",
            ),
        ),
        Observation(
            "outcome",
            "Ends of the curves: accepted answers, probability of the re-check token, share of answers that check, entropy.",
            tuple(
                f"{arm}/{name}"
                for arm in (
                    "start",
                    "grpo",
                    "capped",
                    "lp-reg",
                    "lp-reg-full",
                    "bonus",
                    "grpo-on",
                    "lp-reg-on",
                )
                for name in _NAMES
            ),
        ),
        Observation(
            "controls",
            "Differences paired by seed; `mean-success` is the mean over the curve. `capped` is Lp-Reg's clip without its "
            "term; `-on` has one update per rollout.",
            tuple(
                f"{arm}-minus-{control}/{name}"
                for arm, control in PAIRS
                for name in (*_NAMES, "mean-success")
            ),
        ),
        Observation(
            "selected",
            "Share of the tokens that Lp-Reg regularised, mean over training.",
            ("lp-reg/selected", "lp-reg-full/selected", "lp-reg-on/selected"),
        ),
    ),
    limits=(
        "A character model of 0.1 M parameters in a world made for the question: 16 characters, one spark, luck in place of "
        "hard problems. rho is 0.025 (paper 0.01), which puts the quantile where the paper has it; 0.01 finds noise alone here. "
        "A and B look at one update, three steps after the rollout."
    ),
)
