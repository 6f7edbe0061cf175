"""The contestants of the benchmark of neural-collapse metrics find the same numbers."""

from pathlib import Path

import pytest


def test_all_contestants_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import neural_collapse as benchmark

    for name, small in (("C", 200), ("TOKENS", 3000), ("SHORT_C", 200), ("SHORT_TOKENS", 3000), ("D", 32)):
        monkeypatch.setattr(benchmark, name, small)
    case = benchmark.case()
    differences = case.check()
    assert max(differences.values()) < 1e-3
    assert set(case.contestants) == set(case.warm_up)
