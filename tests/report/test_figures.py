from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uncollapse.measure.entropy_law import compare_laws
from uncollapse.report import figures, svg
from uncollapse.report.series import Curve, Estimate


def line(n: int = 5, name: str = "a") -> Curve:
    return Curve(name, np.arange(n, dtype=float), np.linspace(1, 0, n))


def law_points() -> tuple[np.ndarray, np.ndarray]:
    entropy = np.linspace(1.2, 0.1, 30)
    return entropy, 1 - 0.2 * np.exp(entropy)


def test_figures_draw_into_the_given_axes() -> None:
    ax = Figure().add_subplot()
    assert figures.curves([line(), line(name="b")], ax, title="Entropy", unit="nats") is ax
    assert ax.get_title(loc="left") == "Entropy"
    assert [text.get_text() for text in ax.texts] == ["a", "b"]


@pytest.mark.parametrize(
    "axes",
    [
        lambda: figures.curves([]),
        lambda: figures.curves([line(1)], share=True),
        lambda: figures.curves([Curve("a", np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1))]),
        lambda: figures.curves([line(3, str(i)) for i in range(12)]),
        lambda: figures.covariance_profile([(0.02, 1.0), (1.0, -0.1)]),
        lambda: figures.covariance_profile([(1.0, 0.0)]),
        lambda: figures.law(compare_laws(*law_points())),
        lambda: figures.plane([("a", np.array([1.0]), np.array([0.0])), ("b", np.ones(50), np.zeros(50))]),
        lambda: figures.plane([("a", np.linspace(1, 0, 40), np.linspace(0, 1, 40))]),
        lambda: figures.bars([("a", Estimate((1.0, 2.0))), ("b", Estimate((0.0,)))], title="Cost"),
        lambda: figures.position_profile([("step 0", np.ones(4)), ("step 9", np.zeros(4))]),
    ],
)
def test_figures_stand_alone(axes, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ax = axes()
    assert isinstance(ax, Axes)
    ax.figure.savefig(tmp_path / "figure.png", dpi=40)


def test_the_law_marks_its_ceiling() -> None:
    ax = figures.law(compare_laws(*law_points()))
    assert "ceiling 0.80" in [text.get_text() for text in ax.texts]
    assert ax.get_xlim()[0] == 0


@given(st.lists(st.floats(-100, 100), max_size=8).map(sorted))
def test_names_keep_their_distance_and_order(wanted: list[float]) -> None:
    placed = figures._spread(wanted, 10.0)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(placed))
    if all(b - a >= 10 for a, b in itertools.pairwise(wanted)):
        assert placed == pytest.approx(wanted)
    assert sum(placed) == pytest.approx(sum(wanted), abs=1e-6)


def test_inline_svg_is_clean_and_stable() -> None:
    def draw(name: str) -> str:
        sheet, (ax,) = svg.canvas(400, 200)
        figures.curves([line(name='<b>"x"')], ax, title="<Entropy> & more", label=True)
        return str(svg.inline(sheet, name, 'said "so" & <b>'))

    first = draw("one")
    assert first == draw("one")
    assert set(svg.re.findall(r'id="([^"]+)"', first)).isdisjoint(
        svg.re.findall(r'id="([^"]+)"', draw("two"))
    )
    assert "<metadata" not in first
    assert "<b>" not in first
    assert 'aria-label="said &#34;so&#34; &amp; &lt;b&gt;"' in first
    assert "var(--s1)" in first
    assert "var(--ink)" in first


def test_readout_knows_where_the_points_are() -> None:
    sheet, axes = svg.canvas(400, 400, 2)
    for ax in axes:
        figures.curves([line(3)], ax, title="t", unit="u")
    sheet.draw_without_rendering()
    top, bottom = svg._readout(sheet, 400.0, 400.0)
    assert top["lines"] == [{"name": "a", "colour": "s1", "x": [0.0, 1.0, 2.0], "y": [1.0, 0.5, 0.0]}]
    assert top["box"][3] < bottom["box"][1]
    assert top["x"] == [0, 2]
