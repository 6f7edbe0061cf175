"""What a section of a report is made of; the template knows how each kind of block looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from uncollapse.report import svg
from uncollapse.report.tokens import TokenView

WIDE, NARROW = 800, 350
"""Widths in CSS pixels at which figures are drawn: for a desk and for a phone."""


@dataclass(frozen=True)
class FigureBlock:
    """A figure in both widths; the page shows the one that fits."""

    wide: Markup
    narrow: Markup
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class TableBlock:
    """A table; the first column holds row headings. `swatches` are colour roles for these."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    swatches: tuple[str, ...] = ()
    kind: str = "table"


@dataclass(frozen=True)
class TextBlock:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class TokensBlock:
    """Token-coloured text; `title` names the recipe where there are several."""

    view: TokenView
    title: str = ""
    kind: str = "tokens"


@dataclass(frozen=True)
class FoldBlock:
    """Preformatted text behind a summary line."""

    summary: str
    text: str
    kind: str = "fold"


@dataclass(frozen=True)
class FindingBlock:
    """A finding as a card: how grave, what, since when, the numbers, a small figure, and where its advice is."""

    id: str
    severity: str
    title: str
    text: str
    since: str
    numbers: tuple[tuple[str, str], ...] = ()
    figure: FigureBlock | None = None
    advice: tuple[tuple[str, str], ...] = ()
    kind: str = "finding"


@dataclass(frozen=True)
class AdviceBlock:
    """Something to try: why, what to paste (label and code), what speaks against it, and its sources (text and address)."""

    id: str
    title: str
    text: str
    codes: tuple[tuple[str, str], ...] = ()
    caution: str = ""
    sources: tuple[tuple[str, str], ...] = ()
    kind: str = "advice"


Block = FigureBlock | TableBlock | TextBlock | TokensBlock | FoldBlock | FindingBlock | AdviceBlock


@dataclass(frozen=True)
class Section:
    """A chapter. `missing` says in one line why there is nothing to show."""

    id: str
    nav: str
    title: str
    lead: str = ""
    missing: str = ""
    blocks: tuple[Block, ...] = ()
    metrics: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Tile:
    """A key figure; `spark` holds the points of its sparkline, empty if there is only one."""

    label: str
    value: str
    unit: str
    note: str
    spark: str


def figure(
    name: str,
    draw: Callable[[Sequence[Axes]], Any],
    *,
    alt: str,
    caption: str = "",
    panels: int = 1,
    columns: int = 1,
    height: int = 300,
    narrow_columns: int = 1,
    share_x: bool = False,
) -> FigureBlock:
    """Draw a figure of `panels` panels of `height` CSS pixels each, once for a desk and once for a phone."""
    drawn = []
    for width, across, tall in ((WIDE, columns, height), (NARROW, narrow_columns, min(height, 250))):
        rows = -(-panels // across)
        sheet, axes = svg.canvas(width, rows * tall, rows, across)
        draw(axes[:panels])
        for ax in axes[panels:]:
            ax.remove()
        if share_x and across == 1:
            for ax in axes[: panels - 1]:
                ax.set_xlabel("")
        drawn.append(svg.inline(sheet, f"{name}-{'wide' if width == WIDE else 'narrow'}", alt))
    return FigureBlock(drawn[0], drawn[1], caption)
