"""Reproduction of "Linguistic Collapse: Neural Collapse in (Large) Language Models" (2405.17767).

A: SmolLM2-135M at its vocabulary of 49,152, against its own head with permuted rows. B: 27 language models trained from scratch,
three widths, depths and lengths, and 16 that differ in the seed alone: do the metrics follow the held-out loss? C: balanced
digits, where the same code has to find the classical collapse. The claims were fixed before the run; learning rates
were chosen on seed 1000, which the study does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim, Op
from uncollapse.studies.linguistic_collapse.experiment import DIGITS, REAL, Size, measure
from uncollapse.studies.linguistic_collapse.ladder import COMPARED, CONTROLLED
from uncollapse.studies.linguistic_collapse.real_model import TIME
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIONS, HELD_OUT = (Size.parts * windows * (TIME - 1) for windows in (Size.windows, Size.held_out))
"""Next tokens of SmolLM2's text: for the means, and of other modules for NC4."""

DRAWN = (
    ("ln_cdnv", "ln CDNV (NC1)"),
    ("gnc2/log_kernel/cov", "CoV of the log kernel (GNC2)"),
    ("nc3/cosine/mean", "mean cosine of head and means (NC3)"),
    ("unc3/cosine/cov", "CoV of that cosine (UNC3)"),
    ("nc4", "agreement with the nearest mean (NC4)"),
    ("nc2/log_norm/cov", "CoV of log norms (NC2)"),
)


