from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from uncollapse.representation.nc_deep_linear import UFM, squared_error, ufm_mse_minimizer
from uncollapse.studies.nc_deep_linear import STUDY, experiment
from uncollapse.studies.nc_deep_linear.experiment import (
    DEEP,
    Size,
    deep_trial,
    merging_trial,
    penalty_at,
    released_window,
    shallow_trial,
    threshold_trial,
)
from uncollapse.studies.nc_deep_linear.networks import geometry, gradient_descent

TINY = Size(
    seeds=2, iterations=3, width=4, restarts=1, ratios=(0.5, 2.0), sweep_restarts=1, digits=2, steps=1, polish=1,
    starts=1,
)  # fmt: skip


def test_gradient_descent_is_repeatable_and_descends() -> None:
    problem = UFM.make((6, 3, 3), 2, 1e-2, 1e-2)
    runs = [gradient_descent(problem, [4, 4], 0, iterations=n) for n in (20, 20, 0)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].layers, runs[1].layers, strict=True))
    assert problem.objective(runs[0], squared_error) < problem.objective(runs[2], squared_error)
    assert not runs[0].features.requires_grad


def test_geometry_is_zero_at_the_minimum() -> None:
    found = ufm_mse_minimizer((20, 10, 5), 1, 5e-3, 5e-3)
    features, head = found.factors([4], torch.Generator().manual_seed(0)).at(1)
    seen = geometry(features, found.problem.labels, head, found)
    for name in ("gram-error", "gof-weights", "gof-means", "gof-alignment", "nc1", "nc4"):
        assert seen[name] < 1e-12, name
    assert seen["of-weights"] > 0.1


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_penalty_puts_the_smallest_class_where_it_says(depth: int, ratio: float) -> None:
    lam = penalty_at(ratio, 10, 90, depth)
    assert bool(ufm_mse_minimizer((50, 30, 10), depth, lam, lam).collapsed[2]) == (ratio < 1)


def test_the_sweep_sees_a_class_vanish() -> None:
    gone, there = (threshold_trial(2, ratio, 4) for ratio in (0.7, 2.0))
    assert gone["found"] < 1e-6 == gone["expected"] + 1e-6
    assert there["found"] == pytest.approx(there["expected"], rel=1e-4)
    assert merging_trial(0.9)["distance"] < 1e-6 < merging_trial(1.1)["distance"]


def test_deep_and_shallow_cross_entropy() -> None:
    run = deep_trial(6, 2, 4, 1e-3, 2)
    assert min(run["descent"]) <= run["pairs"] + 1e-9 < run["etf"]
    assert all(rank <= 5 for rank in run["rank"])
    found = shallow_trial(4, 1e-2)
    assert found["error"] < 1e-11
    assert found["margin"] > 0


def test_the_released_point_is_worse_than_collapse() -> None:
    x = np.roots([0.55, 0, 1.1, -2, 0.55])
    x = max(float(root.real) for root in x if abs(root.imag) < 1e-9)
    assert released_window()["excess"] == pytest.approx(1 / (x**2 + 1) + 0.55 * x - 1)


def _network(counts: tuple[int, ...], seed: int, **_: Any) -> dict[str, Any]:
    names = "gof-weights of-weights etf-weights gof-means gof-alignment nc1 nc4 gram-error accuracy objective after-adam minimum"
    lengths = torch.linspace(3, 1, 10, dtype=torch.float64) + 0.01 * seed
    return {name: 0.1 for name in names.split()} | {
        "lengths": lengths.tolist(),
        "gram": lengths.square().diag().tolist(),
    }


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", TINY)
    monkeypatch.setattr(experiment, "train_digits", _network)
    monkeypatch.setattr(experiment, "DEEP", DEEP[:1])
    monkeypatch.setattr(experiment, "SHALLOW", ((4, 1e-2),))
    smoke(STUDY, lambda name: any(size in name for size in ("K=6", "K=8", "K=10")))


def test_the_network_trains_on_real_digits() -> None:
    pytest.importorskip("sklearn")
    from uncollapse.studies.nc_deep_linear.networks import train_digits

    first, later = (
        train_digits((12, 6, 6, 6, 6, 6, 6, 6, 6, 3), 0, lam=1e-3, width=16, steps=steps, polish=2)
        for steps in (1, 60)
    )
    assert later["objective"] < first["objective"]
    assert later["objective"] > later["minimum"]
    assert len(later["lengths"]) == 10
