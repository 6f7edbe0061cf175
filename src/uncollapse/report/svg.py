"""A matplotlib figure as inline SVG that follows the page: its colours, its font, its width, its tooltips."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from uncollapse.report.figures import TITLE
from uncollapse.report.palette import LIGHT

_RC: Any = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, small
    "svg.hashsalt": "uncollapse",  # the same figure gives the same bytes
    "font.family": ["DejaVu Sans"],
    "axes.unicode_minus": True,
    "path.simplify": True,
}
_COORDINATES = re.compile(r'\b(?:d|x|y|points|transform)="[^"]*"')
_LONG = re.compile(r"(\.\d\d)\d+")
_ID = re.compile(r'\b(id="|href="#|url\(#)')


def canvas(
    width: int, height: int, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` CSS pixels, and its axes row by row."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=2 / 72, h_pad=9 / 72, hspace=0.02, wspace=0.06)  # type: ignore[union-attr,call-arg]
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def inline(figure: Figure, name: str, alt: str) -> Markup:
    """`<svg>` markup of the figure; `name` makes its ids unique in the page, `alt` is its text alternative."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        # The layout once and the canvas directly: `savefig` would lay out and draw everything twice more.
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine("none")
        _align_titles(figure)
        readout = _readout(figure, figure.get_figwidth() * 72, figure.get_figheight() * 72)
        for artist in figure.findobj(lambda artist: artist.get_gid() is not None):
            artist.set_gid(None)  # it would become an id, and ids are unique
        figure.set_dpi(72)
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = _COORDINATES.sub(lambda match: _LONG.sub(r"\1", match[0]), text)
    text = _ID.sub(lambda match: f"{match[1]}{name}-", text)
    text = text.replace("font: 700", "font: 600")  # a weight that DejaVu lacks and web fonts have
    for role, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{role})")
    viewbox = re.search(r'viewBox="([^"]*)"', text)
    width, height = (float(x) for x in viewbox[1].split()[2:]) if viewbox else (0.0, 0.0)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'data-readout="{escape(json.dumps(readout, separators=(",", ":")))}">'
    )
    return Markup(head + text[text.index(">") + 1 :].strip())


def _align_titles(figure: Figure) -> None:
    """Titles of panels in one column begin at the left edge of the figure, in line with the text of the page."""
    for ax in figure.axes:
        spec = ax.get_subplotspec()
        if spec is None or spec.get_gridspec().ncols > 1:
            continue
        box = ax.get_position()
        for text in ax.findobj(lambda artist: artist.get_gid() == TITLE):
            text.set_x(-box.x0 / box.width)  # type: ignore[attr-defined]


def _readout(figure: Figure, width: float | np.floating, height: float | np.floating) -> list[dict[str, Any]]:
    """Where the axes lie in the figure and what their lines are made of, for the tooltip."""
    panels = []
    for ax in figure.axes:
        lines = [line for line in ax.get_lines() if str(line.get_gid()).startswith("readout")]
        if not lines:
            continue
        box = ax.get_position()
        panels.append(
            {
                "box": [
                    round(v, 1)
                    for v in (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
                ],
                "x": [round(float(v), 6) for v in ax.get_xlim()],
                "y": [round(float(v), 6) for v in ax.get_ylim()],
                "title": ax.get_title(loc="left"),
                "unit": ax.get_title(loc="right"),
                "xname": ax.get_xlabel(),
                "nearest": "xy" if lines[0].get_gid() == "readout-xy" else "x",
                "lines": [_line(line) for line in lines],
            }
        )
    return panels


def _line(line: Any) -> dict[str, Any]:
    colour = {value: role for role, value in LIGHT.items()}.get(str(line.get_color()), "ink")
    x, y = (np.asarray(v, dtype=np.float64) for v in line.get_data())
    return {"name": str(line.get_label()).lstrip("_"), "colour": colour, "x": _rounded(x), "y": _rounded(y)}


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
