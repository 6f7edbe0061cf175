"""Figures of the geometry of classes: their frame in two or three dimensions, lengths against class sizes, Gram matrices.

Each draws into `ax` (or a new figure) and returns the Axes; `geometry` puts them side by side. Rows are class means or
rows of a classifier, as `uncollapse.measure.neural_collapse` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from uncollapse.report.palette import GAINED, LIGHT, LOST, series_colour

_DIVERGING = LinearSegmentedColormap.from_list("inner products", [*reversed(LOST), LIGHT["page"], *GAINED])


def frame(
    rows: Float[np.ndarray, "class feature"],
    ax: Axes | None = None,
    *,
    weights: Float[np.ndarray, "class feature"] | None = None,
    names: Sequence[str] | None = None,
    dimensions: int = 2,
) -> Axes:
    """Rows as arrows from the origin, seen from where a symmetric frame of K vectors is a regular star.

    The view is spanned by sum_k cos(2 pi k/K) u_k and the same sum of sines, u_k the directions of the rows; in three
    dimensions also by that of cos(4 pi k/K), so that four classes are a tetrahedron. The title says how much of the rows'
    squared length is in view. `weights`: rows of the classifier, drawn dashed, both families scaled to a longest arrow of
    1. A given `ax` must have the projection "3d" for three dimensions.
    """
    if ax is None:
        ax = _new(projection="3d" if dimensions == 3 else None)
    basis = _view(rows, dimensions)
    power = float(np.square(rows).sum())
    shown = float(np.square(rows @ basis.T).sum()) / power if power else 0.0
    labels = [str(k) for k in range(len(rows))] if names is None else names
    canvas: Any = ax  # three-dimensional axes take a third coordinate
    for family, dash in ((rows, "-"), (weights, (0, (3, 2)))):
        if family is None:
            continue
        longest = float(np.linalg.norm(family, axis=1).max()) or 1.0
        for k, place in enumerate(family @ basis.T / longest):
            canvas.plot(
                *np.stack([np.zeros(dimensions), place], 1),
                linestyle=dash,
                color=series_colour(k),
                linewidth=2,
            )
            if family is rows:
                canvas.plot(*place[:, None], "o", color=series_colour(k), markersize=5)
                canvas.text(
                    *(1.12 * place), labels[k], color=LIGHT["ink"], ha="center", va="center", fontsize=9
                )
    ax.set_title(f"{100 * shown:.0f} % of the squared length in view", fontsize=9, color=LIGHT["muted"])
    ax.margins(0.15)
    ax.set_aspect("equal")
    for axis in "xyz"[:dimensions]:
        getattr(ax, f"set_{axis}ticks")([])
    return ax


def _view(
    rows: Float[np.ndarray, "class feature"], dimensions: int
) -> Float[np.ndarray, "dimension feature"]:
    """Orthonormal directions of the view; arbitrary ones where the pattern gives none."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms > 0, norms, 1.0)
    turn = 2 * np.pi * np.arange(len(rows)) / len(rows)
    patterns = np.stack(
        [np.cos(turn), np.sin(turn), np.cos(2 * turn) if len(rows) > 3 else np.ones_like(turn)]
    )
    missing = max(0, dimensions - rows.shape[1])
    directions = np.pad(patterns[:dimensions] @ units, ((0, 0), (0, missing)))
    basis, triangle = np.linalg.qr(directions.T)
    return np.asarray((basis * np.where(np.diag(triangle) < 0, -1.0, 1.0)).T[:, : rows.shape[1]])


def lengths(
    counts: Int[np.ndarray, " class"] | Sequence[int],
    families: Sequence[tuple[str, Float[np.ndarray, " class"]]],
    ax: Axes | None = None,
    *,
    expected: Sequence[tuple[str, Float[np.ndarray, " class"]]] = (),
) -> Axes:
    """Lengths of each family of vectors (name, lengths) against class sizes, and what theory expects as lines."""
    ax = ax or _new()
    sizes = np.asarray(counts)
    order = np.argsort(sizes)
    for index, (name, values) in enumerate(families):
        ax.plot(sizes, values, "o", color=series_colour(index), alpha=0.8, label=name)
    for index, (name, values) in enumerate(expected):
        ax.plot(
            sizes[order],
            np.asarray(values)[order],
            "-",
            color=series_colour(index),
            label=name,
            linewidth=1.5,
        )
    ax.set(xscale="log", xlabel="samples of the class", ylabel="length", ylim=(0, None))
    ax.legend(fontsize=8, frameon=False)
    return ax


def gram(
    rows: Float[np.ndarray, "class feature"],
    ax: Axes | None = None,
    *,
    other: Float[np.ndarray, "class feature"] | None = None,
    names: Sequence[str] | None = None,
) -> Axes:
    """Inner products of the rows with themselves, or with `other`; blue positive, orange negative, largest is 1."""
    ax = ax or _new()
    products = rows @ (rows if other is None else other).T
    products = products / (np.abs(products).max() or 1.0)
    ax.imshow(products, cmap=_DIVERGING, vmin=-1, vmax=1)
    labels = [str(k) for k in range(len(rows))] if names is None else names
    ticks = range(len(rows)) if len(rows) <= 20 else []
    ax.set_xticks(ticks, labels[: len(ticks)], fontsize=8)
    ax.set_yticks(ticks, labels[: len(ticks)], fontsize=8)
    return ax


def geometry(
    means: Float[np.ndarray, "class feature"],
    weights: Float[np.ndarray, "class feature"] | None = None,
    *,
    counts: Int[np.ndarray, " class"] | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Frame in two and in three dimensions, Gram matrix of the means and of the classifier, lengths if there are `counts`.

    Means are drawn as given: pass centred ones where the frame is a simplex ETF.
    """
    columns = 3 + (weights is not None) + (counts is not None)
    figure = Figure(figsize=(4.2 * columns, 4.0), layout="constrained")
    axes: list[Any] = [figure.add_subplot(1, columns, 1), figure.add_subplot(1, columns, 2, projection="3d")]
    axes += [figure.add_subplot(1, columns, place) for place in range(3, columns + 1)]
    for ax, dimensions in zip(axes, (2, 3), strict=False):
        frame(means, ax, weights=weights, names=names, dimensions=dimensions)
    gram(means, axes[2], names=names).set_title("inner products of class means", fontsize=9)
    if weights is not None:
        gram(weights, axes[3], names=names).set_title("inner products of classifier rows", fontsize=9)
    if counts is not None:
        families = [("class means", means)] + ([] if weights is None else [("classifier", weights)])
        lengths(counts, [(name, np.linalg.norm(rows, axis=1)) for name, rows in families], axes[-1])
    return figure


def _new(projection: str | None = None) -> Axes:
    return Figure(figsize=(4.2, 4.0), layout="constrained").add_subplot(projection=projection)
