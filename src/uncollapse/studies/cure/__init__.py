"""Reproduction of "CURE: Critical-Token-Guided Re-Concatenation for Entropy-Collapse Prevention" (2508.11016).

E1: CURE against DAPO on modsum. E2: what explains the difference (masked prefixes, random cuts, group sizes). E3: two
stages against DAPO for as many steps, also where the first token decides. E4: the sampler on a language model. The claims
here were fixed before the run; the margins of E3 and the size of the equal-token group were chosen on seeds 100 and
101, which the study does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.cure.experiment import measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """Entropy and reward of the arms on modsum, of both stages, and where the first token decides."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7), layout="constrained")
    axes = canvas.subplots(2, 2)
    curves, every = measured.details["curves"], measured.details["every"]

    def draw(axis: Axes, key: str, what: str, style: str, label: str) -> None:
        curve = np.mean([run[what] for run in curves[key]], axis=0)
        axis.plot(every * np.arange(len(curve)), curve, style, label=label)

    arms = {"two-stage": "CURE, then DAPO", "dapo": "DAPO", "mask-only": "masked prefixes, no branches"}
    arms |= {"random": "CURE, random cuts", "dapo-same-tokens": "DAPO, same tokens"}
    for name, label in arms.items():
        style = "-" if name in ("two-stage", "dapo") else "--"
        for axis, what in zip(axes[0], ("entropy", "reward"), strict=True):
            draw(axis, f"modsum/{name}", what, style, label)
    for name in ("two-stage", "dapo"):
        for axis, what in zip(axes[1], ("entropy", "reward"), strict=True):
            draw(axis, f"opening/{name}", what, "-", arms[name])
    axes[0, 0].axhline(measured.estimates["modsum/optimum/entropy"].value, color="grey", lw=0.8)
    axes[0, 0].set(title="modsum (mean over seeds); grey: what R = 1 allows")
    axes[0, 1].set(title="modsum")
    axes[1, 0].set(title="opening: the first token decides as well")
    axes[1, 1].set(title="opening")
    for row in axes:
        for axis, label in zip(row, ("entropy (nats/token)", "reward"), strict=True):
            axis.axvline(measured.details["first"], color="grey", lw=0.8, ls=":")
            axis.set(xlabel="step", ylabel=label)
            axis.legend(fontsize=8)
    return canvas


_E1 = "modsum/cure-minus-dapo"


def _stages(place: str, words: str) -> Claim:
    difference = f"stages/{place}/two-stage-minus-dapo"
    return Claim(
        id=f"E3-{place}",
        paper_says="The second stage turns the entropy that the first kept into accuracy; plain DAPO ends with less.",
        measured=f"150 steps of CURE and 75 of DAPO against 225 of DAPO on {words}: exact reward, and different right "
        "answers among 32 per prompt.",
        criterion=AllOf(
            (
                Bound(f"{difference}/reward", ">=", -0.02, by="value"),
                Bound(f"{difference}/distinct", ">", 0.0),
            )
        ),
        effect=f"{difference}/distinct",
    )


def _differences(*pairs: str) -> tuple[str, ...]:
    return tuple(f"modsum/{pair}/{key}" for pair in pairs for key in ("entropy", "reward", "distinct"))


STUDY = Study(
    slug="cure",
    claims=(
        Claim(
            id="E1",
            paper_says="Branching at critical tokens keeps entropy that DAPO loses, at no less accuracy.",
            measured="Exact entropy (nats/token) and reward after 150 steps on modsum, CURE minus DAPO, both with 16 "
            "members per group, paired by seed.",
            criterion=AllOf(
                (
                    Bound(f"{_E1}/entropy", ">=", 0.1, by="value"),
                    Bound(f"{_E1}/entropy", ">", 0.0),
                    Bound(f"{_E1}/reward", ">=", -0.03, by="value"),
                )
            ),
            effect=f"{_E1}/entropy",
        ),
        _stages("modsum", "modsum"),
        _stages("opening", "modsum with a rule for the first token"),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "control-mask",
            "As many tokens without gradient, at the same places, but independent answers instead of branches.",
            _differences("mask-only-minus-dapo", "cure-minus-mask-only"),
        ),
        Observation(
            "control-random",
            "Branches at random positions instead of at high entropy.",
            _differences("random-minus-dapo", "cure-minus-random"),
        ),
        Observation(
            "control-size",
            "DAPO with groups of 11 independent answers (about the tokens of CURE's 16) and of 4 (its originals).",
            _differences(
                "dapo-same-tokens-minus-dapo", "cure-minus-dapo-same-tokens", "dapo-originals-minus-dapo"
            ),
        ),
        Observation(
            "family-baseline",
            "Branches compared with their family instead of the whole group.",
            _differences("family-baseline-minus-dapo", "cure-minus-family-baseline"),
        ),
        Observation(
            "same-reward",
            "Entropy when the reward first reaches 0.9: whether CURE keeps entropy beyond learning more slowly.",
            tuple(
                f"modsum/{pair}/entropy-at-same-reward"
                for pair in (
                    "cure-minus-dapo",
                    "mask-only-minus-dapo",
                    "random-minus-dapo",
                    "cure-minus-dapo-same-tokens",
                )
            ),
        ),
        Observation(
            "early",
            "A third of the way: what the entropy costs in reward while it is kept.",
            (f"{_E1}/early-reward", f"{_E1}/early-entropy"),
        ),
        Observation(
            "cost",
            "Tokens generated per step and per row that was trained on, and tokens trained on per step.",
            tuple(
                f"modsum/{arm}/{key}"
                for arm in ("cure", "dapo", "mask-only", "dapo-same-tokens")
                for key in ("tokens-per-step", "tokens-per-useful", "trained-tokens")
            ),
        ),
        Observation(
            "families",
            "Variance of the reward within and between families, and what a group of 16 is worth in independent members.",
            tuple(
                f"modsum/{arm}/{key}"
                for arm in ("cure", "random")
                for key in ("within", "between", "effective-samples")
            ),
        ),
        Observation(
            "bias",
            "Value of the prefixes that are cut minus value of the prompt, before training, at step 50 and at step 150.",
            tuple(f"modsum/cure/bias/{step}" for step in (0, 50, 150)),
        ),
        Observation(
            "language",
            "SmolLM2-135M, 12 prompts: entropy at the critical position over the mean of the answer; different first tokens "
            "of three branches at critical and at random positions, drawn and expected. Intervals over prompts.",
            (
                "language/entropy-ratio",
                "language/critical-distinct",
                "language/random-distinct",
                "language/distinct-critical-minus-random",
                "language/critical-expected-distinct",
                "language/random-expected-distinct",
            ),
        ),
    ),
    limits=(
        "Tabular policies, six tokens of which five can be cut, hence K = 2 instead of 20; a policy without shared "
        "parameters, so that a prefix gains nothing from what is learnt behind it. The language model is sampled, not trained."
    ),
)
