"""Exact checks of BAPO, numbered; all in float64."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from lab import loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError
from uncollapse.policy import bapo
from uncollapse.policy.bapo import (
    PRESETS,
    BalancedClip,
    ClipBounds,
    balanced_clip_bounds,
    clipped_surrogate,
    entropy_clip_contributions,
    positive_share,
    share_of_ratio,
)
from uncollapse.policy.batch import Batch
from uncollapse.policy.config import resolve
from uncollapse.policy.config.describe import describe
from uncollapse.policy.entropy_mechanism import entropy_change_first_order
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip, bounded_ratio
from uncollapse.policy.stats import Logp

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)
PAPER = {"low": (0.6, 0.9, 0.02), "high": (1.2, 3.0, 0.05)}
YAML = {
    "target": 0.5, "low": (0.6, 0.8, 0.05), "high": (1.2, 2.0, 0.05), "order": "low_first", "end": "clamp",
}  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(
    seed: int, rows: int = 6, time: int = 23, spread: float = 0.6, shift: float = 0.0
) -> tuple[Tensor, ...]:
    """ratio, advantage and mask; `shift` moves the advantages, so that one sign may dominate."""
    g = generator(seed)
    ratio = (spread * torch.randn(rows, time, generator=g, dtype=F64)).exp()
    advantage = torch.randn(rows, 1, generator=g, dtype=F64).expand(rows, time) + shift
    mask = torch.rand(rows, time, generator=g) < 0.8
    mask[0, 0] = True
    return ratio, advantage.clone(), mask


# ---- naive references ----------------------------------------------------------------------------------------------


def naive_sides(ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float, contribution: str):
    """P and N, token by token."""
    positive = negative = 0.0
    for r, a, m in zip(*(t.flatten().tolist() for t in (ratio, advantage, mask)), strict=True):
        if not m:
            continue
        if a > 0 and contribution == "loss":
            positive += a * min(r, high)
        elif a > 0 and r < high:
            positive += a * r
        elif a < 0 and contribution == "loss":
            negative += -a * max(r, low)
        elif a < 0 and r > low:
            negative += -a * r
    return positive, negative


def naive_share(*arguments) -> float:
    positive, negative = naive_sides(*arguments)
    return 1.0 if positive + negative == 0 else positive / (positive + negative)


def algorithm_1(data, target, low, high, contribution="loss"):
    """The paper's loop, with integer steps against drift; returns low, high and steps."""
    (a_low, b_low, d_low), (a_high, b_high, d_high) = low, high
    i = j = 0

    def share():
        return naive_share(*data, a_low + i * d_low, a_high + j * d_high, contribution)

    while share() < target * (1 - 1e-9) and a_low + (i + 1) * d_low <= b_low + 1e-12:
        if a_high + (j + 1) * d_high <= b_high + 1e-12:
            j += 1
        else:
            i += 1
    return a_low + i * d_low, a_high + j * d_high, i + j


def official(data, tau, low, high):
    """The released search on P / N: lower bound first, last step shortened."""
    (c_low, b_low, d_low), (c_high, b_high, d_high) = low, high
    steps = 0

    def ratio():
        positive, negative = naive_sides(*data, c_low, c_high, "loss")
        return math.inf if negative <= 0 else positive / (negative + 1e-8)

    while ratio() < tau and c_low < b_low - 1e-12:
        c_low, steps = min(c_low + d_low, b_low), steps + 1
    while ratio() < tau and c_high < b_high - 1e-12:
        c_high, steps = min(c_high + d_high, b_high), steps + 1
    return c_low, c_high, steps


