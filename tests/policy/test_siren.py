"""Exact checks of SIREN, numbered; all in float64."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from lab import loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError
from uncollapse.measure import statistics
from uncollapse.measure.statistics import Rows
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.config import resolve
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.registry import recipe
from uncollapse.policy.siren import (
    EntropyAnchor,
    LagrangianEntropy,
    PeakEntropyBonus,
    Siren,
    nucleus_entropy,
    peak_entropy_mask,
    peak_entropy_mean,
    siren_regularizer,
)
from uncollapse.policy.stats import Entropy, NucleusEntropy

F64 = torch.float64
WHOLE = [torch.arange(40)]
PIECES = [torch.arange(0, 7), torch.arange(7, 8), torch.arange(8, 33), torch.arange(33, 40)]
seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def some_logits(seed: int, rows: int = 4, time: int = 6, vocab: int = 31) -> Tensor:
    return (2 * torch.randn(rows, time, vocab, generator=generator(seed), dtype=F64)).requires_grad_()


def some_mask(seed: int, rows: int = 4, time: int = 6) -> Tensor:
    return torch.arange(time) < torch.randint(1, time + 1, (rows, 1), generator=generator(seed))


def full_entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def inside(logits: Tensor, p: float = 0.8, mode: str = "standard") -> Tensor:
    """Membership by a plain loop over the sorted row."""
    found = torch.zeros_like(logits, dtype=torch.bool).reshape(-1, logits.shape[-1])
    for probs, row in zip(logits.detach().softmax(-1).reshape(found.shape), found, strict=True):
        mass = 0.0
        for v in probs.argsort(descending=True, stable=True).tolist():
            after = mass + probs[v].item()
            row[v] = mass < p if mode == "standard" else after < p
            mass = after
    return found.view(logits.shape)


def naive_regularizer(logits: Tensor, mask: Tensor, p: float, quantile: float, mode: str) -> Tensor:
    """Mean over rows of the mean over peaks, row by row and token by token."""
    total = 0.0 * logits.sum()
    for row, valid in zip(logits, mask, strict=True):
        values = []
        for z in row[valid]:
            member = inside(z[None], p, mode)[0]
            q = z[member].softmax(-1)
            values.append(-(q * q.log()).sum() if member.any() else z.sum() * 0)
        tau = np.quantile([v.item() for v in values], quantile)
        peaks = [v for v in values if v.item() > tau]
        if peaks:
            total = total + sum(peaks) / len(peaks)
    return total / len(logits)


# 1 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, mode=st.sampled_from(["standard", "released"]))
def test_01_p_1_is_the_full_entropy_with_its_gradient(seed: int, mode: str) -> None:
    z = some_logits(seed)
    h = nucleus_entropy(z, 1.0, mode)
    torch.testing.assert_close(h, full_entropy(z), rtol=0, atol=1e-12)
    logp = z.detach().log_softmax(-1)
    expected = -logp.exp() * (logp + full_entropy(z).detach()[..., None])
    torch.testing.assert_close(gradient(h.sum(), z), expected, rtol=0, atol=1e-12)


@quick
@given(seed=seeds)
def test_01_quantile_0_keeps_all_but_the_least_and_none_keeps_all(seed: int) -> None:
    h, mask = torch.rand(5, 9, generator=generator(seed), dtype=F64), some_mask(seed, 5, 9)
    h[2] = 0.4
    least = torch.where(mask, h, math.inf).amin(1, keepdim=True)
    assert torch.equal(peak_entropy_mask(h, mask, 0.0), mask & (h != least))
    assert torch.equal(peak_entropy_mask(h, mask, None), mask)
    assert not peak_entropy_mask(h, mask, 1.0).any()


# 2 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, p=st.sampled_from([0.05, 0.5, 0.8, 0.99]), mode=st.sampled_from(["standard", "released"]))
def test_02_the_gradient_is_0_outside_and_sums_to_0_inside(seed: int, p: float, mode: str) -> None:
    z = some_logits(seed)
    h = nucleus_entropy(z, p, mode)
    weight = torch.randn(h.shape, generator=generator(seed), dtype=F64)
    found, member = gradient((weight * h).sum(), z), inside(z, p, mode)
    assert not found[~member].any()
    torch.testing.assert_close(found.sum(-1), torch.zeros_like(h), rtol=0, atol=1e-14)
    logq = torch.where(member, z.detach(), -math.inf).log_softmax(-1)
    expected = torch.where(member, -logq.exp() * (logq + h.detach()[..., None]), 0.0) * weight[..., None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["standard", "released"])
def test_02_gradcheck(mode: str) -> None:
    z = some_logits(3, rows=2, time=2, vocab=13)
    assert torch.autograd.gradcheck(lambda x: nucleus_entropy(x, 0.8, mode), (z,))


# 3 --------------------------------------------------------------------------------------------------------------


def test_03_uniform() -> None:
    z = torch.zeros(51, dtype=F64)
    assert nucleus_entropy(z).item() == pytest.approx(math.log(41), abs=1e-12)
    assert nucleus_entropy(z).item() == pytest.approx(3.713572, abs=1e-6)


@quick
@given(seed=seeds, p=st.floats(0.01, 1), mode=st.sampled_from(["standard", "released"]))
def test_03_bounds(seed: int, p: float, mode: str) -> None:
    z = some_logits(seed)
    h, member = nucleus_entropy(z, p, mode), inside(z, p, mode)
    mass, count = (z.softmax(-1) * member).sum(-1), member.sum(-1)
    assert (h >= 0).all()
    assert (h <= count.clamp(min=1).log() + 1e-12).all()
    some = count > 0
    assert (h[some] <= (full_entropy(z) + mass.log())[some] + 1e-12).all()
    assert (h[~some] == 0).all()


def test_03_both_readings_of_the_nucleus() -> None:
    for p, standard, released in [((0.6, 0.3, 0.1), 0.6365, 0.0), ((0.45, 0.3, 0.15, 0.1), 1.0114, 0.6730)]:
        z = torch.tensor(p, dtype=F64).log()
        assert nucleus_entropy(z).item() == pytest.approx(standard, abs=5e-5)
        assert nucleus_entropy(z, mode="released").item() == pytest.approx(released, abs=5e-5)


def test_03_top_k_cuts_the_nucleus() -> None:
    z = torch.zeros(51, dtype=F64).requires_grad_()
    assert nucleus_entropy(z, top_k=7).item() == pytest.approx(math.log(7), abs=1e-12)
    assert nucleus_entropy(z, 1.0, top_k=7).item() == pytest.approx(math.log(7), abs=1e-12)
    wide = some_logits(0)
    assert torch.equal(nucleus_entropy(wide, top_k=500), nucleus_entropy(wide))


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    p=st.sampled_from([1e-9, 0.3, 0.8, 0.999, 1.0]),
    mode=st.sampled_from(["standard", "released"]),
    top_k=st.sampled_from([None, 1, 4, 40]),
    step=st.sampled_from([0.0, 0.5]),
)
def test_03_the_search_agrees_with_a_stable_sort_ties_included(
    seed: int, p: float, mode: str, top_k: int | None, step: float
) -> None:
    """Coarse logits tie almost everywhere; a front of 3 tokens is widened several times."""
    z = 2 * torch.randn(9, 120, generator=generator(seed), dtype=F64)
    z = (z / step).round() * step if step else z
    rows = Rows(z.log_softmax(-1), torch.zeros(9, dtype=torch.long))
    values, order = rows.p.sort(dim=-1, descending=True, stable=True)
    reached = values.cumsum(-1)
    before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], 1)
    keep = (before if mode == "standard" else reached) < (p if p < 1 else math.inf)
    keep[:, 120 if top_k is None else top_k :] = False
    expected = torch.zeros_like(keep).scatter_(-1, order, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "FRONT", 3)
        assert torch.equal(statistics.NucleusEntropy(p, mode, top_k).members(rows), expected)


# 4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["standard", "released"])
@pytest.mark.parametrize("height", [3.0, 40.0, 1e4])
def test_04_one_likely_token(mode: str, height: float) -> None:
    z = torch.zeros(7, dtype=F64)
    z[2] = height
    h = nucleus_entropy(z.requires_grad_(), 0.5, mode)
    assert h.item() == 0
    assert not gradient(h, z).any()


# 5 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_05_ten_values_have_two_peaks(seed: int) -> None:
    h = torch.randperm(10, generator=generator(seed))[None].double()
    peaks = peak_entropy_mask(h, torch.ones(1, 10, dtype=torch.bool))
    assert sorted(h[peaks].tolist()) == [8, 9]


@quick
@given(seed=seeds, q=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.9, 1.0]), scale=st.floats(0.01, 100))
def test_05_counts_order_idempotence_and_scale(seed: int, q: float, scale: float) -> None:
    h, mask = torch.rand(6, 23, generator=generator(seed), dtype=F64), some_mask(seed, 6, 23)
    peaks, n = peak_entropy_mask(h, mask, q), mask.sum(1)
    assert not (peaks & ~mask).any()
    expected = [int(k) - 1 - math.floor(q * (int(k) - 1)) for k in n]
    assert peaks.sum(1).tolist() == expected
    for other in (h.exp(), h**3, scale * h):
        assert torch.equal(peak_entropy_mask(other, mask, q), peaks)
    for row, kept, valid in zip(h, peaks, mask, strict=True):
        assert torch.equal(row[valid] > np.quantile(row[valid].numpy(), q), kept[valid])


@quick
@given(seed=seeds)
def test_05_applied_twice_as_released_is_applied_once(seed: int) -> None:
    h, mask = torch.rand(6, 23, generator=generator(seed), dtype=F64), torch.ones(6, 23, dtype=torch.bool)
    peaks = peak_entropy_mask(h, mask)
    assert torch.equal(peak_entropy_mask(h * peaks, mask), peaks)


# 6 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, quantile=st.sampled_from([0.0, 0.5, 0.8]), mode=st.sampled_from(["standard", "released"]))
def test_06_regularizer_equals_the_naive_loop(seed: int, quantile: float, mode: str) -> None:
    z, mask = some_logits(seed), some_mask(seed)
    anchor = EntropyAnchor(0.7, 0)
    loss, metrics = siren_regularizer(z, mask, anchor, 0.8, quantile, 0.3, mode=mode)
    mean = naive_regularizer(z, mask, 0.8, quantile, mode)
    expected = 0.3 * (mean - 0.7) ** 2
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(loss, z), gradient(expected, z), rtol=0, atol=1e-12)
    assert metrics["siren/gap/mean"].item() == pytest.approx(float(mean.detach()) - 0.7, abs=1e-12)


def test_06_nothing_at_the_anchor_and_a_push_back_from_both_sides() -> None:
    z, mask = some_logits(0), some_mask(0)
    empty = EntropyAnchor()
    loss, metrics = siren_regularizer(z, mask, empty)
    assert loss == 0
    assert not gradient(loss, z).any()
    mean = float(metrics["siren/peak_entropy/mean"])
    above, below = (
        gradient(siren_regularizer(z, mask, EntropyAnchor(mean + d, 0))[0], z) for d in (-0.2, 0.2)
    )
    torch.testing.assert_close(above, -below, rtol=1e-9, atol=1e-15)
    assert above.any()
    for anchor, moves in ((mean - 0.2, -1), (mean + 0.2, 1)):
        step = z - 0.01 * gradient(siren_regularizer(z, mask, EntropyAnchor(anchor, 0))[0], z)
        after = siren_regularizer(step, mask, empty)[1]["siren/peak_entropy/mean"]
        assert math.copysign(1, float(after) - mean) == moves


def unprepared(batch: Batch) -> Batch:
    """The batch as the sampler and the engine left it."""
    written = ("advantage", "keep", "weight")
    raw = {k: v for k, v in batch.columns.items() if k not in written and "/" not in k}
    return replace(batch, columns=raw)


def with_siren(term: object, coef: float = 3.0) -> Recipe:
    return replace(
        recipe("dr-grpo"), name="made", regularizers=(Weighted(term, coef=coef, mean=Mean(("row",), "all")),)
    )


def test_06_beta_0_leaves_the_loss_bit_identical() -> None:
    engine, batch = prepared(with_siren(Siren(), 0.0))
    moved_on(engine.policy)
    off = loss_and_gradient(engine, with_siren(Siren(), 0.0), batch, PIECES)
    plain = loss_and_gradient(engine, recipe("dr-grpo"), batch, PIECES)
    assert off[0] == plain[0]
    assert torch.equal(off[1], plain[1])
    assert with_siren(Siren(), 0.0).stats("loss") == recipe("dr-grpo").stats("loss")


# 7 --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, pad=st.integers(0, 4), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_07_what_padding_holds_never_matters(seed: int, pad: int, junk: float) -> None:
    z, mask = some_logits(seed), some_mask(seed)
    anchor = EntropyAnchor(0.5, 0)
    loss, _ = siren_regularizer(z, mask, anchor)
    wide = torch.nn.functional.pad(z.detach(), (0, 0, 0, pad))
    there = torch.nn.functional.pad(mask, (0, pad))
    wide = torch.where(there[..., None], wide, junk).requires_grad_()
    again, _ = siren_regularizer(wide, there, anchor)
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-14)
    found = gradient(again, wide)
    assert not found[~there].any()
    torch.testing.assert_close(found[:, :6], gradient(loss, z), rtol=0, atol=1e-14)
    h = torch.where(there, nucleus_entropy(wide.detach(), mask=there), math.nan)
    assert torch.equal(peak_entropy_mask(h, there)[:, :6], peak_entropy_mask(h[:, :6], mask))


@quick
@given(seed=seeds)
def test_07_order_of_the_rows_does_not_matter(seed: int) -> None:
    z, mask, order = some_logits(seed), some_mask(seed), torch.randperm(4, generator=generator(seed))
    anchor = EntropyAnchor(0.5, 0)
    loss, other = (siren_regularizer(z[i], mask[i], anchor)[0] for i in (slice(None), order))
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-14)


# 8 --------------------------------------------------------------------------------------------------------------


def test_08_one_token_has_no_peak() -> None:
    z = some_logits(1, 1, 1)
    loss, metrics = siren_regularizer(z, torch.ones(1, 1, dtype=torch.bool), EntropyAnchor(0.5, 0), beta=1.0)
    assert loss.item() == pytest.approx(0.25)
    assert not gradient(loss, z).any()
    assert metrics["siren/peak_entropy/mean"] == 0
    assert metrics["siren/peaks/frac"] == 0


def test_08_nothing_at_all() -> None:
    z = some_logits(1)
    loss, metrics = siren_regularizer(z, torch.zeros(4, 6, dtype=torch.bool), EntropyAnchor())
    assert loss == 0
    assert not gradient(loss, z).any()
    assert all(math.isfinite(float(value)) for value in metrics.values())
    assert not peak_entropy_mask(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)).any()


# 9 --------------------------------------------------------------------------------------------------------------


def test_09_temperature() -> None:
    z = some_logits(2)
    for temperature in (0.5, 2.0):
        token = torch.zeros(4, 6, dtype=torch.long)
        stat = NucleusEntropy("now")
        found = stat.of((z / temperature).flatten(0, 1), token.flatten())
        torch.testing.assert_close(found.view(4, 6), nucleus_entropy(z / temperature))
    assert not nucleus_entropy(z / 1e-4).any()
    made = replace(recipe("siren"), sampler=replace(recipe("siren").sampler, temperature=0.5))
    engine, batch = prepared(made)
    engine.temperature = 0.5
    found = engine.measure(batch, frozenset({NucleusEntropy("now")})).stats[NucleusEntropy("now")]
    hot = engine.lab.logits(engine.policy, batch.columns["prompt"], batch.ids) / 0.5
    torch.testing.assert_close(found, nucleus_entropy(hot, mask=batch.mask))


# 10 -------------------------------------------------------------------------------------------------------------


def seen(entropy: float, step: int = 0, tokens: int = 3) -> Batch:
    mask = torch.arange(4) < torch.tensor([[tokens], [max(tokens - 1, 0)]])
    h = torch.where(mask, entropy, math.nan).double()
    stats = {Entropy("old"): h, Entropy("now"): h}
    return Batch(uid=torch.arange(2), mask=mask, stats=stats, clock=Clock(step=step))


def test_10_the_multiplier_rises_exactly_below_the_anchor_and_stays_in_bounds() -> None:
    bonus = LagrangianEntropy(rate=0.1, limit=0.3)
    bonus.observe(seen(9.0, tokens=0))
    assert bonus.memory.value is None
    bonus.observe(seen(2.0, step=1))
    assert (bonus.memory.value, bonus.memory.step, bonus.coefficient) == (2.0, 1, 0.0)
    history = [0.0]
    for step, entropy in enumerate([3.0, 1.0, 1.5, 2.0, 2.5, 9.0, 0.0, 0.0, 0.0]):
        told = pytest.warns(UserWarning, match="at its limit of 0.3") if step == 7 else nullcontext()
        with told:
            bonus.observe(seen(entropy, step))
        history.append(bonus.coefficient)
        assert (history[-1] > history[-2]) == (entropy < 2.0 and history[-2] < 0.3)
    assert history == pytest.approx([0, 0, 0.1, 0.15, 0.15, 0.1, 0, 0.2, 0.3, 0.3])
    other = LagrangianEntropy(rate=0.1, limit=0.3)
    other.load_state_dict(bonus.state_dict())
    assert other.decide(seen(1.0))["coefficient"] == pytest.approx(0.3)
    assert other.memory == bonus.memory
    other.observe(seen(0.0, 9))  # still at its limit, but that was said


# A target out of reach --------------------------------------------------------------------------------------------


def watched(term: Siren, level: float) -> None:
    """One rollout batch whose mean peak entropy is `level`."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    h = torch.full((2, 6), level / 2, dtype=F64)
    h[:, 3] = level  # the one peak of each row
    term.observe(Batch(torch.arange(2), mask, stats={s.by("now"): h for s in term.needs}, clock=Clock()))


