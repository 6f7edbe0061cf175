"""Reproduction of "BAPO: Stabilizing Off-Policy RL for LLMs via Balanced Policy Optimization with Adaptive Clipping" (2510.18927).

A: what the search does to the share. B: when it acts at all. C: success and entropy against a fixed clip on stale data,
and entropy against GRPO on policy. D: the entropy-clip rule, and whether a fixed clip blocks the tokens it speaks of. The
claims here were fixed before the run but for C-entropy-grpo, added after the first one, in which its estimate was an
observation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.bapo.experiment import READ, UPDATES, measure
from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("on-policy", "clip", "clip-higher", "start", "wide", "end", "bapo", "bapo-gradient")
_SETTINGS = ("bapo-readme", "bapo-released", "bapo-script")
_RIVALS = ("on-policy", "clip-higher", "start", "wide", "end", "bapo-gradient")


def figure(measured: Measurements) -> Figure:
    """Success, entropy against success, and the bounds and shares of both searches."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7), layout="constrained")
    axes = canvas.subplots(2, 2)
    last = len(measured.details["looks"]["clip"]["reward"])
    for arm in ARMS:
        looks = measured.details["looks"][arm]
        style = "-" if arm.startswith("bapo") else "--"
        axes[0, 0].plot(looks["reward"][:last], style, label=arm)
        axes[0, 1].plot(looks["reward"], looks["entropy"], style, label=arm)
    axes[0, 0].axvline(READ, color="grey", lw=0.8)
    axes[0, 0].set(title="success (grey: where it is compared)", xlabel="rollout batch", ylabel="success")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(title="entropy at equal success", xlabel="success", ylabel="entropy (nats/token)")
    for arm, bounds in measured.details["bounds"].items():
        axes[1, 0].plot(bounds["high"], lw=0.8, label=f"{arm}, high")
        axes[1, 0].plot(bounds["low"], lw=0.8, label=f"{arm}, low")
        for name in ("share_before", "share_after"):
            later = np.arange(len(bounds[name])) % UPDATES > 0
            axes[1, 1].plot(np.asarray(bounds[name])[later], lw=0.8, label=f"{arm}, {name.replace('_', ' ')}")
    axes[1, 0].set(title="bounds of the ratio", xlabel="update")
    axes[1, 1].axhline(0.4, color="grey", lw=0.8)
    axes[1, 1].set(title="share of the positive tokens, updates with r ≠ 1", xlabel="update")
    for axis in axes[1]:
        axis.legend(fontsize=8)
    return canvas


def _mechanism(arm: str, words: str) -> Claim:
    rises = f"unequal/{arm}/rises"
    return Claim(
        id=f"A-{arm}",
        paper_says="The search re-balances: it raises the share of the positive tokens until it reaches its target.",
        measured=f"{words}: share minus target wherever the search says that it is reached (smallest), and part of the "
        "updates with r != 1 in which the search moved a bound that end with a larger share than the start bounds.",
        criterion=AllOf((Bound(f"unequal/{arm}/shortfall", ">=", -1e-9), Bound(rises, ">=", 0.95))),
        effect=rises,
    )


def _rule(side: str, says: str) -> Claim:
    share = f"rule/{side}/improbable"
    return Claim(
        id=f"D-{side}",
        paper_says=says,
        measured="Part of random softmax states in which it does so, where all actions that the wider clip sets free are "
        "improbable (log pi < -H); exact gradient of the clipped objective, central difference.",
        criterion=Bound(share, ">=", 0.99),
        effect=share,
    )


_SUCCESS = "unequal/bapo-minus-clip/reward"
_ENTROPY = "unequal/bapo-minus-clip/entropy-at-reward"
_ENTROPY_GRPO = "unequal/bapo-minus-on-policy/entropy-at-reward"
_INERT = "equal/bapo-minus-start/largest"
_MOVES = "unequal/bapo/high-moves"
_BLOCKED = "unequal/clip/blocked-minus-positive/improbable"

