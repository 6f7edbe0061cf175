"""Exact checks of STEER, numbered as in its specification; all in float64. The estimators' own are in `tests/measure`."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from lab import loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.integrations.offers import TRL, VERL_ENGINE, VERL_TRAINER
from uncollapse.measure import entropy_change
from uncollapse.policy import steer as module
from uncollapse.policy.batch import Batch
from uncollapse.policy.config import resolve, stage_to_plain
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.filters import DropUnfinished
from uncollapse.policy.stages.surrogates import PPOClip
from uncollapse.policy.stats import Collision, Entropy, Logp
from uncollapse.policy.steer import Steer, steer_loss, steer_weights, token_entropy_change

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)
modes = st.sampled_from([("exp", 0.7, 1.0), ("linear", 0.8, 1.2), ("asymmetric", 0.7, 1.3)])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollout(seed: int, rows: int = 6, time: int = 17, drift: float = 0.4) -> tuple[Tensor, ...]:
    """log_prob (leaf), old_log_prob, entropy, advantages, mask."""
    g = generator(seed)
    old = -4 * torch.rand(rows, time, generator=g, dtype=F64)
    logp = (old + drift * torch.randn(rows, time, generator=g, dtype=F64)).clamp(max=-1e-4)
    entropy = 2 * torch.rand(rows, time, generator=g, dtype=F64)
    advantages = torch.randn(rows, 1, generator=g, dtype=F64).expand(rows, time).clone()
    mask = torch.rand(rows, time, generator=g) < 0.8
    mask[0, 0] = True
    return logp.requires_grad_(), old, entropy, advantages, mask


def naive_weights(
    omega: Tensor, mask: Tensor, mode: str, w_min: float, w_max: float, floor: float = 0.02
) -> Tensor:
    """The released rule, token by token."""
    valid = [abs(float(omega[i, j])) for i, j in mask.nonzero().tolist()]
    found = torch.zeros_like(omega)
    if not valid:
        return found
    low, high = min(valid), max(valid)
    kappa = -math.log(w_min) / max(high, floor)
    for i, j in mask.nonzero().tolist():
        signed = float(omega[i, j])
        if mode == "exp":
            w = math.exp(-kappa * abs(signed))
        elif mode == "asymmetric":
            w = math.exp(-kappa * signed)
        elif high == low:
            w = (w_min + w_max) / 2
        else:
            w = w_max - (abs(signed) - low) / (high - low) * (w_max - w_min)
        found[i, j] = min(max(w, w_min), w_max)
    return found


def plain_loss(logp: Tensor, old: Tensor, a: Tensor, c: float = 10.0) -> Tensor:
    """PPO with dual clip, per token, as in the released scripts."""
    r = (logp - old).clamp(-20, 20).exp()
    clipped = torch.maximum(-a * r, -a * r.clamp(0.8, 1.28))
    return torch.where(a < 0, torch.minimum(clipped, -a * c), clipped)


def test_the_names_of_the_interface() -> None:
    for name in ("token_entropy_change", "exact_entropy_change", "collision_term", "entropy_quadrants"):
        assert getattr(module, name) is getattr(entropy_change, name)
    assert set(module.__all__) == {
        "Steer", "collision_term", "entropy_quadrants", "exact_entropy_change", "steer_loss", "steer_weights", "token_entropy_change",
    }  # fmt: skip


# 3 and weights against the naive loop ------------------------------------------------------------------------------


@quick
@given(seed=seeds, how=modes)
def test_weights_equal_the_naive_loop(seed: int, how: tuple[str, float, float]) -> None:
    mode, low, high = how
    logp, old, h, a, mask = rollout(seed)
    omega = token_entropy_change(logp, old, h, a)
    found = steer_weights(omega, mask, mode, low, high)
    torch.testing.assert_close(found, naive_weights(omega, mask, mode, low, high), rtol=1e-12, atol=1e-12)
    assert (found[mask] >= low).all()
    assert (found[mask] <= high).all()


def test_03_no_advantage_no_change_weight_one() -> None:
    logp, old, h, a, mask = rollout(0)
    a[2] = 0
    omega = token_entropy_change(logp, old, h, a)
    assert (omega[2] == 0).all()
    assert (steer_weights(omega, mask)[2][mask[2]] == 1).all()


# 4 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, w_min=st.floats(0.05, 0.99))
def test_04_the_largest_change_gets_the_smallest_weight(seed: int, w_min: float) -> None:
    logp, old, h, a, mask = rollout(seed)
    omega = token_entropy_change(logp, old, h, a)
    size = torch.where(mask, omega.abs(), -1.0)
    assert size.max() >= 0.02
    weights = steer_weights(omega, mask, w_min=w_min)
    assert weights.flatten()[size.argmax()].item() == pytest.approx(w_min, rel=1e-12)
    paper = (math.log(w_min) * omega.abs() / size.max()).exp()
    torch.testing.assert_close(weights[mask], paper[mask], rtol=1e-10, atol=0)


def test_04_below_the_floor_weights_stay_near_one() -> None:
    omega = torch.tensor([[0.0, 0.005, -0.01]], dtype=F64)
    weights = steer_weights(omega, torch.ones(1, 3, dtype=torch.bool), w_min=0.8)
    assert weights.min().item() == pytest.approx(math.sqrt(0.8), abs=1e-12)
    assert weights.min().item() == pytest.approx(0.894427, abs=1e-6)


@quick
@given(seed=seeds)
def test_04_smallest_weight_one_is_plain_ppo_bit_for_bit(seed: int) -> None:
    logp, old, h, a, mask = rollout(seed)
    weights = steer_weights(token_entropy_change(logp, old, h, a), mask, w_min=1.0)
    loss, _ = steer_loss(logp, old, a, mask, weights)
    plain = torch.where(mask, plain_loss(logp, old, a), 0.0).sum() / mask.sum()
    assert torch.equal(loss, plain)
    mine, theirs = (torch.autograd.grad(value, logp, retain_graph=True)[0] for value in (loss, plain))
    assert torch.equal(mine, theirs)


# 5 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.floats(0.5, 50))
def test_05_scaling_and_sign_of_the_advantages(seed: int, scale: float) -> None:
    logp, old, h, a, mask = rollout(seed, drift=0.0)
    omega = token_entropy_change(logp, old, h, a)
    assert 0.5 * omega[mask].abs().max() >= 0.02
    for mode, low, high in (("exp", 0.7, 1.0), ("linear", 0.8, 1.2)):
        base = steer_weights(omega, mask, mode, low, high)
        for factor in (scale, -scale, -1.0):
            other = steer_weights(token_entropy_change(logp, old, h, factor * a), mask, mode, low, high)
            torch.testing.assert_close(other, base, rtol=1e-10, atol=1e-12)
    tiny = steer_weights(1e-9 * omega, mask, "linear", 0.8, 1.2)
    torch.testing.assert_close(tiny, steer_weights(omega, mask, "linear", 0.8, 1.2), rtol=1e-9, atol=1e-10)


def test_05_equal_changes_get_the_midpoint_of_linear() -> None:
    mask = torch.tensor([[True, True, False]])
    weights = steer_weights(torch.full((1, 3), 0.3, dtype=F64), mask, "linear", 0.8, 1.2)
    assert weights.tolist() == [[1.0, 1.0, 0.0]]


# 6 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_06_weights_carry_no_gradient(seed: int) -> None:
    logp, old, h, a, mask = rollout(seed)
    weights = steer_weights(token_entropy_change(logp, old, h, a), mask)
    assert not weights.requires_grad
    weighted = torch.autograd.grad(steer_loss(logp, old, a, mask, weights)[0], logp)[0]
    plain = torch.autograd.grad(steer_loss(logp, old, a, mask, mask.to(F64))[0], logp)[0]
    torch.testing.assert_close(weighted, weights * plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_06_the_gradient_of_the_loss(seed: int) -> None:
    logp, old, h, a, mask = rollout(seed, rows=3, time=4)
    weights = steer_weights(token_entropy_change(logp, old, h, a), mask)
    assert torch.autograd.gradcheck(lambda x: steer_loss(x, old, a, mask, weights)[0], (logp,))


# 7 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, pad=st.integers(1, 5), junk=st.sampled_from([0.0, 1e6, math.nan, math.inf]), how=modes,
       quantile=st.sampled_from([1.0, 0.9]))  # fmt: skip
def test_07_padding_changes_nothing(
    seed: int, pad: int, junk: float, how: tuple[str, float, float], quantile: float
) -> None:
    mode, low, high = how
    logp, old, h, a, mask = rollout(seed)
    omega = token_entropy_change(logp, old, h, a)
    expected = steer_weights(omega, mask, mode, low, high, quantile=quantile)
    loss, metrics = steer_loss(logp, old, a, mask, expected)

    def spoiled(x: Tensor) -> Tensor:
        inside = torch.where(mask, x.detach(), junk)
        return torch.cat([inside, torch.full((len(x), pad), junk, dtype=F64)], 1)

    wide = torch.cat([mask, torch.zeros(len(mask), pad, dtype=torch.bool)], 1)
    lp, o, e, adv = (spoiled(x) for x in (logp, old, h, a))
    lp.requires_grad_()
    weights = steer_weights(token_entropy_change(lp, o, e, adv), wide, mode, low, high, quantile=quantile)
    torch.testing.assert_close(weights[:, :17], expected, rtol=1e-12, atol=0)
    assert (weights[:, 17:] == 0).all()
    again, measured = steer_loss(lp, o, adv, wide, weights)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-15)
    for name, value in metrics.items():
        torch.testing.assert_close(measured[name], value, rtol=1e-10, atol=1e-15)
    grad = torch.autograd.grad(again, lp)[0]
    assert torch.isfinite(grad).all()
    assert (grad[~wide] == 0).all()


def test_07_numbers_that_are_not_finite_count_as_no_change() -> None:
    omega = torch.tensor([[math.nan, 0.5, math.inf, -0.1]], dtype=F64)
    weights = steer_weights(omega, torch.ones(1, 4, dtype=torch.bool))
    clean = steer_weights(omega.nan_to_num(0, 0, 0), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(weights, clean)
    assert weights[0, 0] == weights[0, 2] == 1


def test_07_nothing_valid() -> None:
    for shape in ((3, 4), (0, 4), (3, 0)):
        omega, mask = torch.rand(shape, dtype=F64), torch.zeros(shape, dtype=torch.bool)
        for quantile in (1.0, 0.5) if omega.numel() else (1.0,):
            assert steer_weights(omega, mask, "linear", quantile=quantile).sum() == 0
            weights = steer_weights(omega, mask, quantile=quantile)
            loss, metrics = steer_loss(omega, omega, omega, mask, weights)
            assert loss == 0
            assert all(math.isfinite(float(v)) for v in metrics.values())


# 8 --------------------------------------------------------------------------------------------------------------


def test_08_dual_clip() -> None:
    logp = torch.tensor([[math.log(20) - 5.0]], dtype=F64, requires_grad=True)
    old, a = torch.full((1, 1), -5.0, dtype=F64), torch.full((1, 1), -1.0, dtype=F64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, metrics = steer_loss(logp, old, a, mask, torch.full((1, 1), 0.7, dtype=F64))
    assert loss.item() == pytest.approx(7.0)
    assert torch.autograd.grad(loss, logp)[0] == 0
    assert metrics["clip/low/frac"] == 1
    assert metrics["clip/high/frac"] == 0


def test_08_huge_ratios_stay_finite() -> None:
    logp = torch.tensor([[0.0, -900.0, 0.0]], dtype=torch.float32, requires_grad=True)
    old = torch.tensor([[-900.0, 0.0, -900.0]])
    a = torch.tensor([[1.0, -1.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = steer_loss(logp, old, a, mask, torch.ones(1, 3))
    assert torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


# ---- pools and quantiles ---------------------------------------------------------------------------------------


@quick
@given(seed=seeds, how=modes, quantile=st.sampled_from([1.0, 0.95, 0.5]))
def test_pools_are_weighted_as_if_alone_in_any_order(
    seed: int, how: tuple[str, float, float], quantile: float
) -> None:
    mode, low, high = how
    logp, old, h, a, mask = rollout(seed)
    mask[4] = False
    omega = token_entropy_change(logp, old, h, a)
    pool = torch.tensor([7, 2, 7, 2, 9, 2])
    found = steer_weights(omega, mask, mode, low, high, pool=pool, quantile=quantile)
    for name in (2, 7, 9):
        rows = pool == name
        alone = steer_weights(omega[rows], mask[rows], mode, low, high, quantile=quantile)
        torch.testing.assert_close(found[rows], alone, rtol=0, atol=0)
    order = torch.randperm(6, generator=generator(seed))
    shuffled = steer_weights(omega[order], mask[order], mode, low, high, pool=pool[order], quantile=quantile)
    assert torch.equal(shuffled, found[order])


def test_a_quantile_is_not_decided_by_one_outlier() -> None:
    omega = torch.cat([torch.linspace(0.01, 1, 100, dtype=F64), torch.tensor([1e6], dtype=F64)])[None]
    mask = torch.ones_like(omega, dtype=torch.bool)
    flat, robust = steer_weights(omega, mask), steer_weights(omega, mask, quantile=0.95)
    assert (flat[0, :100] > 0.999).all()
    assert robust[0, 47:].max() < 0.85
    assert (robust[0, 95:] == 0.7).all()
    assert robust[0, 95] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"w_min": 0.0}, ConfigError, "needs 0 < w_min <= 1"),
        ({"w_min": 0.9, "w_max": 0.8}, ConfigError, "w_min <= w_max; got 0.9 and 0.8"),
        ({"w_max": 1.2}, ConfigError, "mode 'exp' never exceed 1"),
        ({"quantile": 0.0}, ConfigError, "0 < quantile <= 1"),
        ({"quantile": 1.5}, ConfigError, "0 < quantile <= 1"),
        ({"floor": -1.0}, ConfigError, "floor >= 0"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Steer(**options)
    with pytest.raises(error, match=message):
        steer_weights(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), **options)


def test_other_refusals() -> None:
    with pytest.raises(UnknownName, match="unknown mode of steer 'binary'"):
        steer_weights(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "binary")
    with pytest.raises(ConfigError, match="set scope to rollout"):
        Steer(length_norm=True)


# ---- the stage in a recipe -------------------------------------------------------------------------------------

VARIANTS = [
    Steer(),
    Steer(scope="rollout"),
    Steer(estimator="theorem", quantile=0.95),
    Steer(estimator="exact", respect_clip=True),
    Steer(mode="linear", w_min=0.8, w_max=1.2),
    Steer(mode="asymmetric", w_max=1.2, estimator="exact", scope="rollout"),
    Steer(length_norm=True, scope="rollout", estimator="theorem"),
]


def made(stage: Steer, **changes: object):
    return replace(recipe("steer"), name="made", weights=(stage,), **changes)


@pytest.mark.parametrize("stage", VARIANTS)
def test_micro_batches_and_order_change_nothing(stage: Steer) -> None:
    method = made(stage, filters=(DropUnfinished(),))
    engine, batch = prepared(method)
    assert 0 < int(batch.mask.any(1).sum()) < len(batch)
    moved_on(engine.policy)
    rows = torch.arange(len(batch))
    loss, gradient = loss_and_gradient(engine, method, batch, [rows])
    for pieces in (2, 7, len(batch)):
        again, regained = loss_and_gradient(engine, method, batch[rows.flip(0)], rows.chunk(pieces))
        assert again == pytest.approx(loss, abs=1e-12)
        torch.testing.assert_close(regained, gradient, rtol=0, atol=1e-12)
    assert not method.split_dependent


@pytest.mark.parametrize("estimator", ["released", "theorem", "exact"])
def test_the_recipe_is_the_pure_loss(estimator: str) -> None:
    """Advantage, current and old log-probabilities and entropies put into the functions by hand."""
    method = made(Steer(estimator=estimator))  # type: ignore[arg-type]
    engine, batch = prepared(method)
    moved_on(engine.policy)
    now = engine.measure(batch, frozenset({Logp("now"), Entropy("now"), Collision("now")}), grad=True).stats
    logp, exact = now[Logp("now")], estimator == "exact"
    h = now[Entropy("now")] if exact else batch.stats[Entropy("old")]
    omega = token_entropy_change(
        logp,
        batch.old_logp,
        h,
        batch.advantage,
        estimator=estimator,
        collision=now[Collision("now")].detach(),
    )
    weights = steer_weights(omega, batch.mask)
    expected, numbers = steer_loss(logp, batch.old_logp, batch.advantage, batch.mask, weights)
    expected.backward()
    gradient = engine.policy.table.grad.clone()
    loss, regained = loss_and_gradient(engine, method, batch, [torch.arange(len(batch))])
    assert loss == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(regained, gradient, rtol=0, atol=1e-12)
    assert float(numbers["steer/weight/min"].detach()) == pytest.approx(0.7)


def test_the_rollout_scope_equals_the_first_optimiser_step() -> None:
    engine, batch = prepared(made(Steer()))
    free = made(Steer(scope="rollout"))
    _, decided = prepared(free, policy=engine.policy)
    planned = made(Steer()).plan(batch.old_as_now())
    torch.testing.assert_close(decided.columns["weight"], planned.columns["weight"], rtol=0, atol=0)
    assert free.stats("plan") == frozenset()


def test_released_scope_depends_on_the_split_and_is_marked() -> None:
    method = recipe("steer-released")
    assert method.split_dependent
    engine, batch = prepared(method)
    moved_on(engine.policy)
    rows = torch.arange(len(batch))
    whole = loss_and_gradient(engine, method, batch, [rows])[0]
    split = loss_and_gradient(engine, method, batch, rows.chunk(9))[0]
    assert whole != split
    as_one = replace(method, weights=(replace(method.weights[0], scope="minibatch"),))
    assert loss_and_gradient(engine, as_one, batch, [rows])[0] == pytest.approx(whole, abs=1e-14)


def test_the_released_linear_script_has_weights_from_one_fifth_more_to_one_fifth_less() -> None:
    linear, released = recipe("steer-released-linear"), recipe("steer-released")
    assert linear.weights == (Steer(mode="linear", w_min=0.8, w_max=1.2, scope="microbatch"),)
    assert replace(linear, name=released.name, summary=released.summary, weights=released.weights) == released
    engine, batch = prepared(linear)
    report = linear.loss(engine.measure(linear.plan(batch), linear.stats("loss")))
    total, tokens = report.metrics["steer/weight/mean"]
    assert 1.0 < float(total / tokens) < 1.2


def test_clipped_tokens_do_not_set_the_scale_if_asked() -> None:
    engine, batch = prepared(made(Steer(respect_clip=True)))
    moved_on(engine.policy, size=2.0)
    method = made(Steer(respect_clip=True))
    plan = method.plan(engine.measure(batch, method.stats("plan")))
    free = made(Steer()).plan(engine.measure(batch, made(Steer()).stats("plan")))
    silenced = (
        PPOClip(0.2, 0.28, 10.0).clipped(engine.measure(batch, frozenset({Logp("now")})), {}) & batch.mask
    )
    assert silenced.any()
    assert (plan.columns["weight"][silenced] == 1).all()
    assert (plan.columns["steer_change"][silenced] == 0).all()
    assert (free.columns["weight"][silenced] < 1).any()


def test_length_norm_divides_by_the_tokens_of_the_group() -> None:
    _, batch = prepared(made(Steer(scope="rollout")))
    _, normed = prepared(made(Steer(scope="rollout", length_norm=True)))
    length = torch.zeros(5, dtype=F64).index_add(0, batch.group, batch.mask.sum(1).double())
    factor = (length.mean() / length)[batch.group][:, None]
    torch.testing.assert_close(normed.columns["steer_change"], batch.columns["steer_change"] * factor)
    assert factor.unique().numel() > 1


def test_metrics_add_up_and_say_what_was_done() -> None:
    method = recipe("steer")
    engine, batch = prepared(method)
    moved_on(engine.policy)
    plan = method.plan(engine.measure(batch, method.stats("plan")))
    whole = method.loss(engine.measure(plan, method.stats("loss"))).metrics
    weights, omega = plan.columns["weight"][plan.mask], plan.columns["steer_change"][plan.mask]
    expected = {
        "steer/weight/mean": weights.mean(),
        "steer/damped/frac": (weights < 0.99).double().mean(),
        "steer/change/mean": -omega.mean(),
        "steer/change/abs": omega.abs().mean(),
    }
    pieces = [
        method.loss(engine.measure(plan[r], method.stats("loss"))).metrics for r in torch.arange(40).chunk(7)
    ]
    for name, value in expected.items():
        for parts in ([whole], pieces):
            total, count = (sum(part[name][k] for part in parts) for k in (0, 1))
            assert float(total / count) == pytest.approx(float(value), abs=1e-12)


def test_stages_of_other_papers_multiply() -> None:
    other = recipe("clip-cov").weights[0]
    both = replace(made(Steer()), weights=(replace(other, fraction=0.1, low=-9.0, high=9.0), Steer()))
    engine, batch = prepared(both)
    plan = both.plan(engine.measure(batch, both.stats("plan")))
    dropped = plan.columns["weight"] == 0
    assert (dropped & plan.mask).any()
    torch.testing.assert_close(plan.columns["weight"][~dropped], plan.columns["steer_weight"][~dropped])


# ---- bad input -------------------------------------------------------------------------------------------------


def lonely(rewards: Tensor, mask: Tensor) -> Batch:
    """A rollout batch with one row per prompt or all rewards equal, entropies NaN in padded places."""
    shape = mask.shape
    spoiled = torch.where(mask, -torch.rand(shape, generator=generator(1), dtype=F64), math.nan)
    return Batch(
        uid=torch.arange(len(mask)), mask=mask,
        columns={"reward": rewards, "group": torch.arange(len(mask)) // 2},
        stats={Logp("old"): spoiled, Entropy("old"): -spoiled, Collision("old"): spoiled},
    )  # fmt: skip


@pytest.mark.parametrize("stage", VARIANTS)
@pytest.mark.parametrize("case", ["alone", "equal", "one token", "cut", "empty"])
def test_bad_input_gives_finite_weights(stage: Steer, case: str) -> None:
    mask = torch.ones(6, 5, dtype=torch.bool)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=F64)
    if case == "one token":
        mask[:, 1:] = False
    elif case == "cut":  # turns: the mask ends and begins again within a row
        mask[:, 2] = False
        mask[1, 3:] = False
    elif case == "empty":
        mask[:] = False
    elif case == "equal":
        rewards[:] = 1.0
    batch = lonely(rewards, mask)
    if case == "alone":
        batch = batch.with_columns(group=torch.arange(6))
    method = made(stage)
    ready = method.plan(method.prepare(batch).old_as_now())
    weights = ready.columns["weight"]
    assert torch.isfinite(weights).all()
    assert (weights[~mask] == 0).all()
    if case in ("alone", "equal"):
        assert weights[mask].unique().numel() == 1  # no advantage, nothing moves: all alike


# ---- recipes, names, engines -----------------------------------------------------------------------------------


def test_ported_hyperparameters_are_the_official_ones() -> None:
    paper, released = recipe("steer"), recipe("steer-released")
    assert (paper.weights[0].w_min, released.weights[0].w_min) == (0.7, 0.8)
    assert paper.surrogate == released.surrogate == PPOClip(low=0.2, high=0.28, dual=10.0)
    assert paper.weights[0].floor == 0.02
    assert paper.weights[0].estimator == released.weights[0].estimator == "released"
    assert (paper.weights[0].scope, released.weights[0].scope) == ("minibatch", "microbatch")
    assert paper.paper == released.paper == "2510.10150"
    assert not paper.regularizers
    assert paper.mean == recipe("dapo").mean


def test_engines_and_yaml() -> None:
    assert recipe("steer").refusals(TRL) == recipe("steer").refusals(VERL_TRAINER) == []
    exact = made(Steer(estimator="exact"))
    assert exact.refusals(VERL_TRAINER) == ["it cannot measure Collision"]
    assert exact.refusals(TRL) == exact.refusals(VERL_ENGINE) == []
    (written,) = stage_to_plain("weights", Steer(estimator="theorem", quantile=0.99)).values()  # type: ignore[union-attr]
    assert Steer(**written) == Steer(estimator="theorem", quantile=0.99)
    text = "{name: mine, base: steer, weights: [{steer: {estimator: theorem, w_min: 0.5}}]}"
    assert resolve(yaml.safe_load(text)).weights == (Steer(estimator="theorem", w_min=0.5),)
    with pytest.raises(ConfigError, match="unknown value 'theorm'; did you mean theorem"):
        resolve(yaml.safe_load(text.replace("theorem", "theorm")))
