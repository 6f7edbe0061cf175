"""The min-p filter as an instrument: thresholds, ties, masses and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from uncollapse.errors import ConfigError
from uncollapse.measure.min_p import LogMassAbove, min_p_proxy, passes_min_p
from uncollapse.measure.statistics import LogKeptMass, MaxLogp
from uncollapse.measure.token_stats import token_stats_from_logits

F64 = torch.float64


def random_logits(seed: int = 0, rows: int = 6, vocab: int = 40) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("keep_equal", [False, True])
def test_mass_above_a_fixed_threshold_and_its_gradient(tau: float, keep_equal: bool) -> None:
    logits = random_logits().requires_grad_()
    stat = LogMassAbove(tau, keep_equal)
    value = token_stats_from_logits(logits, torch.zeros(6, dtype=torch.long), stats=(stat,))[stat]
    (mine,) = torch.autograd.grad(value.sum(), logits)
    p = logits.softmax(-1)
    keep = (p > tau) | (p == p.amax(-1, keepdim=True))
    expected = torch.where(keep, p, 0.0).sum(-1).log()
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-12)


def test_the_proxy_agrees_with_the_streamed_statistics() -> None:
    logits, token = random_logits(1), torch.arange(6)
    stats = (LogKeptMass(0.1), MaxLogp(), LogMassAbove(0.05))
    found = token_stats_from_logits(logits, token, stats=stats)
    for asked, stat in (({"kappa": 0.1}, stats[0]), ({"kappa": None, "tau": 0.05}, stats[2])):
        log_q, keep, log_mass = min_p_proxy(logits, **asked)
        torch.testing.assert_close(log_mass, found[stat], rtol=0, atol=1e-12)
        logp = logits.log_softmax(-1)
        torch.testing.assert_close(log_q[keep], (logp - log_mass[:, None])[keep], rtol=0, atol=1e-12)
        assert (log_q[~keep] == -math.inf).all()
        kept = passes_min_p(logp, found[stats[1]][:, None], **asked)
        assert torch.equal(kept, keep)


def test_impossible_tokens_are_never_kept() -> None:
    logits = torch.tensor([0.0, -math.inf, -math.inf], dtype=F64)
    for kappa in (0.0, 0.5):
        log_q, keep, log_mass = min_p_proxy(logits, kappa=kappa, keep_equal=True)
        assert keep.tolist() == [True, False, False]
        assert log_q[0] == log_mass == 0


@pytest.mark.parametrize(
    "options", [{"kappa": None}, {"kappa": 0.1, "tau": 0.1}, {"kappa": -0.1}, {"kappa": None, "tau": 2.0}]
)
def test_exactly_one_threshold_is_wanted(options: dict) -> None:
    with pytest.raises(ConfigError, match="give either kappa"):
        min_p_proxy(random_logits(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"kappa": 0.02}, {"kappa": None, "tau": 1e-4}])
def test_half_precision_is_reduced_in_float32(dtype: torch.dtype, options: dict) -> None:
    half = (2 * torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    log_q, keep, log_mass = min_p_proxy(half, **options)
    wanted = min_p_proxy(half.double(), **options)
    assert log_q.dtype == log_mass.dtype == torch.float32
    assert torch.equal(keep, wanted[1])
    torch.testing.assert_close(log_mass.double(), wanted[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_q[keep].double(), wanted[0][keep], rtol=0, atol=1e-4)
