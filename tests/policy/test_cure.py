"""CURE: the exact checks of the method, a naive reference of the choice of positions, and bad input."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from lab import Table, TableLab, loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError, DataError
from uncollapse.models import load
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.cure import (
    CureSampler,
    FamilyAdvantage,
    ModelWriter,
    TwoStageSampler,
    TwoStageSchedule,
    branch_prompts,
    critical_positions,
    critical_tokens,
    effective_samples,
    expected_tokens,
    family_variance,
    left_pad,
)
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.filters import DropDeadGroups
from uncollapse.policy.stages.samplers import DynamicSampler, PlainSampler, dead_groups
from uncollapse.policy.stats import Entropy, Logp
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, TablePolicy, correct

F64 = torch.float64
SMALL = CureSampler(samples=8, branches=3, k=2)


def naive_candidates(entropy, mask, token_ok, max_pos):
    """What may be cut, best first, for one row: written as the recipe of the method reads."""
    first = next((t for t, inside in enumerate(mask) if inside), 0)
    ranked = sorted(range(len(entropy)), key=lambda t: -entropy[t])
    return first, [t for t in ranked if mask[t] and t != first and token_ok[t] and t <= max_pos]


def modsum_batch(sampler, *, task=None, seed=0, clock=None):
    task = task or ModSum(prompts=3, length=6, vocab=5)
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(seed), F64))
    engine = LogitsEngine(ModSumLab(task), policy)
    return engine, sampler(engine, list(range(task.prompts)), clock or Clock(step=1, seed=seed))


def values(task, table):
    """Probability of a right answer from every (prompt, position, running sum), by recursion from the end."""
    p = table.softmax(-1)
    here = torch.arange(task.vocab)
    after = (here[:, None] + here[None, :]) % task.vocab
    targets = task.targets(torch.arange(task.prompts))
    value = [torch.nn.functional.one_hot(targets, task.vocab).to(table.dtype)]
    for t in reversed(range(task.length)):
        value.insert(0, (p[:, t] * value[0][:, after]).sum(-1))
    return torch.stack(value, 1)


# ---- 1: sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "branches"), [(16, 3), (8, 1), (6, 5), (4, 0), (12, 2)])
def test_1_a_group_is_its_originals_and_their_branches(samples, branches):
    sampler = CureSampler(samples=samples, branches=branches, k=2)
    _, batch = modsum_batch(sampler)
    originals = samples // (1 + branches)
    assert sampler.originals == originals
    assert len(batch) == 3 * originals * (1 + branches)
    assert torch.equal(batch.uid, torch.arange(3 * samples))
    family, branch = (batch.columns[name].view(3, samples) for name in ("family", "branch"))
    expected = [*range(originals), *(f for f in range(originals) for _ in range(branches))]
    assert family.tolist() == [expected] * 3
    assert branch.tolist() == [[0] * originals + [*range(1, branches + 1)] * originals] * 3
    assert batch.group.view(3, samples).tolist() == [[g] * samples for g in range(3)]
    assert [p for g in range(3) for p in [g] * samples] == batch.columns["prompt"]


def test_1_without_branches_it_is_vanilla_bit_for_bit():
    _, mine = modsum_batch(CureSampler(samples=6, branches=0))
    _, plain = modsum_batch(PlainSampler(samples=6))
    for name, value in plain.columns.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine.columns[name], value), name
    assert torch.equal(mine.mask, plain.mask)
    assert torch.equal(mine.uid, plain.uid)
    assert mine.clock == plain.clock
    assert mine.columns["family"].tolist() == [*range(6)] * 3


def test_1_without_branches_training_is_vanilla_bit_for_bit():
    tables = []
    for sampler in (CureSampler(samples=6, branches=0), PlainSampler(samples=6)):
        method = replace(recipe("cure"), name="n1-only", rewards=(), sampler=sampler)
        task = ModSum(prompts=3, length=4, vocab=4)
        policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(0)))
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        trainer = Trainer(method, LogitsEngine(ModSumLab(task), policy), optimizer, seed=3, minibatches=2)
        for _ in range(3):
            trainer.step([0, 1, 2])
        tables.append(policy.table.detach().clone())
    assert torch.equal(*tables)


# ---- 2: prefixes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["entropy", "random"])
def test_2_a_branch_continues_prompt_and_prefix_of_its_parent(mode):
    _, batch = modsum_batch(CureSampler(samples=16, k=3, mode=mode))
    ids, cut, family, branch = batch.ids, *(batch.columns[n] for n in ("cut", "family", "branch"))
    resampled = 0
    for row in range(len(batch)):
        parent = int(batch.group[row]) * 16 + int(family[row])
        end = int(cut[row])
        assert batch.columns["prompt"][row] == batch.columns["prompt"][parent]
        if branch[row] == 0:
            assert end == 0
            assert batch.mask[row].all()
            continue
        assert end > 0
        assert torch.equal(ids[row, :end], ids[parent, :end])
        assert not batch.mask[row, :end].any()
        assert batch.mask[row, end:].all()
        resampled += int(ids[row, end] != ids[parent, end])
    assert 0 < resampled < 36  # the critical token is drawn again, and may come out the same


def test_2_the_resampled_token_equals_the_old_one_with_its_probability():
    task = ModSum(prompts=1, length=2, vocab=3)
    engine, batch = modsum_batch(CureSampler(samples=8000, k=1), task=task)
    branches = batch.columns["branch"] > 0
    parent = batch.columns["family"]
    same = batch.ids[branches, 1] == batch.ids[parent[branches], 1]
    p = engine.policy.table.detach()[0].softmax(-1)
    expected = (p[0, 0] * (p[1] ** 2).sum(-1)).sum()  # first token = running sum, then the same token twice
    assert abs(same.double().mean() - expected) < 4 * 0.5 / math.sqrt(2000)


# ---- 3: the choice ---------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 9),
    limit=st.integers(0, 9),
    mode=st.sampled_from(["entropy", "random"]),
)
@settings(max_examples=60)
def test_3_the_choice_is_the_naive_one(seed, k, limit, mode):
    g = torch.Generator().manual_seed(seed)
    entropy = (4 * torch.rand(6, 8, generator=g)).round()  # with ties
    mask = torch.rand(6, 8, generator=g) < 0.7
    token_ok = torch.rand(6, 8, generator=g) < 0.6
    entropy = torch.where(mask, entropy, torch.nan)
    uniform = torch.rand(6, generator=g, dtype=F64)
    found = critical_positions(entropy, mask, token_ok, k, mode, limit, uniform=uniform)
    for row in range(6):
        level = entropy[row].nan_to_num(0.0) * (mode == "entropy")
        first, ranked = naive_candidates(level.tolist(), mask[row], token_ok[row], limit)
        kept = ranked[:k] if mode == "entropy" else ranked
        expected = kept[int(uniform[row] * len(kept))] if kept else first
        assert int(found[row]) == expected


def test_3_the_draw_is_uniform_over_the_k_largest():
    entropy = torch.tensor([9.0, 1.0, 5.0, 3.0, 4.0, 8.0]).expand(10_000, 6)
    mask = torch.ones(10_000, 6, dtype=torch.bool)
    token_ok = torch.ones(10_000, 6, dtype=torch.bool)
    token_ok[:, 5] = False
    found = critical_positions(entropy, mask, token_ok, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(found, minlength=6)
    assert counts[[0, 1, 5]].tolist() == [0, 0, 0]
    chi_square = ((counts[[2, 3, 4]] - 10_000 / 3) ** 2 / (10_000 / 3)).sum()
    assert chi_square < 13.8  # 0.999 of chi-square with 2 degrees of freedom
    keys = Clock(seed=1).uniform(torch.arange(10_000), 1, "cure")[:, 0]
    counts = torch.bincount(critical_positions(entropy, mask, None, 5, uniform=keys), minlength=6)
    assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 18.5  # 4 degrees of freedom


def test_3_no_survivor_means_a_whole_new_answer():
    entropy, none = torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    uniform = torch.full((3,), 0.99)
    assert critical_positions(entropy, mask, none, uniform=uniform).tolist() == [0, 0, 0]
    assert critical_positions(entropy, mask, max_pos=0, uniform=uniform).tolist() == [0, 0, 0]
    only = critical_positions(entropy, mask, uniform=uniform)
    assert only[1:].tolist() == [0, 0]  # a single token, and none at all
    assert only[0] > 0
    given = torch.tensor(
        [[0, 0, 1, 0]], dtype=torch.bool
    )  # a response that itself continues two given tokens
    assert critical_positions(entropy[:1], given, uniform=uniform[:1]).tolist() == [2]
    empty = critical_positions(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), uniform=torch.zeros(2))
    assert empty.tolist() == [0, 0]


def test_3_ties_go_to_the_earlier_position():
    mask = torch.ones(1, 7, dtype=torch.bool)
    for key in (0.0, 0.4, 0.999):
        found = critical_positions(torch.ones(1, 7), mask, k=2, uniform=torch.tensor([key]))
        assert int(found) == (1 if key < 0.5 else 2)


@given(seed=st.integers(0, 1000), extra=st.integers(1, 4))
@settings(max_examples=25)
def test_3_neither_padding_nor_row_order_changes_the_choice(seed, extra):
    g = torch.Generator().manual_seed(seed)
    entropy, mask = torch.rand(7, 5, generator=g), torch.rand(7, 5, generator=g) < 0.8
    uniform = torch.rand(7, generator=g, dtype=F64)
    order = torch.randperm(7, generator=g)
    found = critical_positions(entropy, mask, k=3, uniform=uniform)
    wide = torch.nn.functional.pad(entropy, (0, extra), value=torch.nan)
    again = critical_positions(
        wide[order],
        torch.nn.functional.pad(mask, (0, extra))[order],
        k=3,
        uniform=uniform[order],
    )
    assert torch.equal(again, found[order])


def test_3_special_and_short_tokens_are_never_critical():
    decoded = ["<eos>", " a", "the", "\n", "7", "", " So", "..", "<pad>", "é"]
    table = critical_tokens(decoded, special=(0, 8))
    assert table.tolist() == [False, False, True, False, False, False, True, True, False, False]
    policy = Table(prompts=5)
    table = torch.tensor(
        [False, True, False, True, True, False]
    )  # the vocabulary has a seventh, unknown token
    sampler = CureSampler(samples=16, k=6, token_ok=table)
    engine = LogitsEngine(TableLab(), policy)
    batch = sampler(engine, list(range(5)), Clock())
    is_branch = batch.columns["branch"] > 0
    parent = batch.group[is_branch] * 16 + batch.columns["family"][is_branch]
    cut = batch.columns["cut"][is_branch]
    critical = batch.ids[parent].gather(1, cut[:, None])[:, 0]
    assert set(critical[cut > 0].tolist()) <= {1, 3, 4}
    assert (cut > 0).any()


def test_3_a_vocabulary_of_single_characters_has_critical_tokens_on_request_and_a_warning_without():
    decoded, special = ["<pad>", "<eos>", " ", "\n", "7", "+", "="], (0, 1)
    with pytest.warns(UserWarning, match="none of 7 tokens has 2 characters.*set shortest to 1"):
        assert not critical_tokens(decoded, special).any()
    assert critical_tokens(decoded, special, 1).tolist() == [False] * 4 + [True] * 3
    assert critical_tokens(decoded, special, 0).tolist() == [False] * 2 + [True] * 5
    sampler = CureSampler(samples=16, k=2, shortest=1).for_vocabulary(decoded, special)
    batch = sampler(LogitsEngine(TableLab(), Table(prompts=5)), list(range(5)), Clock())
    cut, is_branch = batch.columns["cut"], batch.columns["branch"] > 0
    assert (cut[is_branch] > 0).any()
    parent = batch.group * 16 + batch.columns["family"]
    critical = batch.ids[parent].gather(1, cut[:, None])[:, 0]
    assert set(critical[cut > 0].tolist()) <= {4, 5, 6}
    assert sampler.for_vocabulary(["xx"], ()) is sampler
    alone = CureSampler(branches=0)
    assert alone.for_vocabulary(decoded, special) is alone
    with pytest.warns(UserWarning, match="every branch is a whole new answer"):
        CureSampler().for_vocabulary(decoded, special)


def test_3_special_ids_beyond_the_table_change_nothing_and_negative_ones_are_refused():
    assert critical_tokens(["xx", "yy"], special=[1, 2, 99]).tolist() == [True, False]
    with pytest.raises(DataError, match="-1 is no token id"):
        critical_tokens(["xx", "yy"], special=[-1])


def test_3_the_chosen_position_is_among_the_k_largest():
    engine, batch = modsum_batch(SMALL)
    first = PlainSampler(2)(engine, [0, 1, 2], Clock(step=1))
    measured = engine.measure(first, frozenset({Entropy("old")}))
    cut = SMALL.cuts(measured)
    entropy = measured.stats[Entropy("old")]
    rank = (entropy[:, 1:] > entropy.gather(1, cut[:, None])).sum(1)
    assert (cut > 0).all()
    assert (rank < 2).all()
    branches = batch.columns["branch"] == 1
    assert torch.equal(batch.columns["cut"][branches], cut)


# ---- 4: advantages ---------------------------------------------------------------------------------------------------


def test_4_advantages_are_those_of_the_whole_group():
    method = replace(recipe("cure"), name="group", rewards=())
    _, batch = prepared(method)
    rewards = batch.reward.view(5, 16)
    dead = (rewards == rewards[:, :1]).all(1)
    row = torch.where(batch.mask, batch.advantage, torch.nan).nanmean(1).view(5, 16)
    assert (~dead).any()
    for g in range(5):
        if dead[g]:
            assert not batch.mask.view(5, 16, -1)[g].any()
            continue
        assert row[g].sum().abs() < 1e-9
        expected = (rewards[g] - rewards[g].mean()) / (rewards[g].std() + 1e-6)
        torch.testing.assert_close(row[g], expected)
        # one value for all trainable tokens of a member
        trained = batch.mask.view(5, 16, -1)[g]
        torch.testing.assert_close(batch.advantage.view(5, 16, -1)[g], row[g][:, None] * trained)


@given(seed=st.integers(0, 500), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
@settings(max_examples=25)
@pytest.mark.parametrize("stage", [GroupAdvantage(eps=1e-6), FamilyAdvantage()])
def test_4_shift_and_scale_of_the_reward_do_not_matter(stage, seed, shift, scale):
    batch = family_batch(seed)
    moved = batch.with_columns(reward=scale * batch.reward + shift)
    torch.testing.assert_close(stage(moved)["advantage"], stage(batch)["advantage"], atol=1e-4, rtol=1e-4)


def family_batch(seed, *, groups=4, originals=3, branches=2):
    g = torch.Generator().manual_seed(seed)
    size = originals * (1 + branches)
    family = [*range(originals), *(f for f in range(originals) for _ in range(branches))] * groups
    branch = ([0] * originals + [*range(1, branches + 1)] * originals) * groups
    columns = {
        "reward": torch.randn(groups * size, generator=g, dtype=F64),
        "group": torch.arange(groups).repeat_interleave(size),
        "family": torch.tensor(family),
        "branch": torch.tensor(branch),
    }
    return Batch(torch.arange(groups * size), torch.ones(groups * size, 2, dtype=torch.bool), columns)


@given(seed=st.integers(0, 100))
@settings(max_examples=10)
def test_family_variances_add_up_and_equal_the_naive_ones(seed):
    batch = family_batch(seed)
    family = batch.columns["family"]
    within, between = family_variance(batch.reward, batch.group, family)
    for g in range(4):
        reward, own = batch.reward[batch.group == g], family[batch.group == g]
        means = torch.stack([reward[own == f].mean() for f in own])
        assert within[g] == pytest.approx(float(((reward - means) ** 2).mean()))
        assert between[g] == pytest.approx(float(((means - reward.mean()) ** 2).mean()))
        assert within[g] + between[g] == pytest.approx(float(reward.var(unbiased=False)))
    order = torch.randperm(len(family), generator=torch.Generator().manual_seed(seed))
    again = family_variance(batch.reward[order], batch.group[order], family[order])
    torch.testing.assert_close(again, (within, between))


def test_family_variance_counts_no_nan_and_takes_an_empty_batch():
    batch = family_batch(0)
    reward = batch.reward.clone()
    reward[::4] = torch.nan
    within, between = family_variance(reward, batch.group, batch.columns["family"])
    known = ~reward.isnan()
    for g in range(4):
        here = known & (batch.group == g)
        assert within[g] + between[g] == pytest.approx(float(reward[here].var(unbiased=False)))
    none = torch.zeros(0, dtype=torch.long)
    assert [len(v) for v in family_variance(torch.zeros(0), none, none)] == [0, 0]


def test_effective_samples_from_independent_to_identical_members():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 4, 4, generator=g, dtype=F64)
    shared = torch.randn(4000, 4, 1, generator=g, dtype=F64)

    def effective(rewards):
        within = ((rewards - rewards.mean(2, keepdim=True)) ** 2).mean()
        between = ((rewards.mean(2) - rewards.mean((1, 2))[:, None]) ** 2).mean()
        return effective_samples(float(within), float(between), 4, 4)

    assert effective(noise) == pytest.approx(16, abs=0.7)
    assert effective(shared.expand(-1, -1, 4)) == pytest.approx(4)
    assert effective(shared + noise) == pytest.approx(16 / (1 + 3 * 0.5), abs=0.3)
    assert effective_samples(0.0, 0.3, 7, 1) == 7
    assert effective_samples(0.0, 0.0, 4, 4) == 16


def test_a_family_baseline_compares_branches_within_and_originals_across():
    batch = family_batch(3)
    advantage = FamilyAdvantage()(batch)["advantage"][:, 0]
    reward, group, family, branch = (batch.columns[n] for n in ("reward", "group", "family", "branch"))
    for row in range(len(batch)):
        mine = group == group[row]
        std = reward[mine].std() + 1e-6
        pool = mine & (family == family[row]) if branch[row] else mine
        assert advantage[row] == pytest.approx(float((reward[row] - reward[pool].mean()) / std))


def test_a_family_baseline_without_branches_is_the_group_s():
    batch = family_batch(5, originals=6, branches=0)
    torch.testing.assert_close(FamilyAdvantage()(batch), GroupAdvantage(eps=1e-6)(batch))


def test_a_family_of_equal_rewards_has_advantage_zero():
    batch = family_batch(5)
    same = (batch.group == 1) & (batch.columns["family"] == 2)
    batch = batch.with_columns(reward=torch.where(same, 0.1, batch.reward))
    advantage = FamilyAdvantage()(batch)["advantage"]
    assert not advantage[same & (batch.columns["branch"] > 0)].any()
    assert advantage[same & (batch.columns["branch"] == 0)].all()


# ---- 5: gradients ----------------------------------------------------------------------------------------------------


def test_5_prefix_tokens_have_no_gradient_in_branches():
    """At the states of position 0, which no branch samples, the gradient is that of the originals alone."""
    method = replace(recipe("cure"), name="gradient", rewards=(), sampler=replace(SMALL, k=2))
    task = ModSum(prompts=3, length=5, vocab=4)
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(0), F64))
    engine = LogitsEngine(ModSumLab(task), policy)
    batch = method.sampler(engine, [0, 1, 2], Clock(seed=5))
    lively = batch.clock.uniform(batch.uid, 1, "reward")[:, 0]  # no group of equal rewards
    batch = batch.with_columns(reward=lively)
    batch = method.prepare(engine.measure(batch, method.stats("rollout")))

    def gradient(rows):
        policy.zero_grad()
        plan = method.plan(batch)[rows]
        method.loss(engine.measure(plan, method.stats("loss"), grad=True)).loss.backward()
        return policy.table.grad.clone()

    everyone = torch.arange(len(batch))
    originals = everyone[batch.columns["branch"] == 0]
    branches = everyone[batch.columns["branch"] > 0]
    all_rows, first, second = gradient(everyone), gradient(originals), gradient(branches)
    torch.testing.assert_close(all_rows, first + second)
    assert first[:, 0].abs().sum() > 0
    assert torch.equal(second[:, 0], torch.zeros_like(second[:, 0]))
    torch.testing.assert_close(all_rows[:, 0], first[:, 0])
    for row in branches.tolist():
        alone = gradient(torch.tensor([row]))
        cut = int(batch.columns["cut"][row])
        assert not alone[:, :cut].any()


def test_5_the_loss_has_the_gradient_of_its_formula():
    method = replace(recipe("cure"), name="checked", rewards=(), sampler=SMALL)
    engine, batch = prepared(method, seed=4)
    moved_on(engine.policy, size=0.1)
    rows = [torch.arange(len(batch))]
    _, gradient = loss_and_gradient(engine, method, batch, rows)
    direction = torch.randn(gradient.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    h, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            engine.policy.table += sign * h * direction
        ends.append(loss_and_gradient(engine, method, batch, rows)[0])
        with torch.no_grad():
            engine.policy.table -= sign * h * direction
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


# ---- 6, 7: limits and padding ----------------------------------------------------------------------------------------


def test_6_the_released_truncation_moves_the_cut_and_reject_prevents_it():
    prompt, response = [1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15, 16, 17]
    cut = torch.tensor([6])
    assert branch_prompts([prompt], [response], cut) == [[*prompt, 10, 11, 12, 13, 14, 15]]
    assert branch_prompts([prompt], [response], cut, 8, "head") == [[*prompt, 10, 11, 12]]
    with pytest.raises(DataError, match="row 0: prompt and prefix have 11 tokens, the limit is 8"):
        branch_prompts([prompt], [response], cut, 8)
    entropy, mask = torch.rand(500, 8), torch.ones(500, 8, dtype=torch.bool)
    found = critical_positions(
        entropy,
        mask,
        max_pos=torch.full((500,), 8 - 5),
        generator=torch.Generator().manual_seed(0),
    )
    assert set(found.tolist()) == {1, 2, 3}  # a prefix that fills the limit exactly is fine
    assert all(len(p) <= 8 for p in branch_prompts([prompt] * 500, [response] * 500, found, max_prompt_len=8))


@pytest.mark.parametrize("keep", ["reject", "head"])
def test_6_the_sampler_limits_its_prefixes(keep):
    free, limited = (
        modsum_batch(CureSampler(samples=16, k=5, **options))[1].columns["cut"]
        for options in ({}, {"prefix_limit": 2, "keep": keep})
    )
    assert limited.max() == 2
    if keep == "head":
        assert torch.equal(limited, free.clamp(max=2))
    else:
        assert not torch.equal(limited, free.clamp(max=2))
    assert not modsum_batch(CureSampler(samples=16, k=5, prefix_limit=0))[1].columns["cut"].any()


def test_7_left_padding():
    ids, attention, position = left_pad([[7], [1, 2, 3], []], pad_id=9, length=4)
    assert ids.tolist() == [[9, 9, 9, 7], [9, 1, 2, 3], [9, 9, 9, 9]]
    assert attention.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert position.tolist() == [[0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert left_pad([[1], [2, 3]])[0].shape == (2, 2)


# ---- 8: tokens -------------------------------------------------------------------------------------------------------


def test_8_tokens_generated():
    length, n1, n2 = 6, 4, 3
    mean_cut = sum(range(1, length)) / (length - 1)
    assert expected_tokens(n1, n2, length, mean_cut) == n1 * length + n1 * n2 * length / 2
    _, batch = modsum_batch(CureSampler(samples=16, mode="random"), task=ModSum(200, length, 4))
    per_group = float(batch.columns["length"].sum()) / 200
    cut = float(batch.columns["cut"][batch.columns["branch"] > 0].double().mean())
    assert per_group == pytest.approx(expected_tokens(n1, n2, length, cut))
    assert per_group == pytest.approx(n1 * length + n1 * n2 * length / 2, rel=0.03)


# ---- 9: values of branches -------------------------------------------------------------------------------------------


def every_parent(task, table):
    """All answers to prompt 0, their probabilities, their running sums and the entropy at each position."""
    ids = torch.tensor([*itertools.product(range(task.vocab), repeat=task.length)])
    state = (ids.cumsum(1) - ids) % task.vocab
    logp = table[0].log_softmax(-1)[torch.arange(task.length), state]
    probability = logp.gather(2, ids[..., None])[..., 0].sum(1).exp()
    return state, probability, -(logp.exp() * logp).sum(-1)


def test_9_a_fixed_cut_leaves_the_value_of_the_prompt():
    task = ModSum(prompts=1, length=4, vocab=4)
    table = task.initial_logits(torch.Generator().manual_seed(2), F64)
    value = values(task, table)[0]
    state, probability, entropy = every_parent(task, table)
    everywhere = value[torch.arange(task.length), state]
    assert probability.sum() == pytest.approx(1)
    for cut in range(task.length):
        assert float((probability * everywhere[:, cut]).sum()) == pytest.approx(float(value[0, 0]), abs=1e-12)
    # A rule that looks at the prefix alone is a stopping time, and just as unbiased.
    early = (entropy > entropy[:, 1:].median()) & (torch.arange(task.length) > 0)
    early[:, -1] = True
    stop = early.int().argmax(1)
    stopped = everywhere.gather(1, stop[:, None])[:, 0]
    assert float((probability * stopped).sum()) == pytest.approx(float(value[0, 0]), abs=1e-12)
    # The largest entropy of the whole answer is not: where the answer went decides where it is cut.
    ranked = 1 + entropy[:, 1:].argmax(1)
    chosen = everywhere.gather(1, ranked[:, None])[:, 0]
    bias = float((probability * chosen).sum() - value[0, 0])
    assert 1e-6 < abs(bias) < 0.05


def test_9_branches_of_a_prefix_have_its_value():
    task = ModSum(prompts=1, length=4, vocab=4)
    table = task.initial_logits(torch.Generator().manual_seed(2), F64)
    engine = LogitsEngine(ModSumLab(task), TablePolicy(table))
    count = 20_000
    batch = engine.generate([0] * count, temperature=1.0, clock=Clock(), prefixes=[[3, 2]] * count)
    measured = float(engine.score(batch).reward.double().mean())
    expected = float(values(task, table)[0, 2, (3 + 2) % 4])
    assert abs(measured - expected) < 4 * 0.5 / math.sqrt(count)
    assert torch.equal(
        correct(task, torch.zeros(count, dtype=torch.long), batch.ids), batch.ids.sum(1) % 4 == 0
    )


# ---- any generate function -------------------------------------------------------------------------------------------


class Scripted:
    """Continues every prompt with numbers that tell where it was and which call drew them."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts):
        self.asked.append([list(prompt) for prompt in prompts])
        call = 100 * len(self.asked)
        return [[call + place for place in range(6 - row % 2)] for row, _ in enumerate(prompts)]

    def entropy(self, prompts, responses):
        return torch.tensor([[1.0, 2.0, 5.0, 3.0, 9.0, 0.1]] * len(responses))


