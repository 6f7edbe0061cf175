"""Reproduction of "Entropy-Guided Attention for Private LLMs" (2501.03489).

A small decoder on the bytes of Python's standard library, with one nonlinearity less at a time, then with what the paper
puts in their place. Claims and criteria were fixed before the first run and have not changed since; the claim with a fixed
yardstick was added when seed 100, on which the learning rate was looked for, showed that the paper's histogram and that
yardstick can disagree.

This is the second run. The first, on seeds 0 to 2, gave all arms the rate 3e-3, chosen on that one seed for SM+LN+G, of which
seed 1 then trained badly (2.82 nats per byte against 2.35 and 2.37). Claim b was reproduced, the others inconclusive: SM minus
SM+LN+G in the lowest layer -0.11 nats [-0.79, 0.56]; the penalty's overload by the paper's histogram -0.07 [-0.53, 0.38],
by the fixed yardstick -0.20 [-0.45, 0.05]; its loss +0.024 [-0.046, 0.094]. So every architecture, and the penalty, now has
a rate of its own, chosen in `calibration` on seeds 1000 to 1002 and on other text before this run, which uses fresh seeds from
10 on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.entropy_guided_attention.arms import ARMS
from uncollapse.studies.entropy_guided_attention.experiment import DIFFERENCES, HISTOGRAM, measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = {
    "SM+LN+G": "k-", "SM+G": "C1-", "SM": "C3-", "SM+ScFuFFN": "C0:", "SM(t)+ScFuFFN": "C0--", "EReg": "C0-", "L2": "C2-",
}  # fmt: skip


def figure(measured: Measurements) -> Figure:
    """Held-out loss, entropy of the lowest layer, entropy by layer at the end, and the four bins of every arm."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 8), layout="constrained")
    means = measured.details
    loss, lowest, layers, bins = canvas.subplots(2, 2).flat
    for arm, style in DRAWN.items():
        for axis, name in ((loss, "loss"), (lowest, "lowest_layer")):
            axis.plot(means[arm]["step"], means[arm][name], style, label=arm)
        layers.plot(means[arm]["layers"], style, label=arm)
    loss.set(xlabel="step", ylabel="held-out loss (nats/byte)")
    lowest.set(xlabel="step", ylabel="entropy of the lowest layer (nats)")
    layers.set(xlabel="layer", ylabel="mean entropy of its heads at the end (nats)")
    loss.legend(fontsize=7)
    left = np.zeros(len(ARMS))
    for place, name in enumerate(("lowest", "second", "third", "highest")):
        share = np.array([means[arm]["bins"]["causal"][place] for arm in ARMS])
        bins.barh(list(ARMS), share, left=left, label=f"{name} quarter")
        left += share
    bins.invert_yaxis()
    bins.set(xlabel="share of heads by entropy, of what a uniform causal head has")
    bins.legend(fontsize=7)
    return canvas


def _less_overload(id: str, share: str, bin: str) -> Claim:
    return Claim(
        id=id,
        paper_says="The entropy penalty removes entropic overload.",
        measured=f"Share of heads in the {bin}: with the penalty at most 0.7 times that of SM+ScFuFFN, paired by seed.",
        criterion=AllOf(
            (
                Bound(f"SM+ScFuFFN/{share}", ">", 0.0, by="value"),
                Bound(f"EReg-minus-0.7-times-SM+ScFuFFN/{share}", "<=", 0.0),
            )
        ),
        effect=f"EReg-minus-SM+ScFuFFN/{share}",
    )


STUDY = Study(
    slug="entropy-guided-attention",
    claims=(
        Claim(
            id="a-collapse",
            paper_says="Without normalisation and activations entropy collapses in deep layers and training fails (NaN).",
            measured="Plain softmax-only decoder against SM+LN+G: share of seeds in which its lowest layer has less entropy, and "
            "in which it diverges or ends with a loss at least a tenth larger.",
            criterion=AllOf(
                (
                    Bound("SM-below-SM+LN+G/lowest_layer", ">=", 1.0, by="value"),
                    Bound("SM-fails/loss", ">=", 1.0, by="value"),
                )
            ),
            effect="SM-minus-SM+LN+G/lowest_layer",
        ),
        Claim(
            id="b-scaled-ffn",
            paper_says="Learnable scales of a fused linear feed-forward layer keep the softmax-only decoder from diverging.",
            measured="Share of seeds of SM+ScFuFFN that diverged.",
            criterion=Bound("SM+ScFuFFN/diverged", "<=", 0.0, by="value"),
            effect="SM+ScFuFFN/diverged",
        ),
        _less_overload(
            "c-overload",
            "overload",
            "highest quarter of the entropies observed in the model (the paper's histogram)",
        ),
        _less_overload(
            "c-overload-fixed",
            "overload_causal",
            "highest quarter of what a causal head can have, (ln T!)/T, a yardstick that is the same for all models",
        ),
        Claim(
            id="d-loss",
            paper_says="The penalty improves the model: perplexity falls from 3.48 (SM+ScFuFFN) to 3.21.",
            measured="Held-out loss with the penalty minus that of the same architecture without, at most 0.01 nats per byte; "
            "what temperatures and penalty each give is reported, the gain itself is not demanded.",
            criterion=Bound("EReg-minus-SM(t)+ScFuFFN/loss", "<=", 0.01, by="value"),
            effect="EReg-minus-SM(t)+ScFuFFN/loss",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "loss",
            "Held-out loss of every arm at the end (nats per byte), missing where a seed diverged.",
            tuple(f"{arm}/loss" for arm in ARMS),
        ),
        Observation(
            "overload",
            "Share of heads in the highest quarter: of the largest entropy observed (the paper), and of what a uniform causal head "
            "has. Means of all four bins of all arms, by ln T too, are in the details, as are sinks; null losses there are seeds that diverged.",
            tuple(f"{arm}/overload" for arm in HISTOGRAM) + tuple(f"{arm}/overload_causal" for arm in ARMS),
        ),
        Observation(
            "collapse", "Mean entropy of the lowest layer.", tuple(f"{arm}/lowest_layer" for arm in ARMS)
        ),
        Observation(
            "comparisons",
            "Loss and overload of arms against each other, paired by seed: temperatures alone, the penalty alone and both; the "
            "penalty per head; thresholds frozen; no dead zone; temperatures that start at 0.1 and 0.01.",
            DIFFERENCES,
        ),
    ),
    limits=(
        "A decoder of 8 layers, width 64 and 4 heads after 600 steps of 8 rows of 64 bytes, far from converged; the paper trains "
        "GPT-2 small on 2.1 billion tokens. Its batch size, which decides how much its coefficient weighs, is not stated and "
        "assumed to be 128. Learning rates come from three seeds, in steps of two; variants have the rate of the arm that they vary."
    ),
    sources=(
        "uncollapse.measure",
        "uncollapse.inspection",
        "uncollapse.attention.entropy_guided_attention",
        "uncollapse.studies.entropy_guided_attention",
        "uncollapse.studies.testbeds.text",
    ),
)