def naive_loss(
    ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(low, high)
    loss = torch.maximum(plain, bounded)
    return loss if dual is None else torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


@quick
@given(
    seed=seeds,
    target=st.floats(0.05, 0.95),
    shift=st.floats(-1, 1),
    contribution=st.sampled_from(["loss", "gradient"]),
)
def test_the_search_equals_algorithm_1(seed: int, target: float, shift: float, contribution: str) -> None:
    data = tokens(seed, shift=shift)
    found = balanced_clip_bounds(*data, target=target, contribution=contribution, **PAPER)
    low, high, steps = algorithm_1(data, target, **PAPER, contribution=contribution)
    assert found.low.item() == pytest.approx(low, abs=1e-12)
    assert found.high.item() == pytest.approx(high, abs=1e-12)
    assert found.steps == steps
    assert found.share.item() == pytest.approx(naive_share(*data, low, high, contribution), abs=1e-12)
    assert found.start_share.item() == pytest.approx(naive_share(*data, 0.6, 1.2, contribution), abs=1e-12)
    assert bool(found.satisfied) == (found.share.item() >= target * (1 - 1e-9))


@quick
@given(seed=seeds, tau=st.floats(0.1, 3), shift=st.floats(-1, 1), d_low=st.sampled_from([0.05, 0.07]))
def test_the_search_equals_the_released_loop(seed: int, tau: float, shift: float, d_low: float) -> None:
    data = tokens(seed, shift=shift)
    ranges = {"low": (0.6, 0.8, d_low), "high": (1.2, 2.0, 0.3)}
    options = {"order": "low_first", "end": "clamp"}
    found = balanced_clip_bounds(*data, target=share_of_ratio(tau), **ranges, **options)
    low, high, steps = official(data, tau, **ranges)
    assert (found.low.item(), found.high.item()) == pytest.approx((low, high), abs=1e-9)
    assert found.steps == steps


def test_a_last_step_that_does_not_fit_is_left_out_or_shortened() -> None:
    data = tokens(0, shift=-9.0)
    ranges = {"low": (0.6, 0.8, 0.07), "high": (1.2, 2.0, 0.3)}
    stopped = balanced_clip_bounds(*data, target=1.0, **ranges, end="stop")
    assert (stopped.low.item(), stopped.high.item(), int(stopped.steps)) == pytest.approx((0.74, 1.8, 4))
    shortened = balanced_clip_bounds(*data, target=1.0, **ranges, end="clamp")
    assert (shortened.low.item(), shortened.high.item(), int(shortened.steps)) == (0.8, 2.0, 6)


def test_a_fixed_lower_bound_leaves_the_upper_one_its_search() -> None:
    """Algorithm 1 as printed would stop before its first step."""
    ratio, advantage, mask = (
        torch.full((1, 2), 2.9, dtype=F64),
        torch.tensor([[1.0, -1.0]], dtype=F64),
        torch.ones(1, 2) > 0,
    )
    found = balanced_clip_bounds(ratio, advantage, mask, target=0.45, low=(0.6, 0.6, 0.02))
    assert found.satisfied
    assert found.high.item() == pytest.approx(2.4)
    assert algorithm_1((ratio, advantage, mask), 0.45, (0.6, 0.6, 0.02), PAPER["high"])[2] == 0


# 1 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(1, 9))
def test_01_at_ratio_one_the_bounds_decide_nothing(seed: int, low: float, high: float) -> None:
    _, advantage, mask = tokens(seed)
    ones = torch.ones_like(advantage)
    loss = clipped_surrogate(ones, advantage, mask, low, high)
    assert loss.item() == pytest.approx(-advantage[mask].mean().item(), abs=1e-12)
    a = advantage[mask]
    closed = a[a > 0].sum() / a.abs().sum()
    assert positive_share(ones, advantage, mask, low, high).item() == pytest.approx(closed.item(), abs=1e-12)


@pytest.mark.parametrize(("plus", "minus"), [(4, 8), (6, 6), (5, 20)])
def test_01_share_of_two_lengths(plus: int, minus: int) -> None:
    """L+ A+ / (L+ A+ + L- A-), with advantages that add up to 0 over the group."""
    advantage = torch.zeros(5, 20, dtype=F64)
    mask = torch.zeros(5, 20, dtype=torch.bool)
    for row, (length, value) in enumerate([(plus, 1.5)] * 2 + [(minus, -1.0)] * 3):
        advantage[row, :length], mask[row, :length] = value, True
    ones = torch.ones_like(advantage)
    found = balanced_clip_bounds(ones, advantage, mask, target=0.4)
    assert found.share.item() == pytest.approx(plus / (plus + minus), abs=1e-15)
    assert bool(found.satisfied) == (plus / (plus + minus) >= 0.4)
    half = balanced_clip_bounds(ones, advantage, mask, target=0.5)
    assert bool(half.satisfied) == (plus == minus)


def test_01_rounding_starts_no_search() -> None:
    """Sums that differ in the last digits only: at a target of 1/2 the released loop would search."""
    a = torch.tensor([[0.3, -0.1, -0.1, -0.1]], dtype=F64)
    mask = torch.ones_like(a) > 0
    assert naive_share(torch.ones_like(a), a, mask, 0.6, 1.2, "loss") != 0.5
    found = balanced_clip_bounds(torch.ones_like(a), a, mask, target=0.5)
    assert found.satisfied
    assert found.steps == 0


# 2 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, shift=st.floats(-1, 1))
def test_02_what_each_side_carries_is_monotone_in_its_bound(seed: int, shift: float) -> None:
    data = tokens(seed, shift=shift)
    for contribution in ("loss", "gradient"):
        highs = [naive_sides(*data, 0.6, h, contribution)[0] for h in (1.2, 1.5, 2.0, 3.0)]
        assert highs == sorted(highs)
    lows = [naive_sides(*data, c, 1.2, "loss")[1] for c in (0.6, 0.7, 0.8, 0.9)]
    assert lows == sorted(lows)
    lows = [naive_sides(*data, c, 1.2, "gradient")[1] for c in (0.6, 0.7, 0.8, 0.9)]
    assert lows == sorted(lows, reverse=True)


@quick
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(1, 4))
def test_02_the_share_equals_the_naive_sum(seed: int, low: float, high: float) -> None:
    data = tokens(seed)
    weight = torch.rand(data[0].shape, generator=generator(seed + 1), dtype=F64)
    for contribution in ("loss", "gradient"):
        share = positive_share(*data, low, high, contribution=contribution)
        assert share.item() == pytest.approx(naive_share(*data, low, high, contribution), abs=1e-12)
        weighed = positive_share(*data, low, high, contribution=contribution, token_weight=weight)
        ratio, advantage, mask = data
        expected = naive_share(ratio, advantage * weight, mask, low, high, contribution)
        assert weighed.item() == pytest.approx(expected, abs=1e-12)