def pulled(term: Siren, mean: float) -> float:
    """The gap that the term acts on when the step's mean is `mean`."""
    mask = torch.ones(1, 6, dtype=torch.bool)
    h = torch.full((1, 6), mean, dtype=F64)
    own = term.decide_rollout(Batch(torch.arange(1), mask, stats=dict.fromkeys(term.needs, h), clock=Clock()))
    own = {"mean": torch.tensor(mean, dtype=F64), **own}
    return float(term._gap({k: v.reshape(1, 1).to(F64) for k, v in own.items()}))


def test_a_target_out_of_reach_is_given_up_with_a_warning_and_the_level_is_held() -> None:
    term = Siren(p=1.0, target=50.0, patience=10)
    levels = [2.5 - 1.0 * 0.6**step for step in range(40)]  # settles at 2.5 nats
    for step, level in enumerate(levels):
        expected = "target entropy of 50 nats is out of reach: 10 rollouts"
        with pytest.warns(UserWarning, match=expected) if step == 9 else nullcontext():  # else an error
            watched(term, level)
    held = term.reach.held
    assert held == pytest.approx(2.5, abs=0.1)
    assert pulled(term, 3.0) == 0.0  # between the level and the target nothing pulls
    assert pulled(term, 2.0) == pytest.approx(2.0 - held)
    other = Siren(p=1.0, target=50.0, patience=10)
    other.load_state_dict(term.state_dict())
    assert other.reach == term.reach
    watched(other, 51.0)  # it had it after all
    assert pulled(other, 49.0) == pytest.approx(-1.0)
    for _ in range(30):
        watched(other, 3.0)
    assert other.reach.held is None


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"target": 1.8}, [1.8, *([1.6] * 60)]),  # it had it: settling below is the usual balance
        ({"target": 2.0}, [0.5 + 0.01 * step for step in range(60)]),  # slow, but on its way
        ({"target": 50.0, "patience": 0}, [1.0] * 60),
        ({}, [1.8, *([1.6] * 60)]),
    ],
)
def test_a_target_that_was_had_or_comes_nearer_is_not_given_up(options: dict, levels: list[float]) -> None:
    term = Siren(p=1.0, **options)
    for level in levels:
        watched(term, level)
    assert pulled(term, 1.5) == pytest.approx(1.5 - options.get("target", 1.8))


