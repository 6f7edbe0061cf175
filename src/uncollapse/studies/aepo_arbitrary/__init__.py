"""Reproduction of "Arbitrary Entropy Policy Optimization" (2510.08141): can the entropy be set, and on what condition?

A: control with exact gradients on a bandit with 20 right answers out of 50. B: where control stops, by how advantages are
scaled, how many answers are sampled, group size and alpha. C: a table of logits over four tokens, with baselines. D: the
packaged language model, with a grid of targets. The claims were fixed before the run; the rule of the square root was found
with seed 1007, the settings of D were chosen with seed 100, and no trial uses either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.aepo_arbitrary.experiment import (
    ALPHAS,
    FAR,
    GATED,
    GROUPS,
    PROBLEM_ALPHAS,
    TOKEN_TARGETS,
    measure,
)
from uncollapse.studies.aepo_arbitrary.language_model import SETTINGS, Setting, statistics
from uncollapse.studies.claims import Bound, Claim
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """Asked against reached, and what decides whether control holds."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 11), layout="constrained")
    axes = canvas.subplots(3, 2)
    _draw_control(axes[0, 0], measured)
    _draw_curves(axes[0, 1], measured)
    _draw_groups(axes[1, 0], measured)
    _draw_tokens(axes[1, 1], measured)
    for axis, setting in zip(axes[2], SETTINGS.values(), strict=True):
        _draw_language(axis, setting, measured)
    return canvas


def _draw_control(axis: Axes, measured: Measurements) -> None:
    found = measured.details["control"]
    targets = found["targets"]
    for mode, style in (("bang", "o"), ("clip", "x")):
        axis.plot(targets, found[mode]["entropy"][:-1], style, label=f"{mode}, centred advantages")
    divided = measured.details["boundary"]["std/exact"][0]
    axis.plot((0.5, 1.0, 2.0), divided[:3], "s", label="bang, divided by the batch's deviation")
    axis.axline((0, 0), slope=1, color="grey", lw=0.8)
    axis.set(title="Bandit, exact gradients", xlabel="entropy asked (nats)", ylabel="entropy reached (nats)")
    axis.legend(fontsize=8)


def _draw_curves(axis: Axes, measured: Measurements) -> None:
    found = measured.details["control"]
    for arm, label in enumerate([*(f"target {target:g}" for target in found["targets"]), "GRPO"]):
        curve = found["bang"][f"curve/{arm}"]
        axis.plot(range(len(curve)), curve, label=label)
    axis.set(title="Bandit, bang-bang", xlabel="training (hundredths)", ylabel="entropy (nats)")
    axis.legend(fontsize=8)


def _draw_groups(axis: Axes, measured: Measurements) -> None:
    for name, runs in measured.details["groups"].items():
        label = "centred" if name == "raw" else f"divided, groups of {name[4:]}"
        axis.semilogx(ALPHAS, np.mean(runs, 0), "o-", ms=3, label=label)
    axis.axhline(1.0, color="grey", lw=0.8)
    axis.set(title="Bandit, 512 answers a step, target 1", xlabel="alpha", ylabel="entropy reached (nats)")
    axis.legend(fontsize=8)


def _draw_tokens(axis: Axes, measured: Measurements) -> None:
    for kind, label in (
        ("aepo-raw", "AEPO, centred, alpha 1"),
        ("aepo-std", "AEPO, divided, alpha 1"),
        ("aepo-std-root", "AEPO, divided, alpha sqrt(8)"),
        ("adaptive", "adaptive entropy bonus"),
    ):
        rows = [measured.estimates[f"tokens/{kind}/{target:g}/entropy"].value for target in TOKEN_TARGETS]
        axis.plot(TOKEN_TARGETS, rows, "o-", ms=4, label=label)
    for kind, style in (("raw", ":"), ("std", "--")):
        value = measured.estimates[f"tokens/{kind}/entropy"].value
        axis.axhline(value, ls=style, color="black", lw=0.8, label=f"GRPO, {kind}")
    axis.axline((0.4, 0.4), slope=1, color="grey", lw=0.8)
    axis.set(title="Tokens", xlabel="entropy asked (nats per token)", ylabel="entropy reached")
    axis.legend(fontsize=8)


def _draw_language(axis: Axes, setting: Setting, measured: Measurements) -> None:
    estimates = measured.estimates
    at = f"language/{setting.task}"
    axis.set(title=f"Language model, {setting.task}", xlabel="entropy asked (nats per token)")
    if f"{at}/grpo/entropy" not in estimates:
        axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
        return
    for name, label in (("entropy", "entropy reached"), ("pass@1", "pass@1"), ("pass@8", "pass@8")):
        rows = [estimates[f"{at}/aepo/{target:g}/{name}"] for target in setting.targets]
        middle = np.array([row.value for row in rows])
        spread = np.array([min(row.high - row.value, 10) for row in rows])
        line = axis.errorbar(
            setting.targets, middle, spread, fmt="o-", ms=4, capsize=2, label=f"AEPO, {label}"
        )
        grpo = estimates[f"{at}/grpo/{name}"].value
        axis.axhline(grpo, ls=":", lw=0.9, color=line[0].get_color(), label=f"GRPO, {label}")
    axis.axline((setting.middle, setting.middle), slope=1, color="grey", lw=0.8)
    axis.legend(fontsize=7)


