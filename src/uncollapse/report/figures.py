"""The figures of the report. Each draws into `ax` (or a new figure) and returns the Axes, for use from Python too.

from uncollapse.report import figures, series
from uncollapse.runs import Run

arm = series.arm_of_run(Run.open("runs/grpo"))
figures.curves([arm.curve("entropy/token/mean")], title="Entropy", unit="nats").figure.savefig("entropy.pdf")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from uncollapse.measure.entropy_law import LawComparison
from uncollapse.report.palette import DASHES, LIGHT, SERIES, TIME
from uncollapse.report.series import Curve, Estimate, Vector
from uncollapse.report.words import number

TITLE = "panel-title"
"""Group id of the titles, by which a page finds and aligns them."""

SIZE = 12.5
"""Font size in points; a page shows one point as one pixel."""


def curves(
    lines: Sequence[Curve],
    ax: Axes | None = None,
    *,
    title: str = "",
    unit: str = "",
    colours: Sequence[str] = SERIES,
    share: bool = False,
    from_zero: bool = True,
    label: bool | None = None,
    xlabel: str = "rollout step",
) -> Axes:
    """Metrics over rollout steps, with their bands and their names at the ends of the lines.

    `share` writes the values as percentages; `from_zero` keeps zero in view; `label` names the lines (default: if
    there is more than one).
    """
    ax = _dress(ax, title, unit, xlabel)
    for index, line in enumerate(lines):
        colour, dash = (
            line.colour or colours[index % len(colours)],
            DASHES[index // len(colours) % len(DASHES)],
        )
        if line.low is not None and line.high is not None:
            ax.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.16, linewidth=0, zorder=2)
        marker = "o" if line.steps.size < 2 else ""
        ax.plot(line.steps, line.values, color=colour, linestyle=dash, linewidth=2, marker=marker, markersize=5,
                label=line.name, gid="readout", zorder=3)  # fmt: skip
    _limits(ax, lines, from_zero=from_zero, share=share)
    if share:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{_tick(100 * value)}\u202f%"))
    if label if label is not None else len(lines) > 1:
        chosen = [line.colour or colours[i % len(colours)] for i, line in enumerate(lines)]
        _name_lines(
            ax,
            [(line.steps[-1], line.values[-1], line.name, c) for line, c in zip(lines, chosen, strict=True)],
        )
    return ax


def covariance_profile(
    profile: Sequence[tuple[float, float]], ax: Axes | None = None, *, colour: str = LIGHT["s1"]
) -> Axes:
    """Mean token covariance (nats times advantage) in each top fraction, as bars on one scale.

    `profile`: (fraction, mean covariance) pairs, fractions in (0, 1].
    """
    ax = _dress(ax, "Mean covariance", "advantage \u00d7 nats", "")
    names = [f"top {100 * f:g}\u202f%" if f < 1 else "all tokens" for f, _ in profile]
    values = [value for _, value in profile]
    rows = np.arange(len(values))[::-1]
    ax.barh(rows, values, height=0.62, color=colour, zorder=3)
    span = max([abs(v) for v in values], default=1.0) or 1.0
    for row, value in zip(rows, values, strict=True):
        ax.annotate(number(value), (max(value, 0.0), row), xytext=(6, 0), textcoords="offset points", va="center",
                    fontsize=SIZE, color=LIGHT["ink"])  # fmt: skip
    ax.set_yticks(rows, names, fontsize=SIZE, color=LIGHT["ink"])
    ax.set_xlim(min([0.0, *values]) * 1.1, span * 1.18)
    ax.grid(False)
    ax.set_xticks([])
    ax.axvline(0, color=LIGHT["faint"], linewidth=1)
    ax.spines["bottom"].set_visible(False)
    return ax


def law(found: LawComparison, ax: Axes | None = None, *, title: str = "Reward", level: float = 0.95) -> Axes:
    """Reward against entropy, both fitted laws, the confidence band of the exponential one and its ceiling at H = 0."""
    ax = _dress(ax, title, "mean of a step", "entropy (nats per token)", whole=False)
    curve = found.exponential
    spread = float(np.ptp(curve.reward)) or 1.0
    bottom = float(curve.reward.min()) - 0.15 * spread
    top = max(float(curve.reward.max()), curve.ceiling) + 0.2 * spread
    grid = np.linspace(0.0, float(curve.entropy.max()) * 1.03, 160)
    low, high = (np.clip(edge, bottom, top) for edge in curve.interval(grid, level))
    ax.fill_between(grid, low, high, color=LIGHT["s1"], alpha=0.14, linewidth=0)
    ax.plot(grid, found.straight_line.predict(grid), color=LIGHT["s8"], linestyle=DASHES[1], linewidth=1.6,
            label="straight line")  # fmt: skip
    ax.plot(grid, curve.predict(grid), color=LIGHT["s1"], linewidth=2.2, zorder=3,
            label="R = b \u2212 a\u00b7exp(H)")  # fmt: skip
    for stage, part in enumerate(np.array_split(np.arange(curve.entropy.size), len(TIME))):
        ax.plot(curve.entropy[part], curve.reward[part], "o", color=TIME[stage], markersize=7.5, zorder=4,
                markeredgecolor=LIGHT["page"], markeredgewidth=1, gid="readout-xy",
                label=f"_stage {stage + 1} of {len(TIME)}")  # fmt: skip
    ax.plot([0], [curve.ceiling], "D", color=LIGHT["s2"], markersize=9, markeredgecolor=LIGHT["page"], zorder=5,
            clip_on=False)  # fmt: skip
    ax.annotate(f"ceiling {curve.ceiling:.2f}", (0, curve.ceiling), xytext=(6, -32), textcoords="offset points",
                fontsize=SIZE, fontweight="bold", color=LIGHT["s2"])  # fmt: skip
    ax.set_xlim(0, float(grid[-1]))
    ax.set_ylim(bottom, top)
    _legend(ax)
    return ax


def plane(
    paths: Sequence[tuple[str, Vector, Vector]],
    ax: Axes | None = None,
    *,
    colours: Sequence[str] = SERIES,
) -> Axes:
    """The way of each recipe through the entropy-reward plane, an arrow from its start to its end.

    `paths`: (name, entropies in nats, rewards), in the order of time.
    """
    ax = _dress(ax, "Reward", "", "entropy (nats per token)", whole=False)
    width, height = (float(np.ptp(np.concatenate([path[i] for path in paths]))) or 1.0 for i in (1, 2))
    for index, (name, entropy, reward) in enumerate(paths):
        colour = colours[index % len(colours)]
        h, r = _smooth(entropy), _smooth(reward)
        ax.plot(entropy, reward, "o", color=colour, alpha=0.16, markersize=4, markeredgewidth=0, zorder=2)
        back = _before_end((h - h[-1]) / width, (r - r[-1]) / height)
        ax.plot(
            h[: back + 1], r[: back + 1], color=colour, linewidth=2.2, label=name, gid="readout-xy", zorder=3
        )
        ax.plot(h[:1], r[:1], "o", color=colour, markersize=7, zorder=4)
        if h.size > 1:
            ax.annotate("", (h[-1], r[-1]), xytext=(h[back], r[back]), zorder=5,
                        arrowprops={"arrowstyle": "-|>,head_length=0.75,head_width=0.36", "color": colour,
                                    "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    ax.margins(0.08)
    ax.set_xlim(left=0)
    _legend(ax)
    return ax


def bars(
    values: Sequence[tuple[str, Estimate]], ax: Axes | None = None, *, title: str, unit: str = "",
    colours: Sequence[str] = SERIES, text: Callable[[float], str] = number,
) -> Axes:  # fmt: skip
    """One bar per recipe, with the 95 % interval over seeds where there is one."""
    ax = _dress(ax, title, unit, "")
    rows = np.arange(len(values))[::-1]
    for index, (row, (_, value)) in enumerate(zip(rows, values, strict=True)):
        ax.barh(row, value.mean, height=0.58, color=colours[index % len(colours)], zorder=3)
        reach = value.mean + (value.half or 0.0)
        if value.half is not None:
            ax.plot([value.mean - value.half, reach], [row, row], color=LIGHT["ink"], linewidth=1.4, zorder=4)
        ax.annotate(text(value.mean), (max(reach, 0.0), row), xytext=(6, 0), textcoords="offset points", va="center",
                    fontsize=SIZE, color=LIGHT["ink"])  # fmt: skip
    ax.set_yticks(rows, [name for name, _ in values], fontsize=SIZE, color=LIGHT["ink"])
    reach = max([v.mean + (v.half or 0.0) for _, v in values] + [0.0]) or 1.0
    ax.set_xlim(min([0.0] + [v.mean for _, v in values]), reach * 1.22)
    ax.grid(False)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    return ax


def cells(
    values: np.ndarray,
    ax: Axes | None = None,
    *,
    title: str,
    xlabel: str,
    steps: Sequence[float],
    colours: Sequence[str],
    legend: bool = True,
) -> Axes:
    """A matrix from 0 to 1 as coloured cells, first row on top; `colours[i]` below `steps[i]`, the last above all. NaN: empty."""
    ax = _dress(ax, title, "", xlabel)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = colours[int(np.searchsorted(steps, value, side="right"))]
            ax.add_patch(Rectangle((column - 0.46, row - 0.43), 0.92, 0.86, facecolor=colour, linewidth=0))
    ax.set_xlim(-0.7, values.shape[1] - 0.3)
    ax.set_ylim(values.shape[0] - 0.3, -0.7)
    ax.grid(False)
    if legend:
        edges = ["0", *(f"{step:g}" for step in steps), "1"]
        patches = [
            Patch(color=colour, label=f"{low} to {high}")
            for colour, low, high in zip(colours, edges, edges[1:], strict=False)
        ]
        ax.legend(handles=patches, frameon=False, fontsize=SIZE - 1.5, labelcolor=LIGHT["ink"], ncols=4, handlelength=1,
                  loc="upper left", bbox_to_anchor=(-0.02, -0.09 if values.shape[0] > 12 else -0.25))  # fmt: skip
    return ax


def position_profile(stages: Sequence[tuple[str, Vector]], ax: Axes | None = None) -> Axes:
    """Entropy by position in the answer at several stages of training, from early (pale) to late (dark).

    `stages`: (name, entropy in nats at positions 0, 1, ...).
    """
    picked = [TIME[round(i)] for i in np.linspace(2, len(TIME) - 1, max(len(stages), 2))]
    lines = [Curve(name, np.arange(v.size, dtype=np.float64), v) for name, v in stages]
    return curves(
        lines,
        ax,
        title="Entropy by position",
        unit="nats",
        colours=picked,
        xlabel="position in the answer (tokens)",
    )


def _dress(ax: Axes | None, title: str, unit: str, xlabel: str, *, whole: bool = True) -> Axes:
    if ax is None:
        ax = Figure(figsize=(8.6, 3.6), layout="constrained").add_subplot()
    for side in ("top", "left", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(LIGHT["faint"])
    ax.grid(True, axis="y", color=LIGHT["faint"], linewidth=1)
    ax.set_axisbelow(True)
    ax.set_facecolor("none")
    ax.tick_params(length=0, labelsize=SIZE - 0.5, labelcolor=LIGHT["muted"], pad=5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4 if _small(ax) else 7, integer=whole))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=3))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_tick))
    if title:
        ax.set_title(
            title, loc="left", fontsize=SIZE + 1, fontweight="bold", color=LIGHT["ink"], pad=10, gid=TITLE
        )
    if unit:
        ax.set_title(unit, loc="right", fontsize=SIZE - 0.5, color=LIGHT["muted"], pad=10)
    ax.set_xlabel(xlabel, fontsize=SIZE - 0.5, color=LIGHT["muted"], loc="right", labelpad=6)
    return ax


def _tick(value: float, _: Any = None) -> str:
    text = number(value, 6)
    head, power, tail = text.partition("\u00b7")
    return (head.rstrip("0").rstrip(".") if "." in head else head) + power + tail


def _limits(ax: Axes, lines: Sequence[Curve], *, from_zero: bool, share: bool) -> None:
    if not lines:
        return
    ends = np.concatenate([a for line in lines for a in (line.values, line.low, line.high) if a is not None])
    low, high = float(ends.min()), float(ends.max())
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if share and high <= 1:
        low = max(low, 0.0)
    if low == high == 0:
        high = 1.0  # a line of zeros on a scale that people know, not on one of a few hundredths
    room = (high - low or abs(high)) * 0.08
    ax.set_ylim(low if from_zero and low == 0 else low - room, high + room)
    steps = np.concatenate([line.steps for line in lines])
    left, right = float(steps.min()), float(steps.max())
    ax.set_xlim(left, right) if right > left else ax.set_xlim(left - 1, right + 1)


def _narrow(ax: Axes) -> bool:
    figure = ax.get_figure(root=True)
    return figure is not None and float(figure.get_figwidth()) < 6


def _small(ax: Axes) -> bool:
    spec, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    columns = spec.get_gridspec().ncols if spec is not None else 1
    return figure is not None and float(figure.get_figwidth()) / columns < 4


def _name_lines(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right ends, pushed apart so that they do not overlap; a legend where there is no room."""
    if _narrow(ax) or len(ends) > 8:
        _legend(ax)
        return
    low, high = ax.get_ylim()
    spec = ax.get_subplotspec()
    rows = spec.get_gridspec().nrows if spec is not None else 1
    figure = ax.get_figure(root=True)
    height = (figure.get_figheight() if figure is not None else 3.6) * 72 / rows * 0.72
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    wanted = [(ends[i][1] - low) / (high - low) * height for i in order]
    for place, y in zip(order, _spread(wanted, 1.25 * SIZE), strict=True):
        x, value, name, colour = ends[place]
        drop = y - (value - low) / (high - low) * height
        ax.annotate(name, (x, value), xytext=(8, drop), textcoords="offset points", va="center", fontsize=SIZE,
                    fontweight="bold", color=colour, annotation_clip=False)  # fmt: skip


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the given ascending order, as near as possible to the wanted ones."""
    blocks: list[list[float]] = []  # sum of (wanted - offset), size: isotonic regression by pooling
    for index, y in enumerate(wanted):
        blocks.append([y - index * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, size = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += size
    level = [total / size for total, size in blocks for _ in range(int(size))]
    return [y + index * gap for index, y in enumerate(level)]


def _legend(ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        legend = ax.legend(handles, labels, frameon=False, fontsize=SIZE - 0.5, loc="best", labelcolor=LIGHT["ink"],
                           handlelength=1.8, ncols=1 if len(labels) < 5 else 2)  # fmt: skip
        legend.set_zorder(6)


def _smooth(values: Vector) -> Vector:
    """Centred running mean over a tenth of the points, shrinking at the ends so that they stay where they are."""
    half = values.size // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(np.minimum(np.arange(values.size), np.arange(values.size)[::-1]), half)
    index = np.arange(values.size)
    return np.asarray((total[index + reach + 1] - total[index - reach]) / (2 * reach + 1))


def _before_end(across: Vector, up: Vector) -> int:
    """Index from which the arrow head points to the end: the last one a sixteenth of the figure away from it."""
    away = np.hypot(across, up) > 1 / 16
    return int(np.flatnonzero(away)[-1]) if away.any() else 0