def test_without_a_target_the_band_has_no_width() -> None:
    term = Siren(p=1.0)
    watched(term, 1.8)
    assert [pulled(term, mean) for mean in (1.0, 1.8, 2.5)] == pytest.approx([-0.8, 0.0, 0.7])


def test_a_target_above_the_entropy_of_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the entropy over 100 tokens is at most 4\.605"):
        Siren(target=5.0, top_k=100)
    made = with_siren(Siren(target=5.0))
    made.check_vocabulary(200)
    with pytest.raises(ConfigError, match="target is 5 nats"):
        made.check_vocabulary(100)


# The stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "term",
    [
        Siren(),
        Siren(nucleus="released"),
        Siren(peak_on="full"),
        Siren(p=1.0),
        Siren(quantile=None),
        Siren(top_k=2),
    ],
    ids=str,
)
def test_the_stage_is_the_formula_under_any_split(term: Siren) -> None:
    """Value and gradient of the square of a mean, with rows of one token (no peak) among the forty."""
    made, plain = with_siren(term), recipe("dr-grpo")
    engine, batch = prepared(made)
    mask = batch.mask.clone()
    mask[::7, 1:] = False
    batch = made.prepare(unprepared(replace(batch, mask=mask)))
    moved_on(engine.policy)
    base, base_gradient = loss_and_gradient(engine, plain, batch, WHOLE)
    engine.policy.zero_grad()
    z = engine.lab.logits(engine.policy, batch.columns["prompt"], batch.ids)
    h = nucleus_entropy(z, term.p, term.nucleus, term.top_k, mask=batch.mask)
    # as the engine measures it: the lab's states recur within a row, and their ties are broken by rounding
    ranked = engine.measure(batch, frozenset({term.ranked})).stats[term.ranked]
    peaks = peak_entropy_mask(ranked.detach(), batch.mask, term.quantile)
    anchor = float(term.aggregate(batch))
    loss = 3.0 * (peak_entropy_mean(h, peaks, batch.mask) - anchor) ** 2
    loss.backward()
    assert loss > 1e-4
    expected = base_gradient + engine.policy.table.grad
    for splits in (WHOLE, PIECES):
        value, found = loss_and_gradient(engine, made, batch, splits)
        assert value == pytest.approx(base + loss.item(), abs=1e-12)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_first_update_of_the_first_batch_has_no_gap_when_it_is_one_minibatch() -> None:
    _, batch = prepared(with_siren(Siren()))
    plan = with_siren(Siren()).plan(batch)
    assert torch.equal(plan.columns["own/Siren/anchor"], plan.columns["own/Siren/mean"])


