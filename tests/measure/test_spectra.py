"""Ranks and norms: closed forms, invariances, streaming."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.spectra import (
    SecondMoment,
    condition_number,
    effective_rank,
    numerical_rank,
    participation_ratio,
    singular_values,
    spectral_norm,
    stable_rank,
)

RANKS = [effective_rank, stable_rank, participation_ratio]


def matrix(rows, columns, *, seed=0, batch=()):
    return torch.randn(
        *batch, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_exact_values():
    s = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert effective_rank(s).item() == pytest.approx(2**1.5)
    assert stable_rank(s).item() == pytest.approx(1.5)
    assert participation_ratio(s).item() == pytest.approx(36 / 18)
    assert numerical_rank(s).item() == 3
    assert condition_number(s).item() == math.inf
    assert condition_number(s[:3]).item() == 2


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-150, 1, 1e150]),
)
def test_bounds_scale_and_transpose(rows, columns, seed, scale):
    a = matrix(rows, columns, seed=seed)
    s, scaled = singular_values(a), singular_values(scale * a.T)
    for rank in RANKS:
        assert 1 - 1e-9 <= rank(s).item() <= min(rows, columns) + 1e-9
        torch.testing.assert_close(rank(s), rank(scaled))
    assert stable_rank(s) <= effective_rank(s) + 1e-9
    assert numerical_rank(s).item() == np.linalg.matrix_rank(a.numpy())


def test_equal_values_and_rank_one():
    for rank in RANKS:
        assert rank(torch.full((6,), 3.0)).item() == pytest.approx(6)
        assert rank(torch.tensor([5.0, 0.0, 0.0])).item() == pytest.approx(1)
        assert rank(torch.zeros(4)).item() == 0
    assert numerical_rank(torch.zeros(4)).item() == 0
    assert condition_number(torch.zeros(4)).isnan()


def test_batched():
    s = singular_values(matrix(5, 7, batch=(2, 3)))
    for function in (*RANKS, numerical_rank, condition_number):
        assert function(s).shape == (2, 3)
        torch.testing.assert_close(function(s)[1, 2], function(s[1, 2]))


def test_gradients():
    a = matrix(4, 3).requires_grad_()
    for rank in RANKS:
        assert torch.autograd.gradcheck(lambda m, rank=rank: rank(singular_values(m)), (a,))
    start = matrix(1, 3)[0]
    assert torch.autograd.gradcheck(lambda m: spectral_norm(m, start=start, steps=200), (a,))


def test_spectral_norm():
    a = matrix(6, 4, batch=(3,))
    exact = singular_values(a)[..., 0]
    start = matrix(3, 4, seed=1)
    torch.testing.assert_close(spectral_norm(a, start=start, steps=300), exact, rtol=1e-10, atol=0)
    assert (spectral_norm(a, start=start, steps=1) <= exact).all()


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=4), offset=st.sampled_from([0.0, 1e6]))
def test_streaming_equals_one_pass(cuts, offset):
    x = matrix(50, 4) + offset
    moment = SecondMoment.empty(4)
    for part in np.split(x, sorted(cuts)):
        moment = moment.add(torch.as_tensor(part))
    torch.testing.assert_close(moment.covariance(), torch.cov(x.T), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moment.singular_values(), singular_values(x - x.mean(0)), rtol=1e-7, atol=1e-7)
    origin = moment.singular_values(about="origin")
    torch.testing.assert_close(origin[0], singular_values(x)[0], rtol=1e-9, atol=1e-9)


def test_streaming_mask_merge_and_dtype():
    x = matrix(12, 3).float().reshape(3, 4, 3)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    bad = x.masked_fill(~mask.unsqueeze(-1), math.nan)
    moment = SecondMoment.empty(3).add(bad, mask=mask)
    assert moment.count == mask.sum()
    torch.testing.assert_close(moment.covariance(), torch.cov(x[mask].T.double()))
    merged = SecondMoment.empty(3).add(x[0]) + SecondMoment.empty(3).add(x[1:])
    torch.testing.assert_close(merged.covariance(), torch.cov(x.reshape(-1, 3).T.double()))
    assert (SecondMoment.empty(3) + SecondMoment.empty(3)).count == 0
    assert SecondMoment.empty(3).add(x, mask=torch.zeros(3, 4, dtype=torch.bool)).count == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: singular_values(torch.full((2, 2), math.nan)), DataError, "NaN or inf"),
        (lambda: effective_rank(torch.tensor([1.0, -1.0])), DataError, "negative or NaN"),
        (lambda: numerical_rank(torch.ones(2), tolerance=1.0), ConfigError, "tolerance is 1.0"),
        (lambda: spectral_norm(torch.eye(2), start=torch.zeros(2)), DataError, "start vector is zero"),
        (lambda: spectral_norm(torch.eye(2), start=torch.ones(2), steps=0), ConfigError, "steps is 0"),
        (lambda: SecondMoment.empty(2).add(torch.ones(1, 2)).covariance(), DataError, "1 rows seen"),
        (lambda: SecondMoment.empty(2).singular_values(about="zero"), ConfigError, "'zero'"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