def figure(measured: Measurements) -> Figure:
    """Each metric against the held-out loss of the ladder; colour is length, size is width; crosses are the siblings."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7), layout="constrained")
    rungs = np.asarray(measured.details["rungs"], dtype=float)
    loss, equal = ([run["loss"] for run in measured.details[name]] for name in ("runs", "siblings"))
    for axis, (name, label) in zip(canvas.subplots(2, 3).flat, DRAWN, strict=True):
        for colour, length in enumerate(sorted(set(rungs[:, 2]))):
            chosen = np.flatnonzero(rungs[:, 2] == length)
            values = [measured.details["runs"][i][name] for i in chosen]
            axis.scatter(
                [loss[i] for i in chosen], values, s=rungs[chosen, 0], c=f"C{colour}", alpha=0.7,
                label=f"{length:g} steps",
            )  # fmt: skip
        axis.plot(
            equal, [run[name] for run in measured.details["siblings"]], "kx", ms=4, label="one size, 16 seeds"
        )
        rho = measured.estimates[f"ladder/{name}"].value
        axis.set(xlabel="held-out loss (nats/token)", title=f"{label}\nSpearman {rho:+.2f}")
    canvas.axes[0].legend(fontsize=7)
    return canvas


def _follows(name: str, words: str, says: str, threshold: float) -> Claim:
    op: Op = ">" if threshold > 0 else "<"
    return Claim(
        id=f"B-{words.split()[0]}",
        paper_says=says,
        measured=f"Spearman correlation of held-out loss and {words} over 27 models.",
        criterion=AllOf(
            (
                Bound(f"ladder/{name}", op, threshold, by="value"),
                Bound(f"ladder/{name}", op, 0.0),
            )
        ),
        effect=f"ladder/{name}",
    )


STUDY = Study(
    slug="linguistic-collapse",
    claims=(
        Claim(
            id="A-alignment",
            paper_says="Head rows of trained language models align with the class means of their features (NC3).",
            measured="Mean cosine of head rows and centred class means of SmolLM2-135M, against its head with permuted rows, "
            "five stretches of text.",
            criterion=AllOf(
                (
                    Bound("smollm2-minus-permuted/nc3/cosine/mean", ">", 0.05),
                    Bound("smollm2/permuted/cosine", "<=", 0.1, by="value"),
                )
            ),
            effect="smollm2-minus-permuted/nc3/cosine/mean",
        ),
        Claim(
            id="A-agreement",
            paper_says="Trained language models agree with the nearest class mean on held-out text well above chance (NC4).",
            measured="Agreement of SmolLM2-135M on held-out modules, against its head with permuted rows, five stretches of text.",
            criterion=AllOf(
                (
                    Bound("smollm2-minus-permuted/nc4/full", ">", 0.05),
                    Bound("smollm2/permuted/nc4", "<=", 0.005, by="value"),
                )
            ),
            effect="smollm2-minus-permuted/nc4/full",
        ),
        _follows("ln_cdnv", "ln CDNV", "Within-class variability (NC1) falls with the loss.", 0.6),
        _follows(
            "gnc2/log_kernel/cov",
            "uniformity (CoV of the log kernel)",
            "Class means become uniform on the sphere (GNC2) as the loss falls.",
            0.5,
        ),
        _follows(
            "nc4", "NC4 agreement", "Agreement with the nearest class mean grows as the loss falls.", -0.6
        ),
        Claim(
            id="B-seeds",
            paper_says="Part of the relation does not come from scale: it holds among models that differ in the seed alone.",
            measured="Spearman correlation of held-out loss and NC4 agreement over 16 models of one size and length.",
            criterion=Bound("siblings/nc4", "<", 0.0),
            effect="siblings/nc4",
        ),
        Claim(
            id="C-balanced",
            paper_says="With few balanced classes training past zero error collapses features to a simplex ETF (NC1 to NC4).",
            measured="Digits, 10 balanced classes, perceptron with batch normalization: CDNV, mean and spread of cosines between means "
            "(ETF: -1/9 and 0), alignment, agreement on training images.",
            criterion=AllOf(
                (
                    Bound("digits/nc1/cdnv/mean", "<=", 0.02),
                    Bound("digits/nc2/cosine/mean", "<=", -0.1),
                    Bound("digits/nc2/cosine/std", "<=", 0.1),
                    Bound("digits/nc3/cosine/mean", ">=", 0.98),
                    Bound("digits/nc4", ">=", 0.99),
                )
            ),
            effect="digits/nc2/cosine/std",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "ladder",
            "Spearman correlation of held-out loss and each metric over 27 models; range of the losses; classes seen.",
            (
                *(f"ladder/{name}" for name in COMPARED),
                "ladder/loss/least",
                "ladder/loss/largest",
                "ladder/classes",
            ),
        ),
        Observation(
            "same-length",
            "The same with loss and metric ranked among the nine models of the same length: what is left without the "
            "progress of training.",
            tuple(f"same-length/{name}" for name in COMPARED),
        ),
        Observation(
            "siblings",
            "The same over 16 models that differ in the seed alone, and the spread of their losses.",
            (*(f"siblings/{name}" for name in COMPARED), "siblings/loss/spread"),
        ),
        Observation(
            "shuffled",
            "Control: the same over 27 models with the tokens handed to the positions at random, so that classes mean nothing.",
            tuple(f"shuffled/{name}" for name in CONTROLLED),
        ),
        Observation(
            "unc3",
            "How much stronger evenness of alignment (UNC3) is correlated with the loss than its size (NC3), by |Spearman|.",
            ("ladder/unc3-over-nc3",),
        ),
        Observation(
            "real-model",
            f"SmolLM2-135M on all text together: {POSITIONS:,} positions for the means, {HELD_OUT:,} for NC4; `twice/cdnv` is over classes seen "
            "twice or more, `above_uniform` the mean log kernel above that of uniform directions.",
            tuple(f"smollm2/{name}" for name in REAL),
        ),
        Observation(
            "digits",
            "Balanced digits with batch normalization, and, as a control, without it.",
            tuple(f"{arm}/{name}" for arm in ("digits", "digits-plain") for name in DIGITS),
        ),
    ),
    limits=(
        "Models of 33 thousand to 1.1 million parameters, widths 32 to 128, about 350 byte-pair classes, sources of Python's standard "
        "library, at most 1,000 steps of 1,024 tokens (a little over one pass), where the paper has up to 205 million parameters, 29,233 "
        "classes, 470 million tokens and 10 passes. Every model of the ladder has one seed. SmolLM2 is looked at, not trained, "
        "on text that may or may not have been part of its training."
    ),
    sources=("uncollapse.measure", "uncollapse.representation", "uncollapse.studies.linguistic_collapse"),
)