@quick
@given(seed=seeds)
def test_02_the_published_search_never_gains_from_the_lower_bound(seed: int) -> None:
    """Once it moves, it runs to its end, and the share is lower than without; with the gradient form it is not."""
    data = tokens(seed, shift=-1.5)
    start = positive_share(*data, 0.6, 3.0)
    found = balanced_clip_bounds(*data, target=0.6)
    if found.low > 0.6:
        assert found.low.item() == pytest.approx(0.9)
        assert found.share <= start + 1e-12
        assert not found.satisfied
    freed = [positive_share(*data, c, 3.0, contribution="gradient").item() for c in (0.6, 0.7, 0.8, 0.9)]
    assert freed == sorted(freed)


# 3 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_03_without_a_search_it_is_ppo_clip(seed: int) -> None:
    ratio, advantage, mask = tokens(seed)
    found = balanced_clip_bounds(
        ratio, advantage, mask, target=0.9, low=(0.8, 0.8, 0.02), high=(1.2, 1.2, 0.05)
    )
    assert (found.low.item(), found.high.item(), int(found.steps)) == (0.8, 1.2, 0)
    ratio.requires_grad_()
    ours = clipped_surrogate(ratio, advantage, mask, found.low, found.high)
    plain = naive_loss(ratio, advantage, 0.8, 1.2)[mask].mean()
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(loss, ratio)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=0)
    idle = balanced_clip_bounds(ratio, advantage, mask, target=0.0)
    assert (idle.low.item(), idle.high.item(), int(idle.steps)) == (0.6, 1.2, 0)


@quick
@given(seed=seeds)
def test_03_without_bounds_it_is_reinforce_with_importance_weights(seed: int) -> None:
    ratio, advantage, mask = tokens(seed)
    loss = clipped_surrogate(ratio, advantage, mask, 0.0, math.inf)
    assert loss.item() == pytest.approx(-(ratio * advantage)[mask].mean().item(), rel=1e-12)
    share = positive_share(ratio, advantage, mask, 0.0, math.inf)
    assert share.item() == pytest.approx(
        naive_share(ratio, advantage, mask, 0.0, math.inf, "loss"), abs=1e-12
    )
    free = {"low": (0.0, 0.0, 1.0), "high": (math.inf, math.inf, 1.0)}
    found = balanced_clip_bounds(ratio, advantage, mask, target=1.0, **free)
    assert found.share.item() == pytest.approx(share.item(), abs=1e-12)