def test_the_anchor_is_of_the_whole_first_batch_on_every_minibatch_and_kept() -> None:
    made = recipe("siren")
    engine, batch = prepared(made)
    term = made.regularizers[0].term
    whole = term.aggregate(batch)
    halves = [made.plan(batch[rows]) for rows in torch.arange(40).chunk(2)]
    for half in halves:
        assert (half.columns["own/Siren/anchor"] == whole).all()
    assert halves[0].columns["own/Siren/mean"][0] != halves[1].columns["own/Siren/mean"][0]
    made.observe(batch)
    assert term.memory == EntropyAnchor(float(whole), batch.clock.step)
    moved_on(engine.policy)
    later = engine.measure(batch, made.stats("rollout"))
    made.observe(later)
    assert term.memory.value == float(whole)
    again = made.prepare(unprepared(replace(later, clock=Clock(step=9))))
    assert (again.columns["own/Siren/anchor"] == whole).all()
    other = recipe("siren")
    other.load_state_dict(made.state_dict())
    assert other.regularizers[0].term.memory == term.memory
    fixed = with_siren(Siren(target=0.3))
    fixed.observe(batch)
    assert fixed.regularizers[0].term.memory.value is None
    assert (fixed.prepare(unprepared(later)).columns["own/Siren/anchor"] == 0.3).all()


