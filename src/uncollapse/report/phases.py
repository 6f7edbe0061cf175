"""Figures of a diagnosis: the course of a run coloured by phase, the forecast, and the evidence of a finding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from uncollapse.diagnose.diagnosis import Diagnosis
from uncollapse.diagnose.finding import ENTROPY, REWARD, VALIDATION, Finding
from uncollapse.diagnose.forecast import Forecast
from uncollapse.diagnose.phases import Phase, State
from uncollapse.diagnose.series import Series, series
from uncollapse.report import figures
from uncollapse.report.blocks import FigureBlock, figure
from uncollapse.report.glossary import title_and_unit
from uncollapse.report.palette import LIGHT, SERIES
from uncollapse.report.series import Curve
from uncollapse.report.words import level

COLOUR: dict[State, str] = {
    "healthy": "s3",
    "collapsing": "s2",
    "collapsed": "s7",
    "exploding": "s4",
    "plateau": "s8",
    "unknown": "faint",
}
"""Colour role of each state."""

_EVIDENCE = 3
"""Columns that the figure of a finding shows at most."""


def course(found: Diagnosis, name: str) -> FigureBlock | None:
    """Entropy with phases and forecast, and reward with held-out reward, over one axis of steps; None without either."""
    panels: list[tuple[str, list[Curve]]] = []
    entropy, reward, held_out = (series(found.log, key, at_least=2) for key in (ENTROPY, REWARD, VALIDATION))
    if entropy is not None:
        panels.append((ENTROPY, [_curve(entropy, "Entropy")]))
    if reward is not None:
        lines = [_curve(reward, "training")] + (
            [_curve(held_out, "validation")] if held_out is not None else []
        )
        panels.append((REWARD, lines))
    if not panels:
        return None
    end = max(float(line.steps[-1]) for _, lines in panels for line in lines)
    reach = _reach(found.forecast, end)

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (key, lines) in zip(axes, panels, strict=True):
            title, unit = title_and_unit(key)
            colours = SERIES if key == ENTROPY else SERIES[1:]
            figures.curves(lines, ax, title=title, unit=unit, colours=colours, xlabel="step")
            _shade(ax, found.course.phases)
            if key == ENTROPY and found.forecast is not None:
                _ahead(ax, found.forecast, end, reach)
            ax.set_xlim(ax.get_xlim()[0], reach)

    words = "; ".join(
        f"{phase.state} from step {phase.first} to {phase.last}" for phase in found.course.phases
    )
    caption = "Behind the curves: the phases of the run." if found.course.phases else ""
    if found.forecast is not None:
        caption += " Dashed: the entropy if it keeps its pace, with the 95\u202f% band of the fitted line; the level at which it counts as spent is dotted."
    return figure(name, draw, alt=f"Course of the run: {words or 'no phases'}.", caption=caption, panels=len(panels),
                  height=230, share_x=True)  # fmt: skip


def evidence(found: Diagnosis, finding: Finding, name: str) -> FigureBlock | None:
    """The columns that a finding rests on, with the steps that it names; None if there is nothing to draw."""
    known = [
        (key, one)
        for key in finding.evidence.columns
        if (one := series(found.log, key, at_least=2)) is not None
    ]
    known = known[:_EVIDENCE]
    if not known:
        return None

    def draw(axes: Sequence[Axes]) -> None:
        for ax, (key, one) in zip(axes, known, strict=True):
            title, unit = title_and_unit(key)
            shown = one if finding.id == "gradient-spikes" else one.binned()
            figures.curves([Curve(title, shown.step, shown.value)], ax, title=title, unit=unit, xlabel="step")
            for mark in finding.evidence.marks[:12]:
                ax.axvline(mark, color=LIGHT["s2"], linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)

    ends = "; ".join(
        f"{title_and_unit(key)[0]} from {level(one.start)} to {level(one.end)}" for key, one in known
    )
    return figure(
        name, draw, alt=f"{finding.title}: {ends}.", panels=len(known), columns=min(len(known), 2), height=170
    )


def _curve(one: Series, name: str) -> Curve:
    shown = one.binned()
    return Curve(name, shown.step, shown.value)


def _shade(ax: Axes, phases: Sequence[Phase]) -> None:
    for index, phase in enumerate(phases):
        # To the next phase, so that no gap of a logging interval shows.
        right = phases[index + 1].first if index + 1 < len(phases) else phase.last
        ax.axvspan(phase.first, right, color=LIGHT[COLOUR[phase.state]], alpha=0.13, linewidth=0, zorder=0)


def _reach(forecast: Forecast | None, end: float) -> float:
    if forecast is None:
        return end
    first = float(forecast.fitted_from)
    wanted = max(step for step in (forecast.high, forecast.step, 0) if step is not None)
    return min(max(wanted * 1.05, end + 0.15 * (end - first)), end + max(end - first, 1.0))


def _ahead(ax: Axes, forecast: Forecast, end: float, reach: float) -> None:
    steps = np.linspace(forecast.fitted_from, reach, 80)
    middle, low, high = forecast.line(steps)
    _, top = ax.get_ylim()
    ahead = steps >= end
    ax.fill_between(
        steps[ahead],
        low[ahead],
        np.minimum(high[ahead], top),
        color=LIGHT["s1"],
        alpha=0.16,
        linewidth=0,
        zorder=2,
    )
    ax.plot(steps, np.minimum(middle, top), color=LIGHT["s1"], linestyle=(0, (5, 2)), linewidth=1.4, zorder=3)
    ax.axhline(forecast.target, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (1.5, 2)), zorder=2)