STUDY = Study(
    slug="bapo",
    claims=(
        _mechanism("bapo", "Published share (of the loss)"),
        _mechanism("bapo-gradient", "Share of the tokens that keep a gradient (ours)"),
        Claim(
            id="B-acts",
            paper_says="The bounds adapt during training.",
            measured="Part of the updates with r != 1 in which the upper bound is above its start, failures being longer.",
            criterion=Bound(_MOVES, ">=", 0.2),
            effect=_MOVES,
        ),
        Claim(
            id="B-equal-lengths",
            paper_says="(Derived, not in the paper.) With answers of equal length BAPO is the fixed clip [0.6, 1.2].",
            measured="modsum: largest absolute difference from that clip in success, entropy and gradient norms, and whether "
            "the final policies are the same to the bit (1) or not (0).",
            criterion=AllOf(
                (Bound(_INERT, "<=", 0.0), Bound("equal/bapo-minus-start/same-policy", ">=", 1.0))
            ),
            effect=_INERT,
        ),
        Claim(
            id="C-success",
            paper_says="On stale data BAPO learns faster than the symmetric clip [0.8, 1.2].",
            measured=f"Exact success after {READ} rollout batches, {UPDATES} updates each, BAPO minus clip, paired by seed.",
            criterion=Bound(_SUCCESS, ">", 0.0),
            effect=_SUCCESS,
        ),
        Claim(
            id="C-entropy",
            paper_says="BAPO preserves entropy, here against the symmetric clip [0.8, 1.2] on the same stale data.",
            measured="Entropy (nats/token) at equal success, 0.5 to 0.9, BAPO minus clip [0.8, 1.2], paired by seed.",
            criterion=Bound(_ENTROPY, ">=", 0.0, by="value"),
            effect=_ENTROPY,
        ),
        Claim(
            id="C-entropy-grpo",
            paper_says="BAPO preserves entropy, here against GRPO on policy: not lower at equal success.",
            measured="Entropy (nats/token) at equal success, 0.5 to 0.9, BAPO minus GRPO with one update per rollout batch, "
            "paired by seed. Added after the first run.",
            criterion=Bound(_ENTROPY_GRPO, ">=", 0.0),
            effect=_ENTROPY_GRPO,
        ),
        _rule("high", "Raising the upper bound lets entropy grow, through improbable positive tokens."),
        _rule("low", "Lowering the lower bound costs entropy, through improbable negative tokens."),
        Claim(
            id="D-blocked",
            paper_says="A symmetric clip blocks the low-probability positive tokens.",
            measured="Part of improbable tokens (log pi < -H) among the positive ones that [0.8, 1.2] silences in training, "
            "and that part minus the same among all positive tokens.",
            criterion=AllOf(
                (Bound("unequal/clip/blocked-improbable", ">=", 0.5, by="value"), Bound(_BLOCKED, ">", 0.0))
            ),
            effect=_BLOCKED,
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "arms",
            f"Success after {READ} rollout batches and after as many updates, final entropy, largest gradient norm.",
            tuple(
                f"unequal/{arm}/{name}"
                for name in ("reward", "final-reward", "final-entropy", "norm-max")
                for arm in ARMS
            ),
        ),
        Observation(
            "against-clip",
            "Every arm minus the symmetric clip: success, and entropy at equal success.",
            tuple(
                f"unequal/{arm}-minus-clip/{name}"
                for name in ("reward", "entropy-at-reward")
                for arm in ARMS
                if arm != "clip"
            ),
        ),
        Observation(
            "is-it-the-search",
            "BAPO minus fixed bounds out of its ranges (start [0.6, 1.2], wide [0.6, 3], end [0.9, 3]), minus the other rivals.",
            tuple(
                f"unequal/bapo-minus-{rival}/{name}"
                for name in ("reward", "entropy-at-reward", "norm-max")
                for rival in _RIVALS
            ),
        ),
        Observation(
            "other-settings",
            "The settings of README, configuration and run script (the last two with dual clip) against the symmetric clip.",
            tuple(
                f"unequal/{arm}-minus-clip/{name}"
                for name in ("reward", "entropy-at-reward")
                for arm in _SETTINGS
            ),
        ),
        Observation(
            "search",
            "What the searches did (updates with r != 1): of those that moved a bound the parts that end with a larger share, "
            "a smaller one, the target reached; moves, bounds, shares. And steps taken in vain at r = 1.",
            tuple(
                f"unequal/{arm}/{name}"
                for arm in ("bapo", "bapo-gradient")
                for name in (
                    "rises",
                    "falls",
                    "rescued",
                    "high-moves",
                    "low-moves",
                    "satisfied",
                    "share-before",
                    "share-after",
                    "mean-low",
                    "mean-high",
                    "first-share",
                    "first-steps",
                )
            ),
        ),
        Observation(
            "equal-lengths",
            "modsum: how often the search moved, lowest share; with a target of 1/2 as well.",
            (
                "equal/bapo/moves",
                "equal/bapo/lowest-share",
                "equal/bapo-half/moves",
                "equal/bapo-half-minus-start/largest",
            ),
        ),
        Observation(
            "rule",
            "The rule where it frees improbable and probable actions together, and where it frees any.",
            tuple(f"rule/{side}/{name}" for side in ("high", "low") for name in ("mixed", "any", "states")),
        ),
        Observation(
            "blocked",
            "Improbable tokens among the blocked and among all positive ones; failed over right length at the start.",
            (
                "unequal/clip/blocked-improbable",
                "unequal/clip/positive-improbable",
                "unequal/initial/length-ratio",
            ),
        ),
    ),
    limits=(
        "Tables of logits, not language models; eight full-batch updates on each rollout batch stand for staleness, with a "
        "step size at which the clip silences a few per cent of the tokens, more than in language models. Nothing explodes at "
        "this scale, so the paper's claim of stability is not tested beyond the gradient norms."
    ),
)
