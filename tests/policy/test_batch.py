"""The batch: slicing, joining, guarded reads, and randomness that belongs to tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.policy.batch import Batch, Clock, UndeclaredRead, join
from uncollapse.policy.stats import Entropy, Logp


def small(rows=4, time=3):
    return Batch(
        uid=torch.arange(rows),
        mask=torch.ones(rows, time, dtype=torch.bool),
        columns={
            "reward": torch.arange(float(rows)),
            "text": [f"row {i}" for i in range(rows)],
            "token_limit": torch.tensor(3.0),
        },
        stats={Logp("old"): torch.arange(float(rows * time)).reshape(rows, time)},
    )


def test_slicing_takes_tensors_lists_and_statistics_and_leaves_numbers():
    part = small()[torch.tensor([2, 0])]
    assert part.uid.tolist() == [2, 0]
    assert part.columns["text"] == ["row 2", "row 0"]
    assert part.columns["token_limit"].item() == 3
    assert part.stats[Logp("old")][0].tolist() == [6, 7, 8]
    assert len(small()[small().reward > 1]) == 2


def test_joining_pads_and_keeps_what_both_have():
    wide = small(2, 5)
    both = join([small(), wide])
    assert both.mask.shape == (6, 5)
    assert both.stats[Logp("old")][:4, 3:].sum() == 0
    assert both.columns["text"][-1] == "row 1"


def test_an_undeclared_read_raises_and_a_declared_one_does_not():
    view = small().view(frozenset({"reward"}), "a stage")
    assert view.reward.tolist() == [0, 1, 2, 3]
    with pytest.raises(UndeclaredRead, match="a stage reads 'text' without declaring it"):
        view.columns["text"]
    with pytest.raises(UndeclaredRead, match="Logp"):
        view.stats[Logp("old")]


def test_statistics_are_sets_of_needs():
    assert Logp("old") == Logp("now").by("old")
    assert len({Logp("old"), Logp("old"), Logp("now"), Entropy("old")}) == 3


@given(st.integers(0, 2**31), st.permutations(range(8)), st.integers(0, 5))
def test_random_numbers_belong_to_tokens(seed, order, extra):
    clock, uid = Clock(seed=seed), torch.arange(8)
    numbers = clock.uniform(uid, 4, "x")
    shuffled = clock.uniform(uid[torch.tensor(order)], 4 + extra, "x")[:, :4]
    assert torch.equal(numbers[torch.tensor(order)], shuffled)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()


def test_random_numbers_are_uniform_and_differ_by_name_step_update_and_seed():
    numbers = Clock().uniform(torch.arange(400), 100, "x")
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.005)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert len(numbers.unique()) == numbers.numel()
    correlation = torch.corrcoef(torch.stack([numbers[:, 0], numbers[:, 1]]))[0, 1]
    assert abs(correlation.item()) < 0.15
    others = [Clock(seed=1), Clock(step=1), Clock(update=1)]
    for other in others:
        assert not torch.equal(other.uniform(torch.arange(400), 100, "x"), numbers)
    assert not torch.equal(Clock().uniform(torch.arange(400), 100, "y"), numbers)
