"""The figure of the near-collapse study: one panel for each part, the geometry and the spectrum among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uncollapse.studies.nc_perturbation.networks import ARMS
from uncollapse.studies.nc_perturbation.theory import BETAS, EPS
from uncollapse.studies.study import Measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(measured: Measurements) -> Figure:
    """Flow, geometry, ties, response; spectrum, depth, effective steps, weight decay."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(16, 8), layout="constrained")
    panels = canvas.subplots(2, 4).flat
    for draw, axis in zip(
        (_flow, _geometry, _tied, _response, _spectrum, _depth, _steps, _decay), panels, strict=True
    ):
        draw(axis, measured.details)
    return canvas


def _flow(axis: Axes, details: Any) -> None:
    for course in details["flow"]:
        axis.semilogy(course["t"], course["nc1"], ".-", lw=0.8)
    axis.set(title="A: central path, random problems", xlabel="t", ylabel="NC1~ / NC1~ at the start")


def _geometry(axis: Axes, details: Any) -> None:
    for at, (points, size) in enumerate(zip(details["geometry"], (6, 8, 30), strict=True)):
        x = np.asarray(points)
        colours = [f"C{3 * k // len(x)}" for k in range(len(x))]
        axis.scatter(x[:, 0], x[:, 1], s=size, c=colours, alpha=(0.25, 0.5, 1.0)[at], marker=".o*"[at])
    axis.set(title="A: three classes at t = 0 (dots), 1, 5 (stars)", aspect="equal", xticks=[], yticks=[])


def _tied(axis: Axes, details: Any) -> None:
    low, middle, high = 1 - np.asarray(details["tied"])[::-1]
    axis.loglog(BETAS, middle, "o-", label="median")
    axis.fill_between(BETAS, low, high, alpha=0.2, label="all problems")
    axis.set(title="B: what a tie to H0 leaves of collapse", xlabel="beta", ylabel="relative fall of NC1~")
    axis.legend(fontsize=8)


def _response(axis: Axes, details: Any) -> None:
    axis.loglog(EPS, details["response"]["exact"], "o-", label="F dH0")
    axis.loglog(EPS, details["response"]["first"], "s--", label="first order in 1/beta")
    axis.set(title="C: error of the linear response", xlabel="size of dH0", ylabel="relative to dH - dH0")
    axis.legend(fontsize=8)


def _spectrum(axis: Axes, details: Any) -> None:
    for name in details["spectrum"][0]:
        values = [row[name] for row in details["spectrum"]]
        if name == "off":
            axis.plot(details["penalties"], values, "k:", label="between classes")
        else:
            axis.plot(details["penalties"], [1 - value for value in values], ".-", label=name)
    axis.set(title="C: spectrum at beta = 100", xlabel="lam_h", ylabel="1 - singular value of F_kk")
    axis.legend(fontsize=7)


def _depth(axis: Axes, details: Any) -> None:
    labels = {
        "nc1-quotient": ("C0", "trained"),
        "test": ("C1", "test digits"),
        "random": ("C7", "untrained layers"),
    }
    labels["predicted"] = ("k", "predicted from the first two")
    for name, (colour, label) in labels.items():
        for at, run in enumerate(details["layers"]):
            course = np.asarray(run[name], dtype=float)
            axis.semilogy(
                course,
                color=colour,
                lw=0.9,
                ls=":" if name == "predicted" else "-",
                label=None if at else label,
            )
    axis.set(title="D: layer by layer", xlabel="layers", ylabel="NC1~")
    axis.legend(fontsize=8)


def _steps(axis: Axes, details: Any) -> None:
    for run in details["layers"]:
        steps = np.asarray([value or np.nan for value in run["steps"]], dtype=float)
        axis.semilogy(range(1, len(steps) + 1), steps, "o-", lw=0.8)
    axis.set(title="D: effective 1/beta of each layer (experimental)", xlabel="layer", ylabel="1/beta")


def _decay(axis: Axes, details: Any) -> None:
    arms = [arm for arm in ARMS if arm != "baseline"]
    for loss, colour, shift in (("mse", "C0", -0.12), ("ce", "C3", 0.12)):
        for at, arm in enumerate(arms):
            change = [np.log(run[arm]["nc1"] / run["baseline"]["nc1"]) for run in details["decay"][loss]]
            label = loss if at == 0 else None
            axis.plot(np.full(len(change), at + shift), change, "o", color=colour, alpha=0.6, label=label)
    axis.axhline(0, color="k", lw=0.6)
    axis.set(title="E: weight decay, by seed", ylabel="ln NC1 against the baseline")
    axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
    axis.legend(fontsize=8)
