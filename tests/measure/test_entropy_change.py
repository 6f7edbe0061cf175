"""First-order entropy change of a token: against finite differences, naive sums and autograd; all in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.measure.entropy_change import (
    ESTIMATORS,
    QUADRANTS,
    collision_term,
    compare_estimators,
    entropy_quadrants,
    exact_entropy_change,
    quadrant_of,
    token_entropy_change,
)

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def states(seed: int, count: int = 6, vocab: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, one sampled token per state, and its surrogate weight."""
    g = generator(seed)
    z = 2 * torch.randn(count, vocab, generator=g, dtype=F64)
    token = torch.multinomial(z.softmax(-1), 1, generator=g)[:, 0]
    return z, token, torch.randn(count, generator=g, dtype=F64)


def step(z: Tensor, token: Tensor, w: Tensor, lr: float) -> Tensor:
    """The logits after one step on the surrogate of one sampled token."""
    pushed = torch.nn.functional.one_hot(token, z.shape[-1]).to(F64) - z.softmax(-1)
    return z + lr * w[:, None] * pushed


def sampled(z: Tensor, token: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, token[:, None])[:, 0]


# 1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_01_exact_change_has_an_error_of_second_order(seed: int) -> None:
    z, token, w = states(seed)
    w = w.sign() * (0.5 + w.abs())

    def error(lr: float) -> Tensor:
        measured = entropy(step(z, token, w, lr)) - entropy(z)
        return (measured - exact_entropy_change(z, token, w, lr)).abs()

    lr = 1e-2
    assert (error(lr) <= 5 * lr**2 * w**2).all()
    small = error(lr) < 1e-6  # where the second order nearly vanishes, the third decides the ratio
    ratio = error(lr) / error(lr / 2)
    assert ((ratio[~small] - 4).abs() < 0.4).all()
    assert (~small).any()


@quick
@given(seed=seeds)
def test_01_exact_change_is_the_directional_derivative(seed: int) -> None:
    z, token, w = states(seed)
    z.requires_grad_()
    direction = step(z, token, w, 1.0).detach() - z.detach()
    slope = (torch.autograd.grad(entropy(z).sum(), z)[0] * direction).sum(-1)
    torch.testing.assert_close(exact_entropy_change(z.detach(), token, w, 1.0), slope, rtol=0, atol=1e-12)