# 4 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, dual=st.sampled_from([None, 1.5, 3.0]), low=st.floats(0.5, 0.95), high=st.floats(1.05, 3))
def test_04_gradient_with_respect_to_the_log_probability(
    seed: int, dual: float | None, low: float, high: float
) -> None:
    ratio, advantage, mask = tokens(seed, spread=1.0)
    logp = ratio.log().requires_grad_()
    loss = clipped_surrogate(logp.exp(), advantage, mask, low, high, dual)
    grad = torch.autograd.grad(loss, logp)[0]
    silenced = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    if dual is not None:
        silenced |= (advantage < 0) & (ratio > dual)
    expected = torch.where(mask & ~silenced, -advantage * ratio / mask.sum(), 0.0)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


# 5 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contribution", ["loss", "gradient"])
@pytest.mark.parametrize("order", ["high_first", "low_first"])
def test_05_one_sign_only(contribution: str, order: str) -> None:
    ratio, advantage, mask = tokens(0)
    options = {"contribution": contribution, "order": order}
    bad = balanced_clip_bounds(ratio, -advantage.abs(), mask, **options)
    assert (bad.low.item(), bad.high.item()) == pytest.approx((0.9, 3.0))
    assert bad.share == 0
    assert not bad.satisfied
    good = balanced_clip_bounds(ratio, advantage.abs(), mask, **options)
    assert (good.low.item(), good.high.item(), good.share.item(), int(good.steps)) == (0.6, 1.2, 1.0, 0)
    assert good.satisfied


# 6 --------------------------------------------------------------------------------------------------------------


def test_06_step_counts_do_not_drift() -> None:
    ratio, advantage, mask = tokens(0)
    found = balanced_clip_bounds(ratio, -advantage.abs(), mask)
    assert found.steps == 36 + 15
    assert (found.low.item(), found.high.item()) == pytest.approx((0.9, 3.0), abs=1e-15)
    reached = [
        balanced_clip_bounds(ratio, -advantage.abs(), mask, high=(1.2, 1.2 + k * 0.05, 0.05))
        for k in range(37)
    ]
    assert [int(b.steps) for b in reached] == [k + 15 for k in range(37)]


# 7 --------------------------------------------------------------------------------------------------------------


def test_07_the_official_function_where_it_is_balanced() -> None:
    logp = torch.tensor([[1.5, 0.7]], dtype=F64).log().requires_grad_()
    advantage, mask = torch.tensor([[1.0, -1.0]], dtype=F64), torch.ones(1, 2) > 0
    found = balanced_clip_bounds(logp.exp(), advantage, mask, **YAML)
    assert int(found.steps) == 0
    assert (found.share / (1 - found.share)).item() == pytest.approx(1.2 / 0.7)
    loss = clipped_surrogate(logp.exp(), advantage, mask, found.low, found.high, dual_clip=3.0)
    assert loss.item() == pytest.approx(-0.25, abs=1e-15)
    grad = torch.autograd.grad(loss, logp)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.35]], dtype=F64), rtol=0, atol=1e-15)


def test_07_the_official_function_where_it_is_not() -> None:
    logp = torch.tensor([[1.5, 0.7]], dtype=F64).log().requires_grad_()
    advantage, mask = torch.tensor([[1.0, -3.0]], dtype=F64), torch.ones(1, 2) > 0
    found = balanced_clip_bounds(logp.exp(), advantage, mask, **YAML)
    assert (found.low.item(), found.high.item()) == pytest.approx((0.8, 2.0))
    assert (found.share / (1 - found.share)).item() == pytest.approx(0.625)
    assert not found.satisfied
    loss = clipped_surrogate(logp.exp(), advantage, mask, found.low, found.high, dual_clip=3.0)
    assert loss.item() == pytest.approx(0.45, abs=1e-15)
    grad = torch.autograd.grad(loss, logp)[0]
    torch.testing.assert_close(grad, torch.tensor([[-0.75, 0.0]], dtype=F64), rtol=0, atol=1e-15)


# 8 --------------------------------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


@quick
@given(seed=seeds, natural=st.booleans(), constant=st.floats(-3, 3))
def test_08_entropy_rule_against_finite_differences(seed: int, natural: bool, constant: float) -> None:
    g = generator(seed)
    z, advantage = torch.randn(2, 4, 17, generator=g, dtype=F64)
    clipped = torch.rand(4, 17, generator=g) < 0.3
    kept = torch.where(clipped, 0.0, advantage)
    p = z.softmax(-1)
    dz = kept + constant if natural else p * (kept - (p * kept).sum(-1, keepdim=True))
    change = entropy_clip_contributions(z, advantage, clipped, natural=natural).sum(-1)
    torch.testing.assert_close(change, entropy_change_first_order(z, dz), rtol=1e-10, atol=1e-12)
    eta = 1e-5
    measured = (entropy(z + eta * dz) - entropy(z - eta * dz)) / (2 * eta)
    torch.testing.assert_close(change, measured, rtol=1e-3, atol=1e-8)


