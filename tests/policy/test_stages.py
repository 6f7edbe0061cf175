"""Generic stages: exact numbers, bounds, and inputs that go wrong."""

from __future__ import annotations

import math

import pytest
import torch

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.stages.advantages import BatchAdvantage, GroupAdvantage, LeaveOneOut
from uncollapse.policy.stages.filters import DropDeadGroups, DropUnfinished
from uncollapse.policy.stages.regularizers import AdaptiveEntropy, EntropyBonus, KLPenalty
from uncollapse.policy.stages.rewards import SoftOverlong
from uncollapse.policy.stages.surrogates import ClippedWeight, PPOClip, SequenceClip, Unclipped
from uncollapse.policy.stages.weights import TopEntropyTokens
from uncollapse.policy.stats import Entropy, Logp


def rewarded(rewards, group, time=1, **columns):
    reward = torch.tensor(rewards, dtype=torch.float64)
    return Batch(
        uid=torch.arange(len(reward)),
        mask=torch.ones(len(reward), time, dtype=torch.bool),
        columns={"reward": reward, "group": torch.tensor(group), **columns},
    )


def advantage(stage, rewards, group):
    return stage(rewarded(rewards, group))["advantage"][:, 0].tolist()


def test_grpo_advantages_of_known_groups():
    """Groups of four with one, three and four successes; unbiased deviation."""
    rewards = [1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    found = advantage(GroupAdvantage(eps=0.0), rewards, [0] * 4 + [1] * 4 + [2] * 4)
    assert found == pytest.approx([1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5, 0, 0, 0, 0])


def test_groups_need_not_be_contiguous():
    found = advantage(GroupAdvantage(std=False), [1, 10, 0, 30], [5, 3, 5, 3])
    assert found == [0.5, -10, -0.5, 10]


def test_equal_rewards_that_rounding_tells_apart_give_exactly_zero():
    third = 0.1 + 0.2
    for stage in (GroupAdvantage(), GroupAdvantage(std=False), BatchAdvantage(), LeaveOneOut()):
        assert advantage(stage, [third] * 7 + [1.0, 0.0], [0] * 7 + [1, 1])[:7] == [0.0] * 7


def test_a_group_of_one_has_no_advantage():
    for stage in (GroupAdvantage(), BatchAdvantage(), LeaveOneOut()):
        assert advantage(stage, [3.0], [0]) == [0.0]


def test_unscorable_rows_count_nowhere():
    found = advantage(GroupAdvantage(std=False), [1.0, math.nan, 0.0], [0, 0, 0])
    assert found == [0.5, 0.0, -0.5]


def test_leave_one_out():
    assert advantage(LeaveOneOut(), [1.0, 0.0, 0.0], [0, 0, 0]) == pytest.approx([1.0, -0.5, -0.5])


def tokens(logp, old, adv, mask=None):
    row = torch.tensor(logp, dtype=torch.float64)[None]
    return Batch(
        uid=torch.arange(1),
        mask=torch.ones(row.shape, dtype=torch.bool)
        if mask is None
        else torch.tensor([mask], dtype=torch.bool),
        columns={
            "old_logp": torch.tensor(old, dtype=torch.float64)[None],
            "advantage": torch.tensor(adv, dtype=torch.float64)[None],
        },
        stats={Logp("now"): row},
    )


def test_ppo_clip_on_every_side():
    """Ratios 2 and 1/2 with advantages of both signs: only two of the four are clipped."""
    up, down = math.log(2), -math.log(2)
    batch = tokens([up, up, down, down], [0] * 4, [1, -1, 1, -1])
    surrogate = PPOClip(low=0.2, high=0.28)
    assert surrogate(batch, {})[0].tolist() == pytest.approx([-1.28, 2, -0.5, 0.8])
    assert surrogate.clipped(batch, {})[0].tolist() == [True, False, False, True]


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    batch = tokens([math.log(10)], [0], [-1])
    assert PPOClip(dual=3.0)(batch, {}).item() == pytest.approx(3)
    assert PPOClip(dual=3.0).clipped(batch, {}).item()
    assert PPOClip()(batch, {}).item() == pytest.approx(10)


def test_sequence_ratio_is_the_geometric_mean_over_the_mask():
    batch = tokens([0.3, -0.1, 99.0], [0, 0, 0], [1, 1, 1], mask=[1, 1, 0])
    wide = SequenceClip(low=1.0, high=1.0)
    assert wide(batch, {})[0, 0].item() == pytest.approx(-math.exp(0.1))
    assert SequenceClip()(batch, {})[0, 0].item() == pytest.approx(-1.0004)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logp = torch.tensor([[math.log(8.0)]], dtype=torch.float64, requires_grad=True)
    batch = tokens([0.0], [0.0], [1.0]).with_stats({Logp("now"): logp})
    ClippedWeight(high=1.0)(batch, {}).sum().backward()
    assert logp.grad.item() == pytest.approx(-2.0)


def test_on_policy_all_surrogates_have_the_policy_gradient():
    for surrogate in (Unclipped(), PPOClip(), ClippedWeight(), PPOClip(dual=3.0)):
        logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
        batch = tokens([0, 0], [-1.0, -2.0], [0.7, -0.3]).with_stats({Logp("now"): logp})
        surrogate(batch, {}).sum().backward()
        assert logp.grad[0].tolist() == pytest.approx([-0.7, 0.3])


def test_kl_estimators_agree_to_second_order_and_are_zero_at_equality():
    for name in ("k2", "k3"):
        penalty = KLPenalty("ref", name)
        for gap, expected in ((0.0, 0.0), (1e-3, 5e-7)):
            batch = tokens([0.0], [0.0], [0.0]).with_stats(
                {Logp("ref"): torch.tensor([[gap]], dtype=torch.float64)}
            )
            assert penalty(batch, {}).item() == pytest.approx(expected, rel=1e-3)
    batch = tokens([0.5], [0.0], [0.0]).with_stats({Logp("ref"): torch.zeros(1, 1, dtype=torch.float64)})
    assert KLPenalty("ref", "k1")(batch, {}).item() == 0.5


def entropies(values):
    value = torch.tensor(values, dtype=torch.float64)
    return Batch(
        uid=torch.arange(len(value)),
        mask=torch.ones(value.shape, dtype=torch.bool),
        stats={Entropy("now"): value, Entropy("old"): value},
    )


def test_entropy_bonus():
    assert EntropyBonus()(entropies([[0.5, 1.0]]), {})[0].tolist() == [-0.5, -1.0]


def test_the_controller_climbs_below_its_target_recovers_from_zero_and_stops_at_its_limit():
    controller = AdaptiveEntropy(target=0.5, step=0.1, limit=0.3)
    low, high = entropies([[0.2]]), entropies([[0.9]])
    assert controller.decide(low)["coefficient"].item() == 0
    for expected in (0.1, 0.2, 0.3, 0.3):
        controller.observe(low)
        assert controller.coefficient == pytest.approx(expected)
    assert controller.decide(low)["coefficient"].item() == pytest.approx(0.3)
    assert controller.decide(high)["coefficient"].item() == 0
    for _ in range(5):
        controller.observe(high)
    assert controller.coefficient == 0
    controller.observe(low)
    assert controller.coefficient == pytest.approx(0.1)


def test_the_controller_survives_a_round_trip_and_an_empty_batch():
    controller = AdaptiveEntropy(start=0.2)
    controller.observe(entropies([[0.1]]))
    other = AdaptiveEntropy(start=0.2)
    other.load_state_dict(controller.state_dict())
    assert other.coefficient == controller.coefficient
    empty = entropies([[0.1]])
    controller.observe(Batch(uid=empty.uid, mask=torch.zeros_like(empty.mask), stats=empty.stats))
    assert other.coefficient == controller.coefficient


def test_overlong_penalty_grows_over_the_last_fifth():
    batch = rewarded(
        [1, 1, 1, 1], [0] * 4, length=torch.tensor([10, 80, 90, 100]), token_limit=torch.tensor(100.0)
    )
    assert SoftOverlong()(batch)["reward"].tolist() == pytest.approx([1, 1, 0.5, 0])


def test_filters():
    batch = rewarded([1, 1, 0, 1], [0, 0, 1, 1], finished=torch.tensor([True, False, True, True]))
    assert DropDeadGroups()(batch)["keep"].tolist() == [False, False, True, True]
    assert DropUnfinished()(batch)["keep"].tolist() == [True, False, True, True]


def test_top_entropy_tokens_counts_over_the_whole_pool():
    weight = TopEntropyTokens(fraction=0.5)(entropies([[0.1, 0.9], [0.8, 0.2]]))["weight"]
    assert weight.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PPOClip(low=-1.0), "ppo-clip"),
        (lambda: PPOClip(dual=0.5), "dual above 1"),
        (lambda: TopEntropyTokens(fraction=0.0), "fraction"),
        (lambda: AdaptiveEntropy(step=0.0), "adaptive-entropy"),
        (lambda: SoftOverlong(cache=2.0), "fraction of the limit"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_clock_defaults():
    assert Clock() == Clock(step=0, total=None, seed=0, update=0)


@pytest.mark.parametrize("surrogate", [Unclipped(), PPOClip(), PPOClip(dual=3.0), ClippedWeight()])
@pytest.mark.parametrize("far", [200.0, -200.0])
def test_ratios_beyond_all_floats_have_finite_gradients(surrogate, far):
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    batch = Batch(
        uid=torch.arange(1),
        mask=torch.ones(1, 2, dtype=torch.bool),
        columns={"old_logp": logp.detach() - far, "advantage": torch.tensor([[1.0, -1.0]])},
        stats={Logp("now"): logp},
    )
    surrogate(batch, {}).sum().backward()
    assert torch.isfinite(logp.grad).all()


def test_the_steered_entropy_is_that_of_the_rows_that_train():
    entropy = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    mask = torch.tensor([[True, True], [False, False]])  # the second row was dropped by a filter
    batch = Batch(uid=torch.arange(2), mask=mask, stats={Entropy("old"): entropy})
    assert AdaptiveEntropy(target=2.0, start=0.1).decide(batch)["coefficient"] == pytest.approx(0.1)
