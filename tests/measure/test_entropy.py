"""Entropies: closed forms, limits, bounds and estimators."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.entropy import (
    collision_probability,
    entropy_from_counts,
    gaussian_entropy,
    knn_entropy,
    renyi_entropy,
    renyi_entropy_from_logits,
    shannon_entropy,
    shannon_entropy_from_logits,
    tsallis_entropy,
    tsallis_entropy_from_logits,
    von_neumann_entropy,
)

ORDERS = [0.0, 0.3, 0.999999, 1.0, 1.000001, 2.0, 5.0, math.inf]
HALVES = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)


def distributions(max_size=12):
    weights = st.integers(1, max_size).flatmap(
        lambda k: arrays(np.float64, k, elements=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)))
    )
    return weights.filter(lambda w: w.sum() > 0).map(lambda w: torch.from_numpy(w / w.sum()))


def test_exact_values():
    log2 = math.log(2)
    assert shannon_entropy(HALVES).item() == pytest.approx(1.5 * log2, abs=1e-15)
    assert renyi_entropy(HALVES, order=0.0).item() == pytest.approx(math.log(3), abs=1e-15)
    assert renyi_entropy(HALVES, order=2.0).item() == pytest.approx(-math.log(0.375), abs=1e-15)
    assert renyi_entropy(HALVES, order=math.inf).item() == pytest.approx(log2, abs=1e-15)
    assert tsallis_entropy(HALVES, order=0.0).item() == 2
    assert tsallis_entropy(HALVES, order=2.0).item() == pytest.approx(0.625, abs=1e-15)
    assert collision_probability(HALVES).item() == pytest.approx(0.375, abs=1e-15)


@settings(max_examples=80, deadline=None)
@given(p=distributions())
def test_bounds_and_order(p):
    k, slack = len(p), 1e-9
    values = [renyi_entropy(p, order=a).item() for a in ORDERS]
    assert all(-slack <= v <= math.log(k) + slack for v in values)
    assert all(a >= b - 1e-5 for a, b in pairwise(values))
    assert shannon_entropy(p).item() == pytest.approx(renyi_entropy(p, order=1.0).item(), abs=1e-12)
    assert collision_probability(p).item() == pytest.approx(math.exp(-values[5]), rel=1e-9)
    for q in (0.0, 0.5, 1.000001, 3.0):
        top = (1 - k ** (1 - q)) / (q - 1)
        assert -slack <= tsallis_entropy(p, order=q).item() <= top + slack


@settings(max_examples=50, deadline=None)
@given(p=distributions(), order=st.floats(0.05, 6).filter(lambda a: abs(a - 1) > 1e-3))
def test_families_against_their_definitions(p, order):
    power = p[p > 0].pow(order).sum().item()
    assert renyi_entropy(p, order=order).item() == pytest.approx(math.log(power) / (1 - order), abs=1e-9)
    assert tsallis_entropy(p, order=order).item() == pytest.approx((1 - power) / (order - 1), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-50, 50), order=st.sampled_from(ORDERS))
def test_logits_agree_with_probabilities(seed, shift, order):
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    logits[:, 2] = -math.inf
    p = logits.softmax(-1)
    torch.testing.assert_close(shannon_entropy_from_logits(logits + shift), shannon_entropy(p))
    torch.testing.assert_close(
        renyi_entropy_from_logits(logits + shift, order=order), renyi_entropy(p, order=order)
    )
    if order < math.inf:
        torch.testing.assert_close(
            tsallis_entropy_from_logits(logits + shift, order=order), tsallis_entropy(p, order=order)
        )


@pytest.mark.parametrize("order", ORDERS[1:-1])
def test_gradients(order):
    logits = torch.randn(
        2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda z: renyi_entropy_from_logits(z, order=order), (logits,))
    assert torch.autograd.gradcheck(lambda z: tsallis_entropy_from_logits(z, order=order), (logits,))


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_extreme_logits(order):
    logits = torch.tensor([[0.0, -3000.0, -math.inf]], requires_grad=True)
    for function in (renyi_entropy_from_logits, tsallis_entropy_from_logits):
        value = function(logits, order=order)
        assert value.item() == 0
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert not grad[0, :2].isnan().any()


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    value = shannon_entropy_from_logits(logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, shannon_entropy_from_logits(logits.double()).float())


def test_counts():
    counts = torch.tensor([[4, 2, 2, 0], [8, 0, 0, 0]])
    plug_in = entropy_from_counts(counts, estimator="plug-in")
    torch.testing.assert_close(plug_in, shannon_entropy(counts.double() / 8))
    torch.testing.assert_close(entropy_from_counts(counts), plug_in + torch.tensor([2 / 16, 0.0]).double())
    assert entropy_from_counts(torch.zeros(3)).isnan()


def test_miller_madow_removes_most_of_the_bias():
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.multinomial(100, np.full(20, 1 / 20), size=400))
    truth = math.log(20)
    plug_in = entropy_from_counts(counts, estimator="plug-in").mean().item() - truth
    corrected = entropy_from_counts(counts).mean().item() - truth
    assert plug_in == pytest.approx(-19 / 200, abs=0.02)
    assert abs(corrected) < 0.2 * abs(plug_in)


def test_gaussian():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).entropy()
    torch.testing.assert_close(gaussian_entropy(covariance), expected)
    assert gaussian_entropy(torch.ones(2, 2)).item() == -math.inf
    assert torch.autograd.gradcheck(
        lambda c: gaussian_entropy((c + c.T) / 2), (covariance.clone().requires_grad_(),)
    )


@pytest.mark.parametrize("dimension", [1, 3])
def test_knn_matches_closed_forms(dimension):
    rng = np.random.default_rng(dimension)
    normal = rng.normal(size=(4000, dimension))
    assert knn_entropy(normal) == pytest.approx(dimension * 0.5 * math.log(2 * math.pi * math.e), abs=0.08)
    assert knn_entropy(3 * normal) == pytest.approx(knn_entropy(normal) + dimension * math.log(3), abs=1e-9)
    assert knn_entropy(rng.random((4000, dimension))) == pytest.approx(0, abs=0.1)


def test_knn_repeated_points():
    assert knn_entropy(np.zeros((10, 2))) == -math.inf


def test_von_neumann():
    identity = torch.eye(5, dtype=torch.float64)
    assert von_neumann_entropy(identity).item() == pytest.approx(math.log(5), abs=1e-14)
    assert von_neumann_entropy(torch.ones(5, 5)).item() == pytest.approx(0, abs=1e-5)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    rho = q @ p.diag() @ q.T
    torch.testing.assert_close(von_neumann_entropy(7 * rho), shannon_entropy(p))
    torch.testing.assert_close(von_neumann_entropy(rho, order=2.0), renyi_entropy(p, order=2.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: shannon_entropy(torch.tensor([0.5, 0.6])), DataError, "sum to 1"),
        (lambda: shannon_entropy(torch.tensor([1.5, -0.5])), DataError, "non-negative"),
        (lambda: collision_probability(torch.tensor([math.nan, 1.0])), DataError, "sum to 1"),
        (lambda: renyi_entropy(HALVES, order=-1.0), ConfigError, "order is -1.0"),
        (lambda: tsallis_entropy(HALVES, order=math.inf), ConfigError, "finite"),
        (lambda: entropy_from_counts(torch.tensor([1, -1])), DataError, "not negative"),
        (lambda: entropy_from_counts(torch.tensor([1]), estimator="jackknife"), ConfigError, "'jackknife'"),
        (lambda: knn_entropy(np.zeros((3, 1)), neighbors=3), ConfigError, "3 with 3 samples; give 1 to 2"),
        (lambda: knn_entropy(np.full((5, 1), np.nan)), DataError, "NaN or inf"),
        (lambda: gaussian_entropy(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), DataError, "symmetric"),
        (
            lambda: gaussian_entropy(torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            DataError,
            "least eigenvalue is -1",
        ),
        (lambda: von_neumann_entropy(torch.zeros(2, 2)), DataError, "trace is 0"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
