"""Exact checks of dual-head distillation, numbered; in float64 where not said."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.dhkd import (
    DualHead,
    DualHeadLoss,
    DualHeadModel,
    DualLogits,
    GradientAlignment,
    aligned_loss,
    auxiliary_head,
    binary_kl_loss,
    binary_kl_norm_loss,
    distill,
    gradient_conflict_report,
    project_conflicting_gradients,
)

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)
taus = st.sampled_from([0.5, 1.0, 2.0, 7.0])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    shape = shape or (5, 7)
    return (scale * torch.randn(*shape, generator=generator(seed), dtype=F64)).requires_grad_()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bernoulli_kl(x: float, y: float) -> float:
    """KL(Bern(sigmoid(x)) || Bern(sigmoid(y)))."""
    return sum(sigmoid(s * x) * math.log(sigmoid(s * x) / sigmoid(s * y)) for s in (1, -1))


def naive(a: Tensor, t: Tensor, tau: float, norm: bool) -> float:
    """Row by row and class by class, as the definitions read."""
    total = 0.0
    for row, teacher in zip(a.tolist(), t.tolist(), strict=True):
        for x, y in zip(row, teacher, strict=True):
            if norm:
                total += bernoulli_kl(0.0, (x - y) / tau)
            else:
                total += bernoulli_kl(y / tau, x / tau)
    return tau**2 * total / len(a)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


# 1 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, tau=taus)
def test_01_norm_is_the_log_cosh_and_the_divergence_from_a_fair_coin(seed: int, tau: float) -> None:
    a, t = logits(seed), logits(seed + 1)
    found = binary_kl_norm_loss(a, t, tau)
    closed = tau**2 / len(a) * ((a - t) / (2 * tau)).cosh().log().sum()
    torch.testing.assert_close(found, closed, rtol=1e-10, atol=0)
    assert float(found.detach()) == pytest.approx(naive(a, t, tau, norm=True), rel=1e-9)


@quick
@given(seed=seeds)
def test_01_norm_is_zero_only_at_the_teacher_and_even(seed: int) -> None:
    a, gap = logits(seed).detach(), logits(seed + 1).detach()
    assert float(binary_kl_norm_loss(a, a)) == 0
    assert float(binary_kl_norm_loss(a + 1e-6 * gap, a)) > 0
    up, down = (binary_kl_norm_loss(a + sign * gap, a, reduction="none") for sign in (1, -1))
    torch.testing.assert_close(up, down, rtol=1e-13, atol=0)


def test_01_limits_of_the_temperature() -> None:
    a, t = logits(0), logits(1)
    gap = (a - t).detach()
    torch.testing.assert_close(
        binary_kl_norm_loss(a, t, 1e4).detach(), gap.square().sum() / (8 * len(a)), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(
        binary_kl_norm_loss(a, t, 1e-6).detach(), 1e-6 / (2 * len(a)) * gap.abs().sum(), rtol=1e-5, atol=0
    )


def test_01_norm_keeps_its_precision_from_tiny_to_huge_differences() -> None:
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    for x in (1e-9, 1e-6, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 1.0, 5.0, 30.0, 300.0):
        up, down = Decimal(x).exp(), (-Decimal(x)).exp()
        exact = float(((up + down) / 2).ln())
        found = binary_kl_norm_loss(torch.tensor([[2 * x]], dtype=F64), torch.zeros(1, 1, dtype=F64), 1.0)
        assert float(found) == pytest.approx(exact, rel=1e-15)


# 2 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, tau=taus)
def test_02_binary_kl_its_gradient_and_its_zero(seed: int, tau: float) -> None:
    a, t = logits(seed), logits(seed + 1)
    found = binary_kl_loss(a, t, tau)
    assert float(found.detach()) == pytest.approx(naive(a, t, tau, norm=False), rel=1e-9)
    expected = tau / len(a) * ((a / tau).sigmoid() - (t / tau).sigmoid())
    torch.testing.assert_close(gradient(found, a), expected.detach(), rtol=0, atol=1e-14)
    assert float(binary_kl_loss(t, t, tau).detach()) == 0
    assert float(binary_kl_loss(t + 1e-5, t, tau).detach()) > 0


def test_02_both_tend_to_an_eighth_of_the_squared_difference() -> None:
    a, t = logits(2), logits(3)
    expected = (a - t).detach().square().sum() / (8 * len(a))
    for loss in (binary_kl_loss, binary_kl_norm_loss):
        torch.testing.assert_close(loss(a, t, 1e4).detach(), expected, rtol=1e-6, atol=0)


# 3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_03_norm_gradient_is_bounded_and_everything_finite_far_away(dtype: torch.dtype) -> None:
    a = torch.tensor([[1e4, -1e4, 0.0], [3.0, 50.0, -80.0]], dtype=dtype, requires_grad=True)
    t = torch.zeros(2, 3, dtype=dtype)
    for loss in (binary_kl_norm_loss, binary_kl_loss):
        value = loss(a, t, 2.0)
        assert value.isfinite()
        slope = gradient(value, a)
        assert slope.dtype == dtype
        assert slope.isfinite().all()
        assert (slope.abs() <= 2.0 / (2 * 2) + 1e-6).all()
    assert (gradient(binary_kl_norm_loss(a, t), a)[0, :2].abs() == 0.5).all()


def test_03_parity_with_the_released_clamp() -> None:
    """In float64 the clamp kills gradients on both sides; in float32 its upper bound is 1, hence inf and NaN above."""
    a = torch.tensor([[-80.0, -3.0, 3.0, 80.0]], dtype=F64, requires_grad=True)
    t = torch.zeros(1, 4, dtype=F64)
    clamped, exact = (gradient(binary_kl_norm_loss(a, t, clamp=c), a) for c in (1e-8, None))
    torch.testing.assert_close(clamped[0, 1:3], exact[0, 1:3], rtol=1e-10, atol=0)
    assert (clamped[0, [0, 3]] == 0).all()
    assert (exact[0, [0, 3]].abs() == 1).all()
    torch.testing.assert_close(
        binary_kl_loss(a, t, clamp=1e-8)[None], binary_kl_loss(a[:, 1:3], t[:, 1:3])[None] + 4 * 2 * (
            0.5 * math.log(0.5 / 1e-8) + 0.5 * math.log(0.5 / (1 - 1e-8))
        ), rtol=1e-9, atol=0,
    )  # fmt: skip
    single = a.detach().float().requires_grad_()
    assert binary_kl_norm_loss(single, t.float(), clamp=1e-8).isinf()
    assert gradient(binary_kl_norm_loss(single, t.float(), clamp=1e-8), single)[0, 3].isnan()


# 4 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, shift=st.floats(0.5, 20))
def test_04_norm_ignores_a_common_offset_and_binary_kl_does_not(seed: int, shift: float) -> None:
    a, t = logits(seed).detach(), logits(seed + 1).detach()
    moved = binary_kl_norm_loss(a + shift, t + shift)
    torch.testing.assert_close(moved, binary_kl_norm_loss(a, t), rtol=1e-10, atol=0)
    alone, before = (binary_kl_norm_loss(x, t, reduction="none") for x in (a + shift, a))
    assert not torch.allclose(alone, before, rtol=1e-3)
    both, before = (binary_kl_loss(a + c, t + c, reduction="none") for c in (shift, 0.0))
    assert not torch.allclose(both, before, rtol=1e-3)


@quick
@given(seed=seeds)
def test_04_classes_and_rows_may_be_permuted(seed: int) -> None:
    a, t = logits(seed).detach(), logits(seed + 1).detach()
    rows, classes = torch.randperm(5, generator=generator(seed)), torch.randperm(7, generator=generator(seed))
    for loss in (binary_kl_loss, binary_kl_norm_loss):
        torch.testing.assert_close(loss(a[rows][:, classes], t[rows][:, classes]), loss(a, t))


# reductions, masks, gradients of gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", [binary_kl_loss, binary_kl_norm_loss])
def test_reductions_and_masks(loss: Any) -> None:
    a, t = logits(0, 2, 3, 7), logits(1, 2, 3, 7)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    each = loss(a, t, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(loss(a, t, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(a, t), each.mean())
    torch.testing.assert_close(loss(a, t, reduction="class_mean"), each.mean() / 7)
    torch.testing.assert_close(loss(a, t, mask=mask), each[mask].mean())
    torch.testing.assert_close(loss(a, t, reduction="class_mean", mask=mask), each[mask].mean() / 7)
    broken, silent = a.detach().clone(), t.detach().clone()
    broken[0, 1], silent[1, 0] = math.nan, math.inf
    broken.requires_grad_()
    value = loss(broken, silent, mask=mask)
    torch.testing.assert_close(value, each[mask].mean())
    slope = gradient(value, broken)
    assert slope.isfinite().all()
    assert (slope[~mask] == 0).all()
    assert float(loss(broken, silent, mask=torch.zeros_like(mask)).detach()) == 0


@pytest.mark.parametrize("loss", [binary_kl_loss, binary_kl_norm_loss])
def test_first_and_second_derivatives(loss: Any) -> None:
    a, t = logits(4, 2, 3), logits(5, 2, 3).detach()
    assert torch.autograd.gradcheck(lambda x: loss(x, t), a)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, t), a)


def test_the_teacher_gets_no_gradient() -> None:
    a, t = logits(0), logits(1)
    for loss in (binary_kl_loss, binary_kl_norm_loss):
        assert torch.autograd.grad(loss(a, t), t, allow_unused=True) == (None,)


REFUSED = (ConfigError, TypeCheckError)
"""Of a `Literal`: in these tests the type checker speaks first."""


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tau": 0.0}, "tau is 0"), ({"clamp": 0.5}, "clamp is 0.5"), ({"reduction": "mean"}, "'mean'")],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(REFUSED, match=words):
        binary_kl_loss(logits(0), logits(1), **options)


@pytest.mark.parametrize("loss", [binary_kl_loss, binary_kl_norm_loss])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_logits_are_refused_where_they_count(loss: Any, value: float) -> None:
    labels, whole = torch.arange(5), DualHeadLoss(loss=loss, align=[])
    for spoilt in range(2):
        pair = [logits(0).detach(), logits(1).detach()]
        pair[spoilt][2, 3] = value if spoilt else math.nan
        pair[0].requires_grad_()
        assert loss(*pair, mask=torch.arange(5) != 2).isfinite()
        with pytest.raises(DataError, match=r"the loss is (nan|inf), from logits"):
            whole(DualLogits(pair[0], pair[0]), pair[1], labels)
        student = DualLogits(pair[0], pair[0])
        assert DualHeadLoss(loss=loss)(student, pair[1], labels.masked_fill(labels == 2, -100)).isfinite()
    with pytest.raises(DataError, match="the loss is nan"):
        whole(pair[0] * math.nan, pair[1], labels)


def test_training_stops_before_a_row_spoils_the_weights() -> None:
    model, (x, _, y) = tower(0), batch(0)
    before = copy.deepcopy(model.state_dict())
    x[3] = math.nan
    with pytest.raises(DataError, match="the loss is nan"):
        distill(model, nn.Linear(6, 4).double(), [(x, y)], torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("loss", [binary_kl_loss, binary_kl_norm_loss])
@pytest.mark.parametrize(
    "mask", [torch.ones(1).bool(), torch.ones(6).bool(), torch.ones(5), torch.ones(5, 1).bool()]
)
def test_masks_that_are_none_are_refused(loss: Any, mask: Tensor) -> None:
    """Called below the checks of shapes that only tests have."""
    with pytest.raises(DataError, match="one bool per position"):
        inspect.unwrap(loss)(logits(0), logits(1), mask=mask)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"gamma": -1.0}, "gamma is -1"), ({"alpha": -0.1}, "alpha -0.1"), ({"alpha": math.nan}, "alpha nan"),
     ({"tau": 0.0}, "tau is 0"), ({"tau": -2.0}, "tau is -2")],
)  # fmt: skip
def test_weights_and_temperature_are_checked_at_construction(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DualHeadLoss(**options)


def test_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"student \(5, 7\) but teacher \(5, 6\)"):
        binary_kl_norm_loss(logits(0), logits(1, 5, 6))


# 5 --------------------------------------------------------------------------------------------------------------


def tower(seed: int, aux: Any = "linear", dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout))
    return nn.Sequential(backbone, DualHead(5, 4, aux, seed=seed)).double()


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 6, generator=generator(seed), dtype=F64)
    return x, 5 * torch.randn(rows, 4, generator=generator(seed + 1), dtype=F64), x[:, :4].argmax(1)


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


@quick
@given(seed=seeds)
def test_05_shared_projection_is_exact(seed: int) -> None:
    model = tower(seed)
    x, t, y = batch(seed)
    losses = DualHeadLoss().parts(model(x), t, y)
    parameters = list(model.parameters())
    plain = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in losses]
    found = project_conflicting_gradients(losses, parameters)
    shared = list(model[0].parameters())
    k = len(shared)
    g1, g2, projected = (flat(part[:k]) for part in (plain[0], plain[1], found.parts[1]))
    torch.testing.assert_close(found.dots[1], g1 @ g2)
    torch.testing.assert_close(found.dots[0], sum(g.square().sum() for g in plain[0] if g is not None))
    size = float(g1.norm() * g2.norm())
    if g1 @ g2 < 0:
        assert abs(float(projected @ g1)) < 1e-12 * size
    else:
        torch.testing.assert_close(projected, g2, rtol=0, atol=0)
    total = flat(found.total[:k])
    assert float(total @ g1) >= float(g1 @ g1) - 1e-12 * size
    main, auxiliary = slice(k, k + 2), slice(k + 2, k + 4)
    torch.testing.assert_close(found.total[main], plain[0][main], rtol=0, atol=0)
    torch.testing.assert_close(found.total[auxiliary], plain[1][auxiliary], rtol=0, atol=0)
    assert found.parts[1][main] == (None, None)


@quick
@given(seed=seeds)
def test_05_projection_is_idempotent(seed: int) -> None:
    g1, g2 = logits(seed, 6).detach(), logits(seed + 1, 6).detach()
    theta = torch.zeros(6, dtype=F64, requires_grad=True)
    once = project_conflicting_gradients((g1 @ theta, g2 @ theta), [theta]).parts[1][0]
    assert once is not None
    twice = project_conflicting_gradients((g1 @ theta, once @ theta), [theta]).parts[1][0]
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-14)


def test_05_any_loss_may_have_priority_and_a_zero_gradient_conflicts_with_nothing() -> None:
    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    first, second = theta @ torch.tensor([3.0, 4.0], dtype=F64), -theta[0]
    parts = project_conflicting_gradients((second, first), [theta], priority=1).parts
    torch.testing.assert_close(parts[0][0], torch.tensor([-0.64, 0.48], dtype=F64))
    torch.testing.assert_close(parts[1][0], torch.tensor([3.0, 4.0], dtype=F64))
    still = project_conflicting_gradients(((theta * 0).sum(), -theta[0]), [theta]).parts[1][0]
    torch.testing.assert_close(still, torch.tensor([-1.0, 0.0], dtype=F64))


# 6 --------------------------------------------------------------------------------------------------------------


def plain_tower(seed: int, dropout: float) -> nn.Sequential:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout))
    return nn.Sequential(backbone, nn.Linear(5, 4)).double()


@pytest.mark.parametrize("aux", ["linear", "mlp"])
@pytest.mark.parametrize("alignment", [{}, {"scope": "shared"}, {"scope": "all"}])
def test_06_alpha_0_is_exactly_the_run_without_auxiliary_head(aux: Any, alignment: Any) -> None:
    """With dropout in the backbone: the auxiliary head consumes no random number of the others."""
    one, two = plain_tower(3, 0.3), tower(3, aux, 0.3)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for m in (one, two)
    ]
    data = [batch(seed) for seed in range(5)]
    torch.manual_seed(0)
    for x, _, y in data:
        optimizers[0].zero_grad()
        cross_entropy(one(x), y).backward()
        optimizers[0].step()
    torch.manual_seed(0)
    teacher = nn.Linear(6, 4).double()
    torch.manual_seed(0)
    batches = ((x, y) for x, _, y in data)
    loss = DualHeadLoss(alpha=0.0, **alignment, align=two.parameters() if alignment else None)
    distill(two, teacher, batches, optimizers[1], loss)
    kept = nn.Sequential(two[0], two[1].export())
    for a, b in zip(one.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("scope", [None, "shared"])
def test_06_the_main_head_gets_the_gradient_of_cross_entropy_alone(alpha: float, scope: Any) -> None:
    model = tower(1)
    x, t, y = batch(1)
    expected = torch.autograd.grad(cross_entropy(model(x).main, y), list(model[1].main.parameters()))
    losses = DualHeadLoss(alpha=alpha).parts(model(x), t, y)
    if scope is None:
        losses.total.backward()
    else:
        GradientAlignment(torch.optim.SGD(model.parameters(), lr=0.1), scope=scope).backward(losses)
    found = [p.grad for p in model[1].main.parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-14, atol=1e-16)


# 7 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", ["linear", "mlp"])
def test_07_without_the_auxiliary_head_nothing_changes_in_evaluation(aux: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    count = sum(p.numel() for p in base.parameters())
    model = DualHeadModel(copy.deepcopy(base), "2", aux)
    x, _, y = batch(0)
    assert torch.equal(model.eval()(x), base(x))
    distill(
        model,
        nn.Linear(6, 4).double(),
        [(x, y)] * 3,
        torch.optim.SGD(model.parameters(), 0.1),
        DualHeadLoss(align=model.parameters()),
    )
    before = model.eval()(x)
    kept = model.export()
    assert torch.equal(kept(x), before)
    assert not torch.equal(before, base(x))
    assert sum(p.numel() for p in kept.parameters()) == count
    assert kept.state_dict().keys() == base.state_dict().keys()


def test_07_both_ways_to_make_it_give_the_same_logits() -> None:
    stacked, around = tower(2), plain_tower(2, 0.0)
    wrapped = DualHeadModel(around, "1", seed=2)
    x, _, _ = batch(0)
    torch.testing.assert_close(wrapped(x), stacked(x))
    assert isinstance(wrapped(x), DualLogits)


# 8 --------------------------------------------------------------------------------------------------------------


def test_08_the_auxiliary_loss_does_not_reach_the_main_head() -> None:
    model = tower(4)
    x, t, y = batch(4)
    losses = DualHeadLoss().parts(model(x), t, y)
    main = list(model[1].main.parameters())
    assert torch.autograd.grad(losses.auxiliary, main, allow_unused=True) == (None, None)


# 9 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "projected", "head"), [("shared", (-0.64, 0.48), 5.0), ("all", (-0.82, 0.24), 5.3)]
)
def test_09_projection_by_hand(scope: Any, projected: tuple[float, float], head: float) -> None:
    shared = torch.zeros(2, dtype=F64, requires_grad=True)
    own = torch.zeros(1, dtype=F64, requires_grad=True)
    losses = (shared @ torch.tensor([3.0, 4.0], dtype=F64) + 5 * own.sum(), -shared[0])
    found = project_conflicting_gradients(losses, [shared, own], scope=scope)
    torch.testing.assert_close(found.parts[1][0], torch.tensor(projected, dtype=F64))
    torch.testing.assert_close(found.total[1], torch.tensor([head], dtype=F64))
    torch.testing.assert_close(found.dots, torch.tensor([50.0, -3.0], dtype=F64))


# alignment, further ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_the_optimiser_and_the_single_loss_hand_out_the_same_gradients(scope: Any) -> None:
    model = tower(5)
    x, t, y = batch(5)
    wrapper = GradientAlignment(torch.optim.SGD(model.parameters(), lr=0.1), scope=scope)
    wrapper.zero_grad()
    for _ in range(2):  # gradients add up
        wrapper.backward(DualHeadLoss().parts(model(x), t, y))
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    wrapper.zero_grad()
    losses = DualHeadLoss().parts(model(x), t, y)
    one = aligned_loss(losses, model.parameters(), scope=scope)
    whole = DualHeadLoss(align=model.parameters(), scope=scope)
    torch.testing.assert_close(whole(model(x), t, y), one)
    torch.testing.assert_close(one.detach(), losses.total.detach())
    (2 * one).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], found)
    assert wrapper.dots is not None
    assert wrapper.dots.shape == (2,)


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_parameters_that_are_not_aligned_get_the_plain_gradient(scope: Any) -> None:
    conflicts = 0
    for seed in range(6):
        model = tower(seed)
        x, t, y = batch(seed)
        losses = DualHeadLoss().parts(model(x), t, y)
        backbone, heads = list(model[0].parameters()), list(model[1].parameters())
        expected = project_conflicting_gradients(losses, backbone, scope=scope, retain_graph=True)
        conflicts += bool(expected.dots[1] < 0)
        plain = torch.autograd.grad(losses.total, heads)
        DualHeadLoss(align=backbone, scope=scope)(model(x), t, y).backward()
        torch.testing.assert_close(tuple(p.grad for p in backbone), expected.total)
        torch.testing.assert_close(tuple(p.grad for p in heads), plain)
    assert conflicts  # else the plain sum would do


def test_alignment_leaves_parameters_alone_that_no_loss_reaches() -> None:
    model = tower(6)
    unused, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    wrapper = GradientAlignment(
        torch.optim.SGD([*model.parameters(), unused, frozen], lr=1, weight_decay=0.5)
    )
    x, t, y = batch(6)
    wrapper.backward(DualHeadLoss().parts(model(x), t, y))
    wrapper.step()
    assert unused.grad is None
    assert torch.equal(unused, torch.ones(2))


def test_gradients_share_no_storage_so_clipping_in_place_is_that_of_autograd() -> None:
    a, b = (nn.Parameter(torch.zeros(3, 2, dtype=F64)) for _ in range(2))
    expected = []
    for align in (False, True):
        losses = (3 * (a + b).sum(), (a - b).sum())
        a.grad = b.grad = None
        if align:
            GradientAlignment(torch.optim.SGD([a, b])).backward(losses)
            assert a.grad.data_ptr() != b.grad.data_ptr()
            assert a.grad.is_contiguous()
            assert b.grad.is_contiguous()
        else:
            sum(losses).backward()
        nn.utils.clip_grad_norm_([a, b], 1.0, foreach=False)
        expected.append((a.grad, b.grad))
    torch.testing.assert_close(*expected)
    a.grad = b.grad = None
    GradientAlignment(torch.optim.SGD([a, b])).backward(((a + b).sum(),))
    nn.utils.clip_grad_norm_([a, b], 1.0, foreach=False)
    torch.testing.assert_close(a.grad, torch.full_like(a, 1 / math.sqrt(12)), rtol=1e-5, atol=0)


def test_alignment_refuses_what_it_cannot_do() -> None:
    theta = torch.zeros(2, requires_grad=True)
    for options, words in (({"scope": "some"}, "'some'"), ({"priority": 2}, "there are 2 losses")):
        with pytest.raises(REFUSED, match=words):
            project_conflicting_gradients((theta.sum(), theta.sum()), [theta], **options)
    with pytest.raises(DataError, match="no graph"):
        project_conflicting_gradients((theta.sum(), torch.zeros(())), [theta])


# the heads, further ---------------------------------------------------------------------------------------------


def test_the_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    head = auxiliary_head(5, 4, "mlp", seed=7)
    head(torch.zeros(3, 5))
    assert torch.equal(torch.get_rng_state(), state)
    again = auxiliary_head(5, 4, "mlp", seed=7)
    for a, b in zip(head.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_mlp_head_is_the_published_one() -> None:
    """In evaluation, and in training with its own dropout mask, against the layers one after another."""
    head = auxiliary_head(5, 4, "mlp").double()
    x = torch.randn(6, 2, 5, generator=generator(0), dtype=F64)
    hidden = head.first(x.reshape(-1, 5))
    keep = torch.empty_like(hidden).bernoulli_(0.9, generator=generator(0))
    dropped = hidden * keep / 0.9
    scaled = (dropped - dropped.mean(0)) / (dropped.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), head.last(scaled.relu()).reshape(6, 2, 4))
    assert 0.8 < float(keep.mean()) < 0.97
    with pytest.raises(DataError, match="2 rows"):
        head(x[:1, 0])
    assert head.eval()(x[:1, 0]).shape == (1, 4)


def test_masks_differ_from_call_to_call() -> None:
    drop = auxiliary_head(5, 4, "mlp").drop
    assert not torch.equal(drop(torch.ones(50)), drop(torch.ones(50)))


def test_a_resumed_run_goes_on_with_the_masks_where_it_stopped() -> None:
    one, x = auxiliary_head(6, 4, "mlp"), torch.ones(8, 6)
    for _ in range(3):
        one(x)
    other = auxiliary_head(6, 4, "mlp")
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_pass_has_the_mask_of_its_first(reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        head = auxiliary_head(6, 4, "mlp").double()
        inputs = [logits(seed, 8, 6) for seed in range(3)]
        if checkpointed:
            found = [checkpoint(head, x, use_reentrant=reentrant) for x in inputs]
        else:
            found = [head(x) for x in inputs]
        for out in reversed(found):
            out.square().sum().backward()
        assert head.drop.calls == 3
        return [t.grad for t in (*inputs, *head.parameters())]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=1e-12)


def test_a_pass_that_repeats_none_is_refused() -> None:
    head, calls = auxiliary_head(6, 4, "mlp").double(), 0

    def changing(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return head(x * calls)

    with pytest.raises(DataError, match="of no recent call; leave the head out"):
        checkpoint(changing, logits(0, 8, 6), use_reentrant=False).sum().backward()


def test_wrong_names_are_refused_with_those_that_there_are() -> None:
    model = plain_tower(0, 0.0)
    with pytest.raises(
        ConfigError, match=r"no linear layer 'fc' in this Sequential; the last ones are: 0\.0, 1"
    ):
        DualHeadModel(model, "fc")
    with pytest.raises(REFUSED, match="'conv'"):
        DualHeadModel(model, "1", "conv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'sum'"):
        DualHeadLoss(reduction="sum")


def test_a_head_that_is_not_called_once_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.fc, self.times = nn.Linear(3, 3), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.fc(x)
            return x

    for times in (0, 2):
        with pytest.raises(ConfigError, match=f"{times} times"):
            DualHeadModel(Twice(times), "fc")(torch.zeros(2, 3))


def test_logits_that_are_no_position_of_the_head_are_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).sum()[None]

    with pytest.raises(ConfigError, match="one position of each row"):
        DualHeadModel(Mean(), "fc")(torch.zeros(2, 5, 3))


HUGGING_FACE = {
    "distilbert": ("DistilBert", {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 32}, "classifier"),
    "roberta": (
        "Roberta",
        {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32},
        "classifier.out_proj",
    ),
    "gpt2": ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}, "score"),
    "llama": (
        "Llama",
        {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32},
        "score",
    ),
}


@pytest.mark.parametrize("family", list(HUGGING_FACE))
def test_hugging_face_classifiers(family: str) -> None:
    """Main logits are the model's, auxiliary ones read the same position, and export gives the model back."""
    transformers = pytest.importorskip("transformers")
    name, sizes, head = HUGGING_FACE[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=50, num_labels=3, pad_token_id=1, **sizes)
    torch.manual_seed(0)
    base = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    model = DualHeadModel(base, head)
    ids = torch.randint(2, 50, (4, 9), generator=generator(0))
    lengths = torch.tensor([9, 5, 7, 2])
    mask = torch.arange(9) < lengths[:, None]
    inputs = {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}
    expected = base(**inputs).logits
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    model.train()
    base.eval()  # no dropout, so that the logits can be compared
    main, auxiliary = model(**inputs)
    torch.testing.assert_close(main, expected)
    model.auxiliary.load_state_dict({"weight": base.get_submodule(head).weight, "bias": torch.zeros(3)})
    bias = base.get_submodule(head).bias
    main, auxiliary = model(**inputs)
    torch.testing.assert_close(auxiliary, main if bias is None else main - bias)
    (main.sum() + auxiliary.sum()).backward()
    assert model.export() is base
    assert not base.get_submodule(head)._forward_hooks


