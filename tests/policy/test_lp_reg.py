"""Exact checks of Lp-Reg, numbered; all in float64."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from lab import loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError
from uncollapse.integrations.offers import TRL, VERL_ENGINE
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.config import resolve
from uncollapse.policy.lp_reg import (
    LpReg,
    ProxyKL,
    SparkTracker,
    low_probability_mask,
    lowest,
    lp_reg_loss,
    min_p_proxy,
    proxy_kl,
    sampled_kl,
    stationary_ratio,
)
from uncollapse.policy.lp_reg.loss import K3_LIMIT, KNEE
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.surrogates import PPOClip
from uncollapse.policy.stats import Entropy, Logp

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def rollout(seed: int, rows: int = 6, time: int = 29, vocab: int = 13, off_policy: float = 0.4):
    """Logits now (leaf with gradient) and old, tokens, advantage, mask, keys."""
    g = generator(seed)
    old = 2.5 * torch.randn(rows, time, vocab, generator=g, dtype=F64)
    now = old + off_policy * torch.randn(rows, time, vocab, generator=g, dtype=F64)
    u = torch.rand(rows, time, 1, generator=g, dtype=F64)
    token = (old.softmax(-1).cumsum(-1) <= u).sum(-1).clamp(max=vocab - 1)
    advantage = torch.randn(rows, 1, generator=g, dtype=F64).expand(rows, time).clone()
    mask = torch.rand(rows, time, generator=g) < 0.8
    mask[0, 0] = True
    return now.requires_grad_(), old, token, advantage, mask, torch.rand(rows, time, generator=g, dtype=F64)


def at(table: Tensor, token: Tensor) -> Tensor:
    return table.gather(-1, token[..., None])[..., 0]


# 1 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, kappa=st.sampled_from([0.0, 0.02, 0.3, 0.99]))
def test_01_divergence_from_the_own_proxy_is_the_lost_mass(seed: int, kappa: float) -> None:
    z = (3 * torch.randn(5, 31, generator=generator(seed), dtype=F64)).requires_grad_()
    log_q, keep, log_mass = min_p_proxy(z.detach(), kappa=kappa)
    kl = proxy_kl(z, log_q)
    torch.testing.assert_close(kl, -log_mass, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(kl.sum(), z), z.softmax(-1) - log_q.exp(), rtol=0, atol=1e-12)
    attached = min_p_proxy(z, kappa=kappa)[2]
    torch.testing.assert_close(gradient(-attached.sum(), z), z.softmax(-1) - log_q.exp(), rtol=0, atol=1e-12)
    if kappa == 0:
        assert keep.all()
        torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            gradient(proxy_kl(z, log_q).sum(), z), torch.zeros_like(z), rtol=0, atol=1e-12
        )


@quick
@given(seed=seeds)
def test_01_the_statistic_takes_the_proxy_of_the_other_policy(seed: int) -> None:
    now, old, token, *_ = rollout(seed)
    z, other = now.flatten(0, 1), old.flatten(0, 1).clone().requires_grad_()
    value = ProxyKL("now", "old").of(z, token.flatten(), other)
    p, q = z.softmax(-1), other.softmax(-1)
    q = torch.where(q > 0.02 * q.amax(-1, keepdim=True), q, 0.0)
    q = q / q.sum(-1, keepdim=True)
    naive = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - p.log()), 0.0).sum(-1)
    torch.testing.assert_close(value, naive, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(value.sum(), z), (p - q).detach(), rtol=0, atol=1e-12)
    assert not ProxyKL("now", "old").of(z.detach(), token.flatten(), other).requires_grad


# 2 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_02_the_sampled_estimate_is_unbiased_as_a_loss(seed: int) -> None:
    z = (2 * torch.randn(17, generator=generator(seed), dtype=F64)).requires_grad_()
    log_q, keep, log_mass = min_p_proxy(z.detach(), kappa=0.2)
    p, q = z.detach().softmax(-1), log_q.exp()
    logp = z.log_softmax(-1)
    over_all, over_kept = torch.zeros_like(p), torch.zeros_like(p)
    for o in range(17):
        # Where q is 0 k3 is infinite, but its derivative in log pi, 1 - q/pi, is 1.
        slope = gradient(sampled_kl(log_q[o] - logp[o]) if keep[o] else logp[o], z)
        over_all += p[o] * slope
        over_kept += p[o] * slope * keep[o]
    torch.testing.assert_close(over_all, p - q, rtol=0, atol=1e-12)
    extra = (1 - log_mass.exp()) * p - p * ~keep
    torch.testing.assert_close(over_kept, p - q + extra, rtol=0, atol=1e-12)


# 3 --------------------------------------------------------------------------------------------------------------


def test_03_slope_of_the_estimate_and_its_two_ends() -> None:
    log_q = torch.tensor(-1.0, dtype=F64)
    logp = torch.linspace(-8, -0.01, 200, dtype=F64).requires_grad_()
    d = (log_q - logp).detach()
    assert math.expm1(KNEE) - KNEE == pytest.approx(K3_LIMIT, abs=1e-12)
    assert math.exp(-KNEE) == pytest.approx(0.0735, abs=5e-5)
    inside = d < KNEE
    raw = d.exp() - d - 1
    mine, cut = sampled_kl(log_q - logp), sampled_kl(log_q - logp, official_clamp=True)
    torch.testing.assert_close(mine[inside], raw[inside], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(cut, raw.clamp(-10, 10), rtol=1e-13, atol=1e-12)
    slope = 1 - d.exp()
    torch.testing.assert_close(gradient(mine.sum(), logp), slope.clamp(min=-math.expm1(KNEE)))
    torch.testing.assert_close(
        gradient(sampled_kl(log_q - logp, official_clamp=True).sum(), logp), torch.where(inside, slope, 0.0)
    )


# 4 --------------------------------------------------------------------------------------------------------------


def descend(size: float, z: float, step: float, steps: int = 4000, p0: float = 0.02) -> tuple[float, float]:
    """Probability ratio and probability after gradient descent on one token alone."""
    logits = torch.tensor([math.log(p0), *[math.log((1 - p0) / 2)] * 2], dtype=F64)
    old = math.log(p0)
    one = torch.tensor([True])
    for _ in range(steps):
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(-1)[:1]
        loss, _ = lp_reg_loss(
            logp,
            torch.tensor([old], dtype=F64),
            torch.tensor([-size], dtype=F64),
            one,
            torch.tensor([old - math.log(z)], dtype=F64),
            one,
            upper=1e9,
        )
        logits = logits - step * gradient(loss, leaf)
    p = logits.softmax(-1)[0].item()
    return p / p0, p


@pytest.mark.parametrize(
    ("size", "z", "expected"), [(1.0, 1.0, (5**0.5 - 1) / 2), (2.0, 1.0, 0.5), (1.0, 0.9, 2 / 3)]
)
def test_04_one_token_stops_where_pull_and_push_balance(size: float, z: float, expected: float) -> None:
    assert stationary_ratio(-size, 1.0, z) == pytest.approx(expected, abs=1e-12)
    r = stationary_ratio(-size, 1.0, z)
    assert size * r + 1 - 1 / (z * r) == pytest.approx(0, abs=1e-12)
    assert descend(size, z, 0.05)[0] == pytest.approx(expected, abs=1e-6)


def raw_descent(size: float, step: float, steps: int = 4000, p0: float = 0.02) -> float:
    """The same with the estimate as the paper has it, unbounded; returns the probability."""
    z0, rest = math.log(p0), math.log((1 - p0) / 2)
    for _ in range(steps):
        p = 1 / (1 + 2 * math.exp(min(rest - z0, 700)))
        force = size * p / p0 + 1 - p0 / max(p, 1e-300)
        z0 -= step * force * (1 - p)
        rest += step * force * (1 - p) / 2
    return p


def test_04_large_steps_overshoot_and_lock() -> None:
    assert raw_descent(1.0, 1.0) == pytest.approx(1.0, abs=1e-6)
    assert raw_descent(2.0, 0.5) == pytest.approx(1.0, abs=1e-6)
    assert raw_descent(1.0, 0.5) / 0.02 == pytest.approx((5**0.5 - 1) / 2, abs=1e-6)


# 5 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_05_without_a_threshold_the_term_vanishes_on_policy(kl: str) -> None:
    now, _, token, advantage, mask, _ = rollout(1, off_policy=0.0)
    logp = at(now.log_softmax(-1), token)
    selected = mask & (advantage < 0)
    for threshold in ({"kappa": 0.0}, {"kappa": None, "tau": 0.0}):
        log_q, keep, _ = min_p_proxy(now.detach(), **threshold)
        torch.testing.assert_close(log_q, now.detach().log_softmax(-1), rtol=0, atol=1e-12)
        assert keep.all()
        given = (logp, logp.detach(), advantage, mask, log_q if kl == "full" else at(log_q, token), selected)
        loss, metrics = lp_reg_loss(*given, kl=kl, logits=now, beta=50.0)
        plain, _ = lp_reg_loss(*given, kl=kl, logits=now, beta=0.0)
        assert metrics["lp_reg/kl/mean"] == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(gradient(loss, now), gradient(plain, now), rtol=0, atol=1e-12)


@quick
@given(seed=seeds)
def test_05_at_kappa_one_only_the_most_probable_token_is_left(seed: int) -> None:
    _, old, token, advantage, mask, _ = rollout(seed)
    for keep_equal in (False, True):
        log_q, keep, log_mass = min_p_proxy(old, kappa=1.0, keep_equal=keep_equal)
        assert (keep.sum(-1) == 1).all()
        torch.testing.assert_close(log_mass, old.log_softmax(-1).amax(-1), rtol=0, atol=1e-12)
        selected = low_probability_mask(
            at(old.log_softmax(-1), token), advantage, mask, at(log_q, token), rho=1.0
        )
        assert not (selected & (token != old.argmax(-1))).any()


# 6 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [{"rho": 0.0}, {"beta": 0.0}, {"positive": True}])
def test_06_nothing_to_do_is_the_capped_policy_gradient(off: dict) -> None:
    now, old, token, advantage, mask, _ = rollout(2, off_policy=1.5)
    advantage = advantage.abs() if off.get("positive") else advantage
    logp, old_logp = at(now.log_softmax(-1), token), at(old.log_softmax(-1), token)
    log_q = at(min_p_proxy(old)[0], token)
    selected = low_probability_mask(old_logp, advantage, mask, log_q, off.get("rho", 0.5))
    assert selected.any() == ("beta" in off)
    loss, _ = lp_reg_loss(
        logp, old_logp, advantage, mask, log_q, selected, beta=off.get("beta", 1.0), upper=2.0
    )
    naive = -(advantage * (logp - old_logp).exp().clamp(0, 2))[mask].mean()
    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, now), gradient(naive, now), rtol=1e-12, atol=1e-15)


def test_06_the_released_code_adds_nothing_for_fewer_than_two() -> None:
    values = torch.arange(150.0)
    pool = torch.ones(150, dtype=torch.bool)
    assert lowest(values, pool, 0.01, skip_below=2).sum() == 0
    assert lowest(values, pool, 0.01).sum() == 1
    assert lowest(values, pool, 2 / 150, skip_below=2).sum() == 2
    assert lowest(values, pool, 0.001).sum() == 0
    assert lowest(values, pool, 0.001, at_least=1).sum() == 1
    assert lowest(values, pool, 1.0, at_least=999).all()


# 7 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, rho=st.sampled_from([0.01, 0.1, 0.5, 1.0]), kappa=st.sampled_from([0.0, 0.05, 0.5]))
def test_07_every_selected_token_is_negative_valid_and_no_noise(seed: int, rho: float, kappa: float) -> None:
    now, old, token, advantage, mask, keys = rollout(seed)
    logp = at(now.detach().log_softmax(-1), token)
    log_q = at(min_p_proxy(old, kappa=kappa)[0], token)
    for pool in ("all", "negative"):
        selected = low_probability_mask(logp, advantage, mask, log_q, rho, pool, uniform=keys)
        assert not (selected & ~(mask & (advantage < 0) & (log_q > -math.inf))).any()
        counted = mask if pool == "all" else mask & (advantage < 0)
        assert selected.sum() <= int(rho * int(counted.sum()))
        naive = sorted((logp[i, t].item(), keys[i, t].item(), i, t) for i, t in counted.nonzero().tolist())
        naive = {(i, t) for *_, i, t in naive[: int(rho * len(naive))]}
        naive = {(i, t) for i, t in naive if advantage[i, t] < 0 and log_q[i, t] > -math.inf}
        assert naive == {tuple(place) for place in selected.nonzero().tolist()}
    surrogate = recipe("lp-reg-released").surrogate
    batch, own = staged(surrogate, seed)
    regularised = surrogate._regularised(batch, own)
    assert (batch.stats[Logp("now")] < surrogate._log_q(batch))[regularised].all()


@quick
@given(seed=seeds)
def test_07_ties_go_to_the_smallest_key_or_the_first(seed: int) -> None:
    values, pool = torch.zeros(30), torch.ones(30, dtype=torch.bool)
    values[7] = -1.0
    keys = torch.rand(30, generator=generator(seed), dtype=F64)
    chosen = lowest(values, pool, 0.4, uniform=keys)
    assert chosen.sum() == 12
    assert chosen[7]
    rest = torch.arange(30) != 7
    assert keys[chosen & rest].max() < keys[~chosen].min()
    order = torch.randperm(30, generator=generator(seed + 1))
    assert torch.equal(lowest(values[order], pool, 0.4, uniform=keys[order]), chosen[order])
    first = lowest(values, pool, 0.4)
    assert set(first.nonzero()[:, 0].tolist()) == set(values.argsort(stable=True)[:12].tolist())


# 8 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, shift=st.floats(-50, 50), kappa=st.sampled_from([0.02, 0.3]))
def test_08_min_p_is_scale_free_and_wants_the_temperature_first(
    seed: int, shift: float, kappa: float
) -> None:
    z = 2 * torch.randn(4, 19, generator=generator(seed), dtype=F64)
    log_q, keep, log_mass = min_p_proxy(z, kappa=kappa)
    moved_q, moved_keep, moved_mass = min_p_proxy(z + shift, kappa=kappa)
    assert torch.equal(moved_keep, keep)
    torch.testing.assert_close(moved_q, log_q, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved_mass, log_mass, rtol=0, atol=1e-12)
    cool, hot = min_p_proxy(z / 0.5, kappa=kappa)[1], min_p_proxy(z / 3.0, kappa=kappa)[1]
    assert not (cool & ~keep).any()
    assert not (keep & ~hot).any()


# 9 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_09_values_of_the_official_code(seed: int) -> None:
    g = generator(seed)
    old_logp = -4 * torch.rand(60, generator=g, dtype=F64) - 0.1
    leaf = (old_logp + 1.7 * torch.randn(60, generator=g, dtype=F64)).requires_grad_()
    advantage = torch.randn(60, generator=g, dtype=F64)
    log_q = old_logp + 0.3 * torch.rand(60, generator=g, dtype=F64)
    selected = (advantage < 0) & (torch.rand(60, generator=g) < 0.6)
    mask = torch.ones(60, dtype=torch.bool)
    options = {"cap_negative": False, "only_below": True, "official_clamp": True, "beta": 0.7}
    loss, metrics = lp_reg_loss(leaf, old_logp, advantage, mask, log_q, selected, **options)
    value, slope, chosen = 0.0, [], 0
    for lp, op, a, lq, chose in zip(leaf.tolist(), old_logp.tolist(), advantage.tolist(), log_q.tolist(), selected.tolist(), strict=True):  # fmt: skip
        r = math.exp(lp - op)
        if chose and lp < lq:
            k3 = math.exp(lq - lp) - (lq - lp) - 1
            value += -a * r + 0.7 * min(max(k3, -10), 10)
            slope.append(-a * r + (0.7 * (1 - math.exp(lq - lp)) if k3 <= 10 else 0.0))
            chosen += 1
        else:
            value += max(-a * r, -a * min(max(r, 0), 10))
            slope.append(0.0 if a > 0 and r > 10 else -a * r)
    assert loss.item() == pytest.approx(value / 60, rel=1e-12)
    torch.testing.assert_close(
        60 * gradient(loss, leaf), torch.tensor(slope, dtype=F64), rtol=1e-10, atol=1e-12
    )
    assert metrics["lp_reg/selected/frac"] == pytest.approx(chosen / 60)


# 10 -------------------------------------------------------------------------------------------------------------


def test_10_exactly_at_the_threshold() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log()
    assert min_p_proxy(logits, kappa=0.5)[1].tolist() == [True, False, False]
    assert min_p_proxy(logits, kappa=0.5, keep_equal=True)[1].tolist() == [True, True, True]
    fixed = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log()
    assert min_p_proxy(fixed, kappa=None, tau=0.25)[1].tolist() == [True, False, False]
    assert min_p_proxy(fixed, kappa=None, tau=0.25, keep_equal=True)[1].all()
    assert min_p_proxy(fixed, kappa=None, tau=0.9)[1].tolist() == [True, False, False]


# Beyond the numbered checks: what the analysis says ----------------------------------------------------------------


def test_on_policy_the_pull_is_of_the_order_of_the_noise_mass() -> None:
    """It cannot stop a negative update of size 1 unless the filter takes more than half of the mass."""
    for mass in (0.99, 0.9, 0.51, 0.49):
        logp = torch.tensor([-2.0], dtype=F64).requires_grad_()
        one = torch.tensor([True])
        args = (logp.detach(), -torch.ones(1, dtype=F64), one, logp.detach() - math.log(mass), one)
        loss, _ = lp_reg_loss(logp, *args)
        slope = gradient(loss, logp).item()
        assert slope == pytest.approx(1 - (1 / mass - 1), abs=1e-12)
        assert (slope < 0) == (mass < 0.5)


def test_lifting_an_improbable_token_lifts_noise_where_another_dominates() -> None:
    for p, up in (([0.05, 0.94, 0.008, 0.002], True), ([0.5, 0.3, 0.15, 0.05], False)):
        pi = torch.tensor(p, dtype=F64)
        step = 1e-6 * (torch.eye(4, dtype=F64)[0] - pi)
        moved = ((pi.log() + step).log_softmax(-1) - pi.log()) / 1e-6
        expected = (pi**2).sum() - pi[0] - pi
        torch.testing.assert_close(moved[1:], expected[1:], rtol=0, atol=1e-5)
        assert (moved[3] > 0) == up


def test_the_full_divergence_lifts_all_kept_tokens_in_proportion() -> None:
    z = torch.tensor([2.0, 0.5, 0.0, -5.0], dtype=F64).requires_grad_()
    log_q, keep, log_mass = min_p_proxy(z.detach())
    assert keep.tolist() == [True, True, True, False]
    push = -gradient(proxy_kl(z, log_q), z)
    p = z.detach().softmax(-1)
    torch.testing.assert_close(push[:3] / p[:3], torch.full((3,), math.expm1(-log_mass.item()), dtype=F64))


def test_bf16_is_reduced_in_float32() -> None:
    now, old, token, advantage, mask, _ = rollout(3)
    logp, old_logp = at(now.detach().log_softmax(-1), token), at(old.log_softmax(-1), token)
    log_q = at(min_p_proxy(old, kappa=0.0)[0], token)
    half = [x.bfloat16() for x in (logp, old_logp, advantage)]
    low, _ = lp_reg_loss(*half, mask, log_q.bfloat16(), mask & (advantage < 0))
    wide = [x.double() for x in half]
    exact, _ = lp_reg_loss(*wide, mask, log_q.bfloat16().double(), mask & (advantage < 0))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-2, atol=1e-2)


def test_divergences_of_half_precision_are_reduced_in_float32() -> None:
    now = (2 * torch.randn(3, 50_000, generator=generator(0))).bfloat16()
    log_q = min_p_proxy(now)[0].bfloat16()
    kl = proxy_kl(now, log_q)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), proxy_kl(now.double(), log_q.double()), rtol=1e-4, atol=1e-5)

    logp, log_q = torch.tensor([[-0.53125]]).bfloat16(), torch.tensor([[-0.5]]).bfloat16()
    mask = torch.ones(1, 1, dtype=torch.bool)
    _, metrics = lp_reg_loss(logp, logp, -mask.bfloat16(), mask, log_q, mask)
    assert metrics["lp_reg/kl/mean"].item() == pytest.approx(math.exp(1 / 32) - 1 / 32 - 1, rel=1e-3)


@pytest.mark.parametrize("cap_negative", [True, False])
@pytest.mark.parametrize("size", [-1.0, 1.0])
def test_ratios_beyond_any_float_keep_finite_gradients(size: float, cap_negative: bool) -> None:
    logp = torch.tensor([[-1.0, -2.0, -1e-3]], requires_grad=True)
    old_logp = torch.tensor([[-90.0, -2.5, -2e4]])
    mask, advantage = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), size)
    loss, _ = lp_reg_loss(logp, old_logp, advantage, mask, old_logp, ~mask, cap_negative=cap_negative)
    pushed = gradient(loss, logp)[0]
    assert torch.isfinite(loss)
    assert torch.isfinite(pushed).all()
    assert pushed[1] != 0
    assert pushed[0] == pushed[2] == 0  # a constant beyond the cap

    surrogate = LpReg(beta=0.0, cap_negative=cap_negative)
    batch = Batch(torch.arange(1), mask, {"advantage": advantage, "old_logp": old_logp}, {Logp("now"): logp})
    assert torch.isfinite(gradient(surrogate(batch, {}).sum(), logp)).all()


@pytest.mark.parametrize(
    "options",
    [{"kl": "full"}, {"kl": "full", "logits": torch.zeros(2, 3), "only_below": True}],
)
def test_the_full_divergence_wants_logits_and_nothing_of_the_estimate(options: dict) -> None:
    x, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="needs logits"):
        lp_reg_loss(x, x, x, mask, torch.zeros(2, 3), mask, **options)


# Stages -----------------------------------------------------------------------------------------------------------


def staged(surrogate: LpReg, seed: int = 0, off_policy: float = 0.6, **changes):
    """A batch with all that the surrogate reads, and what it decided."""
    now, old, token, advantage, mask, _ = rollout(seed, off_policy=off_policy)
    stats = {
        stat: stat.of(old.flatten(0, 1), token.flatten()).view(mask.shape)
        for stat in surrogate.needs
        if stat not in ("old_logp", "advantage") and stat.whose == "old"
    }
    if surrogate.kl == "full":
        other = old.flatten(0, 1)
        stats[surrogate._divergence] = surrogate._divergence.of(
            now.flatten(0, 1), token.flatten(), other
        ).view(mask.shape)
    stats = {stat: torch.where(mask, value, 0.0) for stat, value in stats.items()}
    stats[Logp("now")] = torch.where(mask, at(now.log_softmax(-1), token), 0.0)
    columns = {"advantage": advantage * mask, "ids": token, "old_logp": stats.get(Logp("old"), 0.0)}
    batch = Batch(torch.arange(len(mask)), mask, columns, stats, Clock(seed=seed))
    frozen = replace(batch, stats={s: v.detach() for s, v in stats.items()})
    own = surrogate.decide(replace(frozen, **changes))
    return batch, {k: v.reshape(1, 1).expand(len(mask), 1) if v.ndim == 0 else v for k, v in own.items()}


@quick
@given(seed=seeds, rho=st.sampled_from([0.02, 0.2, 1.0]))
def test_the_stage_and_the_functions_agree(seed: int, rho: float) -> None:
    now, old, token, advantage, mask, _ = rollout(seed, off_policy=0.6)
    logp, old_logp = at(now.log_softmax(-1), token), at(old.log_softmax(-1), token)
    for options in (
        {},
        {"kl": "full"},
        {"kappa": None, "tau": 0.1},
        {"pool": "negative", "only_below": True},
    ):
        surrogate = LpReg(rho=rho, scope="minibatch", **options)
        batch, own = staged(surrogate, seed)
        full, *_ = min_p_proxy(old, kappa=surrogate.kappa, tau=surrogate.tau)
        keys = batch.clock.uniform(batch.uid, mask.shape[1], "lp-reg")
        selected = low_probability_mask(
            logp, advantage, mask, at(full, token), rho, surrogate.pool, uniform=keys
        )
        assert torch.equal(own["selected"], selected)
        loss, _ = lp_reg_loss(
            logp,
            old_logp,
            advantage,
            mask,
            full if surrogate.kl == "full" else at(full, token),
            selected,
            kl=surrogate.kl,
            logits=now,
            only_below=surrogate.only_below,
        )
        staged_loss = torch.where(mask, surrogate(batch, own), 0.0).sum() / mask.sum()
        torch.testing.assert_close(staged_loss, loss, rtol=1e-11, atol=1e-13)


def test_metrics_of_the_stage_against_a_naive_loop() -> None:
    surrogate = LpReg(rho=0.4, kappa=0.1, scope="minibatch")
    batch, own = staged(surrogate, 4)
    found = {name: (s / w).item() for name, (s, w) in surrogate.metrics(batch, own).items()}
    _, old, token, advantage, mask, _ = rollout(4, off_policy=0.6)
    log_q, keep, log_mass = min_p_proxy(old, kappa=0.1)
    logp, old_logp = batch.stats[Logp("now")].detach(), at(old.log_softmax(-1), token)
    noise = ~at(keep, token)
    low, chosen = own["low"], own["selected"]
    gap = (at(log_q, token) - logp)[chosen]
    ratio = (logp - old_logp).exp()[chosen]
    assert found["lp_reg/selected/frac"] == pytest.approx((chosen.sum() / mask.sum()).item())
    assert found["lp_reg/filtered/frac"] == pytest.approx((noise & mask).sum().item() / mask.sum().item())
    assert found["lp_reg/low/kept_frac"] == pytest.approx(1 - noise[low].double().mean().item())
    assert found["lp_reg/low/quantile"] == pytest.approx(logp[low].max().exp().item())
    assert found["lp_reg/kept_mass/mean"] == pytest.approx(log_mass[mask].exp().mean().item())
    assert found["lp_reg/kl/mean"] == pytest.approx((gap.exp() - gap - 1).mean().item())
    force = (gap.exp() - 1) / (advantage[chosen].abs() * ratio)
    assert (gap < KNEE).all()
    assert found["lp_reg/force/ratio"] == pytest.approx(force.mean().item())


def test_positives_are_regularised_on_request() -> None:
    surrogate = LpReg(rho=0.2, rho_positive=0.5, pool="negative", kappa=0.0)
    batch, own = staged(surrogate, 5)
    positive = batch.mask & (batch.advantage > 0)
    assert (own["selected"] & positive).sum() == int(0.5 * int(positive.sum()))
    assert not (staged(LpReg(rho=0.2, pool="negative"), 5)[1]["selected"] & positive).any()


def test_released_preset_by_micro_batch_is_the_official_loop() -> None:
    """`scope="microbatch"`: quantile, skipping and gate inside each piece of rows."""
    released = recipe("lp-reg-released")
    made = replace(
        released, name="parity", surrogate=replace(released.surrogate, scope="microbatch", rho=0.2)
    )
    assert made.split_dependent
    engine, batch = prepared(made)
    moved_on(engine.policy)
    plan = made.plan(batch)
    for rows in torch.arange(len(batch)).chunk(4):
        micro = engine.measure(plan[rows], made.stats("loss") | {Logp("now")})
        decided = made._decide(micro, "microbatch", slots=("weights",))
        negative = micro.mask & (micro.advantage < 0)
        order = micro.stats[Logp("now")][negative].sort().values
        k = int(0.2 * len(order))
        low = decided.columns["own/surrogate/low"]
        assert low.sum() == (k if k > 1 else 0)
        assert not low.any() or micro.stats[Logp("now")][low].max() <= order[k - 1]
    assert loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(4))[0] != pytest.approx(
        loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])[0], abs=1e-9
    )


def test_beta_zero_is_free_and_the_bare_capped_surrogate() -> None:
    off = replace(recipe("lp-reg"), name="off", surrogate=LpReg(beta=0.0))
    wide = replace(recipe("lp-reg"), name="wide", surrogate=PPOClip(low=1.0, high=1e9))
    assert off.surrogate.needs == wide.surrogate.needs
    assert off.stats("rollout") == wide.stats("rollout")
    engine, batch = prepared(off)
    moved_on(engine.policy)
    rows = [torch.arange(len(batch))]
    torch.testing.assert_close(
        loss_and_gradient(engine, off, batch, rows)[1], loss_and_gradient(engine, wide, batch, rows)[1]
    )
    assert off.surrogate.metrics(batch, {}) == {}


def test_the_term_acts_in_the_recipes_and_the_old_policy_is_the_old_one() -> None:
    """With the old policy's logits lost, the full divergence of kappa = 0 would be 0 whatever has moved."""
    for name in ("lp-reg", "lp-reg-full", "lp-reg-released"):
        made = recipe(name)
        made = replace(made, name="much", surrogate=replace(made.surrogate, rho=1.0, kappa=0.001))
        off = replace(made, name="none", surrogate=replace(made.surrogate, beta=0.0))
        engine, batch = prepared(made)
        moved_on(engine.policy)
        rows = [torch.arange(len(batch))]
        with_term, without = (loss_and_gradient(engine, m, batch, rows)[1] for m in (made, off))
        assert (with_term - without).norm() > 0.05 * without.norm()


