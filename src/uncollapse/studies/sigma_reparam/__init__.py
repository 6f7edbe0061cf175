"""Reproduction of "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (2303.06296).

Transformers without norms, with sigmaReparam and with the other remedies, trained by Adam without warm-up at learning rates
up to where the plain net fails: real digits as 16 patches, and bytes of real sources. And one weight alone, under the same
gradient at every step. The claims here were fixed before the run; sizes, learning rates and how weights are drawn after
a look at seed 1000, which the study does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uncollapse.studies.claims import AllOf, Bound, Claim
from uncollapse.studies.sigma_reparam.experiment import ENOUGH, QUICK, Size, measure
from uncollapse.studies.sigma_reparam.training import ARMS
from uncollapse.studies.study import Measurements, Observation, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = {
    "plain": "k-", "warm-up": "k--", "pre-ln": "C2-", "qk-norm": "C4-", "softcap": "C5-",
    "spectral-norm": "C1-", "sigma": "C0-", "sigma-one": "C0--",
}  # fmt: skip


def figure(measured: Measurements) -> Figure:
    """One weight; digits and text against the learning rate; entropy against loss."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 7.5), layout="constrained")
    (weight, accuracy), (loss, entropy) = canvas.subplots(2, 2)
    widths = measured.details["widths"]
    for name, label in (
        ("plain", "plain: |W|"), ("exact", "sigmaReparam, exact u: |W_hat|"),
        ("gamma", "one power step: gamma"), ("one", "one power step: true |W_hat|"),
    ):  # fmt: skip
        values = [measured.estimates[f"growth/{name}/{width}"].value for width in widths]
        weight.loglog(widths, values, "o-", label=label)
    weight.set(title="one weight, the same signs every step", xlabel="width", ylabel="change per step / lr")
    for kind, key, axis in (("digits", "accuracy", accuracy), ("text", "loss", loss)):
        for arm, style in DRAWN.items():
            rates, values = _curve(measured.details[kind][arm], key)
            axis.semilogx(rates, values, style, label=arm)
        axis.set(title=kind, xlabel="learning rate", ylabel=f"{key}, median of seeds")
    top = _curve(measured.details["text"]["pre-ln"], "loss")[1]
    loss.set_ylim(min(top) - 0.5, 8)
    for arm, style in DRAWN.items():
        low, end = (_curve(measured.details["digits"][arm], key)[1] for key in ("lowest", "loss"))
        filled = "none" if style.endswith("--") else "full"
        entropy.semilogy(low, end, style.rstrip("-") + "o", label=arm, fillstyle=filled, markersize=5)
    entropy.set(
        title="digits, every arm and learning rate",
        xlabel="least attention entropy (nats)",
        ylabel="final loss",
    )
    for axis in canvas.axes:
        axis.legend(fontsize=7)
    return canvas


def _curve(by_rate: dict[str, Any], key: str) -> tuple[list[float], list[float]]:
    """Medians over seeds at every learning rate; what is not finite is drawn large."""
    values = [runs[key] for runs in by_rate.values()]
    return [float(lr) for lr in by_rate], [v if v is not None and np.isfinite(v) else 1e4 for v in values]


def _failing(kind: str, plain: str, sigma: str, place: str, words: str) -> Claim:
    effect = f"{kind}/{place}-failure/sigma/learned"
    return Claim(
        id=f"{kind}-{place}-failure",
        paper_says="Where a higher learning rate makes the plain transformer diverge, sigmaReparam trains.",
        measured=f"At the {words} learning rate at which the plain net {plain} in 4 of 5 seeds: share of seeds in which "
        f"sigmaReparam {sigma}.",
        criterion=Bound(effect, ">=", ENOUGH),
        effect=effect,
    )


def _wider(kind: str, trainable: str) -> Claim:
    return Claim(
        id=f"{kind}-range",
        paper_says="sigmaReparam is robust to the choice of hyperparameters.",
        measured=f"Octaves of learning rate that are trainable ({trainable}), sigmaReparam minus plain, by seed.",
        criterion=Bound(f"{kind}/octaves/median-sigma-minus-plain", ">=", 2.0),
        effect=f"{kind}/octaves/sigma-minus-plain",
    )


def _correlation(kind: str) -> Claim:
    return Claim(
        id=f"{kind}-entropy-and-loss",
        paper_says="Low attention entropy goes with instability: high, oscillating or diverging loss.",
        measured="Spearman correlation of the least mean attention entropy of a run with its final loss, all arms, "
        "learning rates and seeds.",
        criterion=AllOf(
            (Bound(f"{kind}/rank-correlation", "<", 0.0), Bound(f"{kind}/rank-correlation-p", "<", 0.01))
        ),
        effect=f"{kind}/rank-correlation",
    )


def _kept(kind: str) -> Claim:
    effect = f"{kind}/first-failure/sigma-minus-plain/lowest"
    return Claim(
        id=f"{kind}-entropy-kept",
        paper_says="sigmaReparam prevents entropy collapse.",
        measured="Least mean attention entropy during training (nats) at the least learning rate at which the plain "
        "net fails, sigmaReparam minus plain, paired by seed.",
        criterion=Bound(effect, ">", 0.0),
        effect=effect,
    )


