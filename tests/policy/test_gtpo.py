"""Exact checks of GTPO, numbered; all in float64."""

from __future__ import annotations

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
from lab import Table, loss_and_gradient, moved_on, prepared

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.config import recipe_to_dict, resolve
from uncollapse.policy.config.describe import describe
from uncollapse.policy.gtpo import (
    LN2,
    ConflictWeights,
    EntropyFilter,
    EntropyShaping,
    Reinforce,
    advantage_sign,
    conflict_count,
    conflict_weights,
    entropy_filter,
    gtpo_loss,
    trajectory_entropy,
)
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.surrogates import Unclipped
from uncollapse.policy.stats import Entropy, Logp

F64 = torch.float64
seeds = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=F64)


def full(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows, padded on the right with an id that also occurs inside."""
    time = max(map(len, rows))
    ids = torch.tensor([row + [4] * (time - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (time - len(row)) for row in rows])
    return ids, mask


def weights(rows: list[list[int]], advantage: list[float], **options) -> list[list[float]]:
    ids, mask = full(rows)
    found = conflict_weights(ids, mask, tensor(advantage), **options)[0]
    assert not found[~mask].any()
    return [row[: len(ids)].tolist() for row, ids in zip(found, rows, strict=True)]


def a_group(seed: int, rows: int = 6, time: int = 8, vocab: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Few ids, so that conflicts are many; lengths from 0, advantages -1, 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, time), generator=g)
    length = torch.randint(0, time + 1, (rows, 1), generator=g)
    advantage = torch.randint(-1, 2, (rows,), generator=g).to(F64)
    return ids, torch.arange(time) < length, advantage


def brute_force(ids, mask, advantage, amplify=2.0, suppress=0.0):
    """Weights of one right-padded group by comparing all pairs of answers, place by place."""
    rows = [[int(v) for v, there in zip(r, m, strict=True) if there] for r, m in zip(ids, mask, strict=True)]
    weight = torch.zeros(ids.shape, dtype=F64)
    runs = []
    for direction in (1, -1):
        turned = [row[::direction] for row in rows]
        run = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(turned):
            for t, token in enumerate(row):
                other = any(
                    advantage[i] * advantage[j] < 0 and t < len(turned[j]) and turned[j][t] == token
                    for j in range(len(rows))
                )
                if not other:
                    break
                run[i, t if direction == 1 else len(row) - 1 - t] = True
        runs.append(run)
    for i, row in enumerate(rows):
        for t in range(len(row)):
            value = 1.0
            for run in runs:
                if run[i, t]:
                    value *= amplify if advantage[i] > 0 else suppress
            weight[i, t] = value
    return weight, *runs


def step(seed: int, groups: int = 3, size: int = 4, time: int = 7, vocab: int = 3) -> dict[str, Tensor]:
    """What `gtpo_loss` takes, with entropies on both sides of ln 2."""
    g = torch.Generator().manual_seed(seed)
    rows = groups * size
    ids = torch.randint(0, vocab, (rows, time), generator=g)
    length = torch.randint(1, time + 1, (rows, 1), generator=g)
    logp = -3 * torch.rand(rows, time, generator=g, dtype=F64)
    return {
        "logp": logp.requires_grad_(),
        "ids": ids,
        "mask": torch.arange(time) < length,
        "rewards": 10.0 * torch.randint(0, 3, (rows,), generator=g).to(F64),
        "group_ids": torch.arange(rows) // size,
        "mean_entropy": 1.2 * torch.rand(rows, generator=g, dtype=F64),
    }


def centred(data: dict[str, Tensor]) -> Tensor:
    reward = data["rewards"].view(-1, int((data["group_ids"] == 0).sum()))
    return (reward - reward.mean(1, keepdim=True)).flatten()


def gradient(data: dict[str, Tensor], **options) -> Tensor:
    loss, _ = gtpo_loss(**data, **options)
    return torch.autograd.grad(loss, data["logp"])[0]


# 1 to 4 -------------------------------------------------------------------------------------------------------------


def test_01_the_official_example() -> None:
    found = weights([[5, 6, 7, 8, 9], [5, 6, 10, 11, 9]], [1.0, -1.0])
    assert found == [[2, 2, 1, 1, 2], [0, 0, 1, 1, 0]]


def test_01_the_count_is_of_the_union_and_the_released_one_of_the_longer_run() -> None:
    ids, mask = full([[5, 6, 7, 8, 9], [5, 6, 10, 11, 9]])
    _, forward, backward = conflict_weights(ids, mask, tensor([1.0, -1.0]))
    assert conflict_count(forward, backward).tolist() == [3, 3]
    assert conflict_count(forward, backward, released=True).tolist() == [2, 2]


def test_02_identical_answers_with_opposite_rewards() -> None:
    assert weights([[3, 8, 4]] * 2, [1.0, -1.0]) == [[4, 4, 4], [0, 0, 0]]


def test_03_a_conflict_in_the_middle_is_left_alone() -> None:
    assert weights([[1, 7, 2], [3, 7, 4]], [1.0, -1.0]) == [[1, 1, 1]] * 2


def test_04_what_only_good_answers_share_is_no_conflict() -> None:
    assert weights([[5, 6, 1], [5, 6, 2], [7, 8, 9]], [1.0, 2.0, -1.0]) == [[1, 1, 1]] * 3


def test_04_an_average_answer_keeps_weight_one_and_creates_nothing() -> None:
    assert weights([[5, 6], [5, 6], [7, 8]], [1.0, 0.0, -1.0]) == [[1, 1]] * 3
    assert weights([[5, 6], [5, 6], [5, 8]], [1.0, 0.0, -1.0]) == [[2, 1], [1, 1], [0, 1]]


# 5 ------------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_05_reversal_swaps_leading_and_trailing(seed: int) -> None:
    ids, mask, advantage = a_group(seed)
    time = torch.arange(ids.shape[1])
    turned = torch.where(mask, mask.sum(1, keepdim=True) - 1 - time, time)
    weight, forward, backward = conflict_weights(ids, mask, advantage)
    again = conflict_weights(ids.gather(1, turned), mask, advantage)
    for mine, other in zip((weight, backward, forward), again, strict=True):
        assert torch.equal(mine.gather(1, turned), other)


@quick
@given(seed=seeds, extra=st.integers(1, 4))
def test_05_order_padding_names_and_scale_change_nothing(seed: int, extra: int) -> None:
    ids, mask, advantage = a_group(seed)
    before = conflict_weights(ids, mask, advantage)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.pad(ids, (extra, 2), value=1)
    there = torch.nn.functional.pad(mask, (extra, 2), value=False)
    renamed = 150_000 - 7 * wide
    after = conflict_weights(renamed[order], there[order], 0.01 * advantage[order])
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[order], b[:, extra:-2])


# 6 and 7 ------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_06_without_weights_shaping_and_filter_it_is_the_mean_centred_policy_gradient(seed: int) -> None:
    data = step(seed)
    ids, mask, advantage = a_group(seed)
    assert torch.equal(conflict_weights(ids, mask, advantage, amplify=1.0, suppress=1.0)[0], mask.to(F64))
    plain = gradient(data, gamma=0.0, amplify=1.0, suppress=1.0, initial_entropy=5.0)
    length = data["mask"].sum(1, keepdim=True)
    expected = -(centred(data)[:, None] / length) * data["mask"] / len(length)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)


def test_06_amplify_one_alone_still_silences_the_negatives() -> None:
    assert weights([[5, 1], [5, 2]], [1.0, -1.0], amplify=1.0) == [[1, 1], [0, 1]]


@quick
@given(seed=seeds, start=st.sampled_from([0.3, 0.9, None]))
def test_07_gradient(seed: int, start: float | None) -> None:
    data = step(seed)
    a, mask = centred(data), data["mask"]
    expected = torch.zeros_like(data["logp"])
    for group in range(3):
        rows = data["group_ids"] == group
        expected[rows] = brute_force(data["ids"][rows], mask[rows], a[rows])[0]
    kept = (data["mean_entropy"] <= LN2) | (start is not None and start > LN2)
    factor = torch.where(kept, a - 0.1 * data["mean_entropy"], 0.0) / mask.sum(1) / len(a)
    expected = -expected * factor[:, None]
    loss, _ = gtpo_loss(**data, initial_entropy=start)
    found = torch.autograd.grad(loss, data["logp"])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(expected.sum().item(), abs=1e-12)  # the ratio has value 1


def test_07_negatives_push_only_outside_their_runs() -> None:
    ids, mask = full([[5, 7, 1, 9, 3], [5, 8, 1, 6, 3]])
    logp = torch.full(ids.shape, -0.5, dtype=F64, requires_grad=True)
    data = {"logp": logp, "ids": ids, "mask": mask, "rewards": tensor([1.0, 0.0])}
    data |= {"group_ids": torch.zeros(2, dtype=torch.long), "mean_entropy": torch.zeros(2, dtype=F64)}
    found = -gradient(data)[1] * 2 * 5
    assert found.tolist() == pytest.approx(
        [0, -0.5, -0.5, -0.5, 0]
    )  # the 1 in the middle is a conflict, but alone


# 8 ------------------------------------------------------------------------------------------------------------------


def test_08_net_force_on_a_token_that_all_share() -> None:
    rows = [[5, 11, 21], [5, 12, 22], [5, 13, 23], [5, 14, 24]]
    ids, mask = full(rows)
    data = {"logp": torch.zeros(4, 3, dtype=F64, requires_grad=True), "ids": ids, "mask": mask}
    data |= {"rewards": tensor([1.0, 0.0, 0.5, 2.0]), "group_ids": torch.zeros(4, dtype=torch.long)}
    data |= {"mean_entropy": torch.zeros(4, dtype=F64)}
    a = centred(data)
    grpo = -gradient(data, gamma=0.0, amplify=1.0, suppress=1.0)[:, 0].sum()
    gtpo = -gradient(data, gamma=0.0)[:, 0].sum()
    assert grpo.item() == pytest.approx(0, abs=1e-15)
    assert gtpo.item() == pytest.approx(2 * a.clamp(min=0).sum().item() / (4 * 3))
    same = data | {"ids": torch.full_like(ids, 5)}
    assert -gradient(same, gamma=0.0)[:, 0].sum().item() == pytest.approx(2 * gtpo.item())


# 9 and 10 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "entropy", "kept"),
    [
        (LN2 + 0.1, LN2 + 0.5, True),
        (LN2 + 0.1, LN2 - 0.5, True),
        (LN2 - 0.1, LN2 + 1e-5, False),
        (LN2 - 0.1, LN2 - 1e-5, True),
        (LN2 - 0.1, LN2, True),
        (LN2, LN2 + 1e-5, False),
        (None, LN2 + 0.5, False),
        (None, LN2, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_09_truth_table(start: float | None, entropy: float, kept: bool, dtype: torch.dtype) -> None:
    mean = torch.tensor([entropy], dtype=dtype)
    assert entropy_filter(mean, start).item() is kept
    assert entropy_filter(mean, start, advantages=torch.tensor([1.0]), scope="negative").item()
    negative = entropy_filter(mean, start, advantages=torch.tensor([-1.0]), scope="negative")
    assert negative.item() is kept


def test_09_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs the advantages"):
        entropy_filter(tensor([0.1]), None, scope="negative")
    for wrong in ({"threshold": 0.0}, {"threshold": -1.0}):
        with pytest.raises(ConfigError, match="threshold > 0"):
            EntropyFilter(**wrong)
    with pytest.raises(ConfigError, match="amplify >= 0"):
        ConflictWeights(amplify=-1.0)


@quick
@given(seed=seeds, size=st.integers(2, 50), sharpness=st.floats(0, 20))
def test_10_entropy_is_at_least_min_entropy(seed: int, size: int, sharpness: float) -> None:
    z = sharpness * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    p = z.softmax(0)
    entropy = -torch.special.xlogy(p, p).sum()
    assert entropy >= -p.max().log() - 1e-12
    if entropy < LN2:
        assert p.max() > 0.5  # the reverse does not hold:
    wide = torch.cat([tensor([0.6]), torch.full((100,), 0.004, dtype=F64)])
    assert -(wide * wide.log()).sum() > LN2
    assert -(2 * 0.5 * math.log(0.5)) == pytest.approx(LN2, abs=1e-15)


# 11 -----------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, gamma=st.floats(0.001, 1.0))
def test_11_shaping_lowers_every_advantage_by_the_entropy(seed: int, gamma: float) -> None:
    data = step(seed)
    entropy = data["mean_entropy"][:, None].expand_as(data["logp"])
    advantage = centred(data)[:, None] * data["mask"]
    batch = Batch(
        torch.arange(12), data["mask"], {"advantage": advantage},
        {Entropy("old"): torch.where(data["mask"], entropy, torch.nan)},
    )  # fmt: skip
    shaped = EntropyShaping(gamma)(batch)["advantage"]
    assert (shaped < advantage)[data["mask"]].all()
    assert not shaped[~data["mask"]].any()
    total = shaped[:, 0].view(3, 4).sum(1)
    expected = -gamma * data["mean_entropy"].view(3, 4).sum(1)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


# 12 -----------------------------------------------------------------------------------------------------------------


def test_12_equals_brute_force_on_500_groups_at_once() -> None:
    groups = [a_group(seed) for seed in range(500)]
    ids, mask, advantage = (torch.cat(part) for part in zip(*groups, strict=True))
    label = torch.arange(500).repeat_interleave(6)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    found = conflict_weights(ids[order], mask[order], advantage[order], 7 * label[order] - 3)
    back = order.argsort()
    expected = [torch.cat(part) for part in zip(*(brute_force(*g) for g in groups), strict=True)]
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine[back], other)
    assert expected[1].any()
    assert (expected[0] == 4).any()


# ---- signs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rounding_does_not_make_an_average_answer_good_or_bad(dtype: torch.dtype) -> None:
    for scale in (1.0, 20.0, 1e-3):
        reward = scale * torch.tensor([0.1, 0.2, 0.3, 0.7, 0.7, 0.7], dtype=dtype)
        group = torch.tensor([0, 0, 0, 1, 1, 1])
        assert advantage_sign(reward, group).tolist() == [-1, 0, 1, 0, 0, 0]


def test_unscorable_rows_have_no_sign() -> None:
    reward = tensor([math.nan, 0.0, 1.0, math.nan, 2.0])
    assert advantage_sign(reward, torch.tensor([0, 0, 0, 1, 1])).tolist() == [0, -1, 1, 0, 0]


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_groups_of_one_equal_rewards_single_tokens_and_empty_answers() -> None:
    assert weights([[5, 6]], [0.0]) == [[1, 1]]
    assert weights([[5], [5], []], [1.0, -1.0, -1.0]) == [[4], [0], []]
    data = step(0)
    equal = data | {"rewards": torch.full((12,), 0.1, dtype=F64)}
    found = gradient(equal, gamma=0.1, initial_entropy=5.0)
    expected = 0.1 * data["mean_entropy"][:, None] / data["mask"].sum(1, keepdim=True) / 12 * data["mask"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)  # gamma alone, a slight push down
    assert not gradient(equal, gamma=0.0, initial_entropy=5.0).any()
    nothing = data | {"mask": torch.zeros_like(data["mask"])}
    loss, metrics = gtpo_loss(**nothing)
    assert loss == 0
    assert metrics["entropy_filter/kept/frac"] == 0


@pytest.mark.parametrize("start", [None, 5.0])
def test_an_empty_answer_may_have_any_mean_entropy(start: float | None) -> None:
    data = step(2)
    data["mask"][4] = False
    clean = gtpo_loss(**data, initial_entropy=start)
    data["mean_entropy"][4] = math.nan  # 0 / 0, the mean over no token
    dirty = gtpo_loss(**data, initial_entropy=start)
    assert clean[0] == dirty[0]
    assert clean[1] == dirty[1]


def test_nan_in_padding_and_in_rewards_never_reaches_the_gradient() -> None:
    data = step(3)
    rewards = data["rewards"].clone()
    rewards[2] = math.nan
    clean = gradient(data | {"rewards": rewards})
    logp = torch.where(data["mask"], data["logp"].detach(), math.nan).requires_grad_()
    dirty = gradient(data | {"rewards": rewards, "logp": logp})
    assert torch.equal(clean, dirty)
    assert not clean[2].any()
    entropy = torch.where(data["mask"], 0.5, math.nan)
    torch.testing.assert_close(
        trajectory_entropy(entropy, data["mask"]), torch.full((12,), 0.5), rtol=0, atol=1e-7
    )


def test_a_mask_that_ends_mid_turn_counts_trainable_tokens_only() -> None:
    """Tokens of a tool between two turns have no weight, and do not break a run or move a position."""
    ids = torch.tensor([[5, 90, 91, 6, 7], [5, 6, 8, 1, 1]])
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    found, forward, _ = conflict_weights(ids, mask, tensor([1.0, -1.0]))
    assert found.tolist() == [[2, 0, 0, 2, 1], [0, 0, 1, 0, 0]]
    assert forward.tolist() == [[True, False, False, True, False], [True, True, False, False, False]]


def test_truncated_answers_need_not_be_aligned_at_their_end() -> None:
    rows, advantage = [[1, 2, 9], [3, 4, 9], [6, 7, 9]], [1.0, -1.0, -1.0]
    assert weights(rows, advantage) == [[1, 1, 2], [1, 1, 0], [1, 1, 0]]
    cut = torch.tensor([False, False, True])
    assert weights(rows, advantage, truncated_mask=cut) == [[1, 1, 2], [1, 1, 0], [1, 1, 1]]
    cut = torch.tensor([True, False, False])
    assert weights(rows, advantage, truncated_mask=cut) == [[1, 1, 1]] * 3
    assert "finished" in ConflictWeights(align_truncated=False).needs
    assert "finished" not in ConflictWeights().needs


# ---- stages and recipes --------------------------------------------------------------------------------------------


def low_entropy():
    return Table(prompts=5, sharpness=4.0)


@pytest.mark.parametrize("name", ["gtpo", "gtpo-released"])
@pytest.mark.parametrize("seed", range(3))
def test_the_recipes_are_the_loss(name: str, seed: int) -> None:
    made = recipe(name)
    policy = low_entropy()
    engine, batch = prepared(made, policy=policy, seed=seed)
    moved_on(policy, size=0.1)
    rows = [torch.arange(len(batch))]
    found, gradient_of_recipe = loss_and_gradient(engine, made, batch, rows)
    engine.policy.zero_grad()
    now = engine.measure(batch, frozenset({Logp("now")}), grad=True)
    entropy = trajectory_entropy(batch.stats[Entropy("old")], batch.mask)
    options = {"normalise": "released", "threshold": 0.7} if "released" in name else {}
    loss, metrics = gtpo_loss(
        now.stats[Logp("now")], batch.ids, batch.mask, batch.reward, batch.group, entropy,
        None if "released" in name else float(entropy.mean()), **options,
    )  # fmt: skip
    if "released" in name:
        loss = 8 * loss  # the sum over the answers of a prompt
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(gradient_of_recipe, policy.table.grad, rtol=0, atol=1e-12)
    report = made.loss(engine.measure(made.plan(batch), made.stats("loss"), grad=True))
    for key, value in metrics.items():
        total, weight = report.metrics[key]
        assert (total / weight).item() == pytest.approx(float(value))
    assert 0 < metrics["entropy_filter/kept/frac"] < 1
    total, weight = report.metrics["entropy/initial/mean"]
    assert (total / weight).item() == pytest.approx(entropy.mean().item())


def test_the_initial_entropy_is_of_the_first_batch_and_survives_a_checkpoint() -> None:
    made = recipe("gtpo")
    _, first = prepared(made, policy=low_entropy())
    made.observe(first)
    start = made.state_dict()["stages"]["weights.1"]["initial_entropy"]
    entropy = trajectory_entropy(first.stats[Entropy("old")], first.mask)
    assert start == pytest.approx(entropy.mean().item())
    _, later = prepared(made, policy=Table(prompts=5, sharpness=3.0), seed=1)
    assert later.columns["gtpo/initial_entropy"].unique().tolist() == [start]
    made.observe(later)
    again = recipe("gtpo")
    again.load_state_dict(made.state_dict())
    _, resumed = prepared(again, policy=Table(prompts=5, sharpness=3.0), seed=1)
    assert torch.equal(resumed.columns["weight"], later.columns["weight"])
    assert again.state_dict() == made.state_dict()


def test_a_start_above_the_threshold_filters_nothing_and_goes_on_doing_so() -> None:
    made = recipe("gtpo")
    _, first = prepared(made)
    assert first.columns["gtpo/kept"].all()
    made.observe(first)
    _, later = prepared(made, policy=low_entropy())
    assert later.columns["gtpo/kept"].all()


def test_a_filter_that_silences_a_batch_says_so_and_gives_zero() -> None:
    made = recipe("gtpo")
    _, first = prepared(made, policy=low_entropy())
    made.observe(first)
    with pytest.warns(UserWarning, match=r"all 40 answers .* mean entropy above 0\.693 nats \(lowest"):
        engine, batch = prepared(made, policy=Table())
    loss, found = loss_and_gradient(engine, made, batch, [torch.arange(40)])
    assert loss == 0
    assert not found.any()
    report = made.loss(engine.measure(made.plan(batch), made.stats("loss"), grad=True))
    total, weight = report.metrics["entropy_filter/kept/frac"]
    assert (total, weight) == (0, 40)


def test_an_empty_batch_is_silent_without_a_warning_and_is_not_remembered() -> None:
    stage = EntropyFilter()
    batch = Batch(
        torch.arange(2), torch.zeros(2, 3, dtype=torch.bool), {}, {Entropy("old"): torch.full((2, 3), 9.0)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = stage(batch)
    assert not written["weight"].any()
    stage.observe(batch)
    assert stage.initial_entropy is None


def test_negative_answers_alone_can_be_filtered() -> None:
    made = recipe("gtpo")
    only = replace(made.weights[1], answers="negative")
    made = replace(made, name="negative", weights=(made.weights[0], only))
    _, batch = prepared(made, policy=low_entropy())
    entropy = trajectory_entropy(batch.stats[Entropy("old")], batch.mask)
    sign = advantage_sign(batch.reward, batch.group)
    assert torch.equal(batch.columns["gtpo/kept"], (entropy <= LN2) | (sign >= 0))


def test_filtered_answers_still_make_conflicts_and_count_in_the_mean() -> None:
    made = recipe("gtpo")
    policy = low_entropy()
    _, batch = prepared(made, policy=policy)
    unfiltered = replace(made, name="unfiltered", weights=made.weights[:1])
    _, other = prepared(unfiltered, policy=policy)
    kept = batch.columns["gtpo/kept"]
    assert not kept.all()
    assert torch.equal(batch.columns["gtpo/conflict"], other.columns["gtpo/conflict"])
    maps = [m.plan(b).columns["map/surrogate"] for m, b in ((made, batch), (unfiltered, other))]
    assert torch.equal(*maps)
    assert not batch.columns["weight"][~kept].any()


def test_the_surrogate_has_ratio_one_whatever_the_old_policy_was() -> None:
    """With several updates nothing corrects for the policy that sampled; PPO's ratio would."""
    g = torch.Generator().manual_seed(0)
    logp, old = -torch.rand(2, 3, 4, generator=g, dtype=F64)
    advantage = torch.randn(3, 4, generator=g, dtype=F64)

    def of(surrogate, before):
        leaf = logp.clone().requires_grad_()
        batch = Batch(
            torch.arange(3), torch.ones(3, 4, dtype=torch.bool),
            {"advantage": advantage, "old_logp": before}, {Logp("now"): leaf}, Clock(update=1),
        )  # fmt: skip
        value = surrogate(batch, {})
        assert not surrogate.clipped(batch, {}).any()
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    for before in (logp, old):
        value, slope = of(Reinforce(), before)
        assert torch.equal(value, -advantage)
        assert torch.equal(slope, -advantage)
    torch.testing.assert_close(of(Unclipped(), logp)[1], -advantage)
    assert not torch.allclose(of(Unclipped(), old)[1], -advantage)
    several = describe(recipe("gtpo"), engines={}, updates=4).warnings
    assert any("reinforce is for one optimiser step" in line for line in several)
    assert describe(recipe("gtpo"), engines={}, updates=1).warnings == ()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("no-lambda", {"weights": ["entropy-filter"]}),
        ("no-delta", {"weights": ["conflict-weights"]}),
        ("no-gamma", {"advantage": [{"group-advantage": {"std": False}}]}),
        ("with-clip", {"surrogate": {"ppo-clip": {"low": 0.2, "high": 0.28}}}),
        ("counted", {"weights": [{"conflict-weights": {"normalise": "count", "align_truncated": False}}]}),
    ],
)
def test_stages_can_be_left_out_or_combined_from_yaml(name: str, change: dict) -> None:
    made = resolve({"name": name, "base": "gtpo"} | change)
    assert resolve(recipe_to_dict(made)) == made
    engine, batch = prepared(made, policy=low_entropy())
    _, found = loss_and_gradient(engine, made, batch, [torch.arange(len(batch))])
    assert torch.isfinite(found).all()
    assert found.any()


def test_presets_have_the_official_numbers() -> None:
    paper, released = recipe("gtpo"), recipe("gtpo-released")
    for made in (paper, released):
        assert made.sampler.samples == 8
        assert made.advantage[0].std is False
        assert made.advantage[1].gamma == 0.1
        assert made.weights[0].amplify == 2.0
        assert made.weights[0].suppress == 0.0
    assert paper.weights[1].threshold == LN2
    assert paper.weights[0].normalise == "none"
    assert released.weights[1].threshold == 0.7
    assert not released.weights[1].spare_high_start
    assert released.weights[0].normalise == "released"
