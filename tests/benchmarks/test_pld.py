"""The contestants of the PLD benchmark agree; what is measured is not asserted."""

from pathlib import Path

import pytest


def test_gradients_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import pld as benchmark

    monkeypatch.setattr(benchmark, "N", 3)
    monkeypatch.setattr(benchmark, "C", 40)
    monkeypatch.setattr(benchmark, "TOP", 7)
    case = benchmark.case()
    found = case.check()
    assert set(found) < set(case.contestants) == set(case.warm_up)
    assert max(found.values()) < 1e-5
    assert case.contestants[benchmark.TOP_K]().shape == (3, 40)
    assert case.contestants[benchmark.QUARTER]().shape == (3, 10)
