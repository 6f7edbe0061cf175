"""The contestants of the GTPO benchmark find the same conflicts."""

from pathlib import Path

import pytest


def test_all_contestants_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import gtpo_conflicts as benchmark

    monkeypatch.setattr(benchmark, "G", 6)
    monkeypatch.setattr(benchmark, "TIME", 80)
    monkeypatch.setattr(benchmark, "SHORT", 24)
    monkeypatch.setattr(benchmark, "V", 97)
    case = benchmark.case()
    assert case.check() == {benchmark.PAIRS: 0, benchmark.COUNTING: 0}
    assert set(case.contestants) == set(case.warm_up)