@quick
@given(seed=seeds)
def test_08_the_plain_step_is_the_gradient_of_the_clipped_objective(seed: int) -> None:
    """dz is the exact gradient of sum_a pi_old min(r A, clip(r) A), over all actions."""
    g = generator(seed)
    old, advantage = torch.randn(2, 17, generator=g, dtype=F64)
    z = (old + 0.4 * torch.randn(17, generator=g, dtype=F64)).requires_grad_()
    ratio = (z.log_softmax(-1) - old.log_softmax(-1)).exp()
    objective = -(old.softmax(-1) * naive_loss(ratio, advantage, 0.8, 1.2)).sum()
    dz = torch.autograd.grad(objective, z)[0]
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    z = z.detach()
    change = entropy_clip_contributions(z, advantage, clipped.detach()).sum()
    torch.testing.assert_close(change, entropy_change_first_order(z, dz), rtol=1e-10, atol=1e-13)


def test_08_a_clipped_action_still_moves_with_the_mean() -> None:
    z, advantage = torch.tensor([1.0, 0.0, -1.0], dtype=F64), torch.tensor([1.0, 0.5, 0.2], dtype=F64)
    clipped = torch.tensor([False, False, True])
    assert entropy_clip_contributions(z, advantage, clipped, natural=True)[2].abs() > 1e-3
    z = torch.tensor([1.0, 0.0, -math.inf], dtype=F64)
    part = entropy_clip_contributions(z, torch.tensor([1.0, 0.5, math.nan], dtype=F64), clipped)
    narrow = entropy_clip_contributions(z[:2], advantage[:2], clipped[:2])
    torch.testing.assert_close(part, torch.cat([narrow, torch.zeros(1, dtype=F64)]))


# 9 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_09_signs_of_the_natural_form(seed: int) -> None:
    g = generator(seed)
    z, advantage = torch.randn(2, 4, 17, generator=g, dtype=F64)
    clipped = torch.rand(4, 17, generator=g) < 0.3
    kept, logp = torch.where(clipped, 0.0, advantage), z.log_softmax(-1)
    probable = logp > (logp.exp() * logp).sum(-1, keepdim=True)
    favoured = kept > (logp.exp() * kept).sum(-1, keepdim=True)
    change = entropy_clip_contributions(z, advantage, clipped, natural=True)
    assert torch.equal(change < 0, probable == favoured)


# 10 -------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.floats(1e-6, 1e6), contribution=st.sampled_from(["loss", "gradient"]))
def test_10_scale_and_order_leave_the_bounds(seed: int, scale: float, contribution: str) -> None:
    ratio, advantage, mask = tokens(seed, shift=-0.5)
    one = balanced_clip_bounds(ratio, advantage, mask, contribution=contribution)
    order = torch.randperm(ratio.numel(), generator=generator(seed))
    moved = [t.flatten()[order] for t in (ratio, scale * advantage, mask)]
    other = balanced_clip_bounds(*moved, contribution=contribution)
    assert (one.low, one.high, one.steps) == (other.low, other.high, other.steps)
    torch.testing.assert_close(other.share, one.share, rtol=1e-9, atol=1e-12)


# Beyond the numbered checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ratios_that_overflow_give_finite_losses_and_gradients(sign: float, dual: float | None) -> None:
    log_ratio = torch.tensor([[100.0, 89.0, 0.1, -0.5, -200.0]])
    adv, mask = torch.full_like(log_ratio, sign), torch.ones_like(log_ratio, dtype=torch.bool)
    plain = log_ratio.exp().requires_grad_()
    assert plain.isinf().any()
    loss = clipped_surrogate(plain, adv, mask, 0.6, 1.2, dual)
    grad = torch.autograd.grad(loss, plain)[0]
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[0, :2] == 0).all()

    leaf = log_ratio.clone().requires_grad_()
    bounded = clipped_surrogate(bounded_ratio(leaf), adv, mask, 0.6, 1.2, dual)
    torch.testing.assert_close(bounded, loss)
    grad = torch.autograd.grad(bounded, leaf)[0]
    assert grad.isfinite().all()
    assert (grad[0, :2] == 0).all()
    assert grad[0, 2] != 0

    signs = adv * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    for contribution in ("loss", "gradient"):
        for high in (1.2, math.inf):
            shares = [
                positive_share(r, signs, mask, 0.6, high, contribution=contribution)
                for r in (plain, bounded_ratio(log_ratio))
            ]
            assert 0 <= shares[0] <= 1
            torch.testing.assert_close(*shares, rtol=1e-6, atol=0)


