"""Reproduction of "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (2505.22617).

E1: exact theory on bandits. E2: Clip-Cov and KL-Cov against GRPO on modsum, with controls. E3: the entropy law on modsum
and on the character-LM lab, against a straight line. The claims here were fixed before the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.measure.entropy_law import compare_laws
from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.entropy_mechanism.experiment import CONTROLS, measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """Entropy and reward of the arms, and both laws on both testbeds."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7), layout="constrained")
    axes = canvas.subplots(2, 2)
    runs = measured.details["modsum"]
    for arm in ("grpo", "clip-cov", "kl-cov", "random-clip", "random-kl"):
        style = "--" if arm.startswith("random") else "-"
        for axis, name in zip(axes[0], ("entropy", "reward"), strict=True):
            curve = np.mean([run[name] for run in runs[arm]], axis=0)
            axis.plot(5 * np.arange(len(curve)), curve, style, label=arm)
    axes[0, 0].axhline(measured.estimates["modsum/optimum/entropy"].value, color="grey", lw=0.8)
    axes[0, 0].set(title="modsum (mean over seeds); grey: what R = 1 allows", ylabel="entropy (nats/token)")
    axes[0, 1].set(title="modsum", ylabel="reward")
    axes[0, 1].legend(fontsize=8)
    charlm = measured.details["charlm"][0]
    for axis, bed, h, r in (
        (axes[1, 0], "modsum", runs["grpo"][0]["entropy"], runs["grpo"][0]["reward"]),
        (axes[1, 1], "character LM", charlm["entropy"], charlm["accuracy"]),
    ):
        both = compare_laws(h, r)
        grid = np.linspace(0, max(h), 100)
        axis.plot(h, r, "k.", ms=4, label="GRPO, seed 0")
        axis.plot(grid, both.exponential.predict(grid), label="R = -a exp(H) + b")
        axis.plot(grid, both.straight_line.predict(grid), "--", label="straight line")
        axis.fill_between(grid, *both.exponential.interval(grid), alpha=0.2)
        axis.set(title=bed, xlabel="entropy (nats/token)", ylabel="reward")
        axis.legend(fontsize=8)
    for axis in axes[0]:
        axis.set_xlabel("step")
    return canvas


def _theory(name: str, words: str) -> Claim:
    slope, r2 = f"bandit/{name}/slope", f"bandit/{name}/r2"
    return Claim(
        id=f"E1-{name}",
        paper_says=f"Under {words} the entropy falls by the covariance of log-probability and logit change.",
        measured="Regression of the measured change per step on minus the covariance, 64 bandits x 200 arms.",
        criterion=AllOf((Bound(slope, ">=", 0.98), Bound(slope, "<=", 1.02), Bound(r2, ">=", 0.999))),
        effect=slope,
    )


def _control(arm: str, title: str, gain: float) -> Claim:
    entropy, reward = f"modsum/{arm}-minus-grpo/entropy", f"modsum/{arm}-minus-grpo/reward"
    return Claim(
        id=f"E2-{arm}",
        paper_says=f"{title} keeps the entropy up without costing reward.",
        measured="Final exact entropy (nats/token) and reward on modsum, method minus GRPO, paired by seed.",
        criterion=AllOf(
            (
                Bound(entropy, ">=", gain, by="value"),
                Bound(entropy, ">", 0.0),
                Bound(reward, ">=", -0.03, by="value"),
            )
        ),
        effect=entropy,
    )


def _law(bed: str, words: str) -> Claim:
    evidence = f"law/{bed}/effective-delta-aic"
    return Claim(
        id=f"E3-{bed}",
        paper_says="Reward follows R = -a exp(H) + b.",
        measured=f"Effective delta AIC of a straight line against that law, GRPO on {words}.",
        criterion=Bound(evidence, ">", 2.0),
        contradicted_if=Bound(evidence, "<", -2.0),
        effect=evidence,
    )


def _forecast(bed: str, words: str) -> Claim:
    error = f"law/{bed}/exponential/early-end-error"
    return Claim(
        id=f"E3-{bed}-forecast",
        paper_says="The law fitted to the first 15 % of the steps predicts the end within 0.5 to 0.9 points.",
        measured=f"Absolute error of that forecast at the last tenth of the run, GRPO on {words}.",
        criterion=Bound(error, "<=", 0.01),
        effect=error,
    )


STUDY = Study(
    slug="entropy-mechanism",
    claims=(
        _theory("npg", "natural policy gradient"),
        _theory("pg", "policy gradient"),
        _control("kl-cov", "KL-Cov", 0.15),
        _control("clip-cov", "Clip-Cov", 0.1),
        _law("modsum", "modsum"),
        _law("charlm", "the character LM"),
        _forecast("modsum", "modsum"),
        _forecast("charlm", "the character LM"),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "control-random",
            "The same number of tokens chosen at random instead of by covariance (paired; method minus control).",
            tuple(
                f"modsum/{m}-minus-{c}/{n}"
                for m, c in CONTROLS.items()
                for n in ("entropy", "reward", "distinct")
            ),
        ),
        Observation(
            "control-surrogate",
            "The bare surrogate without ratio clip, since both methods all but remove PPO's clip.",
            (
                "modsum/unclipped-minus-grpo/entropy",
                "modsum/kl-cov-minus-unclipped/entropy",
                "modsum/clip-cov-minus-unclipped/entropy",
            ),
        ),
        Observation(
            "paper-defaults",
            "The paper's fractions (2e-3, 2e-4) choose 1 token of a 384-token step.",
            ("modsum/kl-cov-default-minus-grpo/entropy", "modsum/clip-cov-default-minus-grpo/entropy"),
        ),
        Observation(
            "diversity",
            "Different right answers among 32 samples, mean over prompts.",
            tuple(
                f"modsum/{arm}/distinct" for arm in ("grpo", "kl-cov", "clip-cov", "random-kl", "random-clip")
            ),
        ),
        Observation(
            "covariance",
            "GRPO: correlation over steps of the token covariance with the fall of entropy; share of the positive "
            "covariance in the top fifth of the tokens; part of the fall at fixed states, as the lemma has it.",
            (
                "modsum/grpo/covariance-correlation",
                "modsum/grpo/top-fifth-share",
                "modsum/grpo/fixed-state-part",
            ),
        ),
        Observation(
            "law",
            "Fit and forecast of both laws; rewards are shares of right answers.",
            tuple(
                f"law/{bed}/{law}/{key}"
                for bed in ("modsum", "charlm")
                for law in ("exponential", "line")
                for key in ("r2", "ceiling", "early-ceiling", "early-rmse", "early-end-error")
            ),
        ),
    ),
    limits=(
        "Tabular policies and a 0.1 M-parameter character model, not language models of billions of parameters. "
        "Fractions are raised to 0.2 (KL-Cov) and 0.02 (Clip-Cov): at the paper's values a 384-token step has one "
        "token to choose. On modsum reward 1 is possible at 2.31 nats, so no ceiling at zero entropy exists there."
    ),
)
