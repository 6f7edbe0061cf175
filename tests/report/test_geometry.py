from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from uncollapse.measure.neural_collapse import gof_frame, simplex_etf
from uncollapse.report import geometry


def etf(classes: int, features: int) -> np.ndarray:
    return np.asarray(simplex_etf(classes, features).numpy())


@pytest.mark.parametrize(("classes", "features", "shown"), [(3, 5, "100 %"), (3, 2, "100 %"), (5, 4, "50 %")])
def test_a_frame_says_how_much_of_it_is_in_view(classes: int, features: int, shown: str) -> None:
    ax = geometry.frame(etf(classes, features))
    assert ax.get_title().startswith(shown)
    assert [text.get_text() for text in ax.texts] == [str(k) for k in range(classes)]


def test_three_classes_of_a_simplex_are_at_120_degrees() -> None:
    ax = geometry.frame(etf(3, 6), weights=2 * etf(3, 6))
    ends = np.array([line.get_xydata()[-1] for line in ax.lines if len(line.get_xydata()) == 2])
    means, weights = ends[:3], ends[3:]
    np.testing.assert_allclose(means @ means.T, np.full((3, 3), -0.5) + 1.5 * np.eye(3), atol=1e-12)
    np.testing.assert_allclose(weights, means, atol=1e-12)


def test_gram_and_lengths_show_what_they_are_given() -> None:
    rows = gof_frame(np_lengths(), 4).numpy()
    image = geometry.gram(rows).images[0].get_array()
    np.testing.assert_allclose(image, np.diag([1, 4 / 9, 1 / 9]), atol=1e-12)
    ax = geometry.lengths(
        [9, 4, 1], [("found", np.array([3.0, 2.0, 1.0]))], expected=[("law", np.array([3.0, 2.0, 1.0]))]
    )
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[9, 3], [4, 2], [1, 1]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[1, 1], [4, 2], [9, 3]])


def np_lengths():  # type: ignore[no-untyped-def]
    import torch

    return torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("counts", [None, [5, 5, 5, 1]])
def test_the_whole_figure(weights: bool, counts: list[int] | None, tmp_path: Path) -> None:
    rows = etf(4, 3)
    figure = geometry.geometry(rows, rows if weights else None, counts=counts, names=list("abcd"))
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 3 + weights + (counts is not None)
    figure.savefig(tmp_path / "figure.png", dpi=40)


def test_zero_rows_and_many_classes_can_be_drawn() -> None:
    assert geometry.frame(np.zeros((2, 3))).get_title().startswith("0 %")
    assert geometry.gram(np.zeros((30, 2))).get_xticks().size == 0
