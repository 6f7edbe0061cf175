"""Reproduction of "GTPO: Trajectory-Based Policy Optimization in Large Language Models" (2508.03772).

E1: one exact step of GRPO and GTPO from the same model and group. E2: training with tags at the learning rates at which
GRPO loses its format and its reward, with ablations. E3: whom the entropy filter silences. The claims were fixed before
the run; those at the lower rate were added, before anything was seen at it on the study's seeds, when calibration had
shown that GRPO breaks down at once at the higher one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from uncollapse.policy.gtpo import LN2
from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.gtpo.experiment import RATES, SEEN, arms, measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """Training curves of all arms, and what one step does to disfavoured tags."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(14, 7), layout="constrained")
    axes = canvas.subplots(2, 3)
    shown = (("format", "in the right format"), ("entropy", "entropy (nats per token)"))
    for column, (bed, arms_of) in enumerate(measured.details["runs"].items()):
        for axis, (name, title) in zip(axes[:, column], shown, strict=True):
            for arm, runs in arms_of.items():
                curve = np.mean([run[name] for run in runs], axis=0)
                axis.plot(runs[0]["step"], curve, "--" if arm.startswith("no-") else "-", label=arm)
            axis.set(title=f"{title}, learning rate {RATES[bed]:g}", xlabel="step")
        axes[1, column].axhline(LN2, color="grey", lw=0.8)
    for arm, runs in measured.details["runs"]["reward"].items():
        curve = np.mean([run["accuracy"] for run in runs], axis=0)
        axes[0, 2].plot(runs[0]["step"], curve, "--" if arm.startswith("no-") else "-", label=arm)
    axes[0, 2].set(title=f"right answers, learning rate {RATES['reward']:g}", xlabel="step")
    axes[0, 0].legend(fontsize=8)
    pooled = {
        name: np.concatenate([run[name] for run in measured.details["step"]]) for name in ("grpo", "gtpo")
    }
    axes[1, 2].plot(pooled["grpo"], pooled["gtpo"], ".", ms=4)
    ends = (
        [min(map(np.min, pooled.values())), max(map(np.max, pooled.values()))]
        if len(pooled["grpo"])
        else [0, 1]
    )
    axes[1, 2].plot(ends, ends, color="grey", lw=0.8)
    axes[1, 2].set(
        title="one step: change of the tags' log-probability",
        xlabel="GRPO",
        ylabel="GTPO (nats / learning rate)",
    )
    return canvas


def _gain(bed: str, name: str, op: Literal[">", "<"], says: str, measured: str) -> Claim:
    statistic = f"{bed}-rate/gtpo-minus-grpo/{name}"
    return Claim(
        id=f"E2-{bed}-rate-{name}",
        paper_says=says,
        measured=f"{measured} at learning rate {RATES[bed]:g}, GTPO minus GRPO, paired by seed.",
        criterion=Bound(statistic, op, 0.0),
        effect=statistic,
    )


def _gains(bed: str) -> tuple[Claim, ...]:
    return (
        _gain(bed, "format", ">", "GTPO keeps the format where GRPO loses it.", "Final share in the format"),
        _gain(
            bed,
            "entropy",
            "<",
            "GTPO keeps the distribution from flattening.",
            "Final entropy (nats per token)",
        ),
        _gain(
            bed,
            "accuracy",
            ">",
            "GTPO ends with better accuracy than GRPO (86.5 against 84.5 on GSM8K).",
            "Final share of right answers",
        ),
    )


STUDY = Study(
    slug="gtpo",
    claims=(
        Claim(
            id="E1-step",
            paper_says="Skipping the negative updates of conflict tokens protects format tokens that GRPO pushes down.",
            measured=(
                "One exact small step from the same model and group: share of groups in which tags in conflict whose summed "
                "advantage is not positive end with a higher mean log-probability after GTPO than after GRPO."
            ),
            criterion=AllOf((Bound("step/gtpo-above-grpo", ">=", 1.0), Bound("step/groups", ">=", 20.0))),
            effect="step/gtpo-above-grpo",
        ),
        Claim(
            id="E2-collapse",
            paper_says="GRPO without a KL penalty collapses: it loses the format while its distribution flattens.",
            measured=f"GRPO (centred, no KL) at learning rate {RATES['format']:g}: format and entropy, end minus start.",
            criterion=AllOf(
                (
                    Bound("format-rate/grpo/format-change", "<", 0.0),
                    Bound("format-rate/grpo/entropy-change", ">", 0.0),
                )
            ),
            effect="format-rate/grpo/format-change",
        ),
        *_gains("format"),
        *_gains("reward"),
        Claim(
            id="E3-high-start",
            paper_says="A policy whose initial entropy exceeds ln 2 is not filtered, or it would starve.",
            measured="GTPO from a model with flattened logits: least share of answers kept, over all steps and seeds.",
            criterion=AllOf(
                (Bound("filter/high/kept", ">=", 1.0), Bound("filter/high/initial-entropy", ">", LN2))
            ),
            effect="filter/high/kept",
        ),
        Claim(
            id="E3-low-start",
            paper_says="Otherwise no answer with a mean entropy above ln 2 contributes.",
            measured="GTPO from the warmed-up model: answers above ln 2 with a weight in the loss, over all steps and seeds.",
            criterion=AllOf(
                (
                    Bound("filter/low/contributing", "<=", 0.0),
                    Bound("filter/low/above", ">", 0.0),
                    Bound("filter/low/initial-entropy", "<", LN2),
                )
            ),
            effect="filter/low/contributing",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "ablations",
            "GTPO without the conflict weights (lambda), the filter (delta) or the shaping (gamma), minus GTPO.",
            tuple(
                f"{bed}-rate/{arm}-minus-gtpo/{name}"
                for bed in RATES
                for arm in ("no-lambda", "no-delta", "no-gamma")
                for name in ("format", "accuracy", "entropy")
            ),
        ),
        Observation(
            "arms",
            "The end of every arm, beside the start that all share.",
            tuple(f"{bed}-rate/{arm}/{name}" for bed in RATES for arm in ("start", *arms()) for name in SEEN),
        ),
        Observation(
            "grpo-std",
            "GTPO against GRPO with division by the deviation.",
            tuple(
                f"{bed}-rate/grpo-std-minus-gtpo/{name}"
                for bed in RATES
                for name in ("format", "accuracy", "entropy")
            ),
        ),
        Observation(
            "step",
            "The conflict weights alone (no filter, no shaping) against GRPO; how often such tags lose probability.",
            (
                "step/groups",
                "step/lambda-above-grpo",
                "step/gtpo-minus-grpo",
                "step/lambda-minus-grpo",
                *(f"step/{name}/falls" for name in ("grpo", "gtpo", "lambda")),
            ),
        ),
        Observation(
            "touched",
            "GTPO: mean share of answers kept, and of tokens amplified and suppressed.",
            tuple(
                f"{bed}-rate/gtpo/{name}"
                for bed in RATES
                for name in (
                    "entropy_filter/kept/frac",
                    "conflict/amplified/frac",
                    "conflict/suppressed/frac",
                )
            ),
        ),
    ),
    limits=(
        "A transformer of 0.1 M parameters and answers of 9 to 15 characters, not language models of billions; 60 updates of 64 "
        "answers. The learning rates are those at which GRPO degrades (on two seeds that the study does not use), so "
        "nothing here says how the methods compare where GRPO is well. Adam has its usual betas, the gradient norm is clipped "
        "at 1."
    ),
)
