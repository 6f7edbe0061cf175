"""Exact checks of AEPO, numbered as in its specification; all in float64."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from lab import Table, TableLab, loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.aepo_arbitrary import (
    EntropyController,
    ReplacingSampler,
    TemperedPositives,
    TemperedReweighting,
    TemperedSampler,
    auxiliary_temperature,
    expected_aux_gradient,
    group_advantage_gain,
    policy_entropy,
    reachable_entropy,
    reweighting_share,
    tempered_positive_loss,
    tempered_reweighting,
)
from uncollapse.policy.aepo_arbitrary.formulas import check_steering
from uncollapse.policy.batch import PARTS, Batch, Clock
from uncollapse.policy.config import recipe_to_yaml, resolve
from uncollapse.policy.metrics import rollout_metrics
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stats import Entropy, Logp, TemperedLogp
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def problem(seed: int, answers: int = 7, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits, and a 0/1 reward with at least one right and one wrong answer."""
    g = generator(seed)
    right = (torch.rand(answers, generator=g) < 0.5).to(F64)
    right[0], right[1] = 1.0, 0.0
    return scale * torch.randn(answers, generator=g, dtype=F64), right


def rows(seed: int, count: int = 6, time: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp (leaf), old_logp, rewards in {0, 1}, a ragged mask with an empty row, one of a single token and one with holes."""
    g = generator(seed)
    old = -4 * torch.rand(count, time, generator=g, dtype=F64)
    logp = (old + 0.4 * torch.randn(count, time, generator=g, dtype=F64)).requires_grad_()
    reward = (torch.rand(count, generator=g) < 0.6).to(F64)
    reward[2] = 1.0
    length = torch.randint(1, time + 1, (count,), generator=g)
    length[0], length[1] = 0, 1
    mask = torch.arange(time) < length[:, None]
    mask[2] = True
    mask[2, [0, 3, 4]] = False  # what a tool wrote between two turns
    return logp, old, reward, mask


def of_part(batch: Batch, name: str) -> Batch:
    return batch[batch.columns["part"] == PARTS[name]]


def with_sampler(made: Recipe, **options: object) -> Recipe:
    return replace(made, sampler=replace(made.sampler, **options))


# 1, 2, 3 ----------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, t=st.floats(0.3, 3.0))
def test_01_expected_gradient_by_enumeration(seed: int, t: float) -> None:
    z, right = problem(seed)
    z.requires_grad_()
    tempered = (z.detach() / t).softmax(-1)
    expected = torch.zeros_like(z)
    for answer in range(len(z)):
        (grad,) = torch.autograd.grad(z.log_softmax(-1)[answer], z)
        expected = expected + tempered[answer] * right[answer] * grad
    found = expected_aux_gradient(z.detach(), right, t)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    s = (tempered * right).sum()
    torch.testing.assert_close(found, s * (tempered * right / s - z.detach().softmax(-1)), rtol=0, atol=1e-13)


def test_01_batches_of_laws_and_temperatures() -> None:
    z, right = (
        torch.randn(3, 5, generator=generator(0), dtype=F64),
        torch.tensor([1.0, 0, 1, 1, 0], dtype=F64),
    )
    t = torch.tensor([[0.8], [1.0], [1.2]], dtype=F64)
    one_by_one = torch.stack(
        [expected_aux_gradient(row, right, float(u)) for row, u in zip(z, t, strict=True)]
    )
    torch.testing.assert_close(expected_aux_gradient(z, right, t), one_by_one)


@quick
@given(seed=seeds)
def test_02_at_the_policy_temperature_it_is_the_policy_gradient(seed: int) -> None:
    z, right = problem(seed)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad((z.softmax(-1) * right).sum(), z)
    torch.testing.assert_close(expected_aux_gradient(z.detach(), right, 1.0), gradient, rtol=0, atol=1e-13)


@quick
@given(seed=seeds, t=st.floats(0.3, 3.0))
def test_03_nothing_right_or_everything_right(seed: int, t: float) -> None:
    z, _ = problem(seed)
    zero = torch.zeros_like(z)
    assert torch.equal(expected_aux_gradient(z, zero, t), zero)
    torch.testing.assert_close(expected_aux_gradient(z, zero + 1, 1.0), zero, rtol=0, atol=1e-15)
    logp, old, reward, mask = rows(seed)
    for options in ({}, {"clip": 0.2}, {"agg": "token"}):
        loss = tempered_positive_loss(logp, old, 0 * reward, mask, 0.5, **options)
        assert loss == 0
        assert not torch.autograd.grad(loss, logp)[0].any()


# 4, 13 ------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, hot=st.floats(1.01, 2.0), cold=st.floats(0.4, 0.99))
def test_04_sign_of_the_entropy_change_where_everything_is_right(seed: int, hot: float, cold: float) -> None:
    z = 2 * torch.randn(6, generator=generator(seed), dtype=F64)
    ones = torch.ones_like(z)
    for t, sign in ((hot, 1), (cold, -1)):
        step = expected_aux_gradient(z, ones, t)
        torch.testing.assert_close(step, (z / t).softmax(-1) - z.softmax(-1), rtol=0, atol=1e-14)
        h = 1e-6
        slope = (entropy(z + h * step) - entropy(z - h * step)) / (2 * h)
        p, logp = z.softmax(-1), z.log_softmax(-1)
        exact = -(p * (logp + entropy(z)) * step).sum()
        assert slope.item() == pytest.approx(exact.item(), abs=1e-7)
        assert sign * exact >= -1e-15
        natural = step / p
        assert sign * -(p * (logp + entropy(z)) * natural).sum() >= -1e-12


def _entropy_change(z: Tensor, step: Tensor) -> Tensor:
    p, logp = z.softmax(-1), z.log_softmax(-1)
    return -(p * (logp + entropy(z)[:, None]) * step).sum(-1)


@pytest.mark.parametrize("family", ["independent", "with-mode", "without-mode"])
def test_13_hot_positives_raise_and_hot_negatives_lower_the_entropy_of_random_laws(family: str) -> None:
    """Laws over 3 to 40 answers; what is right knows nothing of the policy, or has its most likely answer, or lacks it."""
    g = generator(0)
    laws, most = 2000, 40
    answers = torch.randint(3, most + 1, (laws, 1), generator=g)
    there = torch.arange(most) < answers
    z = torch.randn(laws, most, generator=g, dtype=F64)
    z = z * (0.3 + 2.7 * torch.rand(laws, 1, generator=g, dtype=F64))
    z = torch.where(there, z, -200.0)  # answers that do not exist, neither right nor wrong
    mode = torch.nn.functional.one_hot(z.argmax(1), most).bool()
    right = torch.rand(laws, most, generator=g) < torch.rand(laws, 1, generator=g)
    if family != "independent":
        right = right | mode if family == "with-mode" else right & ~mode
    first = torch.where(mode, 2.0, torch.rand(laws, most, generator=g)).masked_fill(~there, 3.0).argsort(1)
    # One of two answers that are not the mode is right and the other wrong, so that there is something to learn.
    right = right.scatter(1, first[:, :1], True).scatter(1, first[:, 1:2], False)
    right, wrong = (right & there).to(F64), (~right & there).to(F64)
    if family != "independent":
        assert bool((right.bool() & mode).any(1).all()) == (family == "with-mode")
        assert bool((right.bool() & mode).any()) == (family == "with-mode")
    change = {
        (sign, t): _entropy_change(z, side * expected_aux_gradient(z, chosen, t))
        for sign, side, chosen in (("positives", 1, right), ("negatives", -1, wrong))
        for t in (0.8, 1.0, 1.2)
    }
    for sign, way in (("positives", 1), ("negatives", -1)):
        assert (way * (change[sign, 1.2] - change[sign, 1.0]) > 0).double().mean() >= 0.99
        assert (way * (change[sign, 0.8] - change[sign, 1.0]) < 0).double().mean() >= 0.99


# 5, 11 ------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, wrong_mode=st.booleans())
def test_05_limits_of_the_temperature(seed: int, wrong_mode: bool) -> None:
    g = generator(seed)
    # Logits at least 0.5 apart, so that a temperature that does not underflow yet tells the best two apart.
    z = torch.linspace(-2, 2, 7, dtype=F64)[torch.randperm(7, generator=g)]
    z = z + 0.1 * torch.rand(7, generator=g, dtype=F64)
    order = z.argsort(descending=True)
    right = (torch.rand(7, generator=g) < 0.5).to(F64)
    right[order[0]], right[order[3]] = float(not wrong_mode), 1.0
    best = torch.nn.functional.one_hot(z.masked_fill(right == 0, -math.inf).argmax(), 7).to(F64)
    for t, law in ((1e7, right / right.sum()), (0.02, best)):
        s = ((z / t).softmax(-1) * right).sum()
        assert s > 0
        found = expected_aux_gradient(z, right, t) / s + z.softmax(-1)
        torch.testing.assert_close(found, law, rtol=0, atol=1e-5)


def test_11_iterating_a_hot_term_spreads_over_the_right_answers() -> None:
    z, right = problem(3, answers=9)
    uniform = torch.where(right > 0, 0.3, -40.0).to(F64)
    assert expected_aux_gradient(uniform, right, 1.4).abs().max() < 1e-12
    for _ in range(6000):
        z = z + expected_aux_gradient(z, right, 1.2)
    assert entropy(z).item() == pytest.approx(reachable_entropy(right).item(), abs=2e-2)
    inside = z[right > 0]
    assert (inside.max() - inside.min()) < 0.05
    assert expected_aux_gradient(z + torch.randn(9, generator=generator(0)), right, 1.2).abs().max() > 1e-3


def test_reachable_entropy() -> None:
    law = torch.tensor([[0.2, 0.0, 0.8], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=F64)
    assert reachable_entropy(law).tolist() == [pytest.approx(math.log(2)), 0.0, -math.inf]
    with pytest.raises(DataError, match="negative or NaN"):
        reachable_entropy(torch.tensor([0.5, math.nan]))


# 6 ----------------------------------------------------------------------------------------------------------------


def test_06_alpha_zero_is_grpo_bit_for_bit() -> None:
    grpo = replace(recipe("aepo-arbitrary"), name="plain", sampler=PlainSampler(samples=5))
    grpo = replace(grpo, advantage=(GroupAdvantage(std=False),))
    off = with_sampler(recipe("aepo-arbitrary"), alpha=0.0)
    tables = []
    for method in (grpo, off):
        policy = Table()
        engine = LogitsEngine(TableLab(), policy)
        trainer = Trainer(method, engine, torch.optim.Adam(policy.parameters(), lr=0.1), minibatches=2)
        for _ in range(3):
            trainer.step(range(5))
        tables.append(policy.table.detach())
    assert torch.equal(*tables)


@quick
@given(seed=seeds)
def test_06_alpha_scales_the_loss(seed: int) -> None:
    logp, old, reward, mask = rows(seed)
    once = tempered_positive_loss(logp, old, reward, mask, 1.0, clip=0.2)
    assert tempered_positive_loss(logp, old, reward, mask, 0.25, clip=0.2).item() == pytest.approx(
        0.25 * once.item()
    )
    assert tempered_positive_loss(logp, old, reward, mask, 0.0, clip=0.2) == 0


@pytest.mark.parametrize("agg", ["row", "token"])
@pytest.mark.parametrize("far", [89.0, 1e4])
def test_far_ratios_have_a_finite_gradient_in_float32(agg: str, far: float) -> None:
    logp = torch.tensor([[0.0, -1.0], [-far, -1.0]], requires_grad=True)
    old = torch.tensor([[-far, -1.0], [0.0, -1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss = tempered_positive_loss(logp, old, torch.ones(2), mask, 1.0, clip=0.2, agg=agg)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert torch.isfinite(loss)
    assert gradient.tolist() == [[0.0, pytest.approx(-0.25)], [0.0, pytest.approx(-0.25)]]
    assert torch.isfinite(tempered_reweighting(logp, old, torch.ones(2), 0.1)).all()


# 7 ----------------------------------------------------------------------------------------------------------------


def test_07_temperature_rules() -> None:
    assert auxiliary_temperature(0.5, 0.5) == 1.2
    assert auxiliary_temperature(0.5 + 1e-9, 0.5) == 0.8
    assert auxiliary_temperature(0.4, 0.5, low=0.7, high=1.5) == 1.5
    for h, t in ((0.5, 1.0), (0.4, 1.1), (0.0, 1.2), (0.9, 0.8)):
        assert auxiliary_temperature(h, 0.5, "clip") == pytest.approx(t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "0 < low <= 1 <= high"),
        ({"low": 1.1}, "0 < low <= 1 <= high"),
        ({"high": 0.9}, "0 < low <= 1 <= high"),
        ({"high": math.inf}, "0 < low <= 1 <= high"),
        ({"target": -0.1}, "target entropy"),
        ({"target": math.nan}, "target entropy"),
    ],
)
def test_07_impossible_steering_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TemperedSampler(**options)
    with pytest.raises(ConfigError, match=message):
        TemperedReweighting(**options)


def test_07_nonsense_is_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        auxiliary_temperature(math.nan, 0.5)
    with pytest.raises(ConfigError, match="mode must be"):
        check_steering(0.5, "pid", 0.8, 1.2)


# 8 ----------------------------------------------------------------------------------------------------------------


def plain_loss(
    logp: Tensor, old: Tensor, reward: Tensor, mask: Tensor, clip: float | None, agg: str
) -> Tensor:
    """Row by row, as the formula reads."""
    total, tokens, answers = torch.zeros((), dtype=F64), 0, 0
    for i in range(len(logp)):
        n = int(mask[i].sum())
        tokens, answers = tokens + n, answers + (n > 0)
        if reward[i] != 1 or n == 0:
            continue
        for t in mask[i].nonzero()[:, 0].tolist():
            ratio = (logp[i, t] - old[i, t]).exp()
            gain = logp[i, t] if clip is None else torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))
            total = total + (gain / n if agg == "row" else gain)
    return -total / max(answers if agg == "row" else tokens, 1)


@quick
@given(seed=seeds, clip=st.sampled_from([None, 0.2]), agg=st.sampled_from(["row", "token"]))
def test_08_the_loss_is_the_mean_over_all_tempered_answers(seed: int, clip: float | None, agg: str) -> None:
    logp, old, reward, mask = rows(seed)
    naive = plain_loss(logp, old, reward, mask, clip, agg)
    found = tempered_positive_loss(logp, old, reward, mask, 1.0, clip, agg)
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found, logp)[0], torch.autograd.grad(naive, logp)[0], rtol=1e-12, atol=1e-14
    )


@quick
@given(seed=seeds, main=st.integers(1, 9), extra=st.integers(1, 9), alpha=st.floats(0, 2))
def test_08_one_mean_over_joint_rows_with_weights(seed: int, main: int, extra: int, alpha: float) -> None:
    value = torch.randn(main + extra, generator=generator(seed), dtype=F64)
    n = main + extra
    weight = torch.cat(
        [torch.full((main,), n / main, dtype=F64), torch.full((extra,), alpha * n / extra, dtype=F64)]
    )
    joint = (weight * value).mean().item()
    assert joint == pytest.approx((value[:main].mean() + alpha * value[main:].mean()).item(), abs=1e-12)


@pytest.mark.parametrize("mean", [Mean(("row",)), Mean()])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_08_the_recipe_adds_alpha_times_the_function_to_grpo(mean: Mean, share: float) -> None:
    alpha, agg = 0.3, "row" if mean.levels else "token"
    made = with_sampler(replace(recipe("aepo-arbitrary"), mean=mean), alpha=alpha, share=share)
    engine, batch = prepared(made)
    moved_on(engine.policy, size=0.2)
    both, gradient = loss_and_gradient(engine, made, batch, torch.arange(len(batch)).chunk(3))
    policy, tempered = of_part(batch, "policy"), of_part(batch, "tempered")
    assert len(policy) == 25
    assert len(tempered) == (10 if share == 0.4 else 25)
    assert 0 < int((tempered.reward == 1).sum()) < len(tempered)
    alone, expected = loss_and_gradient(engine, made, policy, [torch.arange(len(policy))])
    engine.policy.zero_grad()
    now = engine.measure(tempered, frozenset({Logp("now")}), grad=True).stats[Logp("now")]
    extra = tempered_positive_loss(now, tempered.old_logp, tempered.reward, tempered.mask, alpha, 0.2, agg)
    extra.backward()
    assert both == pytest.approx(alone + extra.item(), abs=1e-12)
    torch.testing.assert_close(gradient, expected + engine.policy.table.grad, rtol=0, atol=1e-12)


# 9 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 60])
@pytest.mark.parametrize("above", [False, True])
def test_09_replacement_keeps_the_number_of_rows(most: int, above: bool) -> None:
    made = with_sampler(recipe("aepo-arbitrary-replace"), samples=8, share=1.0, most=most)
    if above:
        made.sampler.controller.observe(2.0)
    engine, batch = prepared(made, seed=2)
    policy, tempered = of_part(batch, "policy"), of_part(batch, "tempered")
    hot = PlainSampler(8, 0.8 if above else 1.2)(engine, range(5), replace(batch.clock, update=1))
    positive = 0
    for group in range(5):
        reward = hot.reward[8 * group : 8 * group + 8]
        beats = (reward - reward.mean()) / (reward.std() + 1e-6) > 0.05
        positive += int(beats.sum())
    count = min(most, positive) // (2 if above else 1)
    assert positive > 4
    assert len(policy) == 40
    assert len(tempered) == count
    assert int(batch.mask.any(1).sum()) == 40
    assert not policy.mask[:count].any()
    assert policy.mask[count:].any(1).all()
    assert (tempered.reward == 1).all()
    assert torch.equal(tempered.advantage, tempered.mask.to(F64))
    moved_on(engine.policy, size=0.2)
    loss, _ = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    now = engine.measure(batch, frozenset({Logp("now")})).stats[Logp("now")]
    ratio, a = (now - batch.old_logp).exp(), batch.advantage
    per_token = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    per_token = torch.where(a < 0, torch.minimum(per_token, -3 * a), per_token)
    assert loss == pytest.approx(per_token[batch.mask].mean().item(), abs=1e-12)


def test_09_a_tempered_token_weighs_what_any_other_does_in_every_optimiser_step() -> None:
    made = with_sampler(recipe("aepo-arbitrary-replace"), samples=8, share=1.0)
    _, batch = prepared(made, seed=2)
    shares = []
    for rows in torch.arange(len(batch)).roll(7).chunk(4):
        plan = made.plan(batch[rows])
        tokens = plan.mask.sum()
        expected = plan.mask.double() / tokens
        torch.testing.assert_close(plan.columns["map/surrogate"], expected, rtol=1e-12, atol=0)
        shares.append(float(of_part(plan, "tempered").mask.sum() / tokens))
    assert max(shares) > 1.5 * min(shares)


@quick
@given(seed=seeds, levels=st.sampled_from([(), ("row",), ("group",)]), parts=st.integers(1, 3))
def test_09_a_joint_mean_ignores_parts(seed: int, levels: tuple[str, ...], parts: int) -> None:
    made = replace(recipe("grpo"), name="joint", mean=Mean(levels, joint=True))
    _, batch = prepared(made)
    plain = replace(made, mean=Mean(levels)).plan(batch).columns["map/surrogate"]
    part = torch.randint(0, parts, (len(batch),), generator=generator(seed))
    found = made.plan(batch.with_columns(part=part)).columns["map/surrogate"]
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("mean", [Mean(), Mean(("row",)), Sum()])
def test_09_a_mean_of_each_part_is_refused(mean: Mean | Sum) -> None:
    with pytest.raises(ConfigError, match="give the recipe a mean with joint: true"):
        replace(recipe("aepo-arbitrary-replace"), mean=mean)


def test_09_without_a_positive_nothing_is_replaced() -> None:
    class Hopeless(TableLab):
        def reward(self, prompts, ids, mask):
            return torch.zeros(len(ids), dtype=F64)

    made = recipe("aepo-arbitrary-replace")
    engine = LogitsEngine(Hopeless(), Table())
    batch = made.sampler(engine, list(range(5)), Clock())
    assert len(batch) == 25
    assert not batch.columns["replaced"].any()
    assert (batch.columns["scale"] == 1).all()


def test_09_the_replacing_estimator_takes_all_tokens_that_train() -> None:
    made = with_sampler(recipe("aepo-arbitrary-replace"), share=1.0)
    _, batch = prepared(made)
    assert len(of_part(batch, "tempered")) > 0
    made.observe(batch)
    expected = -batch.stats[Logp("old")][batch.mask].mean().item()
    assert made.sampler.controller.entropy == pytest.approx(expected, abs=1e-12)


# 10, 12 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["aepo-arbitrary", "aepo-arbitrary-scope", "aepo-arbitrary-replace", "aepo-arbitrary-reweight"]
)
def test_10_old_log_probabilities_are_the_policy_s_whatever_sampled_the_row(name: str) -> None:
    made = recipe(name)
    engine, batch = prepared(made)
    now = engine.measure(batch, frozenset({Logp("now")})).stats[Logp("now")]
    assert torch.equal(now[batch.mask], batch.old_logp[batch.mask])
    logits = TableLab().logits(engine.policy, batch.columns["prompt"], batch.ids)
    logp = logits.log_softmax(-1).gather(2, batch.ids[..., None])[..., 0]
    torch.testing.assert_close(batch.old_logp[batch.mask], logp[batch.mask])


def test_10_tempered_rows_are_sampled_hot_below_the_target_and_cold_above() -> None:
    for last, temperature in ((None, 1.2), (3.0, 0.8)):
        made = with_sampler(recipe("aepo-arbitrary"), share=1.0)
        if last is not None:
            made.sampler.controller.observe(last)
        engine = LogitsEngine(TableLab(), Table())
        batch = made.sampler(engine, list(range(5)), Clock(step=4))
        again = PlainSampler(5, temperature)(engine, list(range(5)), Clock(step=4, update=1))
        tempered = of_part(batch, "tempered")
        assert torch.equal(tempered.ids, again.ids)
        first = PlainSampler(5)(engine, list(range(5)), Clock(step=4))
        assert torch.equal(of_part(batch, "policy").ids, first.ids)
        assert tempered.uid.tolist() == list(range(25, 50))
        assert tempered.group.tolist() == [5 + i // 5 for i in range(25)]


@quick
@given(seed=seeds)
def test_12_beyond_the_clip_a_positive_has_no_gradient(seed: int) -> None:
    logp, old, reward, mask = rows(seed)
    (gradient,) = torch.autograd.grad(tempered_positive_loss(logp, old, reward, mask, 1.0, clip=0.2), logp)
    learnt = mask & (reward == 1)[:, None]
    beyond = logp - old > math.log(1.2)
    assert not gradient[learnt & beyond].any()
    assert (gradient[learnt & ~beyond] < 0).all()
    assert not gradient[~learnt].any()


# The controller ---------------------------------------------------------------------------------------------------


def drive(controller: EntropyController, values: list[float]) -> list[float]:
    found = []
    for value in values:
        found.append(controller.temperature)
        controller.observe(value)
    return found


def test_the_first_step_is_hot_and_the_next_follows_the_last_entropy() -> None:
    controller = EntropyController(target=0.5)
    assert drive(controller, [0.9, 0.4, 0.5, 0.6]) == [1.2, 0.8, 1.2, 1.2]
    assert controller.temperature == 0.8
    assert controller.duty_cycle == 0.75
    assert math.isnan(EntropyController().duty_cycle)


def test_hysteresis_keeps_the_last_temperature_near_the_target() -> None:
    controller = EntropyController(target=0.5, hysteresis=0.1)
    assert drive(controller, [0.7, 0.45, 0.55, 0.35, 0.55, 0.65, 0.5]) == [1.2, 0.8, 0.8, 0.8, 1.2, 1.2, 0.8]
    with pytest.raises(ConfigError, match="hysteresis keeps one of two"):
        EntropyController(mode="clip", hysteresis=0.1)
    with pytest.raises(ConfigError, match="hysteresis >= 0"):
        EntropyController(patience=1)


def test_a_target_out_of_reach_is_said_once_and_no_longer_pushed_for() -> None:
    controller = EntropyController(target=3.0, patience=10)
    with pytest.warns(UserWarning, match=r"target entropy of 3 nats is out of reach.*led to 2 nats") as said:
        drive(controller, [2.0] * 11)
    assert len(said) == 1
    assert controller.saturated
    assert controller.aim == pytest.approx(2.0)
    controller.observe(2.3)
    assert controller.temperature == 1.0
    controller.observe(1.9)
    assert controller.temperature == 1.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.observe(3.1)
        assert not controller.saturated
        assert controller.temperature == 0.8
        drive(controller, [2.0] * 12)
        assert controller.saturated


def test_a_recovery_takes_the_target_up_again() -> None:
    controller = EntropyController(target=1.0, patience=10)
    with pytest.warns(UserWarning, match="out of reach"):
        drive(controller, [0.5 - 0.02 * i for i in range(15)])
    assert controller.saturated
    assert set(drive(controller, [0.2 + 0.01 * i for i in range(12)])) == {1.2}
    assert not controller.saturated
    assert controller.aim == 1.0


def test_a_target_below_reach_is_not_pushed_for_either() -> None:
    controller = EntropyController(target=0.1, patience=6, mode="clip")
    with pytest.warns(UserWarning, match="out of reach"):
        drive(controller, [1.0] * 7)
    controller.observe(0.7)
    assert controller.temperature == 1.0
    controller.observe(1.1)
    assert controller.temperature == pytest.approx(0.9)
    controller.observe(0.05)
    assert not controller.saturated


@pytest.mark.parametrize(
    "values",
    [
        [0.5 + 0.01 * (-1) ** i for i in range(200)],  # chatter around the target
        [2.0 - 0.01 * i for i in range(120)],  # falling towards it
        [0.4 + 0.0005 * i for i in range(100)],  # rising slowly, in reach
    ],
)
def test_tracking_is_not_saturation(values: list[float]) -> None:
    controller = EntropyController(target=0.5, patience=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drive(controller, values)
    assert not controller.saturated


def test_a_proportional_rule_at_rest_below_the_target_is_not_saturated() -> None:
    controller = EntropyController(target=0.5, mode="clip", patience=5)
    drive(controller, [0.47] * 50)
    assert not controller.saturated


@given(
    values=st.lists(st.floats(0, 3), max_size=40), cut=st.integers(0, 40), patience=st.sampled_from([0, 4, 8])
)
@settings(max_examples=30)
@pytest.mark.filterwarnings("ignore:the target entropy")
def test_a_restored_controller_goes_on_as_the_saved_one(values: list[float], cut: int, patience: int) -> None:
    whole, start = EntropyController(patience=patience), EntropyController(patience=patience)
    expected = drive(whole, values)
    found = drive(start, values[:cut])
    resumed = EntropyController(patience=patience)
    resumed.load_state_dict(json.loads(json.dumps(start.state_dict())))
    assert found + drive(resumed, values[cut:]) == expected
    assert resumed == whole


def test_nothing_measured_changes_nothing() -> None:
    controller = EntropyController()
    controller.observe(0.7)
    controller.observe(math.nan)
    assert controller.entropy == 0.7
    made = recipe("aepo-arbitrary")
    _, batch = prepared(made)
    made.observe(batch.with_columns(sampled=torch.zeros_like(batch.mask)))
    assert made.sampler.controller.entropy is None


# Stages -----------------------------------------------------------------------------------------------------------


def test_the_controller_sees_the_policy_s_rows_alone() -> None:
    made = with_sampler(recipe("aepo-arbitrary"), share=1.0)
    _, batch = prepared(made)
    policy = of_part(batch, "policy")
    expected = policy.stats[Entropy("old")][policy.mask].mean().item()
    assert policy_entropy(batch) == pytest.approx(expected, abs=1e-14)
    assert policy_entropy(batch) == pytest.approx(
        rollout_metrics(batch, batch)["entropy/token/mean"], abs=1e-12
    )
    dirty = torch.where(batch.mask, batch.stats[Entropy("old")], math.nan)
    assert policy_entropy(batch.with_stats({Entropy("old"): dirty})) == policy_entropy(batch)
    made.observe(batch)
    assert made.sampler.controller.entropy == policy_entropy(batch)
    state = json.loads(json.dumps(made.state_dict()))
    again = with_sampler(recipe("aepo-arbitrary"), share=1.0)
    again.load_state_dict(state)
    assert again.sampler.controller == made.sampler.controller


@pytest.mark.parametrize("reward", [0.0, 1.0, None])
def test_the_filter_of_dead_groups_spares_positives_and_the_controller(reward: float | None) -> None:
    """`base: dapo` with a tempering sampler; without a reward given, that of the lab, where some groups are dead."""

    class Flat(TableLab):
        def reward(self, prompts, ids, mask):
            return super().reward(prompts, ids, mask) if reward is None else torch.full((len(ids),), reward)

    made = replace(
        recipe("dapo"),
        name="dapo-tempered",
        sampler=TemperedSampler(samples=3, share=1.0, alpha=0.5),
        rewards=(),
        advantage=(*recipe("dapo").advantage, TemperedPositives()),
    )
    engine = LogitsEngine(Flat(), Table())
    batch = made.sampler(engine, list(range(5)), Clock())
    raw = engine.measure(batch, made.stats("rollout") | {Entropy("old"), Logp("old")})
    batch = made.prepare(raw)
    policy, tempered = of_part(batch, "policy"), of_part(batch, "tempered")
    groups = policy.reward.view(5, 3)
    dead = (groups == groups[:, :1]).all(1)
    assert dead.all() == (reward is not None)
    assert dead.any()
    assert torch.equal(policy.mask.any(1), ~dead.repeat_interleave(3))
    assert torch.equal(tempered.mask, of_part(raw, "tempered").mask)
    _, gradient = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    assert bool(gradient.any()) == (reward != 0)
    made.observe(batch)
    expected = rollout_metrics(raw, batch)["entropy/token/mean"]
    assert made.sampler.controller.entropy == pytest.approx(expected, abs=1e-12)


def test_tempered_rows_leave_the_policy_s_rows_as_they_were() -> None:
    plain = replace(
        recipe("aepo-arbitrary"), sampler=PlainSampler(samples=5), advantage=(GroupAdvantage(std=False),)
    )
    _, without = prepared(plain)
    _, batch = prepared(with_sampler(recipe("aepo-arbitrary"), share=0.4))
    policy = of_part(batch, "policy")
    assert torch.equal(policy.advantage, without.advantage)
    assert torch.equal(policy.uid, without.uid)
    assert torch.equal(policy.group, without.group)
    tempered = of_part(batch, "tempered")
    assert torch.equal(tempered.advantage, ((tempered.reward == 1)[:, None] & tempered.mask).to(F64))
    assert (tempered.columns["scale"] == 1 / 64).all()


@given(prompts=st.integers(1, 40), share=st.floats(0.001, 1), step=st.integers(0, 50))
@settings(max_examples=25)
def test_which_prompts_are_sampled_again_is_the_clock_s_choice(prompts: int, share: float, step: int) -> None:
    sampler = TemperedSampler(samples=2, share=share)
    engine = LogitsEngine(TableLab(), Table(prompts=40))
    first, second = (sampler(engine, list(range(prompts)), Clock(step=step)) for _ in range(2))
    again = of_part(first, "tempered").columns["prompt"]
    assert again == of_part(second, "tempered").columns["prompt"]
    assert len(set(again)) == max(1, round(share * prompts))
    assert again == sorted(again)


def test_the_prompts_change_with_the_step() -> None:
    engine, sampler = LogitsEngine(TableLab(), Table(prompts=40)), TemperedSampler(samples=1, share=0.1)
    chosen = {
        tuple(of_part(sampler(engine, list(range(40)), Clock(step=step)), "tempered").columns["prompt"])
        for step in range(5)
    }
    assert len(chosen) == 5


def test_reports() -> None:
    made = with_sampler(recipe("aepo-arbitrary"), share=1.0, target=0.7)
    made.sampler.controller.observe(0.9)
    engine, batch = prepared(made)
    plan = made.plan(batch)
    reports = [
        made.loss(engine.measure(plan[piece], made.stats("loss"))).metrics
        for piece in torch.arange(len(batch)).chunk(3)
    ]
    found = {
        name: sum(r[name][0] for r in reports) / sum(r[name][1] for r in reports)
        for name in reports[0]
        if name.startswith("tempered/")
    }
    tempered = of_part(batch, "tempered")
    right = (tempered.reward == 1).double()
    assert {name: pytest.approx(float(value)) for name, value in found.items()} == {
        "tempered/temperature/mean": 0.8,
        "tempered/entropy_gap/mean": -0.2,
        "tempered/saturated/frac": 0.0,
        "tempered/hot/frac": 1.0,
        "tempered/rows/frac": 0.5,
        "tempered/positive/frac": right.mean().item(),
        "tempered/tokens/per_positive": (tempered.mask.sum() / right.sum()).item(),
    }


def test_temperatures_are_relative_to_the_policy_s() -> None:
    sampler = TemperedSampler(samples=3, share=1.0, temperature=0.5)
    engine = LogitsEngine(TableLab(), Table(), temperature=0.5)
    tempered = of_part(sampler(engine, [0, 1, 2], Clock()), "tempered")
    direct = engine.generate([0, 0, 0, 1, 1, 1, 2, 2, 2], temperature=0.6, clock=Clock(update=1))
    assert torch.equal(tempered.ids, direct.ids)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (TemperedSampler, {"share": 0.0}, "share"),
        (TemperedSampler, {"share": 1.5}, "share"),
        (TemperedSampler, {"alpha": -0.1}, "alpha"),
        (TemperedSampler, {"samples": 0}, "samples >= 1"),
        (TemperedSampler, {"temperature": 0.0}, "temperature > 0"),
        (ReplacingSampler, {"most": 0}, "most"),
        (TemperedReweighting, {"limit": 0.0}, "limit"),
    ],
)
def test_unreachable_options_are_refused(stage: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(**options)


def test_positives_without_a_tempering_sampler_are_refused() -> None:
    with pytest.raises(ConfigError, match="use the sampler tempered-sampler"):
        prepared(replace(recipe("aepo-arbitrary"), name="x", sampler=PlainSampler(samples=2)))


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["aepo-arbitrary", "aepo-arbitrary-replace", "aepo-arbitrary-reweight"])
def test_groups_of_one_and_equal_rewards(name: str, samples: int, reward: float) -> None:
    class Flat(TableLab):
        def reward(self, prompts, ids, mask):
            return torch.full((len(ids),), reward, dtype=F64)

    made = with_sampler(recipe(name), samples=samples)
    engine = LogitsEngine(Flat(), Table())
    batch = made.sampler(engine, list(range(5)), Clock())
    batch = made.prepare(engine.measure(batch, made.stats("rollout")))
    assert torch.isfinite(batch.advantage).all()
    loss, gradient = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    imitates = reward == 1 and name != "aepo-arbitrary-replace"
    assert bool(gradient.any()) == imitates
    assert math.isfinite(loss)


def test_rewards_that_cannot_be_scored_are_no_positives() -> None:
    columns = {
        "part": torch.tensor([0, 1, 1, 1]),
        "reward": torch.tensor([1.0, math.nan, 1.0, 0.5], dtype=F64),
        "advantage": torch.full((4, 2), 7.0, dtype=F64),
    }
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    found = TemperedPositives()(Batch(torch.arange(4), mask, columns))["advantage"]
    assert found.tolist() == [[7.0, 7.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_tokens_that_a_tool_wrote_inside_an_answer_take_no_part() -> None:
    made = with_sampler(recipe("aepo-arbitrary"), share=1.0, alpha=0.5)
    engine = LogitsEngine(TableLab(), Table())
    batch = made.sampler(engine, list(range(5)), Clock())
    hole = batch.mask & (torch.arange(6) == 1)
    batch = replace(batch, mask=batch.mask & ~hole)
    batch = made.prepare(engine.measure(batch, made.stats("rollout") | {Entropy("old"), Logp("old")}))
    assert not batch.advantage[hole].any()
    dirty = batch.with_stats({Entropy("old"): torch.where(hole, 99.0, batch.stats[Entropy("old")])})
    policy = of_part(batch, "policy")
    assert policy_entropy(dirty) == pytest.approx(policy.stats[Entropy("old")][policy.mask].mean().item())
    plan = made.plan(batch)
    assert not plan.columns["map/surrogate"][hole].any()
    longest = of_part(plan, "tempered")
    rows = longest.mask.any(1)
    total = (longest.columns["map/surrogate"].sum(1) * len(longest[rows]) / 0.5)[rows]
    torch.testing.assert_close(total, torch.ones_like(total))


@quick
@given(seed=seeds, pad=st.integers(1, 5), junk=st.sampled_from([math.nan, math.inf, -1e30]))
def test_padding_and_order_change_nothing(seed: int, pad: int, junk: float) -> None:
    logp, old, reward, mask = rows(seed)
    order = torch.randperm(6, generator=generator(seed))
    wide, wide_old = (
        torch.cat([t.detach()[order], torch.full((6, pad), junk, dtype=F64)], 1) for t in (logp, old)
    )
    wide.requires_grad_()
    wide_mask = torch.cat([mask[order], torch.zeros(6, pad, dtype=torch.bool)], 1)
    for clip, agg in itertools.product((None, 0.2), ("row", "token")):
        loss = tempered_positive_loss(logp, old, reward, mask, 0.7, clip, agg)
        again = tempered_positive_loss(wide, wide_old, reward[order], wide_mask, 0.7, clip, agg)
        torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-14)
        (gradient,), (wider,) = torch.autograd.grad(loss, logp), torch.autograd.grad(again, wide)
        torch.testing.assert_close(wider[:, :9], gradient[order], rtol=1e-12, atol=1e-14)
        assert not wider[:, 9:].any()


def test_no_rows() -> None:
    none = torch.zeros(0, 3, dtype=F64)
    assert tempered_positive_loss(none, none, none[:, 0], none > 0, 1.0) == 0


# Reweighting ------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, t=st.floats(0.4, 2.0))
def test_reweighted_answers_have_the_expectation_of_tempered_ones(seed: int, t: float) -> None:
    z, right = problem(seed)
    z.requires_grad_()
    logp, logp_t = z.detach().log_softmax(-1), (z.detach() / t).log_softmax(-1)
    factor = tempered_reweighting(logp_t[:, None], logp[:, None], right, 1.0)[:, 0]
    (found,) = torch.autograd.grad((z.detach().softmax(-1) * factor * z.log_softmax(-1)).sum(), z)
    torch.testing.assert_close(found, expected_aux_gradient(z.detach(), right, t), rtol=0, atol=1e-13)


def test_the_share_of_reweighting() -> None:
    def share(gap: float, success: float) -> float:
        return reweighting_share(torch.tensor(gap, dtype=F64), torch.tensor(success, dtype=F64)).item()

    a = 0.05 / 0.4
    assert share(0.05, 0.4) == share(-0.05, 0.4) == pytest.approx(a / (1 + a))
    assert share(3.0, 0.5) == pytest.approx(0.2 / 1.2)
    assert share(0.0, 0.5) == share(0.3, 0.0) == share(0.0, 0.0) == 0


def test_the_reweighting_stage_mixes_as_the_formula_says() -> None:
    made = recipe("aepo-arbitrary-reweight")
    stage = made.advantage[1]
    stage.controller.observe(0.46)
    assert TemperedLogp("old", temperature=1.2) in made.stats("rollout")
    engine, batch = prepared(made)
    base = GroupAdvantage(std=True)(batch)["advantage"]
    success = (batch.reward == 1).double().mean()
    a = 0.04 / success
    alpha = a / (1 + a)
    logits = TableLab().logits(engine.policy, batch.columns["prompt"], batch.ids)
    picked = [
        (logits / t).log_softmax(-1).gather(2, batch.ids[..., None])[..., 0].detach() for t in (1.2, 1.0)
    ]
    factor = (picked[0] - picked[1]).exp()
    expected = (1 - alpha) * base + alpha * (batch.reward == 1)[:, None] * factor
    torch.testing.assert_close(batch.advantage[batch.mask], expected[batch.mask])
    made.observe(batch)
    assert stage.controller.entropy == policy_entropy(batch)
    assert TemperedLogp("old", temperature=stage.controller.temperature) in made.stats("rollout")


def test_at_the_target_reweighting_is_grpo() -> None:
    made = recipe("aepo-arbitrary-reweight")
    made.advantage[1].controller.observe(0.5)
    _, batch = prepared(made)
    assert torch.equal(batch.advantage, GroupAdvantage(std=True)(batch)["advantage"])


# GRPO's pull ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_gain_of_group_advantages_by_enumeration(std: bool, samples: int) -> None:
    z, right = problem(5, answers=3)
    z.requires_grad_()
    p = z.detach().softmax(-1)
    total = torch.zeros_like(z)
    for drawn in itertools.product(range(3), repeat=samples):
        reward = right[list(drawn)]
        spread = reward.std() if std and samples > 1 else torch.ones((), dtype=F64)
        advantage = (reward - reward.mean()) / (spread if spread > 0 else 1)
        log = sum(a * z.log_softmax(-1)[i] for a, i in zip(advantage, drawn, strict=True)) / samples
        total = total + p[list(drawn)].prod() * torch.autograd.grad(log, z)[0]
    success = (p * right).sum().item()
    gain = group_advantage_gain(success, samples, std=std)
    torch.testing.assert_close(
        total, gain * expected_aux_gradient(z.detach(), right, 1.0), rtol=0, atol=1e-13
    )


def test_towards_success_normalising_gains_the_root_of_the_group() -> None:
    for samples in (4, 16, 64):
        plain, divided = (group_advantage_gain(1 - 1e-9, samples, std=std) for std in (False, True))
        assert plain == pytest.approx((samples - 1) / samples)
        assert divided / plain == pytest.approx(math.sqrt(samples), rel=1e-6)
    assert group_advantage_gain(0.9, 20_000, std=True) == pytest.approx(1 / math.sqrt(0.09), rel=1e-3)
    with pytest.raises(ConfigError, match="0 < success < 1"):
        group_advantage_gain(1.0, 4, std=True)


# Recipes ----------------------------------------------------------------------------------------------------------


def test_the_recipes_have_the_settings_of_paper_and_code() -> None:
    made = recipe("aepo-arbitrary")
    assert (made.sampler.alpha, made.sampler.share, made.sampler.target) == (1 / 64, 1 / 64, 0.5)
    assert (made.sampler.low, made.sampler.high, made.sampler.mode) == (0.8, 1.2, "bang")
    assert recipe("aepo-arbitrary-scope").sampler.mode == "clip"
    code = recipe("aepo-arbitrary-replace").sampler
    assert (code.share, code.most, code.samples, code.target, code.patience) == (0.25, 60, 5, 0.5, 0)
    assert recipe("aepo-arbitrary-reweight").advantage[1].limit == 0.1
    assert all(recipe(f"aepo-arbitrary{tail}").surrogate.dual == 3.0 for tail in ("", "-scope", "-replace"))


@pytest.mark.parametrize("tail", ["", "-scope", "-replace", "-reweight"])
def test_recipes_survive_yaml(tail: str, tmp_path: Path) -> None:
    made = replace(recipe(f"aepo-arbitrary{tail}"), name="again")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(made), encoding="utf-8")
    assert resolve(file) == made


def test_copies_share_no_controller() -> None:
    first, second = recipe("aepo-arbitrary"), recipe("aepo-arbitrary")
    first.sampler.controller.observe(0.3)
    assert second.sampler.controller.entropy is None


def test_training_holds_a_chosen_entropy_where_grpo_does_not() -> None:
    """A bandit with many right answers, from samples, through the whole step: a smoke test of the sign."""

    class Bandit(TableLab):
        token_limit = 1

        def reward(self, prompts, ids, mask):
            return (ids[:, 0] % 2 == 0).double()

    ends = {}
    for target in (None, 1.0):
        made = with_sampler(
            recipe("aepo-arbitrary"),
            samples=16,
            share=1.0,
            alpha=1.0 if target else 0.0,
            target=target or 0.5,
        )
        policy = Table(prompts=2)
        engine = LogitsEngine(Bandit(token_limit=1), policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=4.0)
        trainer = Trainer(made, engine, optimizer, max_grad_norm=None)
        for _ in range(80):
            batch, _ = trainer.step(range(2))
        ends[target] = policy_entropy(batch)
    assert ends[None] < 0.6
    assert ends[1.0] == pytest.approx(1.0, abs=0.2)
