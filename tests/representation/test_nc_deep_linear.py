"""Exact checks of the global minima, numbered as in their specification (8 to 10 are in tests/measure); all in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.neural_collapse import nc2_etf, nc2_gof, nc3_gof, nc_metrics
from uncollapse.representation.nc_deep_linear import (
    UFM,
    Factors,
    balanced_factors,
    best_scale,
    ce_margin,
    circulant_logits,
    class_costs,
    cross_entropy,
    descend,
    etf_logits,
    initial_factors,
    minimize_ufm,
    minority_collapse_threshold,
    paired_logits,
    released_root,
    scalar_cost_limit,
    scalar_local_limit,
    scalar_minimum,
    schatten_objective,
    schatten_penalty,
    squared_error,
    ufm_ce_convex,
    ufm_ce_minimizer_balanced,
    ufm_mse_minimizer,
)

seeds = st.integers(0, 10_000)
quick = settings(max_examples=10)
COUNTS = (20, 10, 5, 5)


def near(value: Any, expected: Any, tol: float) -> None:
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), atol=tol, rtol=0)


def gradient(problem: UFM, factors: Factors, loss: Any) -> float:
    """Largest entry of the gradient of f."""
    parts = [*factors.layers, factors.features, *([] if factors.bias is None else [factors.bias])]
    parts = [part.clone().requires_grad_() for part in parts]
    depth = problem.depth
    again = Factors(
        tuple(parts[:depth]), parts[depth], parts[depth + 1] if factors.bias is not None else None
    )
    grads = torch.autograd.grad(problem.objective(again, loss), parts)
    return max(float(g.abs().max()) for g in grads)


def nudged(factors: Factors, size: float, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        return x + size * torch.randn(x.shape, generator=g, dtype=x.dtype)

    return Factors(
        tuple(move(w) for w in factors.layers),
        move(factors.features),
        None if factors.bias is None else move(factors.bias),
    )


def naive_objective(problem: UFM, factors: Factors, ce: bool) -> float:
    """f by a loop over samples."""
    total, y = 0.0, [k for k, n in enumerate(problem.counts) for _ in range(n)]
    for h, k in zip(factors.features, y, strict=True):
        for weight in factors.layers:
            h = weight @ h
        z = h if factors.bias is None else h + factors.bias
        if ce:
            total += float(z.exp().sum().log() - z[k])
        else:
            total += float((z - torch.eye(len(z), dtype=z.dtype)[k]).square().sum()) / 2
    total /= len(y)
    for lam, part in zip((*problem.lam_w, problem.lam_h), (*factors.layers, factors.features), strict=True):
        total += lam / 2 * sum(float(x) ** 2 for x in part.flatten())
    return total


# ---- 1 to 4: closed forms of squared error ---------------------------------------------------------------------------


def test_01_one_layer_unequal_classes() -> None:
    found = ufm_mse_minimizer(COUNTS, 1, 5e-3, 5e-3, width=8)
    near(found.w_norm2, (4.27213595, 2.96227766, 2.03606798, 2.03606798), 1e-8)
    near(found.h_norm2, (0.2136068, 0.29622777, 0.4072136, 0.4072136), 1e-7)
    near(found.z_diag, (0.95527864, 0.93675445, 0.91055728, 0.91055728), 1e-8)
    near(found.objective, 0.0585327479, 1e-10)
    assert found.unique
    assert not found.collapsed.any()
    narrow = ufm_mse_minimizer(COUNTS, 1, 5e-3, 5e-3, width=2)
    near(narrow.w_norm2, (4.27213595, 2.96227766, 0, 0), 1e-8)
    near(narrow.objective, 0.1621720681, 1e-10)
    assert narrow.collapsed.tolist() == [False, False, True, True]
    assert narrow.unique
    assert not ufm_mse_minimizer(COUNTS, 1, 5e-3, 5e-3, width=3).unique


def test_02_deeper_heads() -> None:
    two = ufm_mse_minimizer(COUNTS, 2, 2e-3, 2e-3)
    near(two.w_norm2, (7.26120094, 4.53460975, 2.81684932, 2.81684932), 1e-8)
    near(two.objective, 0.0247050432, 1e-10)
    three = ufm_mse_minimizer(COUNTS, 3, 1e-3, 1e-3)
    near(three.w_norm2, (9.39735229, 5.56330553, 3.28351916, 3.28351916), 1e-8)
    near(three.objective, 0.0137386133, 1e-10)


def test_03_penalties_of_head_and_features_differ() -> None:
    found = ufm_mse_minimizer((40, 10, 2), 1, 0.02, 0.01)
    near(found.w_norm2, (3.95213595, 1.71606798, 0.48), 1e-8)
    near(found.objective, 0.1385640786, 1e-10)
    samples = 52
    near(found.w_norm2, [math.sqrt(n * 0.5) - samples * 0.01 for n in (40, 10, 2)], 1e-12)


def test_04_equal_classes_with_bias() -> None:
    one = ufm_mse_minimizer([6] * 4, 1, 8e-3, 8e-3, bias=True)
    near(one.gram_w, np.full((4, 4), -0.56437244) + np.eye(4) * (1.69311731 + 0.56437244), 1e-8)
    near(one.objective, 0.0564837538, 1e-10)
    assert one.bias is not None
    near(one.bias, [0.25] * 4, 1e-15)
    two = ufm_mse_minimizer([6] * 4, 2, 4e-3, 4e-3, bias=True)
    near(two.gram_w.diagonal(), [2.37996461] * 4, 1e-8)
    near(two.gram_w[0, 1], -0.79332154, 1e-8)
    near(two.objective, 0.0323880420, 1e-10)
    assert float(nc2_etf(torch.linalg.cholesky(two.gram_w + 1e-14 * torch.eye(4)))) < 1e-6
    low = ufm_mse_minimizer([6] * 4, 1, 8e-3, 8e-3, width=2, bias=True)
    assert int(torch.linalg.matrix_rank(low.gram_w, rtol=1e-9)) == 2
    assert not low.unique
    near(low.objective, (2 * (one.objective * 8 / 3) + 1) / 8, 1e-12)


# ---- 5: cross-entropy ------------------------------------------------------------------------------------------------


def test_05_cross_entropy_equal_classes() -> None:
    found = ufm_ce_minimizer_balanced(6, 5, 1e-3, 1e-3)
    near(ce_margin(5, 6, 1e-3, 1e-3), 6.00202927, 1e-8)
    near(found.objective, 0.06865391, 1e-8)
    near(found.gram_w.trace(), 58.807637, 1e-6)
    near(ce_margin(5, 6, 0.02, 0.02), 2.79803803, 1e-8)
    near(ufm_ce_minimizer_balanced(6, 5, 0.02, 0.02).objective, 0.76640648, 1e-8)
    limit = 1 / (5 * math.sqrt(6))
    none = ufm_ce_minimizer_balanced(6, 5, limit, limit)
    near(none.objective, math.log(5), 1e-15)
    assert float(none.gram_w.abs().max()) < 1e-13


@pytest.mark.parametrize("lam", [1e-3, 0.02, 0.09])
def test_05_the_convex_program_agrees(lam: float) -> None:
    closed, convex = ufm_ce_minimizer_balanced(6, 5, lam, 2 * lam), ufm_ce_convex([6] * 5, lam, 2 * lam)
    assert abs(convex.objective - closed.objective) < 1e-12
    assert -1e-13 < convex.gap <= 1e-12
    near(convex.gram_w, closed.gram_w, 1e-4 * float(1 + closed.gram_w.max()))
    near(convex.gram_h, closed.gram_h, 1e-4 * float(1 + closed.gram_h.max()))


@pytest.mark.parametrize("counts", [(30, 12, 8, 3, 3), (9, 1)])
def test_05_the_convex_program_agrees_with_factors(counts: tuple[int, ...]) -> None:
    convex = ufm_ce_convex(counts, 4e-3, 2e-3)
    problem = convex.problem
    built = convex.factors(len(counts) + 1)
    near(problem.objective(built, cross_entropy), convex.objective, 1e-10)
    assert gradient(problem, built, cross_entropy) < 1e-5
    run = minimize_ufm(counts, 1, 4e-3, 2e-3, widths=[6], loss=cross_entropy, restarts=2)[0]
    near(run.objective, convex.objective, 1e-9)
    assert run.objective > convex.objective - convex.gap - 1e-12
    near(run.factors.layers[0] @ run.factors.layers[0].T, convex.gram_w, 1e-3)


def test_05_groups_of_small_classes_become_one_at_the_threshold_of_squared_error() -> None:
    counts = (40, 40, 40, 8, 8)
    samples = sum(counts)
    for ratio, apart in ((0.9, True), (1.1, False)):
        lam = math.sqrt(ratio * 8) / samples
        near(minority_collapse_threshold(samples, lam, lam) / 8, ratio, 1e-12)
        found = ufm_ce_convex(counts, lam, lam, tolerance=1e-13)
        a, b, cross = found.gram_w[3, 3], found.gram_w[4, 4], found.gram_w[3, 4]
        gap = math.sqrt(max(0.0, float(a + b - 2 * cross)))
        assert (gap > 0.3) if apart else (gap < 1e-5)
        assert float(a) > 0.1  # together, but not at 0


# ---- 6 and 7: balance, stationarity, minimality ----------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"n_per_class": COUNTS, "depth": 1, "lam_w": 5e-3, "lam_h": 5e-3, "widths": [6]},
    {"n_per_class": COUNTS, "depth": 3, "lam_w": [1e-3, 3e-3, 5e-4], "lam_h": 2e-3, "widths": [6, 5, 7]},
    {
        "n_per_class": (9, 9, 9),
        "depth": 2,
        "lam_w": [1e-3, 2e-3],
        "lam_h": 4e-3,
        "widths": [3, 4],
        "bias": True,
    },
    {"n_per_class": COUNTS, "depth": 2, "lam_w": 2e-3, "lam_h": 2e-3, "widths": [2, 5], "width": 2},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turned", [False, True])
def test_06_07_minimisers_are_balanced_and_stationary(case: dict[str, Any], turned: bool) -> None:
    case = dict(case)
    widths = case.pop("widths")
    found = ufm_mse_minimizer(**case)
    generator = torch.Generator().manual_seed(0) if turned else None
    factors, problem = found.factors(widths, generator), found.problem
    for m in range(problem.depth - 1):
        below, above = factors.layers[m], factors.layers[m + 1]
        near(problem.lam_w[m + 1] * above.T @ above, problem.lam_w[m] * below @ below.T, 1e-12)
    head, features = factors.layers[0], factors.features
    near(problem.lam_w[0] * head.T @ head, problem.lam_h * features.T @ features, 1e-12)
    for layer, spectrum in zip(factors.layers, found.sv2, strict=True):
        values = torch.linalg.svdvals(layer).square()
        expected = spectrum.sort(descending=True).values
        near(values[: len(expected)], expected[: len(values)], 1e-10)
    near(problem.objective(factors, squared_error), found.objective, 1e-12)
    near(naive_objective(problem, factors, ce=False), found.objective, 1e-12)
    assert gradient(problem, factors, squared_error) < 1e-12
    whole = factors.at(1)[1]
    near(whole @ whole.T, found.gram_w, 1e-10)
    means = torch.stack([features[problem.labels == k][0] for k in range(problem.classes)])
    near(means @ means.T, found.gram_h, 1e-10)
    for seed in range(5):
        assert float(problem.objective(nudged(factors, 1e-3, seed), squared_error)) > found.objective


@quick
@given(
    seed=seeds,
    depth=st.integers(1, 3),
    bias=st.booleans(),
    scale=st.floats(0.1, 0.8),
    classes=st.integers(2, 4),
)
def test_07_no_descent_ends_below_the_closed_form(
    seed: int, depth: int, bias: bool, scale: float, classes: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = [4] * classes if bias else torch.randint(1, 9, (classes,), generator=g).tolist()
    lam = (scale * min(counts) / minority_collapse_threshold(sum(counts), 1.0, 1.0, depth)) ** (
        depth / (depth + 1)
    )
    found = ufm_mse_minimizer(counts, depth, lam, lam, bias=bias)
    runs = minimize_ufm(
        counts,
        depth,
        lam,
        lam,
        widths=[classes + 1] * depth,
        bias=bias,
        restarts=3,
        seed=seed,
        max_iterations=2000,
    )
    assert runs[0].objective > found.objective - 1e-10
    if depth == 1:
        near(runs[0].objective, found.objective, 1e-8)


def test_07_descent_finds_the_closed_form() -> None:
    for counts, depth, lam, bias in (
        (COUNTS, 1, 5e-3, False),
        (COUNTS, 2, 2e-3, False),
        ([6] * 4, 2, 4e-3, True),
    ):
        found = ufm_mse_minimizer(counts, depth, lam, lam, bias=bias)
        best = minimize_ufm(counts, depth, lam, lam, widths=[8] * depth, bias=bias, restarts=5)[0]
        near(best.objective, found.objective, 1e-9)
        assert best.gradient < 1e-7
        head = best.factors.at(1)[1]
        near(head @ head.T, found.gram_w, 1e-4)


def test_metrics_of_the_minimiser_at_every_layer() -> None:
    found = ufm_mse_minimizer(COUNTS, 3, [1e-3, 2e-3, 5e-4], 1e-3)
    factors = found.factors([7, 6, 5], torch.Generator().manual_seed(0))
    for layer in (1, 2, 3):
        features, head = factors.at(layer)
        report = nc_metrics(features, found.problem.labels, head)
        assert report.nc1_quotient < 1e-20
        assert report.nc4 == 0
        squares = found.sv2[layer - 1 :].prod(0)
        assert float(nc2_gof(head, squares)) < 1e-7
        means = torch.stack([features[found.problem.labels == k][0] for k in range(4)])
        assert float(nc3_gof(head, means, found.z_diag)) < 1e-7
        assert report.metrics()["nc2_of_weights"] > 0.1


def test_large_classes_have_longer_weights_and_shorter_features() -> None:
    found = ufm_mse_minimizer((200, 100, 50, 50), 3, 5e-4, 5e-4)
    assert (found.w_norm2.diff() <= 0).all()
    assert (found.h_norm2.diff() >= 0).all()


# ---- 11: deep cross-entropy ------------------------------------------------------------------------------------------

LISTED = [  # classes, depth, n, lam, then ETF, pairs, circulant (None: not listed)
    (4, 3, 10, 5e-4, 0.0160930, 0.0148624, 0.0148624),
    (6, 2, 10, 5e-4, 0.0337172, 0.0316553, 0.0400593),
    (8, 2, 10, 5e-4, 0.0472019, 0.0426190, None),
    (10, 4, 10, 5e-4, 0.0437915, 0.0323809, 0.0336765),
    (10, 2, 5, 2.0**-10, 0.0906622, 0.0800127, None),
]


@pytest.mark.parametrize(("classes", "depth", "n", "lam", "etf", "pairs", "circulant"), LISTED)
def test_11_counter_examples(
    classes: int, depth: int, n: int, lam: float, etf: float, pairs: float, circulant: float | None
) -> None:
    near(best_scale(etf_logits(classes), n, depth, lam).objective, etf, 1e-6)
    near(best_scale(paired_logits(classes), n, depth, lam).objective, pairs, 1e-6)
    if circulant is not None:
        near(best_scale(circulant_logits(classes), n, depth, lam).objective, circulant, 1e-6)


def test_11_scale_and_two_layers_of_four_classes() -> None:
    near(best_scale(circulant_logits(4), 10, 3, 5e-4).scale, 7.699, 1e-3)
    near(best_scale(etf_logits(4), 10, 2, 5e-3).objective, 0.16173, 1e-5)
    near(best_scale(paired_logits(4), 10, 2, 5e-3).objective, 0.16188, 1e-5)
    near(best_scale(etf_logits(4), 10, 2, 1e-2).objective, 0.296258, 1e-6)
    near(best_scale(paired_logits(4), 10, 2, 1e-2).objective, 0.294089, 1e-6)


@pytest.mark.parametrize("classes", [4, 6, 8, 10])
@pytest.mark.parametrize("lam", [1e-5, 1e-3, 1e-2])
def test_11_with_one_layer_the_etf_wins(classes: int, lam: float) -> None:
    etf = best_scale(etf_logits(classes), 10, 1, lam)
    assert etf.objective < best_scale(paired_logits(classes), 10, 1, lam).objective
    assert etf.objective < best_scale(circulant_logits(classes), 10, 1, lam).objective
    closed = ufm_ce_minimizer_balanced(10, classes, lam, lam)
    near(etf.objective, closed.objective, 1e-12)
    near(etf.scale, ce_margin(classes, 10, lam, lam), 1e-5)


@quick
@given(seed=seeds, depth=st.integers(1, 4), classes=st.integers(2, 5))
def test_11_balanced_factors_reproduce_the_objective(seed: int, depth: int, classes: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(classes, classes, generator=g, dtype=torch.float64)
    lams = (0.01 * (1 + torch.rand(depth + 1, generator=g, dtype=torch.float64))).tolist()
    problem = UFM.make([3] * classes, depth, lams[:depth], lams[depth])
    factors = balanced_factors(problem, logits, [classes + 1] * depth, generator=g)
    near(factors.logits(), logits[problem.labels], 1e-10)
    near(problem.objective(factors, cross_entropy), schatten_objective(logits, 3, depth, lams), 1e-12)
    near(naive_objective(problem, factors, ce=True), schatten_objective(logits, 3, depth, lams), 1e-12)
    # no other factors of the same logits are cheaper
    turn = torch.eye(classes + 1, dtype=torch.float64) + 0.1 * torch.randn(
        classes + 1, classes + 1, generator=g, dtype=torch.float64
    )
    first = factors.layers[0] @ torch.linalg.inv(turn)
    other = Factors((first, *factors.layers[1:]), factors.features @ turn.T)
    near(other.logits(), factors.logits(), 1e-9)
    assert float(problem.penalty(other)) >= float(schatten_penalty(logits, 3, depth, lams)) - 1e-12


def test_11_descent_from_pairs_stays_below_the_etf() -> None:
    """The etf is a stationary point of a deep head, and descent finds less than it."""
    classes, n, depth, lam = 6, 4, 3, 1e-3
    problem = UFM.make([n] * classes, depth, lam, lam)
    etf = best_scale(etf_logits(classes), n, depth, lam)
    at_etf = balanced_factors(problem, etf.logits, [8] * depth)
    assert gradient(problem, at_etf, cross_entropy) < 1e-6
    pairs = best_scale(paired_logits(classes), n, depth, lam)
    found = descend(problem, balanced_factors(problem, pairs.logits, [8] * depth), cross_entropy)
    assert found.objective <= pairs.objective + 1e-12 < etf.objective - 1e-3


def test_11_nothing_is_best_where_the_penalty_is_large() -> None:
    found = best_scale(etf_logits(4), 10, 3, 1.0)
    assert found.scale == 0
    assert found.objective == math.log(4)


# ---- 12: thresholds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "limit"), [(1, 1.0), (2, 0.5), (3, 2 ** (2 / 3) / 3), (6, 5 ** (5 / 6) / 6)]
)
def test_12_thresholds(depth: int, limit: float) -> None:
    near(scalar_cost_limit(depth), limit, 1e-15)
    jump = (depth - 1) ** (1 / depth)
    near(1 / (jump**depth + 1) + limit * jump, 1.0, 1e-15)
    below, above = torch.tensor([[limit * (1 - 1e-9)], [limit * (1 + 1e-6)]], dtype=torch.float64)
    x, v = scalar_minimum(below, depth)
    near(x, [jump], 1e-4)
    assert float(v) <= 1
    x, v = scalar_minimum(above, depth)
    assert (float(x), float(v)) == (0.0, 1.0)


@quick
@given(log_c=st.floats(-12, 1), depth=st.integers(1, 7))
def test_12_the_scalar_minimum_is_the_least_on_a_grid(log_c: float, depth: int) -> None:
    c = torch.tensor([math.exp(log_c)], dtype=torch.float64)
    x, v = scalar_minimum(c, depth)
    top = (depth / float(c)) ** (1 / (depth + 1))
    grid = torch.linspace(0, 1.1 * top, 20_001, dtype=torch.float64)
    values = 1 / (grid**depth + 1) + c * grid
    assert float(v) <= float(values.min()) + 1e-12
    near(v, 1 / (x**depth + 1) + c * x, 1e-15)
    if depth == 1 and float(c) < 1:
        near(x, c.rsqrt() - 1, 1e-9 * float(1 + x))


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("side", [0.98, 1.02])
def test_12_a_class_vanishes_at_its_threshold(depth: int, side: float) -> None:
    counts = (40, 20, 10)
    unit = minority_collapse_threshold(sum(counts), 1.0, 1.0, depth)
    lam = (10 / (side * unit)) ** (depth / (depth + 1))
    near(minority_collapse_threshold(sum(counts), lam, lam, depth) * side, 10, 1e-9)
    found = ufm_mse_minimizer(counts, depth, lam, lam)
    assert found.collapsed.tolist() == [False, False, side < 1]
    near(class_costs(found.problem)[2], scalar_cost_limit(depth) / side, 1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_12_up_to_the_local_limit_a_class_stays_alive_if_it_is(depth: int) -> None:
    limit = scalar_local_limit(depth)
    grid = torch.linspace(0, 3, 300_001, dtype=torch.float64)
    near((depth * grid ** (depth - 1) / (grid**depth + 1) ** 2).max(), limit, 1e-9)
    c = torch.tensor([limit * (1 - 1e-2)], dtype=torch.float64)
    x = released_root(c, depth)

    def value(at: Tensor) -> float:
        return float(1 / (at**depth + 1) + c * at)

    assert value(x) <= min(value(x * 0.9999), value(x * 1.0001))
    with pytest.raises(DataError, match="no stationary point"):
        released_root(torch.tensor([limit * (1 + 1e-6)], dtype=torch.float64), depth)


def test_the_released_solver_is_wrong_in_a_window_and_fails_beyond() -> None:
    c = torch.tensor([0.1, 0.55], dtype=torch.float64)
    x, v = scalar_minimum(c, 2)
    released = released_root(c, 2)
    near(released[0], x[0], 1e-12)
    assert float(x[1]) == 0.0
    assert float(1 / (released[1] ** 2 + 1) + c[1] * released[1]) > 1.0
    assert float(v[1]) == 1.0
    released_root(torch.tensor([0.6495], dtype=torch.float64), 2)
    with pytest.raises(DataError, match="no stationary point"):
        released_root(torch.tensor([0.6496], dtype=torch.float64), 2)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "depth", "lam", "match"),
    [
        ((5,), 1, 0.1, "two classes"),
        ((5, 0), 1, 0.1, "at least one sample"),
        ((5, 5), 0, 0.1, "at least one layer"),
        ((5, 5), 1, 0.0, "above 0"),
        ((5, 5), 1, math.nan, "above 0"),
        ((5, 5), 2, [0.1], "one per layer"),
    ],
)
def test_bad_problems_are_refused(counts: tuple[int, ...], depth: int, lam: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ufm_mse_minimizer(counts, depth, lam, 0.1)


def test_what_has_no_closed_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="minimize_ufm"):
        ufm_mse_minimizer(COUNTS, 1, 0.01, 0.01, bias=True)
    with pytest.raises(ConfigError, match="width is 0"):
        ufm_mse_minimizer(COUNTS, 1, 0.01, 0.01, width=0)
    with pytest.raises(ConfigError, match="need 4 features"):
        ufm_ce_minimizer_balanced(5, 5, 0.01, 0.01, width=3)
    with pytest.raises(ConfigError, match="even number"):
        paired_logits(5)
    with pytest.raises(ConfigError, match="3 factors"):
        schatten_objective(etf_logits(4), 10, 2, [0.1, 0.1])
    with pytest.raises(ConfigError, match="below the rank"):
        ufm_mse_minimizer(COUNTS, 1, 5e-3, 5e-3).factors([3])
    with pytest.raises(ConfigError, match="2 widths for depth 1"):
        initial_factors(UFM.make(COUNTS, 1, 0.1, 0.1), [3, 3], seed=0)
    with pytest.raises(DataError, match="allow more"):
        ufm_ce_convex(COUNTS, 1e-4, 1e-4, max_iterations=20)


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction])
def test_penalties_are_numbers_of_any_kind(number):
    wanted = UFM.make([3, 3], 2, 0.5, 0.25)
    assert UFM.make([3, 3], 2, number(0.5), number(0.25)) == wanted
    assert UFM.make([3, 3], 2, [number(0.5), 0.5], 0.25) == wanted
    logits = torch.eye(3, dtype=torch.float64)
    assert schatten_penalty(logits, 2, 1, number(0.5)) == schatten_penalty(logits, 2, 1, 0.5)
