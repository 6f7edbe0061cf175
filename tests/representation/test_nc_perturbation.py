"""Exact checks of near-collapse, numbered as in the specification, against naive references in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.neural_collapse import nc1_quotient, nc_metrics
from uncollapse.representation.nc_deep_linear import ufm_mse_minimizer
from uncollapse.representation.nc_perturbation import (
    LinearResponse,
    central_path_flow,
    central_path_gradient,
    central_path_loss,
    collapsed_minimizer,
    effective_step,
    linear_response,
    near_collapse_objective,
    near_collapse_spectrum,
    one_hot,
    optimal_features,
    optimal_head,
    pooled_moments,
    predict_layerwise_nc1,
    proximal_features,
    unconstrained_penalties,
)

PAPER = {"K": 4, "n": 5, "d": 10, "lam_w": math.sqrt(2), "lam_h": 0.1}


def random_features(seed: int, K: int = 3, n: int = 4, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(K).repeat_interleave(n)[torch.randperm(K * n, generator=generator)]
    return torch.randn(K * n, d, generator=generator, dtype=torch.float64), y


def near_collapsed(
    seed: int = 0, noise: float = 0.1, lam_w: float = 0.5, lam_h: float = 0.1
) -> tuple[Tensor, Tensor]:
    ideal = collapsed_minimizer(3, 4, 6, lam_w, lam_h, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return ideal.H + noise * torch.randn(ideal.H.shape, generator=generator, dtype=torch.float64), ideal.y


def dense(operator: LinearResponse) -> np.ndarray:
    return operator @ np.eye(operator.shape[0])


def values_and_counts(values: np.ndarray) -> list[tuple[float, int]]:
    found, counts = np.unique(np.asarray(values).round(9), return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


# ---- 1: the minimiser without a tie ---------------------------------------------------------------------------------


def test_1_the_collapsed_minimiser_is_stationary_and_has_the_derived_value() -> None:
    ideal = collapsed_minimizer(5, 3, 8, 0.3, 0.4)
    W, H = ideal.W.clone().requires_grad_(), ideal.H.clone().requires_grad_()
    value = near_collapse_objective(W, H, ideal.y, 0.3, 0.4)
    gradients = torch.autograd.grad(value, (W, H))
    assert max(float(g.abs().max()) for g in gradients) < 1e-12
    assert float(value.detach()) == pytest.approx(0.2864101615, abs=1e-10)
    assert float(value.detach()) == pytest.approx(ideal.objective, abs=1e-12)
    means = ideal.H.reshape(5, 3, 8)
    torch.testing.assert_close(means[:, 0] @ means[:, 0].T, ideal.rho * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(ideal.H @ ideal.W.T, (1 - ideal.c) * one_hot(ideal.y))
    report = nc_metrics(ideal.H, ideal.y, ideal.W)
    assert report.nc2_etf_means == pytest.approx(0, abs=1e-12)
    assert report.nc1_quotient == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 10_000), st.floats(-1.5, 1.5), st.floats(-3, -0.1))
def test_1_nothing_is_below_the_minimum(seed: int, log_ratio: float, log_product: float) -> None:
    lam_w, lam_h = (math.exp((log_product + sign * log_ratio) / 2) for sign in (1, -1))
    ideal = collapsed_minimizer(3, 2, 4, lam_w, lam_h, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    W = ideal.W + 0.1 * torch.randn(ideal.W.shape, generator=generator, dtype=torch.float64)
    H = ideal.H + 0.1 * torch.randn(ideal.H.shape, generator=generator, dtype=torch.float64)
    assert float(near_collapse_objective(W, H, ideal.y, lam_w, lam_h)) > ideal.objective


def test_1_penalties_that_are_too_strong_leave_nothing() -> None:
    ideal = collapsed_minimizer(3, 2, 4, 2.0, 0.8)
    assert (ideal.rho, ideal.c, ideal.objective) == (0, 1, 0.5)
    assert not ideal.W.any()
    assert not ideal.H.any()


def test_1_a_given_frame_is_used() -> None:
    frame = torch.eye(4, dtype=torch.float64)[[2, 0]]
    ideal = collapsed_minimizer(2, 3, 4, 0.5, 0.5, frame=frame)
    torch.testing.assert_close(ideal.H[0], math.sqrt(ideal.rho) * frame[0])
    with pytest.raises(ConfigError, match="orthonormal"):
        collapsed_minimizer(2, 3, 4, 0.5, 0.5, frame=2 * frame)


# ---- 2 and 7: the spectrum -------------------------------------------------------------------------------------------


def paper_response(*, exact: bool) -> np.ndarray:
    ideal = collapsed_minimizer(**PAPER)
    return dense(linear_response(ideal.W, ideal.H, ideal.y, PAPER["lam_w"], PAPER["lam_h"], 100.0, exact))


@pytest.mark.parametrize(
    ("exact", "block", "off"),
    [
        (False, [(0.99734085, 16), (0.99750424, 1), (0.99875212, 3), (0.999, 24), (1.0, 6)], 0.00124787938),
        (
            True,
            [(0.9973479044, 16), (0.9975104545, 1), (0.9987552273, 3), (0.999000999, 24), (1.0, 6)],
            0.00124477273,
        ),
    ],
)
def test_2_blocks_of_the_response_of_the_paper(
    exact: bool, block: list[tuple[float, int]], off: float
) -> None:
    F = paper_response(exact=exact)
    found = values_and_counts(np.linalg.svd(F[:50, :50], compute_uv=False))
    assert [count for _, count in found] == [count for _, count in block]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in block], atol=1e-8)
    singular = np.linalg.svd(F[:50, 50:100], compute_uv=False)
    assert singular[0] == pytest.approx(off, abs=1e-8)
    assert singular[1] < 1e-12
    spectrum = near_collapse_spectrum(**PAPER, beta=100.0)
    closed = sorted((round(m.exact if exact else m.large_beta, 9), m.multiplicity) for m in spectrum.block)
    np.testing.assert_allclose([v for v, _ in closed], [v for v, _ in found], atol=2e-9)
    assert [count for _, count in closed] == [count for _, count in found]
    assert (spectrum.off_block.exact if exact else spectrum.off_block.large_beta) == pytest.approx(
        off, abs=1e-8
    )


@given(
    st.integers(2, 4), st.integers(2, 3), st.integers(0, 3), st.floats(0.2, 2), st.floats(0.05, 0.4),
    st.sampled_from([0.5, 10.0, 1e4]),
)  # fmt: skip
def test_7_all_of_the_response_is_symmetric_and_has_the_closed_spectrum(
    K: int, n: int, more: int, lam_w: float, lam_h: float, beta: float
) -> None:
    d = K + more
    ideal = collapsed_minimizer(K, n, d, lam_w, lam_h)
    F = dense(linear_response(ideal.W, ideal.H, ideal.y, lam_w, lam_h, beta))
    np.testing.assert_allclose(F, F.T, atol=1e-12)
    modes = near_collapse_spectrum(K, n, d, lam_w, lam_h, beta).full
    closed = np.sort(np.concatenate([np.full(m.multiplicity, m.exact) for m in modes]))
    np.testing.assert_allclose(np.linalg.eigvalsh(F), closed, atol=1e-10)
    assert closed[0] > 0
    assert closed[-1] <= 1


@pytest.mark.parametrize(("K", "d", "count"), [(4, 10, 30), (6, 9, 33)])
@pytest.mark.parametrize("beta", [0.3, 30.0])
def test_7_rotations_pass_unchanged(K: int, d: int, count: int, beta: float) -> None:
    ideal = collapsed_minimizer(K, 2, d, 0.6, 0.2)
    F = linear_response(ideal.W, ideal.H, ideal.y, 0.6, 0.2, beta)
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(7, d, d, generator=generator, dtype=torch.float64)
    turned = ideal.H @ (skew - skew.mT)
    torch.testing.assert_close(F.apply(turned), turned, rtol=0, atol=1e-11)
    assert int((np.linalg.eigvalsh(dense(F)) > 1 - 1e-10).sum()) == count
    rotated = next(
        m for m in near_collapse_spectrum(K, 2, d, 0.6, 0.2, beta).full if m.name == "means rotated"
    )
    assert (rotated.exact, rotated.multiplicity) == (1.0, count)


def test_7_large_beta_is_the_first_order() -> None:
    ideal = collapsed_minimizer(3, 2, 5, 0.6, 0.2)
    errors = []
    for beta in (100.0, 1000.0):
        exact, first = (
            dense(linear_response(ideal.W, ideal.H, ideal.y, 0.6, 0.2, beta, e)) for e in (True, False)
        )
        errors.append(np.abs(exact - first).max())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.02)


# ---- 3 and 4: the head minimised out ---------------------------------------------------------------------------------


def test_3_the_flow_is_the_gradient_of_the_loss_with_the_optimal_head() -> None:
    H, y = random_features(1)
    H.requires_grad_()
    (expected,) = torch.autograd.grad(central_path_loss(H, y, 0.2, 0.3), H)
    torch.testing.assert_close(
        central_path_gradient(H.detach(), y, 0.2, 0.3), len(H) * expected, rtol=0, atol=1e-10
    )


def test_3_curvature_is_the_hessian_of_that_loss() -> None:
    H, y = random_features(2)
    change = random_features(3)[0]
    W = optimal_head(H, one_hot(y), 0.2)
    F = linear_response(W, H, y, 0.2, 0.3, 5.0)
    expected = torch.autograd.functional.hvp(lambda x: central_path_loss(x, y, 0.2, 0.3), H, change)[1]
    torch.testing.assert_close(F.curvature(change), len(H) * expected, rtol=0, atol=1e-10)
    moved = torch.autograd.functional.jvp(lambda x: optimal_head(x, one_hot(y), 0.2), H, change)[1]
    torch.testing.assert_close(F.head_change(change), moved, rtol=0, atol=1e-10)


def test_4_conservation_at_the_optimal_head() -> None:
    H, y = random_features(4)
    W = optimal_head(H, one_hot(y), 0.2)
    torch.testing.assert_close(0.2 * W, (one_hot(y) - H @ W.T).T @ H / 4, rtol=0, atol=1e-12)


def test_4_halves_of_alternating_minimisation_are_stationary() -> None:
    H0, y = random_features(5)
    W = optimal_head(H0, one_hot(y), 0.2).requires_grad_()
    H = optimal_features(W.detach(), y, 0.3, 2.0, H0).requires_grad_()
    value = near_collapse_objective(W, H, y, 0.2, 0.3, beta=2.0, H0=H0)
    (gradient,) = torch.autograd.grad(value, H)
    assert float(gradient.abs().max()) < 1e-12
    value = near_collapse_objective(W, H0, y, 0.2, 0.3)
    (gradient,) = torch.autograd.grad(value, W)
    assert float(gradient.abs().max()) < 1e-12


def test_without_head_penalty_the_head_is_least_squares() -> None:
    H, y = random_features(6, K=3, n=1, d=5)
    torch.testing.assert_close(optimal_head(H, one_hot(y), 0.0), torch.linalg.pinv(H).T[y.argsort()])


# ---- 5: the central path ---------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.3, 2.0]), st.sampled_from([0.0, 0.05, 1.8]))
def test_5_the_theorem_holds_at_every_step(seed: int, lam_w: float, lam_h: float) -> None:
    H0, y = random_features(seed)
    path = central_path_flow(H0, y, lam_w, lam_h, (0.0, 5.0))
    growth = (2 * lam_h * path.t).exp()
    assert bool((path.nc1.diff() < 1e-10).all())
    # so small because the shrinkage by lam_h is exact: growth reaches 7e7
    assert bool(((growth * path.trace_w).diff() < 1e-12).all())
    assert bool(((growth * path.trace_b).diff() > -1e-10).all())
    assert float(path.nc1[-1]) < float(path.nc1[0])


def test_5_without_feature_penalty_traces_move_apart() -> None:
    path = central_path_flow(*random_features(7), 0.2, 0.0, (0.0, 2.0))
    assert bool((path.trace_w.diff() < 0).all())
    assert bool((path.trace_b.diff() > 0).all())


def test_5_the_flow_on_moments_is_the_flow_of_the_samples() -> None:
    H0, y = random_features(8)
    y[0] = y[1]  # unbalanced, too
    lam_w, lam_h, steps = 0.2, 0.1, 400
    H, dt = H0.clone(), 1.5 / steps

    def velocity(x: Tensor) -> Tensor:
        return -central_path_gradient(x, y, lam_w, lam_h)

    for _ in range(steps):
        k1 = velocity(H)
        k2 = velocity(H + dt / 2 * k1)
        k3 = velocity(H + dt / 2 * k2)
        k4 = velocity(H + dt * k3)
        H = H + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    path = central_path_flow(H0, y, lam_w, lam_h, (0.0, 1.5), t_eval=[0.5, 1.5])
    assert path.H_t.shape == (2, *H0.shape)
    torch.testing.assert_close(path.features(), H, rtol=0, atol=1e-9)
    assert float(path.nc1[-1]) == pytest.approx(float(nc1_quotient(H, y)), abs=1e-9)


def test_5_implicit_steps_approach_the_flow_at_first_order() -> None:
    H0, y = random_features(9)
    goal = central_path_flow(H0, y, 0.3, 0.1, (0.0, 1.0)).features()
    errors = []
    for count in (20, 40):
        H = H0
        for _ in range(count):
            _, H = proximal_features(H, y, 0.3, 0.1, float(count))
        errors.append(float((H - goal).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_stiff_methods_agree() -> None:
    H0, y = random_features(10)
    ends = [central_path_flow(H0, y, 0.01, 0.1, (0.0, 1.0), method=m).nc1[-1] for m in ("DOP853", "LSODA")]
    assert float(ends[0]) == pytest.approx(float(ends[1]), rel=1e-6)


# ---- 6: tied features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_6_collapsed_features_stay(beta: float) -> None:
    ideal = collapsed_minimizer(3, 4, 6, 0.5, 0.1)
    W, H = proximal_features(ideal.H, ideal.y, 0.5, 0.1, beta)
    torch.testing.assert_close(H, ideal.H, rtol=0, atol=1e-10)
    torch.testing.assert_close(W, ideal.W, rtol=0, atol=1e-10)


def test_6_tied_to_zero_is_a_larger_feature_penalty() -> None:
    y = torch.arange(3).repeat_interleave(4)
    W, H = proximal_features(torch.zeros(12, 6, dtype=torch.float64), y, 0.5, 0.1, 0.3)
    ideal = collapsed_minimizer(3, 4, 6, 0.5, 0.4)
    value = near_collapse_objective(W, H, y, 0.5, 0.1, beta=0.3, H0=torch.zeros_like(H))
    assert float(value) == pytest.approx(ideal.objective, abs=1e-12)
    torch.testing.assert_close(H @ H.T, ideal.H @ ideal.H.T, rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.1, 1.0, 100.0, 1e4]), st.sampled_from([0.03, 0.5]))
def test_6_the_solver_ends_in_a_minimum_and_lower_than_alternation(
    seed: int, beta: float, lam_w: float
) -> None:
    H0, y = random_features(seed)
    W, H = proximal_features(H0, y, lam_w, 0.1, beta)
    gradient = beta * (H - H0) + central_path_gradient(H, y, lam_w, 0.1)
    assert float(gradient.norm()) < 1e-9 * (1 + beta) * float(H0.norm())
    torch.testing.assert_close(W, optimal_head(H, one_hot(y), lam_w), rtol=0, atol=1e-8)
    G = H0
    for _ in range(100):
        V = optimal_head(G, one_hot(y), lam_w)
        G = optimal_features(V, y, 0.1, beta, H0)
    reached = float(near_collapse_objective(V, G, y, lam_w, 0.1, beta=beta, H0=H0))
    assert float(near_collapse_objective(W, H, y, lam_w, 0.1, beta=beta, H0=H0)) <= reached + 1e-9
    assert float(nc1_quotient(H, y)) < float(nc1_quotient(H0, y))


@pytest.mark.parametrize("beta", [1.0, 50.0])
def test_6_the_response_is_the_derivative_of_the_minimiser(beta: float) -> None:
    H0, y = near_collapsed()
    change = random_features(11)[0]
    W, H = proximal_features(H0, y, 0.5, 0.1, beta)
    predicted = linear_response(W, H, y, 0.5, 0.1, beta).apply(change)
    errors = []
    for eps in (1e-3, 1e-4):
        moved = proximal_features(H0 + eps * change, y, 0.5, 0.1, beta, tolerance=1e-14)[1]
        errors.append(float(((moved - H) / eps - predicted).norm() / predicted.norm()))
    assert errors[0] < 1e-2
    assert 8 < errors[0] / errors[1] < 12


def test_tied_minimiser_does_not_depend_on_the_order_of_samples() -> None:
    H0, y = random_features(12)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    W, H = proximal_features(H0, y, 0.3, 0.1, 3.0)
    V, G = proximal_features(H0[order], y[order], 0.3, 0.1, 3.0)
    torch.testing.assert_close(V, W, rtol=0, atol=1e-10)
    torch.testing.assert_close(G, H[order], rtol=0, atol=1e-10)


# ---- the operator ----------------------------------------------------------------------------------------------------


def naive_response(W: Tensor, H: Tensor, y: Tensor, lam_w: float, lam_h: float, beta: float) -> np.ndarray:
    """Theorem 4.1 with explicit Kronecker products, columns as in the paper."""
    K, d = W.shape
    w, h, N = W.numpy(), H.numpy().T, len(H)
    E = w @ h - np.eye(K)[:, y.numpy()]
    commutation = np.zeros((K * d, K * d))
    for k in range(K):
        for j in range(d):
            commutation[k * d + j, j * K + k] = 1  # vec(W) to vec(W^T)
    C = np.kron(h.T, w.T) + np.kron(E.T, np.eye(d)) @ commutation
    inner = np.kron(h @ h.T, np.eye(K)) + N / K * lam_w * np.eye(K * d)
    S = np.kron(np.eye(N), w.T @ w) + (lam_h + beta) * np.eye(N * d) - C @ np.linalg.solve(inner, C.T)
    return beta * np.linalg.inv(S)


def test_the_operator_is_the_schur_complement_of_the_paper() -> None:
    H0, y = random_features(13)
    W, H = proximal_features(H0, y, 0.3, 0.2, 4.0)
    F = linear_response(W, H, y, 0.3, 0.2, 4.0)
    np.testing.assert_allclose(dense(F), naive_response(W, H, y, 0.3, 0.2, 4.0), atol=1e-11)
    x = np.random.default_rng(0).normal(size=F.shape[0])
    np.testing.assert_allclose(F.T @ x, F @ x)
    np.testing.assert_allclose(F.H @ x, F @ x)
    top = eigsh(F, k=2, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(top), np.linalg.eigvalsh(dense(F))[-2:], atol=1e-9)


def test_torch_and_scipy_apply_the_same_map_in_the_dtype_given() -> None:
    ideal = collapsed_minimizer(3, 2, 5, 0.5, 0.2)
    change = torch.randn(
        2, 4, *ideal.H.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    F = linear_response(ideal.W, ideal.H, ideal.y, 0.5, 0.2, 2.0)
    batched = F.apply(change)
    np.testing.assert_allclose(F @ change[1, 2].numpy().ravel(), batched[1, 2].flatten(), atol=1e-12)
    single = linear_response(ideal.W.float(), ideal.H.float(), ideal.y, 0.5, 0.2, 2.0)
    assert single.dtype == np.float32
    torch.testing.assert_close(single.apply(change.float()), batched.float(), rtol=1e-4, atol=1e-5)


def test_without_a_strict_minimum_there_is_no_response() -> None:
    ideal = collapsed_minimizer(3, 4, 6, 0.5, 0.1)
    with pytest.raises(DataError, match="strict minimum"):
        linear_response(0 * ideal.W, 0 * ideal.H, ideal.y, 0.5, 0.1, 0.01).apply(ideal.H)


# ---- 8 and 9: NC1~, and the other paper ------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_8_nc1_knows_no_scale_rotation_or_duplicates(seed: int, scale: float) -> None:
    H, y = random_features(seed)
    turn = torch.linalg.qr(random_features(seed, 2, 3, 6)[0]).Q
    expected = float(pooled_moments(H, y).nc1)
    assert expected == pytest.approx(float(nc1_quotient(H, y)), rel=1e-12)
    assert float(pooled_moments(scale * H @ turn, y).nc1) == pytest.approx(expected, rel=1e-9)
    assert float(pooled_moments(torch.cat([H, H]), torch.cat([y, y])).nc1) == pytest.approx(
        expected, rel=1e-9
    )
    assert float(pooled_moments(H, y).normalised().gram.trace()) == pytest.approx(len(H))


@pytest.mark.parametrize(("lam_w", "lam_h"), [(0.3, 0.4), (1.2, 0.05)])
def test_9_one_deep_linear_layer_is_the_same_problem(lam_w: float, lam_h: float) -> None:
    K, n, d = 4, 5, 7
    ideal = collapsed_minimizer(K, n, d, lam_w, lam_h)
    l_w, l_h = unconstrained_penalties(K, n, lam_w, lam_h)
    assert l_w / 2 + l_h / 3 == pytest.approx(lam_w / (2 * K) + lam_h / (3 * K * n))
    found = ufm_mse_minimizer([n] * K, 1, l_w, l_h, width=d)
    assert found.objective == pytest.approx(ideal.objective, abs=1e-12)
    torch.testing.assert_close(ideal.W @ ideal.W.T, found.gram_w, rtol=0, atol=1e-12)
    torch.testing.assert_close(ideal.H[::n] @ ideal.H[::n].T, found.gram_h, rtol=0, atol=1e-12)
    torch.testing.assert_close(ideal.H[::n] @ ideal.W.T, found.logits, rtol=0, atol=1e-12)


# ---- layers of a network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_the_effective_step_is_the_one_that_was_taken(beta: float) -> None:
    H0, y = random_features(14)
    H0 = H0 / H0.square().sum(1).mean().sqrt()
    following = proximal_features(H0, y, 0.01, 0.0, beta)[1]
    wider = torch.cat([7 * following, torch.zeros(len(y), 3, dtype=torch.float64)], dim=1)
    assert effective_step(5 * H0.float(), wider, y) == pytest.approx(1 / beta, rel=1e-4)
    assert effective_step(following, H0, y) == 0
    assert effective_step(H0, one_hot(y), y) == math.inf


def test_steps_of_equal_length_are_predicted() -> None:
    H, y = random_features(15)
    H = H / H.square().sum(1).mean().sqrt()
    layers = {"first": H}
    for name in ("second", "third", "fourth"):
        H = proximal_features(H, y, 0.01, 0.0, 8.0)[1]
        layers[name] = H
    found = predict_layerwise_nc1(layers, y)
    assert found.layers == tuple(layers)
    np.testing.assert_allclose(found.predicted, found.measured, rtol=1e-6)
    assert found.steps[0] == pytest.approx(1 / 8, rel=1e-5)
    assert predict_layerwise_nc1(list(layers.values()), y).layers == ("0", "1", "2", "3")


def test_layers_that_do_not_collapse_have_no_prediction() -> None:
    H, y = random_features(16)
    following = proximal_features(H, y, 0.01, 0.0, 1.0)[1]
    found = predict_layerwise_nc1([following, H, following], y)
    assert found.steps[0] == 0
    assert found.steps[1] > 0
    assert found.predicted[0] == found.measured[0]
    assert math.isnan(found.predicted[1])


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_penalties_that_the_theorems_exclude_are_refused() -> None:
    H, y = random_features(17)
    with pytest.raises(ConfigError, match="lam_w is 0"):
        central_path_flow(H, y, 0.0, 0.1, (0.0, 1.0))
    with pytest.raises(ConfigError, match="lam_h is -1"):
        proximal_features(H, y, 0.1, -1.0, 1.0)
    with pytest.raises(ConfigError, match="beta is 0"):
        proximal_features(H, y, 0.1, 0.1, 0.0)
    with pytest.raises(ConfigError, match="lam_w is nan"):
        central_path_gradient(H, y, math.nan, 0.1)
    with pytest.raises(ConfigError, match="lam_w is -1"):
        optimal_head(H, one_hot(y), -1.0)
    with pytest.raises(ConfigError, match="t_span"):
        central_path_flow(H, y, 0.1, 0.1, (1.0, 0.0))
    with pytest.raises(ConfigError, match="no H0"):
        near_collapse_objective(H[:3], H, y, 0.1, 0.1, beta=1.0)
    with pytest.raises(ConfigError, match="d >= K"):
        collapsed_minimizer(5, 2, 4, 0.1, 0.1)
    with pytest.raises(ConfigError, match="lam_h is 0"):
        collapsed_minimizer(2, 2, 4, 0.1, 0.0)
    with pytest.raises(ConfigError, match="not all zero"):
        near_collapse_spectrum(2, 2, 4, 2.0, 0.5, 1.0)
    with pytest.raises(ConfigError, match="d >= K"):
        near_collapse_spectrum(5, 2, 4, 0.1, 0.1, 1.0)
    with pytest.raises(ConfigError, match="at least two"):
        predict_layerwise_nc1([H], y)


def test_features_and_labels_that_cannot_be_used_are_refused() -> None:
    H, y = random_features(18)
    with pytest.raises(DataError, match="classes \\[3\\]"):
        proximal_features(H, y, 0.1, 0.1, 1.0, num_classes=4)
    with pytest.raises(DataError, match="NaN or inf"):
        central_path_flow(H.log(), y, 0.1, 0.1, (0.0, 1.0))
    with pytest.raises(DataError, match="0 to 2"):
        near_collapse_objective(H[:3], H, y + 1, 0.1, 0.1)
    with pytest.raises(DataError, match="0 to K - 1"):
        central_path_loss(H, y - 1, 0.1, 0.1)
    with pytest.raises(DataError, match="coincide"):
        effective_step(torch.ones_like(H), H, y)
    with pytest.raises(DataError, match="raise beta"):
        proximal_features(H, y, 0.1, 0.1, 1.0, max_steps=1)


def test_classes_with_one_sample_are_welcome() -> None:
    H, y = random_features(19, K=4, n=1, d=5)
    path = central_path_flow(H, y, 0.2, 0.1, (0.0, 1.0))
    assert not path.trace_w.any()
    _, G = proximal_features(H, y, 0.2, 0.1, 10.0)
    assert float(pooled_moments(G, y).nc1) == 0
    with pytest.raises(DataError, match="single sample"):
        effective_step(H, G, y)


def test_single_precision_goes_in_and_comes_out() -> None:
    H, y = random_features(20)
    W, G = proximal_features(H.float(), y, 0.2, 0.1, 10.0)
    assert (
        W.dtype
        == G.dtype
        == central_path_flow(H.float(), y, 0.2, 0.1, (0.0, 1.0)).features().dtype
        == torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    H, y = random_features(0, K=3, n=2)
    narrow = y.to(dtype)
    for call in (
        lambda labels: pooled_moments(H, labels).scatter,
        lambda labels: optimal_features(H[:3], labels, 0.1, 0.5, H),
        lambda labels: central_path_flow(H, labels, 0.5, 0.1, (0.0, 0.5)).H_t,
        lambda labels: near_collapse_objective(H[:3], H, labels, 0.5, 0.1),
        lambda labels: proximal_features(H, labels, 0.5, 0.1, 1.0)[1],
        lambda labels: central_path_gradient(H, labels, 0.5, 0.1),
    ):
        torch.testing.assert_close(call(narrow), call(y))


def test_a_frame_is_compared_on_its_own_device():
    frame = torch.eye(2, 4, dtype=torch.float64)
    with torch.device("meta"):  # where new tensors go that name no device
        assert collapsed_minimizer(2, 3, 4, 0.5, 0.5, frame=frame).H.device == frame.device
