from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from uncollapse.report import palette

# Machado, Oliveira and Fernandes (2009), severity 1.0, linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
PAGE = {"light": "#fdfdfc", "dark": "#15171b"}


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    lms = (
        np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        )
        @ rgb
    )
    return np.array(
        [
            [0.2104542553, 0.793617785, -0.0040720468],
            [1.9779984951, -2.428592205, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.808675766],
        ]
    ) @ np.cbrt(lms)


def contrast(one: str, two: str) -> float:
    bright, dim = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, two)), reverse=True)
    return float((bright + 0.05) / (dim + 0.05))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_recipe_colours_are_told_apart(colours: dict[str, str], vision: str) -> None:
    seen = {f"s{i}": oklab(np.clip(VISION[vision] @ linear(colours[f"s{i}"]), 0, 1)) for i in range(1, 8)}
    distances = {
        pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(seen, 2)
    }
    closest = min(distances, key=distances.__getitem__)
    assert distances[closest] > 0.06, (closest, distances[closest])
    first = min(v for (a, b), v in distances.items() if a in ("s1", "s2", "s3") and b in ("s1", "s2", "s3"))
    assert first > 0.09


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("low", "high"),
    [(palette.LOST, palette.GAINED), (palette.LOST_DARK, palette.GAINED_DARK)],
    ids=["light", "dark"],
)
def test_lost_and_gained_are_told_apart(low: tuple[str, ...], high: tuple[str, ...], vision: str) -> None:
    for lost, gained in zip(low[1:], high[1:], strict=True):
        one, two = (oklab(np.clip(VISION[vision] @ linear(c), 0, 1)) for c in (lost, gained))
        assert np.linalg.norm(one - two) > 0.06


@pytest.mark.parametrize(("page", "colours"), [("light", palette.LIGHT), ("dark", palette.DARK)])
def test_contrast_with_the_page(page: str, colours: dict[str, str]) -> None:
    assert contrast(colours["ink"], PAGE[page]) > 12
    assert contrast(colours["muted"], PAGE[page]) > 4.5
    assert all(contrast(colours[f"s{i}"], PAGE[page]) > 2.3 for i in range(1, 9))


@pytest.mark.parametrize(
    ("colours", "ink"),
    [
        (palette.LOST + palette.GAINED, palette.LIGHT["ink"]),
        (palette.LOST_DARK + palette.GAINED_DARK, palette.DARK["ink"]),
    ],
    ids=["light", "dark"],
)
def test_text_on_the_token_scale_is_readable(colours: tuple[str, ...], ink: str) -> None:
    assert min(contrast(colour, ink) for colour in colours) > 3.9


def test_a_light_colour_names_its_role() -> None:
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)
    assert set(palette.LIGHT) == set(palette.DARK)
    assert all(re.fullmatch(r"#[0-9a-f]{6}", c) for c in [*palette.LIGHT.values(), *palette.DARK.values()])
    assert palette.series_colour(8) == palette.series_colour(0)
