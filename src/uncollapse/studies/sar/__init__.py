"""Reproduction of "Towards Stable Test-Time Adaptation in Dynamic Wild World" (2302.12400).

Two small classifiers trained on clean digits meet streams of shifted ones, in random and in class order: no adaptation, Tent, SAR,
and SAR with some of its parts. Severities and learning rates were chosen on seeds 100 to 102, which the study does not
use; claims and criteria were fixed before the run. The observations `part-by-part`, the second of `gradient` and
the arm `low-margin` were added after a first run, whose claims and numbers were the same. Shrunk against the specification of the study: streams of 2,700 images, and
batches of one image on 450 of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.sar.experiment import LARGE, LOST, MAIN, PAIRS, RATES, REPORTED, SEVERITY, measure
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = {
    "none": "k:", "tent": "C3-o", "sar": "C0-o", "filter": "C1--", "sam": "C2--", "reset": "C4--",
    "no-reset": "C0:",
}  # fmt: skip
KINDS = {"conv": "GroupNorm conv net", "mlp": "LayerNorm perceptron"}


def figure(measured: Measurements) -> Figure:
    """Accuracy and largest class by learning rate, gradients by entropy, and the toy."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(12, 7), layout="constrained")
    axes = canvas.subplots(2, 3)
    for row, kind in zip(axes, measured.details["curves"], strict=False):
        for axis, name in zip(row, ("accuracy", "share"), strict=False):
            for arm, style in DRAWN.items():
                curve = measured.details["curves"][kind][arm]
                if arm == "none":
                    axis.axhline(curve[name][0], color="k", linestyle=":", label=arm)
                else:
                    axis.semilogx(curve["rate"], curve[name], style, label=arm)
            label = "accuracy" if name == "accuracy" else "share of the largest class at the end"
            axis.set(title=KINDS[kind], xlabel="learning rate", ylabel=label, ylim=(0, 1))
    axes[0, 0].legend(fontsize=8)
    middle = np.arange(0.05, 1, 0.1)
    for kind, rows in measured.details["gradients"].items():
        means = np.ma.masked_invalid(np.array(rows, dtype=float)).mean(axis=0)
        axes[0, 2].plot(middle, means / means.max(), "o-", label=KINDS[kind])
    axes[0, 2].axvline(0.4, color="k", linestyle=":", label="margin")
    axes[0, 2].set(title="gradient of one sample", xlabel="entropy / ln C", ylabel="norm / largest")
    for name, seen in measured.details["toy"].items():
        axes[1, 2].plot(10 * np.arange(len(seen)), seen, label=name.replace("-", " ") + " outliers")
    axes[1, 2].set(title="toy: bias", xlabel="step", ylabel="b")
    for axis in axes[:, 2]:
        axis.legend(fontsize=8)
    return canvas


def _claims(kind: str) -> tuple[Claim, ...]:
    at = " and ".join(f"{rate:g}" for rate in LARGE)
    cells = f"{KINDS[kind]}, mean over 3 corruptions, 2 orders and learning rates {at}"
    return (
        Claim(
            id=f"tent-{kind}",
            paper_says="Entropy minimisation alone collapses on such streams, models with GroupNorm or LayerNorm included.",
            measured=f"Share of runs of Tent that end with one class in 60 % of the last 400 predictions, or lose {LOST:g} of "
            f"accuracy against no adaptation; {cells}.",
            criterion=Bound(f"{kind}/tent/collapsed", ">=", 0.6, by="value"),
            effect=f"{kind}/tent/collapsed",
        ),
        Claim(
            id=f"share-{kind}",
            paper_says="SAR prevents collapse to a few classes.",
            measured=f"Share of the largest class among the last 400 predictions, Tent minus SAR, paired by seed; {cells}.",
            criterion=AllOf(
                (
                    Bound(f"{kind}/tent-minus-sar/share", ">=", 0.15, by="value"),
                    Bound(f"{kind}/tent-minus-sar/share", ">", 0.0),
                )
            ),
            effect=f"{kind}/tent-minus-sar/share",
        ),
        Claim(
            id=f"accuracy-{kind}",
            paper_says="SAR is more accurate than Tent: 37.2 against 22.0 % (ResNet50-GN), 58.0 against 47.3 % (ViT-B-LN), "
            "label-ordered ImageNet-C.",
            measured=f"Accuracy over the whole stream, SAR minus Tent, paired by seed; {cells}.",
            criterion=AllOf(
                (
                    Bound(f"{kind}/sar-minus-tent/accuracy", ">=", 0.03, by="value"),
                    Bound(f"{kind}/sar-minus-tent/accuracy", ">", 0.0),
                )
            ),
            effect=f"{kind}/sar-minus-tent/accuracy",
        ),
        Claim(
            id=f"gradient-{kind}",
            paper_says="Samples of high entropy are those with large gradients, so a filter on entropy drops them.",
            measured="Mean gradient norm of single samples with at least 0.4 ln C of entropy over that of the others, shifted "
            f"images before adaptation; {KINDS[kind]}, mean over 3 corruptions.",
            criterion=Bound(f"{kind}/gradient/ratio", ">", 1.0),
            effect=f"{kind}/gradient/ratio",
        ),
    )