def test_rollouts_with_a_function_have_the_same_shape():
    world = Scripted()
    prompts = [[1, 2], [3]]
    group = CureSampler(samples=8, branches=3, k=1).rollout(world.generate, world.entropy, prompts)
    assert [len(asked) for asked in world.asked] == [4, 12]
    assert group.group_id.tolist() == [0] * 8 + [1] * 8
    assert group.family_id.tolist() == [0, 1, 0, 0, 0, 1, 1, 1] * 2
    assert group.parent.tolist() == [0, 1, 0, 0, 0, 1, 1, 1, 8, 9, 8, 8, 8, 9, 9, 9]
    assert group.branch_pos.tolist() == [0, 0, 4, 4, 4, 4, 4, 4] * 2
    for row in range(16):
        start = group.ids[row, group.ids.shape[1] - int(group.prompt_len[row]) :].tolist()
        parent = int(group.parent[row])
        kept = group.response_ids[parent, : int(group.branch_pos[row])].tolist()
        assert start == [*prompts[int(group.group_id[row])], *kept]
    assert set(group.response_ids[group.branch_pos > 0][:, 0].tolist()) == {200}
    assert group.response_mask.sum(1).unique().tolist() == [5, 6]


def test_rollouts_keep_to_the_limit_of_prompts():
    for keep, expected in (("reject", [2, 4]), ("head", [3, 4])):
        world = Scripted()
        sampler = CureSampler(samples=4, branches=1, k=1, keep=keep, prefix_limit=4, max_prompt_len=5)
        group = sampler.rollout(world.generate, world.entropy, [[1, 2], [3]])
        cuts = group.branch_pos.view(2, 4)[:, 2:]
        assert cuts.tolist() == [[e] * 2 for e in expected]
        assert max(map(len, world.asked[1])) <= 5