def test_where_the_recipes_run() -> None:
    assert recipe("lp-reg").refusals(TRL) == []
    assert recipe("lp-reg").refusals(VERL_ENGINE) == []
    assert recipe("lp-reg-released").refusals(TRL) == []
    reasons = " ".join(recipe("lp-reg-full").refusals(TRL))
    assert "two policies' logits" in reasons
    with pytest.raises(ConfigError, match="cannot run on TRL"):
        recipe("lp-reg-full").check("TRL", TRL)


def test_defaults_are_the_papers() -> None:
    stage = recipe("lp-reg").surrogate
    assert (stage.rho, stage.kappa, stage.beta, stage.upper, stage.pool) == (0.01, 0.02, 1.0, 10.0, "all")
    assert recipe("lp-reg").sampler.samples == 8
    assert recipe("lp-reg").mean.levels == ()


def test_a_fixed_threshold_from_yaml_and_its_statistic() -> None:
    made = resolve({"name": "fixed", "base": "lp-reg", "surrogate": {"lp-reg": {"kappa": None, "tau": 0.02}}})
    assert {
        type(need).__name__ for need in made.surrogate.needs if need not in ("old_logp", "advantage")
    } == {
        "Logp",
        "MaxLogp",
        "LogMassAbove",
    }
    assert made.refusals(TRL) == []
    engine, batch = prepared(made)
    moved_on(engine.policy)
    loss, grad = loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(3))
    again, regained = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    assert loss == pytest.approx(again, abs=1e-12)
    torch.testing.assert_close(grad, regained, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 1.5},
        {"rho": -0.1},
        {"kappa": 1.0},
        {"kappa": 0.02, "tau": 0.02},
        {"kappa": None},
        {"beta": -1.0},
        {"upper": 1.0},
        {"kl": "full", "official_clamp": True},
        {"kl": "full", "only_below": True},
        {"at_least": -1},
        {"rho_positive": 2.0},
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="lp-reg"):
        LpReg(**options)