def test_an_empty_first_batch_leaves_no_anchor() -> None:
    made = recipe("siren")
    _, batch = prepared(made)
    made.observe(replace(batch, mask=torch.zeros_like(batch.mask)))
    assert made.regularizers[0].term.memory.value is None


def test_rows_of_other_parts_enter_neither_anchor_nor_mean() -> None:
    made = recipe("siren")
    _, batch = prepared(made)
    part = torch.zeros(40, dtype=torch.long)
    part[:15] = 1
    mixed = made.prepare(unprepared(batch).with_columns(part=part, scale=torch.ones(40, dtype=F64)))
    made.observe(mixed)
    expected = float(made.regularizers[0].term.aggregate(batch[part == 0]))
    assert made.regularizers[0].term.memory.value == pytest.approx(expected, abs=1e-14)
    assert mixed.columns["own/Siren/anchor"][part == 0] == pytest.approx(expected, abs=1e-14)


def test_rows_that_a_filter_drops_do_not_enter_the_anchor() -> None:
    made = replace(recipe("siren"), filters=recipe("dapo").filters)
    _, batch = prepared(made)
    reward = torch.where(batch.group == batch.group[0], 1.0, batch.reward)
    batch = made.prepare(unprepared(batch).with_columns(reward=reward))
    live = batch.mask.any(1)
    assert 0 < int(live.sum()) < len(batch)
    made.observe(batch)
    expected = float(made.regularizers[0].term.aggregate(batch[live]))
    assert made.regularizers[0].term.memory.value == pytest.approx(expected, abs=1e-14)


