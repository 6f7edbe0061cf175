"""The detector of collapsed predictions, against one pass over the window."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.prediction_collapse import CollapseDetector


def logits_of(seed: int, rows: int, scale: float = 3.0, classes: int = 6) -> Tensor:
    return scale * torch.randn(
        rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_spread_is_that_of_the_window(seed: int, cuts: list[int]) -> None:
    z = logits_of(seed, 60)
    detector = CollapseDetector(window=60)
    edges = [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(edges):
        detector.update(z[start:stop])
    p = z.softmax(-1)
    found = detector.spread()
    assert (found.samples, found.classes, found.collapsed) == (60, 6, False)
    assert found.marginal_entropy == pytest.approx(float(torch.special.entr(p.mean(0)).sum()))
    assert found.sample_entropy == pytest.approx(float(torch.special.entr(p).sum(-1).mean()))
    assert found.largest_share == pytest.approx(float(z.argmax(-1).bincount().max() / 60))
    assert found.mutual_information >= -1e-12


def test_the_oldest_batch_goes_when_the_rest_fills_the_window() -> None:
    detector, z = CollapseDetector(window=10), logits_of(0, 24)
    for rows in z.split(4):
        detector.update(rows)
    assert detector.spread().samples == 12
    other = CollapseDetector(window=10)
    other.update(z[12:])
    assert detector.spread().marginal_entropy == pytest.approx(other.spread().marginal_entropy)
    detector.reset()
    with pytest.raises(DataError, match="no predictions yet"):
        detector.spread()


def test_what_is_called_collapsed() -> None:
    sure = 50 * torch.nn.functional.one_hot(torch.arange(64) % 4, 4).double()
    cases = {
        "sure and always the same": (torch.tensor([[50.0, 0, 0, 0]]).repeat(64, 1), True),
        "sure of different classes": (sure, False),
        "knows nothing": (torch.zeros(64, 4), False),
        "always the same without being sure": (torch.tensor([[1.0, 0, 0, 0]]).repeat(64, 1), False),
    }
    for name, (z, collapsed) in cases.items():
        detector = CollapseDetector(window=64)
        detector.update(z[:32])
        assert not detector.spread().collapsed, f"{name}: half a window"
        detector.update(z[32:])
        assert detector.spread().collapsed == collapsed, name


def test_rows_that_are_not_finite_do_not_count() -> None:
    z = logits_of(1, 5).float()
    z[2] = math.nan
    detector = CollapseDetector()
    detector.update(z)
    detector.update(z[:0])
    clean = CollapseDetector()
    clean.update(z[[0, 1, 3, 4]])
    assert detector.spread() == clean.spread()
    assert detector.spread().samples == 4
    tokens = CollapseDetector()
    tokens.update(z[[0, 1, 3, 4]].view(2, 2, 6))
    assert tokens.spread() == clean.spread()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="window is 1"):
        CollapseDetector(window=1)
    with pytest.raises(ConfigError, match="sample is 0"):
        CollapseDetector(sample=0.0)
    detector = CollapseDetector()
    detector.update(torch.zeros(2, 3))
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 1)):
        with pytest.raises(DataError, match="two or more classes"):
            detector.update(wrong)