STUDY = Study(
    slug="aepo-arbitrary",
    claims=(
        Claim(
            id="A-bang",
            paper_says="The entropy can be held at any chosen level by switching between two temperatures.",
            measured="Bandit, exact gradients, alpha 0.2: largest |reached - asked| over targets 0.5, 1, 1.5, 2 nats.",
            criterion=Bound("control/bang/worst-offset", "<", 0.02),
            effect="control/bang/worst-offset",
        ),
        Claim(
            id="A-clip",
            paper_says="The same with a temperature in proportion to the gap (later version).",
            measured="As A-bang with T = clip(1 + H0 - H, 0.8, 1.2).",
            criterion=Bound("control/clip/worst-offset", "<", 0.05),
            effect="control/clip/worst-offset",
        ),
        Claim(
            id="A-baseline",
            paper_says="GRPO alone loses its entropy.",
            measured="Entropy (nats) at the end of the same bandit without the tempered term.",
            criterion=Bound("control/none/entropy", "<", 0.05),
            effect="control/none/entropy",
        ),
        Claim(
            id="B-raw",
            paper_says="Control works from samples as well.",
            measured=(
                "As A-bang with 4000 steps and centred advantages, exact and from 16, 512 and 4096 answers a step: largest "
                "offset per seed over these and over targets 0.5, 1, 2."
            ),
            criterion=Bound("boundary/raw/worst-offset", "<", 0.02),
            effect="boundary/raw/worst-offset",
        ),
        Claim(
            id="B-std",
            paper_says="Nothing; our condition: dividing exact advantages by the batch's deviation destroys control.",
            measured="As B-raw with that division: largest entropy over the three targets.",
            criterion=Bound("boundary/std/exact/largest-entropy", "<", 0.05),
            effect="boundary/std/exact/largest-entropy",
        ),
        Claim(
            id="B-root",
            paper_says="Nothing; our rule: with advantages divided per group, alpha has to grow with sqrt(group size).",
            measured=(
                "Alpha 0.2 sqrt(G), groups of G = 4, 8, 16, 64 out of 512 answers a step: largest offset per seed over sizes "
                "and targets 0.5 and 1."
            ),
            criterion=Bound("groups/root/worst-offset", "<", 0.05),
            effect="groups/root/worst-offset",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "dose-response",
            "Entropy reached for every target asked; 2.5 and 2.9 are below ln 20 but far for 6000 steps.",
            (
                *(f"control/{mode}/{h:g}/entropy" for mode in ("bang", "clip") for h in (*GATED, *FAR)),
                "control/bang/success",
                "control/clip/success",
            ),
        ),
        Observation(
            "problems",
            "Added after a first run, which failed A-bang at two of four targets: share of 20 other initial policies on "
            "which a target is held within 0.02 nats after 6000 steps, by alpha.",
            tuple(f"problems/alpha-{alpha:g}/{h:g}/held" for alpha in PROBLEM_ALPHAS for h in GATED),
        ),
        Observation(
            "division",
            "Divided by the deviation of a batch that is sampled, and divided only once control was there (target 1).",
            (
                *(f"boundary/std/{n}/largest-entropy" for n in (16, 512, 4096)),
                "boundary/divided-after-control/before",
                "boundary/divided-after-control/entropy",
            ),
        ),
        Observation(
            "group-size",
            "Target 1, 512 answers a step: entropy reached by group size at alpha 0.2, the least alpha of the grid "
            f"{', '.join(f'{alpha:g}' for alpha in ALPHAS)} that ends within 0.05 nats, and the entropy at alpha 0.2 under the "
            "expected update of such groups, which has no sampling noise.",
            (
                "groups/raw/alpha-0.2/entropy",
                "groups/raw/least-alpha",
                *(f"groups/std-{g}/{name}" for g in GROUPS for name in ("alpha-0.2/entropy", "least-alpha")),
                *(f"groups/expected-{g}/largest-entropy" for g in GROUPS),
            ),
        ),
        Observation(
            "tokens",
            "Four tokens out of six, 16 prompts, groups of 8: entropy per token, reward and distinct right answers of 32.",
            tuple(
                f"tokens/{arm}/{name}"
                for arm in (
                    "raw",
                    "std",
                    *(
                        f"{kind}/{target:g}"
                        for kind in ("aepo-raw", "aepo-std", "aepo-std-root", "adaptive")
                        for target in TOKEN_TARGETS
                    ),
                    "bonus/0.05",
                    "bonus/0.3",
                    "replace/0.7",
                    "reweight/0.7",
                )
                for name in ("entropy", "reward", "distinct")
            ),
        ),
        Observation(
            "equal-generation",
            "Added after the first runs: GRPO with groups of 16 instead of 8, which generates as many answers as AEPO, that "
            "answers every prompt of these trials twice.",
            tuple(
                f"tokens/{arm}/{name}"
                for arm in ("raw-16", "std-16")
                for name in ("entropy", "reward", "distinct")
            ),
        ),
        *(
            Observation(
                f"language-{task}",
                f"The packaged language model on {task}, {setting.steps} rollouts of 16 prompts with 8 answers, alpha {setting.alpha:g}, a quarter of "
                "the prompts answered again: where each arm ends (pass@k and distinct right answers of 16 samples for 128 "
                "held-out prompts); slope of reached on asked (`follows`, 1 is control); curvature of a parabola through "
                "pass@k over the targets and its slopes at both ends; AEPO at the middle target against controls, paired by "
                "seed.",
                statistics(setting),
            )
            for task, setting in SETTINGS.items()
        ),
    ),
    limits=(
        "One bandit, one tabular task and a language model of 1.6 million parameters on two tasks of a few characters. Alpha is "
        "0.05 to 3.2 here and 1/64 in the paper. The paper's benchmark scores are not tested, nor its best target."
    ),
    sources=(
        "uncollapse.integrations",
        "uncollapse.measure",
        "uncollapse.models",
        "uncollapse.policy",
        "uncollapse.studies.aepo_arbitrary",
        "uncollapse.studies.testbeds",
        "uncollapse.tasks",
    ),
)