@pytest.mark.parametrize("options", [{"kl": "reverse"}, {"pool": "batch"}])
def test_unknown_words_are_refused(options: dict) -> None:
    with pytest.raises(
        (ConfigError, TypeCheckError)
    ):  # the latter where shapes and types are checked, as here
        LpReg(**options)


def test_silenced_tokens_are_those_beyond_the_cap_that_nothing_pulls() -> None:
    both, one = LpReg(rho=0.5, upper=1.2), LpReg(rho=0.5, upper=1.2, cap_negative=False)
    batch, own = staged(both, 6)
    ratio = (batch.stats[Logp("now")] - batch.old_logp).exp()
    beyond = (ratio > 1.2) & ~own["selected"]
    assert torch.equal(both.clipped(batch, own), beyond)
    assert torch.equal(one.clipped(batch, own), beyond & (batch.advantage > 0))
    assert torch.equal(LpReg(beta=0.0, upper=1.2).clipped(batch, {}), ratio > 1.2)


# Bad input --------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, junk=st.sampled_from([math.nan, math.inf, -1e30]))
def test_padding_may_hold_anything(seed: int, junk: float) -> None:
    now, old, token, advantage, mask, keys = rollout(seed)
    logp, old_logp = at(now.log_softmax(-1), token), at(old.log_softmax(-1), token)
    log_q = at(min_p_proxy(old, kappa=0.01)[0], token)

    def run(fill: float | None):
        values = [logp.detach().clone(), old_logp.clone(), advantage.clone(), log_q.clone()]
        if fill is not None:
            for value in values:
                value[~mask] = fill
        lp, op, a, lq = values
        lp.requires_grad_()
        selected = low_probability_mask(lp.detach(), a, mask, lq, 0.5, uniform=keys)
        loss, _ = lp_reg_loss(lp, op, a, mask, lq, selected)
        return loss.detach(), selected, gradient(loss, lp)

    for clean, dirty in zip(run(None), run(junk), strict=True):
        assert torch.equal(clean, dirty)