def test_per_micro_batch_as_released() -> None:
    """Each micro-batch squares its own mean and counts with its share of the rows."""
    made, plain = with_siren(Siren(scope="microbatch")), recipe("dr-grpo")
    assert made.split_dependent
    engine, batch = prepared(made)
    moved_on(engine.policy)
    base, base_gradient = loss_and_gradient(engine, plain, batch, PIECES)
    anchor = float(Siren().aggregate(batch))
    engine.policy.zero_grad()
    z = engine.lab.logits(engine.policy, batch.columns["prompt"], batch.ids)
    h = nucleus_entropy(z, mask=batch.mask)
    peaks = peak_entropy_mask(h.detach(), batch.mask)
    loss = sum(
        3.0 * len(rows) / 40 * (peak_entropy_mean(h[rows], peaks[rows], batch.mask[rows]) - anchor) ** 2
        for rows in PIECES
    )
    loss.backward()
    expected = base_gradient + engine.policy.table.grad
    value, found = loss_and_gradient(engine, made, batch, PIECES)
    assert value == pytest.approx(base + loss.item(), abs=1e-12)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_bonus_without_anchor_is_minus_the_mean_and_needs_no_second_forward() -> None:
    made, plain = with_siren(PeakEntropyBonus()), recipe("dr-grpo")
    assert not made.has("minibatch")
    engine, batch = prepared(made)
    moved_on(engine.policy)
    base, base_gradient = loss_and_gradient(engine, plain, batch, WHOLE)
    engine.policy.zero_grad()
    h = nucleus_entropy(engine.lab.logits(engine.policy, batch.columns["prompt"], batch.ids), mask=batch.mask)
    loss = -3.0 * peak_entropy_mean(h, peak_entropy_mask(h.detach(), batch.mask), batch.mask)
    loss.backward()
    expected = base_gradient + engine.policy.table.grad
    value, found = loss_and_gradient(engine, made, batch, PIECES)
    assert value == pytest.approx(base + loss.item(), abs=1e-12)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_what_it_reports_adds_up() -> None:
    made = replace(
        with_siren(Siren()),
        regularizers=(
            Weighted(Siren(), coef=1.0, mean=Siren.mean),
            Weighted(PeakEntropyBonus(), coef=1.0, mean=Siren.mean),
            Weighted(LagrangianEntropy(start=0.1)),
        ),
    )
    engine, batch = prepared(made)
    moved_on(engine.policy)
    plan = made.plan(engine.measure(batch, made.stats("plan")))
    pieces = [made.loss(engine.measure(plan[rows], made.stats("loss"))).metrics for rows in PIECES]
    found = {
        name: float(sum(p[name][0] for p in pieces) / sum(p[name][1] for p in pieces)) for name in pieces[0]
    }
    term = Siren()
    now = engine.measure(batch, made.stats("loss"))
    mean, anchor = float(term.aggregate(now)), float(term.aggregate(batch))
    assert found["siren/peak_entropy/mean"] == pytest.approx(mean)
    assert found["siren/gap/mean"] == pytest.approx(mean - anchor)
    assert found["siren/anchor/value"] == pytest.approx(anchor)
    assert found["siren/peaks/frac"] == pytest.approx(float(term.peaks(now).sum() / batch.mask.sum()))
    empty = ~term.peaks(now).any(1) & batch.mask.any(1)
    assert found["siren/empty_rows/frac"] == pytest.approx(float(empty.sum() / 40))
    assert found["peak_bonus/peak_entropy/mean"] == found["siren/peak_entropy/mean"]
    assert found["lagrangian/coefficient/value"] == pytest.approx(0.1)