_DIGITS = ("has less than half of the held-out digits right", "has more than 0.8 right")
_TEXT = ("is no better than byte frequencies", "is better by half a nat")
_REMEDIES = tuple(arm for arm in ARMS if arm not in ("plain", "sigma"))

STUDY = Study(
    slug="sigma-reparam",
    claims=(
        Claim(
            id="growth-plain",
            paper_says="An Adam step grows the spectral norm of a weight with the square root of its width.",
            measured="Slope of the growth per step against width (64 to 512), logarithmic axes, plain weight.",
            criterion=AllOf((Bound("growth/plain/slope", ">=", 0.4), Bound("growth/plain/slope", "<=", 0.6))),
            effect="growth/plain/slope",
        ),
        Claim(
            id="growth-sigma",
            paper_says="With sigmaReparam it moves by the learning rate, whatever the width.",
            measured="The same for the largest change of the norm of W_hat in a step, u exact at every step.",
            criterion=AllOf(
                (Bound("growth/exact/slope", ">=", -0.1), Bound("growth/exact/slope", "<=", 0.1))
            ),
            effect="growth/exact/slope",
        ),
        Claim(
            id="growth-one-power-step",
            paper_says="One power iteration per training step is enough.",
            measured="The same for the true norm of W_hat when u is one power iteration per step: what the layer computes with.",
            criterion=AllOf((Bound("growth/one/slope", ">=", -0.1), Bound("growth/one/slope", "<=", 0.1))),
            effect="growth/one/slope",
        ),
        _failing("digits", *_DIGITS, "first", "least"),
        _failing("digits", *_DIGITS, "last", "largest"),
        _wider("digits", "at least 0.9 of the best accuracy of any arm"),
        _kept("digits"),
        _correlation("digits"),
        _failing("text", *_TEXT, "first", "least"),
        _failing("text", *_TEXT, "last", "largest"),
        _wider("text", "a loss at most 0.25 nats above the best of any arm"),
        _kept("text"),
        _correlation("text"),
        Claim(
            id="digits-without-norms",
            paper_says="sigmaReparam trains without warm-up and without LayerNorm to what the tuned recipe reaches.",
            measured="Best accuracy over learning rates, sigmaReparam without norms minus pre-LN, paired by seed.",
            criterion=Bound("digits/best/sigma-minus-pre-ln", ">=", -0.03),
            effect="digits/best/sigma-minus-pre-ln",
        ),
    ),
    measure=measure,
    figure=figure,
    observations=(
        Observation(
            "gamma-one-power-step",
            "Largest change of gamma in a step over the learning rate with one power iteration: what the theorem speaks of.",
            tuple(f"growth/gamma/{width}" for width in Size().widths),
        ),
        Observation(
            "norm-one-power-step",
            "The same for the true norm of the weight that the layer computes with.",
            tuple(f"growth/one/{width}" for width in Size().widths),
        ),
        *(
            Observation(
                f"{kind}-remedies-{what}",
                text,
                tuple(f"{kind}/{stem}/{arm}{tail}" for arm in ("plain", "sigma", *_REMEDIES)),
            )
            for kind in ("digits", "text")
            for what, text, stem, tail in (
                (
                    "learned",
                    "Share of seeds that learn where the plain net fails, by arm.",
                    "failure",
                    "/learned",
                ),
                ("lowest", "Least attention entropy there (nats), by arm.", "failure", "/lowest"),
                ("octaves", "Trainable range (octaves).", "octaves", ""),
                ("best", "Best accuracy (digits) or loss (text) over learning rates.", "best", ""),
            )
        ),
        Observation(
            "within-rates",
            "The rank correlation of entropy and loss among runs at one learning rate: what is left of it when the learning rate "
            "cannot drive both.",
            ("digits/rank-correlation-within-rates", "text/rank-correlation-within-rates"),
        ),
        Observation(
            "gap",
            "Largest true norm of a weight over its gamma at the end of training, where the plain net fails.",
            tuple(
                f"{kind}/failure/{arm}/gap" for kind in ("digits", "text") for arm in ("sigma", "sigma-one")
            ),
        ),
        Observation(
            "failure-rate",
            "The least and the largest learning rate of the grid at which the plain net fails.",
            tuple(f"{kind}/{place}-failure/lr" for kind in ("digits", "text") for place in ("first", "last")),
        ),
    ),
    limits=(
        "Width 32, six and four layers, a few hundred steps, learning rates by octaves: divergence in minutes, "
        "not in weeks. Weights are drawn as PyTorch does, not with 0.02. One optimiser, Adam."
    ),
    sources=(
        "uncollapse.measure",
        "uncollapse.attention",
        "uncollapse.studies.sigma_reparam",
        "uncollapse.studies.testbeds",
    ),
)

__all__ = ["DRAWN", "QUICK", "STUDY"]