@quick
@given(seed=seeds, junk=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_padding_may_hold_anything_for_the_full_divergence(seed: int, junk: float) -> None:
    now, old, token, advantage, mask, keys = rollout(seed)
    log_q = min_p_proxy(old, kappa=0.01)[0]
    old_logp = at(old.log_softmax(-1), token)
    selected = low_probability_mask(old_logp, advantage, mask, at(log_q, token), 0.5, uniform=keys)

    def run(fill: float | None):
        z, q = now.detach().clone(), log_q.clone()
        if fill is not None:
            z[~mask], q[~mask] = fill, fill
        z.requires_grad_()
        logp = torch.where(mask, at(now.detach().log_softmax(-1), token), 0.0)
        loss, metrics = lp_reg_loss(logp, old_logp, advantage, mask, q, selected, kl="full", logits=z)
        return loss.detach(), metrics["lp_reg/kl/mean"], gradient(loss, z)

    for clean, dirty in zip(run(None), run(junk), strict=True):
        assert torch.equal(clean, dirty)


def test_an_empty_mask_selects_nothing_and_costs_nothing() -> None:
    x = torch.zeros(3, 4, dtype=F64).requires_grad_()
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    selected = low_probability_mask(x.detach(), x.detach(), nothing, x.detach(), 1.0, at_least=3)
    assert not selected.any()
    loss, metrics = lp_reg_loss(x, x.detach(), x.detach(), nothing, x.detach(), selected)
    assert loss == 0
    assert (gradient(loss, x) == 0).all()
    assert all(math.isfinite(float(value)) for value in metrics.values())


@pytest.mark.parametrize("case", ["single", "equal", "one-row-empty", "mid-mask"])
@pytest.mark.parametrize("name", ["lp-reg", "lp-reg-full", "lp-reg-released"])
def test_degenerate_rollouts(name: str, case: str) -> None:
    made = recipe(name)
    made = replace(made, surrogate=replace(made.surrogate, rho=0.5))
    engine, batch = prepared(made)
    mask, raw = batch.mask.clone(), {k: v for k, v in batch.columns.items() if "/" not in k}
    if case == "single":
        mask[:, 1:] = False
    elif case == "one-row-empty":
        mask[3] = False
    elif case == "mid-mask":
        mask[:, ::2] = False
    raw.pop("advantage")
    if case == "equal":
        raw["reward"] = torch.ones_like(batch.reward)
        raw["group"] = torch.arange(len(batch))  # groups of one
    stats = {stat: value * mask for stat, value in batch.stats.items()}
    batch = made.prepare(replace(batch, mask=mask, columns=raw, stats=stats))
    moved_on(engine.policy)
    loss, grad = loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(3))
    assert math.isfinite(loss)
    assert torch.isfinite(grad).all()
    if case == "equal":
        assert not grad.any()