@quick
@given(seed=seeds, junk=st.sampled_from([math.nan, math.inf, -1e30]))
def test_padding_changes_nothing(seed: int, junk: float) -> None:
    ratio, advantage, mask = tokens(seed, shift=-0.5)
    dirty = [torch.where(mask, t, junk) for t in (ratio, advantage)]
    assert balanced_clip_bounds(ratio, advantage, mask) == balanced_clip_bounds(*dirty, mask)
    leaf = dirty[0].clone().requires_grad_()
    for agg in ("token-mean", "seq-mean-token-mean"):
        loss = clipped_surrogate(leaf, dirty[1], mask, 0.6, 1.2, 3.0, agg)
        torch.testing.assert_close(
            loss.detach(), clipped_surrogate(ratio, advantage, mask, 0.6, 1.2, 3.0, agg)
        )
        grad = torch.autograd.grad(loss, leaf)[0]
        assert (grad[~mask] == 0).all()
        assert torch.isfinite(grad).all()


def test_nothing_to_balance() -> None:
    ratio, advantage, mask = tokens(1)
    for a, m in ((torch.zeros_like(advantage), mask), (advantage, torch.zeros_like(mask))):
        for contribution in ("loss", "gradient"):
            found = balanced_clip_bounds(ratio, a, m, target=0.9, contribution=contribution)
            assert (found.share.item(), int(found.steps), bool(found.satisfied)) == (1.0, 0, True)
    assert clipped_surrogate(ratio, advantage, torch.zeros_like(mask), 0.6, 1.2) == 0


def test_tokens_without_advantage_belong_to_neither_side() -> None:
    ratio, advantage, mask = tokens(2)
    more = [torch.cat([t, e]) for t, e in ((ratio, ratio), (advantage, 0 * advantage), (mask, mask))]
    assert balanced_clip_bounds(*more) == balanced_clip_bounds(ratio, advantage, mask)


def test_rows_weigh_alike_under_the_mean_over_rows() -> None:
    ratio, advantage, mask = tokens(3)
    mask[2] = False
    rows = [naive_loss(ratio[i], advantage[i], 0.6, 1.2)[mask[i]].mean().item() for i in range(6) if i != 2]
    loss = clipped_surrogate(ratio, advantage, mask, 0.6, 1.2, agg="seq-mean-token-mean")
    assert loss.item() == pytest.approx(sum(rows) / 5, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.5}, "share_of_ratio"),
        ({"target": math.nan}, "is no share"),
        ({"low": (0.9, 0.6, 0.1)}, "low: needs"),
        ({"low": (0.6, 0.9, 0.0)}, "low: needs"),
        ({"high": (1.2, math.inf, 0.1)}, "high: needs"),
        ({"high": (1.2, 3.0)}, "start, end and step"),
        ({"low": (0.6, 1.4, 0.1)}, "keep them apart"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        balanced_clip_bounds(*tokens(0), **options)
    with pytest.raises(ConfigError, match=message):
        BalancedClip(**options)


def test_more_options_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        share_of_ratio(-1.0)
    with pytest.raises(ConfigError, match="dual must be above 1"):
        BalancedClip(dual=1.0)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("order", bapo.Order),
        ("contribution", bapo.Contribution),
        ("end", bapo.End),
        ("agg", bapo.Aggregation),
    ],
)
def test_unknown_words_are_refused(name: str, choices: object) -> None:
    """Tests check types at run time and stop such a word earlier, hence the private function."""
    with pytest.raises(ConfigError, match=f"{name} is .* or .*; got 'both'"):
        bapo._one_of(name, "both", choices)


# ---- stage and recipes ---------------------------------------------------------------------------------------------

NAMES = ("bapo", "bapo-gradient", "bapo-released", "bapo-script")


