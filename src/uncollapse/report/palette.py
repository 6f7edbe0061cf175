"""Colours of the report: one light and one dark set, told apart by eyes with any kind of colour vision.

Figures are drawn in the light colours. In a page every light colour becomes a CSS variable, so that the same figure
follows the reader's preference for light or dark. Light colours are therefore unique: a colour is its role.
"""

from __future__ import annotations

LIGHT: dict[str, str] = {
    "page": "#fdfdfc",
    "ink": "#1c2026",
    "muted": "#5d6673",
    "faint": "#dfe2e6",
    "s1": "#334ea6",
    "s2": "#d5621f",
    "s3": "#179a86",
    "s4": "#8c4583",
    "s5": "#c59715",
    "s6": "#6fa8dc",
    "s7": "#7a1f2b",
    "s8": "#7d8590",
    "t1": "#c6d3e6",
    "t2": "#97b0d4",
    "t3": "#688cc0",
    "t4": "#3f6bab",
    "t5": "#1d3f75",
}
"""Role to colour on a light page: background, text, grid, series `s1`-`s8`, time from early `t1` to late `t5`."""

DARK: dict[str, str] = {
    "page": "#15171b",
    "ink": "#ecebe7",
    "muted": "#a3abb6",
    "faint": "#343941",
    "s1": "#869ff5",
    "s2": "#f2945e",
    "s3": "#21d8c4",
    "s4": "#d18bc7",
    "s5": "#e6bf4a",
    "s6": "#5185bc",
    "s7": "#e0707c",
    "s8": "#98a1ad",
    "t1": "#34465f",
    "t2": "#46689a",
    "t3": "#5f8dcb",
    "t4": "#8fb6ec",
    "t5": "#d4e4fb",
}
"""The same roles on a dark page."""

SERIES = tuple(LIGHT[f"s{i}"] for i in range(1, 9))
"""Colours of recipes in the order in which they are listed; the ninth starts again, with another dash."""

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""Line styles; they change with every round through `SERIES`."""

TIME = tuple(LIGHT[f"t{i}"] for i in range(1, 6))

LOST = ("#fbe9dc", "#f6cba9", "#ec9f68", "#d9702f")
GAINED = ("#e2ecf8", "#bcd3ee", "#87aede", "#4f83c4")
LOST_DARK = ("#3a2a20", "#5e3a22", "#8c4f22", "#a5561f")
GAINED_DARK = ("#212d3c", "#29425f", "#325f92", "#3a74b5")
"""Diverging scale of entropy change, orange for lost and blue for gained, from weak to strong."""


def series_colour(index: int) -> str:
    """Light colour of the recipe at `index` (from 0)."""
    return SERIES[index % len(SERIES)]


def variables(colours: dict[str, str], lost: tuple[str, ...], gained: tuple[str, ...]) -> str:
    """CSS declarations for one set of colours."""
    pairs = {**colours}
    pairs.update({f"l{i}": colour for i, colour in enumerate(lost, start=1)})
    pairs.update({f"g{i}": colour for i, colour in enumerate(gained, start=1)})
    return "".join(f"--{name}:{colour};" for name, colour in pairs.items())


def css() -> tuple[str, str]:
    """Declarations for light and for dark pages."""
    return variables(LIGHT, LOST, GAINED), variables(DARK, LOST_DARK, GAINED_DARK)