# Recipes and refusals -----------------------------------------------------------------------------------------------


def test_the_recipes_hold_the_official_settings() -> None:
    made, released = recipe("siren"), recipe("siren-released")
    assert made.regularizers[0].coef == released.regularizers[0].coef == 0.005
    term = made.regularizers[0].term
    assert (term.p, term.quantile, term.nucleus, term.top_k, term.peak_on) == (
        0.8, 0.8, "standard", None, "nucleus",
    )  # fmt: skip
    assert released.regularizers[0].term == replace(term, nucleus="released", top_k=10_000)
    assert (made.surrogate.low, made.surrogate.high, made.surrogate.dual) == (0.2, 0.2, 3.0)
    assert made.sampler.samples == 8
    assert not made.advantage[0].std
    assert made.mean == Sum()
    assert released.mean == Sum(per_row=False)


def test_recipes_from_the_registry_share_no_anchor() -> None:
    first, second = recipe("siren"), recipe("siren")
    first.regularizers[0].term.memory.observe(torch.tensor(1.0), 0)
    assert second.regularizers[0].term.memory.value is None
    assert first == second


def test_the_full_entropy_needs_no_nucleus() -> None:
    assert Siren(p=1.0).needs == {Entropy("now"), Entropy("old")}
    assert Siren(peak_on="full").needs == {
        s.by(w) for s in (Entropy(), NucleusEntropy()) for w in ("now", "old")
    }