def test_language_models_learn_from_the_vocabulary_with_masked_positions() -> None:
    models = pytest.importorskip("uncollapse.models")
    pytest.importorskip("transformers")
    base, _ = models.load("tiny")
    teacher = copy.deepcopy(base)
    model = DualHeadModel(base, "lm_head").train()
    ids = torch.randint(0, base.config.vocab_size, (2, 12), generator=generator(1))
    labels = torch.where(torch.arange(12) < 8, ids.roll(-1, 1), -100)
    with torch.no_grad():
        target = teacher(input_ids=ids).logits
    logits_of_both = model(input_ids=ids)
    loss = DualHeadLoss(reduction="class_mean").parts(logits_of_both, target, labels)
    kept = labels != -100
    main = cross_entropy(logits_of_both.main[kept], labels[kept])
    auxiliary = binary_kl_norm_loss(logits_of_both.auxiliary[kept], target[kept], reduction="class_mean")
    torch.testing.assert_close(loss, (main, auxiliary))
    assert loss.auxiliary < 10  # not a sum over the vocabulary
    loss.total.backward()
    assert model.export() is base


def test_main_logits_alone_give_cross_entropy_and_no_label_gives_0() -> None:
    a, t = logits(0), logits(1)
    y = torch.tensor([0, 3, -100, 1, 6])
    torch.testing.assert_close(DualHeadLoss(gamma=2.0)(a, t, y), 2 * cross_entropy(a, y))
    loss = DualHeadLoss(align=[a])
    with torch.no_grad():
        assert loss(DualLogits(a, a), t, y).isfinite()
    assert float(loss(DualLogits(a, a), t, torch.full_like(y, -100)).detach()) == 0