def test_the_published_settings() -> None:
    """Written by hand from the paper, the README, the configuration, the script and the appendix."""
    got = {name: (p.target, p.low, p.high, p.order, p.end, p.dual) for name, p in PRESETS.items()}
    assert got == {
        "paper": (0.4, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05), "high_first", "stop", None),
        "readme": (0.5, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05), "high_first", "stop", None),
        "yaml": (0.5, (0.6, 0.8, 0.05), (1.2, 2.0, 0.05), "low_first", "clamp", 3.0),
        "script": (pytest.approx(1 / 3), (0.8, 0.95, 0.05), (1.2, 2.0, 0.1), "low_first", "clamp", 3.0),
        "llama": (0.45, (0.8, 0.9, 0.02), (1.2, 2.0, 0.05), "high_first", "stop", None),
    }
    assert [recipe(name).surrogate.contribution for name in NAMES] == ["loss", "gradient", "loss", "loss"]
    assert [share_of_ratio(t) for t in (2 / 3, 1.0, 0.5)] == pytest.approx([0.4, 0.5, 1 / 3])


def decided(made: Recipe, batch: Batch, engine) -> Batch:
    return made.plan(engine.measure(batch, made.stats("plan")))


@pytest.mark.parametrize("name", NAMES)
def test_the_stage_is_the_function_over_the_optimiser_step(name: str) -> None:
    made = recipe(name)
    engine, batch = prepared(made, seed=1)
    moved_on(engine.policy)
    plan = decided(made, batch, engine)
    s = made.surrogate
    now = engine.measure(batch, frozenset({Logp("now")})).stats[Logp("now")]
    ratio = (now - batch.old_logp).exp()
    found = balanced_clip_bounds(
        ratio, batch.advantage, batch.mask, target=s.target, low=s.low, high=s.high, order=s.order,
        contribution=s.contribution, end=s.end,
    )  # fmt: skip
    for key, value in found._asdict().items():
        column = plan.columns[f"own/surrogate/{key}"]
        assert column.shape == (len(batch), 1)
        torch.testing.assert_close(column, value.double().expand(len(batch), 1), rtol=1e-12, atol=0)
    loss, _ = loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(5))
    expected = clipped_surrogate(ratio, batch.advantage, batch.mask, found.low, found.high, s.dual)
    assert loss == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_log_says_what_the_search_did(pieces: int) -> None:
    made = recipe("bapo")
    engine, batch = prepared(made, seed=1)
    moved_on(engine.policy)
    batch = replace(batch, mask=batch.mask & (torch.arange(len(batch)) != 3)[:, None])
    plan = decided(made, batch, engine)
    total: dict[str, list[float]] = {}
    for rows in torch.arange(len(batch)).chunk(pieces):
        report = made.loss(engine.measure(plan[rows], made.stats("loss"), grad=True))
        for key, pair in report.metrics.items():
            assert not any(value.requires_grad for value in pair)
            total.setdefault(key, [0.0, 0.0])
            total[key] = [a + float(b) for a, b in zip(total[key], pair, strict=True)]
    shown = {key: value / weight for key, (value, weight) in total.items()}
    assert total["bapo/low/mean"][1] == int(batch.mask.any(1).sum())
    for key, column in {
        "low": "low",
        "high": "high",
        "share_before": "start_share",
        "share_after": "share",
    }.items():
        assert shown[f"bapo/{key}/mean"] == pytest.approx(
            plan.columns[f"own/surrogate/{column}"][0, 0].item()
        )
    assert shown["bapo/steps/mean"] == plan.columns["own/surrogate/steps"][0, 0]
    assert shown["bapo/satisfied/frac"] in (0.0, 1.0)


def test_clipped_tokens_are_those_without_a_gradient() -> None:
    made = replace(recipe("bapo-released"), name="dual", surrogate=replace(PRESETS["yaml"], dual=1.3))
    engine, batch = prepared(made, seed=2)
    moved_on(engine.policy)
    plan = decided(made, batch, engine)
    low, high = (plan.columns[f"own/surrogate/{k}"] for k in ("low", "high"))
    ratio = (plan.stats[Logp("now")] - plan.old_logp).requires_grad_()
    own = {"low": low, "high": high}
    view = plan.with_stats({Logp("now"): ratio + plan.old_logp})
    grad = torch.autograd.grad(made.surrogate(view, own).sum(), ratio)[0]
    counted = plan.mask & (plan.advantage != 0)
    assert torch.equal(made.surrogate.clipped(view, own)[counted], (grad == 0)[counted])
    assert made.surrogate.clipped(view, own)[counted].any()