@pytest.mark.parametrize(("keep", "cuts"), [("reject", {1, 2}), ("head", {1, 2})])
def test_6_a_prompt_and_its_prefix_share_one_limit(keep, cuts):
    sampler = CureSampler(k=20, max_prompt_len=7, keep=keep)
    assert "prompt_length" in sampler.needs
    assert "prompt_length" not in CureSampler().needs
    mask = torch.ones(80, 6, dtype=torch.bool)
    level = torch.rand(80, 6, generator=torch.Generator().manual_seed(0))
    columns = {"ids": mask.long(), "prompt_length": torch.tensor([5, 3] * 40)}
    batch = Batch(torch.arange(80), mask, columns, {Entropy("old"): level})
    cut = sampler.cuts(batch)
    assert set(cut[::2].tolist()) == cuts
    assert set(cut[1::2].tolist()) == {1, 2, 3, 4}
    lower = replace(sampler, prefix_limit=3).cuts(batch)
    assert set(lower[1::2].tolist()) == {1, 2, 3}
    with pytest.raises(DataError, match="a prompt has 9 tokens, more than max_prompt_len=7"):
        sampler.cuts(batch.with_columns(prompt_length=torch.full((80,), 9)))
    world = Scripted()
    with pytest.raises(DataError, match="a prompt has 8 tokens"):
        sampler.rollout(world.generate, world.entropy, [[1] * 8])
    assert {"prompt_length", "fresh_prompts"} <= TwoStageSampler(max_prompt_len=7, rounds=2).needs