def test_from_yaml() -> None:
    document = {
        "name": "mine",
        "base": "siren",
        "regularizers": [
            {
                "term": {"siren": {"p": 0.9, "quantile": None, "scope": "microbatch"}},
                "coef": 0.1,
                "mean": {"levels": ["row"], "rows": "all"},
            }
        ],
    }
    term = resolve(document).regularizers[0].term
    assert term == Siren(p=0.9, quantile=None, scope="microbatch")
    document["regularizers"] = ["siren"]
    with pytest.raises(ConfigError, match="Siren is defined with the mean"):
        resolve(document)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Siren(p=0.0), "p is 0.0; give a number above 0"),
        (lambda: Siren(p=1.1), "p is 1.1"),
        (lambda: Siren(quantile=80.0), "quantile is 80; give a share"),
        (lambda: Siren(top_k=0), "top_k is 0"),
        (lambda: Siren(target=-1.0), "target is -1"),
        (lambda: Siren(target=math.nan), "target is nan"),
        (lambda: Siren(patience=1), "patience is 1"),
        (lambda: Siren(scope="rollout"), "scope 'rollout' would hold the mean"),
        (lambda: PeakEntropyBonus(p=2.0), "p is 2.0"),
        (lambda: LagrangianEntropy(rate=0.0), "needs rate > 0"),
        (lambda: LagrangianEntropy(scope="minibatch"), "scope rollout"),
        (lambda: Weighted(Siren(), mean=Mean()), "Siren is defined with the mean"),
        (lambda: nucleus_entropy(torch.zeros(3), 0.0), "p is 0.0"),
        (lambda: nucleus_entropy(torch.zeros(3), chunk=0), "chunk is 0"),
        (lambda: peak_entropy_mask(torch.zeros(1, 3), torch.ones(1, 3).bool(), 80.0), "quantile is 80"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_groups_of_one_and_equal_rewards_leave_the_regularizer_at_work() -> None:
    made = replace(recipe("siren"), sampler=replace(recipe("siren").sampler, samples=1))
    engine, batch = prepared(made)
    moved_on(engine.policy)
    assert not batch.advantage.any()
    loss, found = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    assert loss > 0
    assert found.any()
    assert torch.isfinite(found).all()


def test_half_precision_logits_give_float32_entropies() -> None:
    z = some_logits(5).detach().bfloat16()
    h = nucleus_entropy(z)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h.double(), nucleus_entropy(z.double()), rtol=1e-5, atol=1e-5)
