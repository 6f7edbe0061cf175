"""The contestants of the benchmark of sigmaReparam compute the same weights."""

from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import sigma_reparam

    monkeypatch.setattr(sigma_reparam, "SIZES", {"tiny": (8, 2)})
    return sigma_reparam


def test_the_contestants_compute_the_same_weights(benchmark) -> None:
    case = benchmark.case("tiny")
    assert set(case.contestants) == {benchmark.OURS, benchmark.PLAIN, benchmark.TOGETHER, benchmark.PEER}
    assert case.check()[benchmark.PEER] < 1e-4
    for call in case.contestants.values():
        call()


def test_overhead_is_of_the_time_above_plain_layers(benchmark) -> None:
    times = {benchmark.OURS: 1.0, benchmark.PLAIN: 0.5, benchmark.PEER: 1.5}
    assert (
        benchmark.overhead({name: {"time_over_ours": t} for name, t in times.items()}, benchmark.OURS) == 0.5
    )