def _of_both(*names: str) -> tuple[str, ...]:
    return tuple(f"{kind}/{name}" for kind in KINDS for name in names)


STUDY = Study(
    slug="sar",
    claims=(
        *_claims("conv"),
        *_claims("mlp"),
        Claim(
            id="toy",
            paper_says="A few samples with large gradients cause the collapse; filtered out, it does not happen.",
            measured="Bias of a two-class toy after 300 steps, in logits, constructed for this: Tent with 5 % outliers, and "
            "both controls, Tent without them and SAR with them. Deterministic.",
            criterion=AllOf(
                (
                    Bound("toy/tent-with/bias", ">=", 4.0),
                    Bound("toy/tent-without/bias", "<=", 0.05),
                    Bound("toy/sar-with/bias", "<=", 0.05),
                )
            ),
            effect="toy/tent-with/bias",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "gain",
            "Accuracy minus that of no adaptation, at the smallest and the largest learning rate.",
            _of_both(
                *(f"{arm}-minus-none/accuracy-{rate:g}" for arm in MAIN for rate in (RATES[0], RATES[-1]))
            ),
        ),
        Observation(
            "gain-by-shift",
            f"SAR's at learning rate {RATES[0]:g}, by corruption.",
            _of_both(*(f"sar-minus-none/{shift}-{RATES[0]:g}" for shift in SEVERITY["conv"])),
        ),
        Observation(
            "parts",
            "SAR's parts alone and together, at the two large learning rates: accuracy, largest share, share of runs collapsed.",
            _of_both(
                *(f"{arm}/{name}" for arm, names in REPORTED.items() for name in names if name != "resets")
            ),
        ),
        Observation(
            "part-by-part",
            "Differences in accuracy between these, paired by seed.",
            _of_both(*(f"{more}-minus-{less}/accuracy" for more, less in PAIRS)),
        ),
        Observation(
            "resets",
            "Resets per run: SAR; as the official code resets (m and momentum kept); at 0.2 nats whatever C is.",
            _of_both("sar/resets", "official/resets", "0.2-nats/resets"),
        ),
        Observation(
            "mixture",
            "Each image with one of the three corruptions, random order, the two large learning rates.",
            _of_both(
                "mixture/none/accuracy",
                *(f"mixture/{arm}/{name}" for arm in MAIN for name in ("accuracy", "share")),
            ),
        ),
        Observation(
            "single",
            "Batches of one image, random order, 450 images, learning rate 0.1 / 32; and SAR's resets per run.",
            _of_both(
                "single/none/accuracy",
                *(f"single/{arm}/{name}" for arm in MAIN for name in ("accuracy", "share")),
                "single/sar/resets",
            ),
        ),
        Observation(
            "gradient",
            "Rank correlation of entropy and gradient norm over samples; and mean norm of samples between 0.2 and 0.4 ln C, which "
            "the filter keeps, over that of those it drops.",
            _of_both("gradient/rank", "gradient/middle"),
        ),
        Observation(
            "detector",
            "Share of runs that CollapseDetector flags on the last 400 predictions: runs with 60 % in one class, and the others.",
            _of_both("detector/collapsed", "detector/others"),
        ),
    ),
    limits=(
        "Classifiers of 7,000 and 45,000 parameters with three norm layers on digits of 16 x 16 pixels, three synthetic shifts, "
        "streams of 2,700 images. No ImageNet-C, no ResNet, no ViT, no BatchNorm. Learning rates are 20 to 800 times the "
        "paper's at this batch size. e_reset and E0 are scaled to 10 classes."
    ),
    sources=("uncollapse.measure", "uncollapse.representation.sar", "uncollapse.studies.testbeds"),
)