def test_01_uniform_policy_does_not_move_at_first_order() -> None:
    z = torch.full((4, 9), 1.7, dtype=F64)
    change = exact_entropy_change(z, torch.arange(4), torch.ones(4, dtype=F64), 0.1)
    torch.testing.assert_close(change, torch.zeros(4, dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("x", [-3.0, -0.4, 0.0, 0.9, 4.0])
def test_01_two_tokens(x: float) -> None:
    z, w, lr = torch.tensor([[x, 0.0]], dtype=F64), torch.tensor([0.7], dtype=F64), 0.01
    p = 1 / (1 + math.exp(-x))
    after = step(z, torch.tensor([0]), w, lr)
    assert (after[0, 0] - after[0, 1]).item() - x == pytest.approx(2 * lr * 0.7 * (1 - p), abs=1e-14)
    change = exact_entropy_change(z, torch.tensor([0]), w, lr).item()
    assert change == pytest.approx(-2 * lr * 0.7 * x * p * (1 - p) ** 2, abs=1e-14)


# 2 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, constant=st.floats(-3, 3))
def test_02_the_average_over_tokens_is_the_covariance_law(seed: int, constant: float) -> None:
    z = 2 * torch.randn(5, 11, generator=generator(seed), dtype=F64)
    w = torch.randn(5, 11, generator=generator(seed + 1), dtype=F64)
    p, logp, lr = z.softmax(-1), z.log_softmax(-1), 0.3
    every = torch.arange(11).expand(5, 11)
    spread = z[:, None].expand(5, 11, 11)
    per_token = exact_entropy_change(spread, every, w, lr)
    dz = lr * (p * w - p * (p * w).sum(-1, keepdim=True))
    mean_dz, mean_logp = (p * dz).sum(-1), (p * logp).sum(-1)
    covariance = (p * logp * dz).sum(-1) - mean_logp * mean_dz
    torch.testing.assert_close((p * per_token).sum(-1), -covariance, rtol=0, atol=1e-12)
    flat = exact_entropy_change(spread, every, torch.full((5, 11), constant, dtype=F64), lr)
    torch.testing.assert_close((p * flat).sum(-1), torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)


# 3 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, drift=st.floats(0, 0.5))
def test_03_estimators_against_their_formulas(seed: int, drift: float) -> None:
    z, token, a = states(seed)
    logp = sampled(z, token)
    old = (logp + drift * torch.randn(6, generator=generator(seed), dtype=F64)).clamp(max=0)
    found = compare_estimators(z, token, a, old_log_prob=old)
    assert tuple(found) == ESTIMATORS
    for i in range(6):
        p, h = z[i].softmax(-1), entropy(z[i])
        x, s2 = p[token[i]], sum(p[v] ** 2 * (p[v].log() + h) for v in range(13))
        ratio = x / old[i].exp()
        assert found["released"][i].item() == pytest.approx(float(ratio * a[i] * (1 - x) * (x.log() + h)))
        assert found["theorem"][i].item() == pytest.approx(float(x * found["released"][i]))
        exact = ratio * a[i] * (x * (x.log() + h) - s2)
        assert found["exact"][i].item() == pytest.approx(float(exact), abs=1e-13)
        assert collision_term(z[i]).item() == pytest.approx(float(s2), abs=1e-14)
    weight = a * (logp - old).exp()
    torch.testing.assert_close(exact_entropy_change(z, token, weight, 0.2), -0.2 * found["exact"])


@pytest.mark.parametrize("seed", range(6))
def test_03_the_theorem_is_the_change_when_only_the_own_logit_moves(seed: int) -> None:
    z, token, w = states(seed)
    logp = sampled(z, token)
    omega = token_entropy_change(logp, logp, entropy(z), w, estimator="theorem")

    def error(lr: float) -> Tensor:
        moved = z.scatter_add(1, token[:, None], (lr * w * (1 - logp.exp()))[:, None])
        return ((entropy(moved) - entropy(z)) + lr * omega).abs()

    assert (error(1e-2) <= 2e-4 * w**2).all()
    assert (error(5e-3) <= error(1e-2) / 3.5 + 1e-9).all()


@pytest.mark.parametrize("estimator", ["released", "theorem"])
def test_03_zeros(estimator: str) -> None:
    def omega(logp: float, h: float, a: float = 1.0) -> float:
        numbers = (torch.tensor([n], dtype=F64) for n in (logp, logp, h, a))
        return token_entropy_change(*numbers, estimator=estimator).item()

    assert omega(-1.3, 0.4, 0.0) == 0
    assert abs(omega(-1e-12, 0.4)) < 1e-8
    assert omega(-0.9, 0.9) == 0
    assert omega(0.0, 0.0) == pytest.approx(0, abs=1e-8)


def test_03_what_the_theorem_leaves_out_for_two_tokens() -> None:
    """exact - theorem = -w (1 - p)^2 (log(1 - p) + H): what the other logit does."""
    for x in (-2.0, 0.3, 1.5):
        z = torch.tensor([[x, 0.0]], dtype=F64)
        p, h = 1 / (1 + math.exp(-x)), entropy(z).item()
        found = compare_estimators(z, torch.tensor([0]), torch.tensor([0.6], dtype=F64))
        rest = -0.6 * (1 - p) ** 2 * (math.log(1 - p) + h)
        assert (found["exact"] - found["theorem"]).item() == pytest.approx(rest, abs=1e-14)


def test_03_the_released_clamps() -> None:
    one = torch.ones(1, dtype=F64)
    rare = token_entropy_change(one * -40, one * -40, one, one)
    assert rare.item() == pytest.approx((1 - 1e-8) * (math.log(1e-8) + 1))
    jumped = token_entropy_change(one * -1e-3, one * -90, one, one)
    p = math.exp(-1e-3)
    assert jumped.item() == pytest.approx(p / 1e-8 * (1 - p) * (math.log(p) + 1))


# ---- clip, bad numbers, dtypes -----------------------------------------------------------------------------------


def test_clipped_tokens_change_nothing() -> None:
    ratio = torch.tensor([1.3, 1.2, 0.7, 0.7, 1.3, 1.0], dtype=F64)
    a = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)
    old = torch.full((6,), -2.0, dtype=F64)
    for estimator in ESTIMATORS:
        omega = token_entropy_change(
            old + ratio.log(), old, old + 3.0, a, estimator=estimator, collision=0 * a, clip=(0.2, 0.28)
        )
        assert (omega == 0).tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_numbers_that_are_not_finite_give_finite_changes_and_spoil_no_other(
    bad: float, estimator: str
) -> None:
    for place in range(4):
        numbers = [torch.tensor([-1.0, -0.5], dtype=F64) for _ in range(2)]
        numbers += [torch.tensor([0.3, 0.9], dtype=F64), torch.tensor([1.0, -2.0], dtype=F64)]
        clean = token_entropy_change(*numbers, estimator=estimator, collision=0.1 * numbers[2])
        numbers[place] = numbers[place].clone()
        numbers[place][0] = bad
        found = token_entropy_change(
            *numbers, estimator=estimator, collision=0.1 * clean.new_tensor([0.3, 0.9])
        )
        assert torch.isfinite(found).all()
        assert found[1] == clean[1]


def test_impossible_tokens_and_masked_vocabularies() -> None:
    z = torch.tensor([[0.3, -1.0, -math.inf]], dtype=F64)
    one = torch.ones(1, dtype=F64)
    torch.testing.assert_close(collision_term(z), collision_term(z[:, :2]))
    torch.testing.assert_close(
        exact_entropy_change(z, torch.tensor([1]), one, 0.1),
        exact_entropy_change(z[:, :2], torch.tensor([1]), one, 0.1),
    )
    assert exact_entropy_change(z, torch.tensor([2]), one, 0.1).item() == pytest.approx(
        0.1 * collision_term(z).item()
    )


def test_half_precision_is_computed_in_float32_near_certainty() -> None:
    logp = torch.tensor([-1e-6], dtype=torch.float32)
    h, a = torch.tensor([0.2]), torch.tensor([1.0])
    wide = token_entropy_change(logp.double(), logp.double(), h.double(), a.double(), estimator="theorem")
    torch.testing.assert_close(
        token_entropy_change(logp, logp, h, a, estimator="theorem").double(), wide, rtol=1e-5, atol=0
    )
    assert token_entropy_change(logp.bfloat16(), logp.bfloat16(), h, a).dtype == torch.float32


@pytest.mark.parametrize("estimator", ["released", "theorem"])
def test_half_precision_is_clipped_in_float32(estimator: str) -> None:
    logp = -torch.rand(4000, generator=generator(0)).bfloat16()
    old = (logp.float() - 0.4 * torch.rand(4000, generator=generator(1))).bfloat16()
    h, a = torch.ones(4000).bfloat16(), torch.ones(4000).bfloat16()
    half = token_entropy_change(logp, old, h, a, estimator=estimator, clip=(0.2, 0.2))
    wide = token_entropy_change(
        logp.double(), old.double(), h.double(), a.double(), estimator=estimator, clip=(0.2, 0.2)
    )
    assert torch.equal(half == 0, wide == 0)


def test_user_errors() -> None:
    x = torch.zeros(2)
    with pytest.raises(UnknownName, match="unknown estimator 'theorm'; did you mean theorem"):
        token_entropy_change(x, x, x, x, estimator="theorm")
    with pytest.raises(ConfigError, match="needs collision="):
        token_entropy_change(x, x, x, x, estimator="exact")


# ---- quadrants -------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_quadrants_equal_the_naive_loop_and_have_their_signs(seed: int) -> None:
    g = generator(seed)
    logp = -3 * torch.rand(4, 9, generator=g, dtype=F64)
    h = 2 * torch.rand(4, 9, generator=g, dtype=F64)
    a = torch.randn(4, 1, generator=g, dtype=F64).expand(4, 9).clone()
    a[1], logp[0, 0] = 0.0, -h[0, 0]
    mask = torch.rand(4, 9, generator=g) < 0.8
    tokens, size, change = [0] * 4, [0.0] * 4, [0.0] * 4
    for i, j in mask.nonzero().tolist():
        if a[i, j] == 0 or logp[i, j] + h[i, j] == 0:
            continue
        q = (2 if -logp[i, j] > h[i, j] else 0) + (1 if a[i, j] < 0 else 0)
        p = math.exp(logp[i, j])
        omega = float(a[i, j]) * p * (1 - p) * float(logp[i, j] + h[i, j])
        tokens[q] += 1
        size[q] += abs(omega)
        change[q] -= omega
        assert quadrant_of(logp, h, a)[i, j] == q
    count, total = int(mask.sum()), sum(size)
    found = entropy_quadrants(logp, h, a, mask)
    assert found.tokens.tolist() == pytest.approx([n / count for n in tokens])
    assert found.share.tolist() == pytest.approx([s / total for s in size])
    assert found.change.tolist() == pytest.approx([c / count for c in change])
    assert len(QUADRANTS) == 4
    assert (found.change * torch.tensor([-1, 1, 1, -1]) >= 0).all()
    dirty = torch.where(mask, logp, math.nan)
    torch.testing.assert_close(entropy_quadrants(dirty, h, a, mask).change, found.change)


def test_quadrants_of_nothing() -> None:
    x = torch.zeros(2, 3, dtype=F64)
    empty = entropy_quadrants(x, x, x, torch.zeros(2, 3, dtype=torch.bool))
    assert empty.share.sum() == empty.tokens.sum() == empty.change.sum() == 0
