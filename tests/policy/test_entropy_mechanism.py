"""Exact checks of the entropy mechanism, numbered; all in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.entropy_mechanism import (
    clip_cov_loss,
    clip_cov_mask,
    entropy_change_first_order,
    fit_entropy_law,
    kl_cov_loss,
    kl_cov_mask,
    policy_gradient_dlogits,
    ppo_clipped,
    sequence_covariance,
    token_covariance,
)

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def rollout(seed: int, rows: int = 5, time: int = 31, off_policy: float = 0.5) -> tuple[Tensor, ...]:
    """logp (leaf with gradient), old_logp, advantage, mask, keys."""
    g = generator(seed)
    old = -5 * torch.rand(rows, time, generator=g, dtype=F64)
    logp = old + off_policy * torch.randn(rows, time, generator=g, dtype=F64)
    advantage = torch.randn(rows, 1, generator=g, dtype=F64).expand(rows, time).clone()
    mask = torch.rand(rows, time, generator=g) < 0.8
    mask[0, 0] = True
    return logp.requires_grad_(), old, advantage, mask, torch.rand(rows, time, generator=g, dtype=F64)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


# 1 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_01_entropy_change_is_the_gradient_of_entropy(seed: int) -> None:
    g = generator(seed)
    z = (3 * torch.randn(4, 31, generator=g, dtype=F64)).requires_grad_()
    dz = torch.randn(4, 31, generator=g, dtype=F64)
    logp, p, h = z.log_softmax(-1), z.softmax(-1), entropy(z)
    score = p * (logp + h[:, None])
    torch.testing.assert_close(score.sum(-1), torch.zeros(4, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(h.sum(), z), -score.detach(), rtol=0, atol=1e-10)
    change = entropy_change_first_order(z, dz)
    torch.testing.assert_close(change, (gradient(entropy(z).sum(), z) * dz).sum(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy_change_first_order(z, dz + 7.5), change, rtol=0, atol=1e-10)
    uniform = torch.full((4, 31), 2.0, dtype=F64)
    torch.testing.assert_close(
        entropy_change_first_order(uniform, dz), torch.zeros(4, dtype=F64), rtol=0, atol=1e-12
    )


def test_01_impossible_actions_contribute_nothing() -> None:
    z = torch.tensor([0.3, -1.0, -math.inf], dtype=F64)
    dz = torch.tensor([1.0, 0.5, math.inf], dtype=F64)
    torch.testing.assert_close(entropy_change_first_order(z, dz), entropy_change_first_order(z[:2], dz[:2]))


# 2 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, t=st.floats(-1, 1))
def test_02_natural_gradient_flow_loses_entropy_at_the_covariance(seed: int, t: float) -> None:
    g = generator(seed)
    z0, a = torch.randn(2, 3, 47, generator=g, dtype=F64)
    step = 1e-4
    here = z0 + t * a
    torch.testing.assert_close(policy_gradient_dlogits(here, a, step, natural=True), step * a)
    measured = (entropy(here + step * a) - entropy(here - step * a)) / (2 * step)
    p, logp = here.softmax(-1), here.log_softmax(-1)
    covariance = (p * logp * a).sum(-1) - (p * logp).sum(-1) * (p * a).sum(-1)
    torch.testing.assert_close(measured, -covariance, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy_change_first_order(here, a), -covariance, rtol=0, atol=1e-10)


@quick
@given(seed=seeds, t=st.floats(0, 3))
def test_02_from_uniform_entropy_falls_at_t_times_the_variance(seed: int, t: float) -> None:
    a = torch.randn(5, 12, generator=generator(seed), dtype=F64)
    p = (t * a).softmax(-1)
    variance = (p * a**2).sum(-1) - (p * a).sum(-1) ** 2
    change = entropy_change_first_order(t * a, policy_gradient_dlogits(t * a, a, 1.0, natural=True))
    torch.testing.assert_close(change, -t * variance, rtol=0, atol=1e-10)
    assert (change <= 1e-12).all()


@quick
@given(seed=seeds)
def test_02_plain_policy_gradient_step(seed: int) -> None:
    g = generator(seed)
    z = torch.randn(3, 12, generator=g, dtype=F64).requires_grad_()
    q = torch.randn(3, 12, generator=g, dtype=F64)
    advantage = q - (z.softmax(-1) * q).sum(-1, keepdim=True)
    ascent = gradient((z.softmax(-1) * q).sum(), z)
    torch.testing.assert_close(policy_gradient_dlogits(z, advantage, 0.1), 0.1 * ascent, rtol=0, atol=1e-12)


# 3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-3.0, -0.2, 0.0, 0.7, 5.0])
def test_03_two_actions(x: float) -> None:
    z = torch.tensor([x, 0.0], dtype=F64)
    p = 1 / (1 + math.exp(-x))
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy(z).item() == pytest.approx(h, abs=1e-12)
    change = entropy_change_first_order(z, torch.tensor([1.0, 0.0], dtype=F64))
    assert change.item() == pytest.approx(-x * p * (1 - p), abs=1e-12)


# 4 --------------------------------------------------------------------------------------------------------------


def test_04_one_correct_arm_of_twelve() -> None:
    v, t = 12, 0.4
    a = torch.zeros(v, dtype=F64)
    a[0] = 1
    z = policy_gradient_dlogits(torch.zeros(v, dtype=F64), a, t, natural=True)
    p = z.softmax(-1)[0].item()
    assert p == pytest.approx(math.exp(t) / (math.exp(t) + v - 1), abs=1e-12)
    assert p == pytest.approx(0.1194240820, abs=5e-11)
    assert entropy(z).item() == pytest.approx(math.log(math.exp(t) + v - 1) - t * p, abs=1e-12)
    assert entropy(z).item() == pytest.approx(2.4773047733, abs=5e-11)
    assert entropy_change_first_order(z, a).item() == pytest.approx(-t * p * (1 - p), abs=1e-12)


# 5 --------------------------------------------------------------------------------------------------------------


def test_05_entropy_law_recovers_its_coefficients_and_refuses_too_little() -> None:
    h = np.linspace(2.0, 0.05, 40)
    law = fit_entropy_law(h, 0.83 - 0.21 * np.exp(h))
    assert law.a == pytest.approx(0.21, abs=1e-10)
    assert law.b == pytest.approx(0.83, abs=1e-10)
    assert law.ceiling == pytest.approx(0.62, abs=1e-10)
    with pytest.raises(DataError, match="needs at least 3"):
        fit_entropy_law([1.0, 2.0], [0.1, 0.2])
    with pytest.raises(DataError, match="entropy is constant"):
        fit_entropy_law([1.0, 1.0, 1.0], [0.1, 0.2, 0.3])


# 6 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, shift=st.floats(-10, 10), scale=st.floats(0.1, 10))
def test_06_token_covariance(seed: int, shift: float, scale: float) -> None:
    logp, _, advantage, mask, _ = rollout(seed)
    c = token_covariance(logp, advantage, mask)
    expected = np.cov(logp.detach()[mask].numpy(), advantage[mask].numpy(), bias=True)[0, 1]
    assert c[mask].mean().item() == pytest.approx(expected, abs=1e-12)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(token_covariance(logp, advantage + shift, mask), c, **close)
    torch.testing.assert_close(token_covariance(logp + shift, advantage, mask), c, **close)
    torch.testing.assert_close(token_covariance(logp, scale * advantage, mask), scale * c, **close)


# 7 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_07_kl_cov_limits(seed: int) -> None:
    logp, old, advantage, mask, _ = rollout(seed)
    surrogate = -(advantage * (logp - old).exp())[mask].mean()
    c = token_covariance(logp, advantage, mask)
    off, _ = kl_cov_loss(logp, old, advantage, mask, kl_cov_mask(c, mask, 0.2), coef=0.0)
    torch.testing.assert_close(off, surrogate)
    everywhere, metrics = kl_cov_loss(logp, old, advantage, mask, kl_cov_mask(c, mask, 1.0), coef=0.7)
    torch.testing.assert_close(everywhere, surrogate + 0.7 * (logp - old).abs()[mask].mean())
    assert metrics["kl_cov/penalised/frac"] == 1


@quick
@given(seed=seeds)
def test_07_kl_cov_is_exactly_inert_on_policy(seed: int) -> None:
    logp, old, advantage, mask, _ = rollout(seed, off_policy=0.0)
    chosen = kl_cov_mask(token_covariance(logp, advantage, mask), mask, 0.2)
    loss, _ = kl_cov_loss(logp, old, advantage, mask, chosen, coef=3.0)
    torch.testing.assert_close(loss, -advantage[mask].mean())
    vanilla = torch.where(mask, -advantage, 0.0) / mask.sum()
    torch.testing.assert_close(gradient(loss, logp), vanilla, rtol=1e-12, atol=0)


# 8 --------------------------------------------------------------------------------------------------------------


def ppo(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    ratio = (logp - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))[mask].mean()


@quick
@given(seed=seeds)
def test_08_clip_cov_limits(seed: int) -> None:
    logp, old, advantage, mask, keys = rollout(seed)
    bounds = {"clip_low": 0.2, "clip_high": 0.2}
    c = token_covariance(logp, advantage, mask)
    silenced = ppo_clipped(logp, old, advantage, mask, **bounds)
    none = clip_cov_mask(c, mask, 0.5, math.inf, math.inf, silenced, uniform=keys)
    assert not none.any()
    loss, _ = clip_cov_loss(logp, old, advantage, mask, none, **bounds)
    plain = ppo(logp, old, advantage, mask)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, logp), gradient(plain, logp), rtol=1e-12, atol=0)

    every = clip_cov_mask(c, mask, 1.0, -math.inf, math.inf, silenced, uniform=keys)
    loss, _ = clip_cov_loss(logp, old, advantage, mask, every, **bounds)
    frozen = (advantage * (logp - old).exp().clamp(0.8, 1.2))[silenced].sum() / mask.sum()
    torch.testing.assert_close(loss, -frozen, rtol=1e-12, atol=1e-15)
    assert (gradient(loss, logp) == 0).all()


@quick
@given(seed=seeds, fraction=st.sampled_from([1e-4, 0.02, 0.1, 0.5, 1.0]))
def test_08_clip_cov_drops_the_right_number_and_their_gradient(seed: int, fraction: float) -> None:
    logp, old, advantage, mask, keys = rollout(seed)
    c = token_covariance(logp, advantage, mask)
    silenced = ppo_clipped(logp, old, advantage, mask, clip_low=0.2, clip_high=0.2)
    dropped = clip_cov_mask(c, mask, fraction, 0.1, 2.0, silenced, uniform=keys)
    candidates = mask & (c > 0.1) & (c < 2.0) & ~silenced
    assert not (dropped & ~candidates).any()
    assert dropped.sum() == min(max(int(fraction * int(mask.sum())), 1), int(candidates.sum()))
    loss, metrics = clip_cov_loss(logp, old, advantage, mask, dropped, clip_low=0.2, clip_high=0.2)
    grad = gradient(loss, logp)
    assert (grad[dropped] == 0).all()
    kept = mask & ~dropped & ~silenced
    expected = (-advantage * (logp - old).exp() / mask.sum()).detach()
    torch.testing.assert_close(grad[kept], expected[kept], rtol=1e-12, atol=0)
    assert metrics["clip_cov/dropped/frac"] == pytest.approx(float(dropped.sum() / mask.sum()))


def test_08_clip_cov_bounds_are_strict() -> None:
    c = torch.tensor([1.0, 1.5, 5.0, 0.0], dtype=F64)
    mask = torch.ones(4, dtype=torch.bool)
    dropped = clip_cov_mask(c, mask, 1.0, uniform=torch.rand(4, generator=generator(0)))
    assert dropped.tolist() == [False, True, False, False]


# 9 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, pad=st.integers(1, 9), junk=st.sampled_from([0.0, 1e6, math.nan]))
def test_09_padding_changes_nothing(seed: int, pad: int, junk: float) -> None:
    logp, old, advantage, mask, keys = rollout(seed)

    def run(width: int) -> tuple[Tensor, ...]:
        extra = torch.full((5, width), junk, dtype=F64)
        lp, o, a = (torch.cat([t.detach(), extra], 1) for t in (logp, old, advantage))
        lp.requires_grad_()
        m = torch.cat([mask, torch.zeros(5, width, dtype=torch.bool)], 1)
        k = torch.cat([keys, torch.zeros(5, width, dtype=F64)], 1)
        c = token_covariance(lp, a, m)
        dropped = clip_cov_mask(c, m, 0.1, 0.0, 5.0, ppo_clipped(lp, o, a, m), uniform=k)
        chosen = kl_cov_mask(c, m, 0.1, uniform=k)
        clip, _ = clip_cov_loss(lp, o, a, m, dropped)
        kl, _ = kl_cov_loss(lp, o, a, m, chosen)
        grads = gradient(clip, lp), gradient(kl, lp)
        for t in (dropped, chosen, *grads):
            assert (t[:, 31:] == 0).all()
        return clip.detach(), kl.detach(), *(t[:, :31] for t in (dropped, chosen, *grads))

    for narrow, wide in zip(run(0), run(pad), strict=True):
        torch.testing.assert_close(wide, narrow, rtol=1e-10, atol=1e-12)


@quick
@given(seed=seeds)
def test_09_permuting_rows_permutes_the_masks(seed: int) -> None:
    logp, _, advantage, mask, keys = rollout(seed)
    order = torch.randperm(5, generator=generator(seed))
    c, d = (token_covariance(logp[i], advantage[i], mask[i]) for i in (slice(None), order))
    torch.testing.assert_close(d, c[order], rtol=1e-10, atol=1e-12)
    assert torch.equal(kl_cov_mask(c[order], mask[order], 0.1), kl_cov_mask(c, mask, 0.1)[order])
    clip = clip_cov_mask(c, mask, 0.1, 0.0, 5.0, uniform=keys)
    assert torch.equal(clip_cov_mask(c[order], mask[order], 0.1, 0.0, 5.0, uniform=keys[order]), clip[order])


@quick
@given(seed=seeds)
def test_09_ties_go_to_the_smallest_key_whatever_the_order(seed: int) -> None:
    keys = torch.rand(40, generator=generator(seed), dtype=F64)
    c, mask = torch.ones(40, dtype=F64), torch.ones(40, dtype=torch.bool)
    c[:4] = 2.0
    chosen = kl_cov_mask(c, mask, 0.25, uniform=keys)
    assert chosen[:4].all()
    assert chosen.sum() == 10
    rest = keys[4:]
    assert rest[chosen[4:]].max() < rest[~chosen[4:]].min()
    order = torch.randperm(40, generator=generator(seed + 1))
    assert torch.equal(kl_cov_mask(c[order], mask, 0.25, uniform=keys[order]), chosen[order])


# 10 -------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, fraction=st.sampled_from([1e-4, 0.02, 0.2, 0.9]))
def test_10_kl_cov_selects_the_largest(seed: int, fraction: float) -> None:
    logp, _, advantage, mask, keys = rollout(seed)
    c = token_covariance(logp, advantage, mask)
    for chosen in (kl_cov_mask(c, mask, fraction), kl_cov_mask(c, mask, fraction, uniform=keys)):
        assert not (chosen & ~mask).any()
        assert chosen.sum() == max(int(fraction * int(mask.sum())), 1)
        outside = mask & ~chosen
        assert not outside.any() or c[chosen].min() >= c[outside].max()


# Beyond the numbered checks ---------------------------------------------------------------------------------------


def test_empty_mask_gives_zero_loss_and_no_selection() -> None:
    logp, old, advantage, mask, keys = rollout(0)
    nothing = torch.zeros_like(mask)
    c = token_covariance(logp, advantage, nothing)
    dropped = clip_cov_mask(c, nothing, uniform=keys)
    chosen = kl_cov_mask(c, nothing)
    assert not dropped.any()
    assert not chosen.any()
    for loss, metrics in (
        clip_cov_loss(logp, old, advantage, nothing, dropped),
        kl_cov_loss(logp, old, advantage, nothing, chosen),
    ):
        assert loss == 0
        assert (gradient(loss, logp) == 0).all()
        assert all(math.isfinite(float(v)) for v in metrics.values())


def test_equal_advantages() -> None:
    logp, _, advantage, mask, keys = rollout(1)
    c = token_covariance(logp, torch.ones_like(advantage), mask)
    assert not clip_cov_mask(c, mask, uniform=keys).any()
    assert kl_cov_mask(c, mask, 0.1).sum() == int(0.1 * int(mask.sum()))
    assert not kl_cov_mask(c, mask, 0.1, skip_flat=True).any()


def test_clip_cov_choice_is_uniform_among_candidates() -> None:
    c, mask = torch.linspace(0, 1, 10, dtype=F64), torch.ones(10, dtype=torch.bool)
    g, hits = generator(0), torch.zeros(10)
    for _ in range(600):
        hits += clip_cov_mask(c, mask, 0.3, 0.3, 2.0, generator=g)
    assert (hits[:3] == 0).all()
    expected = 600 * 3 / 7
    assert hits.sum() == 1800
    assert ((hits[3:] - expected).abs() < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize("choice", [{}, {"uniform": torch.zeros(3), "generator": torch.Generator()}])
def test_clip_cov_wants_exactly_one_source_of_randomness(choice: dict) -> None:
    with pytest.raises(ConfigError, match="either uniform"):
        clip_cov_mask(torch.zeros(3), torch.ones(3, dtype=torch.bool), **choice)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 20.0])
def test_percentages_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fractions are shares"):
        kl_cov_mask(torch.zeros(3), torch.ones(3, dtype=torch.bool), fraction)


def test_selection_in_micro_batches_takes_more_than_asked() -> None:
    """The trap of the released code: at least one token per pool, so small pools raise the effective fraction."""
    logp, _, advantage, mask, _ = rollout(2, rows=8)
    c = token_covariance(logp, advantage, mask)
    pooled = kl_cov_mask(c, mask, 2e-3)
    split = torch.cat([kl_cov_mask(c[i : i + 1], mask[i : i + 1], 2e-3) for i in range(8)])
    assert pooled.sum() == 1
    assert split.sum() == 8


@quick
@given(seed=seeds)
def test_sequence_covariance_equals_the_naive_loop(seed: int) -> None:
    g = generator(seed)
    logp, _, _, mask, _ = rollout(seed, rows=9)
    mask[4] = False
    advantage = torch.randn(9, generator=g, dtype=F64)
    group = torch.tensor([7, 7, 3, 3, 3, 7, 9, 3, 7])
    result = sequence_covariance(logp, advantage, mask, group)
    for k, name in enumerate((3, 7, 9)):
        rows = [i for i in range(9) if group[i] == name and mask[i].any()]
        means = np.array([logp.detach()[i][mask[i]].mean().item() for i in rows])
        adv = advantage[rows].numpy()
        expected = (means * adv).mean() - means.mean() * adv.mean()
        assert result[k].item() == pytest.approx(expected, abs=1e-10)


def test_bf16_inputs_are_reduced_in_float32() -> None:
    logp, old, advantage, mask, keys = rollout(3)
    lp, o, a = (t.detach().bfloat16() for t in (logp, old, advantage))
    c = token_covariance(lp, a, mask)
    dropped, chosen = clip_cov_mask(c, mask, uniform=keys), kl_cov_mask(c, mask)
    for (low, _), (exact, _) in (
        (
            clip_cov_loss(lp, o, a, mask, dropped),
            clip_cov_loss(lp.double(), o.double(), a.double(), mask, dropped),
        ),
        (kl_cov_loss(lp, o, a, mask, chosen), kl_cov_loss(lp.double(), o.double(), a.double(), mask, chosen)),
    ):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-6)
