from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError
from uncollapse.measure.covariance import covariance_profile, token_covariance

seeds = st.integers(0, 10_000)


def pool(seed: int, rows: int = 3, time: int = 47) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, time, generator=g, dtype=torch.float64) * 5
    advantage = torch.randn(rows, time, generator=g, dtype=torch.float64)
    mask = torch.rand(rows, time, generator=g) < 0.7
    mask[0, 0] = True
    return logp, advantage, mask


def naive(logp: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    cells = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[i, j]]
    mean_a = sum(advantage[c] for c in cells) / len(cells)
    mean_p = sum(logp[c] for c in cells) / len(cells)
    out = torch.zeros_like(logp)
    for c in cells:
        out[c] = (advantage[c] - mean_a) * (logp[c] - mean_p)
    return out


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_equals_the_naive_loop(seed: int) -> None:
    torch.testing.assert_close(token_covariance(*pool(seed)), naive(*pool(seed)), rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, junk=st.sampled_from([0.0, 1e9, float("nan"), float("-inf")]))
def test_padding_never_matters(seed: int, junk: float) -> None:
    logp, advantage, mask = pool(seed)
    wide = [torch.cat([t, torch.full((3, 5), fill)], 1) for t, fill in ((logp, junk), (advantage, junk))]
    c = token_covariance(*wide, torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], 1))
    torch.testing.assert_close(c[:, :47], token_covariance(logp, advantage, mask), rtol=1e-12, atol=1e-12)
    assert (c[:, 47:] == 0).all()


def test_is_detached_keeps_dtype_and_widens_bf16() -> None:
    logp, advantage, mask = pool(0)
    assert not token_covariance(logp.requires_grad_(), advantage, mask).requires_grad
    half = token_covariance(logp.detach().bfloat16(), advantage.bfloat16(), mask)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half.double(), token_covariance(logp.detach(), advantage, mask), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3)])
def test_empty_pool_gives_zeros(shape: tuple[int, int]) -> None:
    nothing = torch.zeros(shape, dtype=torch.bool)
    c = token_covariance(torch.full(shape, -1.0), torch.ones(shape), nothing)
    assert (c == 0).all()
    profile = covariance_profile(c, nothing)
    assert profile.tokens == (0,) * 6
    assert (profile.mean == 0).all()
    assert (profile.share == 0).all()


def test_one_token_and_equal_advantages_have_none() -> None:
    logp, advantage, mask = pool(1)
    assert (token_covariance(logp, torch.ones_like(advantage), mask) == 0).all()
    assert token_covariance(torch.tensor([[-3.0]]), torch.tensor([[2.0]]), torch.tensor([[1]])).item() == 0


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_profile_equals_sorting_by_hand(seed: int) -> None:
    c, mask = token_covariance(*pool(seed)), pool(seed)[2]
    values = sorted((float(c[i, j]) for i in range(3) for j in range(47) if mask[i, j]), reverse=True)
    fractions = (2e-4, 0.1, 0.5, 1.0)
    profile = covariance_profile(c, mask, fractions)
    positive = sum(max(v, 0) for v in values)
    for k, fraction in enumerate(fractions):
        n = max(int(fraction * len(values)), 1)
        assert profile.tokens[k] == n
        assert float(profile.mean[k]) == pytest.approx(sum(values[:n]) / n, rel=1e-9, abs=1e-12)
        expected = sum(max(v, 0) for v in values[:n]) / positive if positive else 0
        assert float(profile.share[k]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (profile.share.diff() >= -1e-12).all()
    assert (profile.mean.diff() <= 1e-12).all()


def test_profile_refuses_percent() -> None:
    with pytest.raises(ConfigError, match="fraction 2"):
        covariance_profile(torch.ones(3), torch.ones(3), (2.0,))