def test_rollouts_without_branches_ask_once():
    world = Scripted()
    group = CureSampler(samples=2, branches=0).rollout(world.generate, world.entropy, [[1]])
    assert len(world.asked) == 1
    assert group.parent.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("generate", "entropy", "prompts", "message"),
    [
        (lambda rows: rows, lambda rows, _: torch.zeros(len(rows), 1), [], "there are no prompts"),
        (lambda rows: rows[1:], lambda rows, _: torch.zeros(len(rows), 1), [[1]], "1 continuations of 2"),
        (lambda rows: rows, lambda rows, _: torch.zeros(len(rows), 3), [[1]], r"shape \(2, 3\).*\(2, 1\)"),
        (lambda rows: rows, lambda rows, _: torch.zeros(1, 1), [[1]], r"shape \(1, 1\).*\(2, 1\)"),
    ],
)
def test_functions_that_do_not_fit_are_named(generate, entropy, prompts, message):
    with pytest.raises(DataError, match=message):
        CureSampler(samples=4, branches=1).rollout(generate, entropy, prompts)


def test_rows_that_do_not_fit_their_padding_are_named():
    with pytest.raises(DataError, match="longest row has 3 tokens, more than length=2"):
        left_pad([[1], [1, 2, 3]], length=2)
    with pytest.raises(DataError, match="no rows"):
        left_pad([])