def test_a_fixed_range_is_ppo_clip_to_the_bit() -> None:
    frozen = replace(recipe("bapo"), name="frozen", surrogate=BalancedClip(target=0.0))
    plain = replace(frozen, name="plain", surrogate=PPOClip(low=0.4, high=0.2))
    engine, batch = prepared(frozen, seed=3)
    moved_on(engine.policy)
    rows = [torch.arange(len(batch))]
    loss, gradient = loss_and_gradient(engine, frozen, batch, rows)
    again, regained = loss_and_gradient(engine, plain, batch, rows)
    assert loss == again
    assert torch.equal(gradient, regained)


def test_per_rollout_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="every ratio is 1 and no bound changes the share"):
        BalancedClip(scope="rollout")


def test_per_micro_batch_depends_on_the_split_and_says_so() -> None:
    made = replace(recipe("bapo"), name="parity", surrogate=BalancedClip(scope="microbatch"))
    assert made.split_dependent
    engine, batch = prepared(made, seed=1)
    moved_on(engine.policy)
    whole, _ = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    pooled, _ = loss_and_gradient(engine, recipe("bapo"), batch, [torch.arange(len(batch))])
    assert whole == pytest.approx(pooled, abs=1e-12)
    split, _ = loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(len(batch)))
    assert split != pytest.approx(whole, abs=1e-6)
    assert any("per micro-batch" in line for line in describe(made, engines={}).warnings)


def test_replayed_rows_have_bounds_of_their_own() -> None:
    made = recipe("bapo")
    engine, batch = prepared(made, seed=1)
    moved_on(engine.policy)
    part = 2 * (batch.columns["group"] % 2)
    plan = decided(made, batch.with_columns(part=part, scale=torch.ones(len(batch), dtype=F64)), engine)
    for code in (0, 2):
        alone = decided(made, batch[part == code], engine)
        for key in ClipBounds._fields:
            name = f"own/surrogate/{key}"
            assert torch.equal(plan.columns[name][part == code], alone.columns[name])


def test_with_one_update_per_rollout_the_card_says_that_it_does_nothing() -> None:
    lines = describe(recipe("bapo"), engines={}, updates=1).warnings
    assert any("balanced-clip does nothing" in line for line in lines)


def test_it_is_written_in_yaml_and_combines() -> None:
    made = resolve(
        {
            "name": "mine",
            "base": "clip-cov",
            "surrogate": {"balanced-clip": {"target": 0.45, "low": [0.8, 0.9, 0.02], "high": [1.2, 2, 0.05]}},
        }
    )
    assert made.surrogate == replace(PRESETS["llama"])
    engine, batch = prepared(made)
    moved_on(engine.policy)
    loss, gradient = loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(3))
    assert math.isfinite(loss)
    assert gradient.abs().sum() > 0


def test_groups_of_one_teach_nothing_and_start_no_search() -> None:
    made = replace(recipe("bapo"), name="alone", sampler=PlainSampler(samples=1))
    engine, batch = prepared(made)
    moved_on(engine.policy)
    loss, gradient = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    assert loss == 0.0
    assert not gradient.any()
    plan = decided(made, batch, engine)
    assert plan.columns["own/surrogate/share"].unique().tolist() == [1.0]
    assert not plan.columns["own/surrogate/steps"].any()


def test_half_precision_is_searched_in_double() -> None:
    ratio, advantage, mask = tokens(5, shift=-0.3)
    low = [t.bfloat16() for t in (ratio, advantage)]
    found = balanced_clip_bounds(*low, mask)
    assert found == balanced_clip_bounds(*(t.double() for t in low), mask)
    assert found.share.dtype == F64


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4)])
def test_single_tokens_and_single_rows(shape: tuple[int, int]) -> None:
    ratio, advantage = torch.full(shape, 1.4, dtype=F64), -torch.ones(shape, dtype=F64)
    found = balanced_clip_bounds(ratio, advantage, torch.ones(shape) > 0)
    assert found.share == 0
    assert clipped_surrogate(
        ratio, advantage, torch.ones(shape) > 0, found.low, found.high
    ).item() == pytest.approx(1.4)