# The spark tracker ------------------------------------------------------------------------------------------------


def test_the_spark_tracker_reports_in_any_recipe_and_changes_nothing() -> None:
    plain = recipe("grpo")
    made = replace(plain, name="watched", weights=(SparkTracker(tokens=(2, 5)),))
    engine, batch = prepared(made)
    report = made.loss(engine.measure(made.plan(batch), made.stats("loss")))
    p, entropy = batch.stats[Logp("old")].exp(), batch.stats[Entropy("old")]
    for token in (2, 5):
        here = batch.mask & (batch.ids == token)
        total, count = report.metrics[f"spark/{token}/prob"]
        assert total.item() == pytest.approx(p[here].sum().item())
        assert count == here.sum()
        share, tokens = report.metrics[f"spark/{token}/frac"]
        assert (share / tokens).item() == pytest.approx(here.sum().item() / batch.mask.sum().item())
        assert report.metrics[f"spark/{token}/entropy"][0].item() == pytest.approx(entropy[here].sum().item())
    moved_on(engine.policy)
    rows = [torch.arange(len(batch))]
    assert loss_and_gradient(engine, made, batch, rows)[0] == loss_and_gradient(engine, plain, batch, rows)[0]
    assert made.refusals(TRL) == []


def test_the_spark_tracker_from_yaml() -> None:
    made = resolve({"name": "w", "base": "lp-reg", "weights": [{"spark-tracker": {"tokens": [3]}}]})
    assert made.weights == (SparkTracker(tokens=(3,)),)