# ---- a language model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load("tiny")
    return model.eval(), tokenizer


def test_a_model_is_branched_where_it_is_undecided(tiny):
    model, tokenizer = tiny
    decoded = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    sampler = CureSampler(samples=8, k=2, shortest=1, temperature=0.7)
    sampler = sampler.for_vocabulary(decoded, tokenizer.all_special_ids)
    prompts = tokenizer(["12 + 30 =", "sum5=2:"])["input_ids"]
    state = torch.get_rng_state()
    groups = []
    for _ in range(2):
        writer = ModelWriter(model, tokenizer, max_new_tokens=9, temperature=0.7)
        groups.append(
            sampler.rollout(writer.generate, writer.entropy, prompts, pad_id=tokenizer.pad_token_id)
        )
    group = groups[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(group.response_ids, groups[1].response_ids)
    assert (group.branch_pos > 0).any()
    for row in (group.branch_pos > 0).nonzero()[:, 0].tolist():
        parent, cut = int(group.parent[row]), int(group.branch_pos[row])
        answer = group.response_ids[parent][group.response_mask[parent]].tolist()
        asked = prompts[int(group.group_id[row])]
        assert group.ids[row, -int(group.prompt_len[row]) :].tolist() == [*asked, *answer[:cut]]
        logits = torch.stack(
            [
                model(torch.tensor([[*asked, *answer[:end]]])).logits[0, -1].detach()
                for end in range(len(answer))
            ]
        )
        expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        torch.testing.assert_close(writer.entropy([asked], [answer])[0], expected, atol=1e-4, rtol=1e-4)
        critical = [t for t in range(1, len(answer)) if sampler.token_ok[answer[t]]]
        assert cut in sorted(critical, key=lambda t: -expected[t])[:2]
    assert writer.entropy([[5]], [[]]).shape == (1, 0)


def test_what_a_model_cannot_write_is_refused(tiny):
    model, tokenizer = tiny
    for options in ({"max_new_tokens": 0}, {"max_new_tokens": 4, "temperature": 0.0}):
        with pytest.raises(ConfigError, match="max_new_tokens >= 1 and temperature > 0"):
            ModelWriter(model, tokenizer, **options)
    writer = ModelWriter(model, tokenizer, max_new_tokens=500)
    with pytest.raises(DataError, match=r"20 tokens and 500 may follow.*room for 512.*max_prompt_len=12"):
        writer.generate([[5] * 20])
    with pytest.raises(DataError, match="a prompt has no token"):
        writer.generate([[5], []])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 10}, "10 samples are not originals with 3 branches each; take a multiple of 4"),
        ({"samples": 0}, "samples >= 1"),
        ({"branches": -1}, "branches >= 0"),
        ({"k": 0}, "k >= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"keep": "head"}, "give one"),
        ({"prefix_limit": -1}, "number of tokens"),
        ({"shortest": -1}, "number of characters"),
        ({"rounds": 0}, "rounds >= 1"),
        ({"rounds": 2, "samples": 1, "branches": 0}, "at least 2 samples"),
        ({"max_prompt_len": 0}, "1 or more"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CureSampler(**options)


@pytest.mark.parametrize(
    "options",
    [{}, {"uniform": torch.zeros(2), "generator": torch.Generator()}, {"uniform": torch.zeros(2), "k": 0}],
)
def test_positions_need_one_source_of_randomness_and_a_k(options):
    with pytest.raises(ConfigError, match="critical_positions"):
        critical_positions(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), **options)


def test_single_token_completions_and_groups_of_one():
    engine, batch = modsum_batch(SMALL, task=ModSum(prompts=2, length=1, vocab=3))
    assert not batch.columns["cut"].any()
    assert batch.mask.all()  # nothing to keep, so a branch is a new answer
    engine, batch = modsum_batch(CureSampler(samples=1, branches=0))
    method = replace(recipe("cure"), name="one", rewards=(), sampler=CureSampler(samples=1, branches=0))
    batch = method.prepare(engine.measure(batch, method.stats("rollout")))
    assert not batch.advantage.any()
    assert not batch.mask.any()


def test_all_equal_rewards_leave_the_loss():
    method = replace(recipe("cure"), name="equal", rewards=(), sampler=SMALL)
    engine, batch = prepared(method)
    raw = {n: v for n, v in batch.columns.items() if n not in ("advantage", "keep", "old_logp")}
    raw["reward"] = torch.ones_like(raw["reward"])
    batch = method.prepare(replace(batch, columns=raw))
    assert not batch.mask.any()
    loss, gradient = loss_and_gradient(engine, method, batch, [torch.arange(len(batch))])
    assert loss == 0
    assert not gradient.any()


def test_a_parent_s_own_mask_bounds_where_it_is_cut():
    """Tokens that a tool wrote may be kept in a prefix, but are never critical; so with what follows a turn's end."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]] * 40, dtype=torch.bool)
    batch = Batch(
        torch.arange(40),
        mask,
        {"ids": torch.zeros(40, 8, dtype=torch.long)},
        {Entropy("old"): torch.where(mask, torch.rand(40, 8, generator=g), torch.nan)},
    )
    cut = CureSampler(k=20).cuts(batch)
    assert set(cut.tolist()) == {1, 4, 5}


# ---- two stages ------------------------------------------------------------------------------------------------------


def test_the_schedule_switches_at_a_step_or_a_plateau():
    steps = TwoStageSchedule(switch_step=3)
    assert [steps.second(Clock(step=s)) for s in range(5)] == [False, False, False, True, True]
    plateau = TwoStageSchedule(switch_step=None, patience=2, gain=0.01)
    seen = []
    for reward in (0.1, 0.2, 0.3, 0.4, math.nan, 0.41, 0.4, 0.3, 0.9):
        plateau.see(reward)
        seen.append(plateau.second(Clock()))
    # last two against the two before: .7/.3, .81/.5, .81/.7, .7/.81
    assert seen == [False] * 7 + [True, True]
    copy = TwoStageSchedule(switch_step=None, patience=2)
    copy.load_state_dict(plateau.state_dict())
    assert copy.second(Clock())
    for options in ({"switch_step": None}, {"switch_step": -1}, {"patience": 0}):
        with pytest.raises(ConfigError, match="two stages"):
            TwoStageSchedule(**options)


def test_the_two_stages_sample_what_they_say():
    sampler = TwoStageSampler(samples=8, k=2, switch_step=2, rounds=2)
    _, first = modsum_batch(sampler, clock=Clock(step=1))
    _, alone = modsum_batch(SMALL, clock=Clock(step=1))
    assert torch.equal(first.ids, alone.ids)
    _, second = modsum_batch(sampler, clock=Clock(step=2))
    _, plain = modsum_batch(DynamicSampler(samples=8, rounds=2), clock=Clock(step=2))
    assert torch.equal(second.ids, plain.ids)
    assert set(sampler.gives) <= set(second.columns)
    assert not second.columns["branch"].any()
    assert "fresh_prompts" in sampler.needs
    assert "fresh_prompts" not in TwoStageSampler().needs
    with pytest.raises(ConfigError, match="rounds >= 1"):
        TwoStageSampler(rounds=0)


def test_dead_groups_are_replaced_by_fresh_prompts_with_branches():
    sampler = replace(SMALL, k=2)
    task = ModSum(prompts=12, length=6, vocab=5)
    _, once = modsum_batch(sampler, task=task)
    _, batch = modsum_batch(replace(sampler, rounds=4), task=task)
    dead = dead_groups(once)
    assert 0 < int(dead.sum()) < len(once)
    assert dead_groups(batch).sum() < dead.sum()
    kept = int((~dead).sum())
    assert torch.equal(batch.ids[:kept], once.ids[~dead])
    assert torch.equal(batch.uid, torch.arange(96))
    assert batch.group.tolist() == [group for group in range(12) for _ in range(8)]
    assert torch.equal(batch.columns["family"].view(12, 8), once.columns["family"].view(12, 8))
    for row in (batch.columns["branch"] > 0).nonzero()[:, 0].tolist():
        parent, cut = (
            int(batch.group[row]) * 8 + int(batch.columns["family"][row]),
            int(batch.columns["cut"][row]),
        )
        assert batch.columns["prompt"][row] == batch.columns["prompt"][parent]
        assert torch.equal(batch.ids[row, :cut], batch.ids[parent, :cut])
    within, between = family_variance(batch.reward, batch.group, batch.columns["family"])
    torch.testing.assert_close(batch.columns["within_family"], within[batch.group])
    torch.testing.assert_close(batch.columns["between_families"], between[batch.group])
    assert "fresh_prompts" in CureSampler(rounds=2).needs
    assert "fresh_prompts" not in CureSampler().needs
    with pytest.raises(ConfigError, match="leave rounds at 1"):
        CureSampler(rounds=2).rollout(lambda rows: rows, lambda rows, _: torch.zeros(0, 0), [[1]])


def test_a_plateau_is_seen_in_training_and_survives_a_checkpoint():
    sampler = TwoStageSampler(samples=8, k=2, switch_step=None, patience=1, gain=10.0)
    method = replace(recipe("cure"), name="plateau", rewards=(), sampler=sampler)
    task = ModSum(prompts=3, length=4, vocab=4)
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    trainer = Trainer(method, LogitsEngine(ModSumLab(task), policy), optimizer)
    branched = [bool((trainer.step([0, 1, 2])[0].columns["branch"] > 0).any()) for _ in range(4)]
    assert branched == [True, True, False, False]
    state = trainer.recipe.state_dict()
    assert state["stages"]["sampler"]["switched"]
    other = replace(method, sampler=replace(sampler))
    assert not other.sampler.schedule.switched
    other.load_state_dict(state)
    assert other.sampler.schedule.second(Clock())
    assert recipe("cure-two-stage").sampler.schedule is not recipe("cure-two-stage").sampler.schedule


# ---- metrics, recipes ------------------------------------------------------------------------------------------------


def test_metrics_say_where_branches_start_and_what_tokens_are_worth():
    method = replace(recipe("cure"), name="metered", rewards=(), filters=(), sampler=replace(SMALL, k=2))
    engine, batch = prepared(method)
    plan = method.plan(batch)
    pieces = [plan[rows] for rows in torch.arange(len(batch)).chunk(7)]
    reports = [method.loss(engine.measure(piece, method.stats("loss"))) for piece in pieces]

    def total(name):
        return float(sum(r.metrics[name][0] for r in reports) / sum(r.metrics[name][1] for r in reports))

    branch = batch.columns["branch"] > 0
    first = batch.mask.int().argmax(1)
    here = torch.arange(len(batch))
    used = branch & batch.mask.any(1)
    entropy = batch.stats[Entropy("old")][here, first]
    assert total("cure/branch/frac") == 0.75
    assert total("cure/cut/mean") == pytest.approx(float(batch.columns["cut"][branch].double().mean()))
    assert total("cure/cut/entropy") == pytest.approx(float(entropy[used].mean()))
    within, between = family_variance(batch.reward, batch.group, batch.columns["family"])
    assert total("cure/reward/within") == pytest.approx(float(within.mean()))
    assert total("cure/reward/between") == pytest.approx(float(between.mean()))


def test_the_entropy_at_a_cut_is_that_of_the_branch_s_first_token():
    """Same prompt, same prefix, same policy: no column has to carry it."""
    engine, batch = modsum_batch(SMALL)
    batch = engine.measure(batch, frozenset({Entropy("old"), Logp("old")}))
    branch = (batch.columns["branch"] > 0).nonzero()[:, 0]
    parent = batch.group[branch] * 8 + batch.columns["family"][branch]
    cut = batch.columns["cut"][branch]
    entropy = batch.stats[Entropy("old")]
    torch.testing.assert_close(entropy[branch, cut], entropy[parent, cut])


def test_the_recipe_is_that_of_the_official_scripts():
    made = recipe("cure")
    assert made.sampler == CureSampler(samples=16, branches=3, k=20)
    assert (made.surrogate.low, made.surrogate.high, made.surrogate.dual) == (0.2, 0.28, 10.0)
    assert made.advantage == (GroupAdvantage(std=True, eps=1e-6),)
    assert made.filters == (DropDeadGroups(),)
    assert made.rewards[0].cache * 2596 == pytest.approx(512)
    assert recipe("cure-two-stage").sampler.switch_step == 300


def test_trl_can_replace_the_size_of_a_group():
    assert replace(CureSampler(), samples=8, temperature=0.7).originals == 2
    assert replace(TwoStageSampler(), samples=8).originals == 2
    with pytest.raises(ConfigError, match="take a multiple of 4"):
        replace(CureSampler(), samples=6)