# the loop ------------------------------------------------------------------------------------------------------


def test_the_auxiliary_loss_can_stop_early_and_the_teacher_is_left_alone() -> None:
    model, teacher = tower(8), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)).double()
    before = copy.deepcopy(teacher.state_dict())
    data = [(x, y) for x, _, y in map(batch, range(4))]
    history = distill(model, teacher, data, torch.optim.SGD(model.parameters(), 0.1), auxiliary_steps=2)
    assert history.shape == (4, 2)
    assert (history[:2, 1] > 0).all()
    assert (history[2:, 1] == 0).all()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert distill(model, teacher, [], torch.optim.SGD(model.parameters(), 0.1)).shape == (0, 2)


def test_training_twice_gives_the_same() -> None:
    ends = []
    for _ in range(2):
        model, teacher = tower(9, "mlp"), tower(10).eval()
        data = [(x, y) for x, _, y in map(batch, range(4))]
        loss = DualHeadLoss(align=model.parameters())
        distill(model, teacher, data, torch.optim.SGD(model.parameters(), 0.1), loss)
        ends.append(flat(model.parameters()))
    assert torch.equal(*ends)


# the derivation of the specification ----------------------------------------------------------------------------


def test_at_collapse_head_and_backbone_gradients_agree_in_sign() -> None:
    """Orthogonal class means and a classifier that is a simplex frame: no asymmetry between head and features.

    Over-shooting the teacher's margin makes both inner products negative, staying below it makes both positive.
    """
    classes = 5
    means = torch.eye(classes, dtype=F64)
    frame = means - 1 / classes
    for margin, sign in ((2.0, 1), (12.0, -1)):
        features = means.clone().requires_grad_()
        weight = (margin * frame).requires_grad_()
        found = features @ weight.T
        teacher = 6.0 * frame
        report = gradient_conflict_report(
            cross_entropy(found, torch.arange(classes)),
            binary_kl_norm_loss(found, teacher),
            {"head": [weight], "features": [features]},
        )
        for group in report.values():
            assert math.copysign(1, float(group.dot.detach())) == sign
