"""Weight maps: what they add up to, and the numbers of small examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.errors import ConfigError
from uncollapse.policy.batch import Batch
from uncollapse.policy.reduction import Mean, Sum


def batch(mask, **columns):
    mask = torch.tensor(mask, dtype=torch.bool)
    return Batch(uid=torch.arange(len(mask)), mask=mask, columns=columns)


def test_token_mean_and_row_mean():
    rows = batch([[1, 1, 0], [1, 0, 0]])
    assert Mean().weights(rows.mask, rows).tolist() == [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]
    assert Mean(("row",)).weights(rows.mask, rows).tolist() == [[0.25, 0.25, 0], [0.5, 0, 0]]


def test_turns_in_trajectories_in_a_hand_computed_example():
    """Two trajectories; the first has turns of 1 and 3 tokens, the second one turn of 2 in a row of its own."""
    rows = batch(
        [[1, 1, 1, 1], [1, 1, 0, 0]],
        trajectory=torch.tensor([7, 9]),
        turn=torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]]),
    )
    weights = Mean(("trajectory", "turn")).weights(rows.mask, rows)
    expected = [[0.25, 0.25 / 3, 0.25 / 3, 0.25 / 3], [0.25, 0.25, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_a_trajectory_that_spans_rows_is_one_member():
    rows = batch([[1, 1], [1, 0], [1, 1]], trajectory=torch.tensor([4, 4, 8]))
    weights = Mean(("trajectory",)).weights(rows.mask, rows)
    assert weights[:2].sum().item() == pytest.approx(0.5)
    assert weights[2].sum().item() == pytest.approx(0.5)


def test_rows_all_counts_rows_without_a_selected_token():
    rows = batch([[1, 1], [1, 1], [0, 0]])
    where = torch.tensor([[True, False], [False, False], [False, False]])
    assert Mean(("row",), rows="nonempty").weights(where, rows).sum().item() == 1
    assert Mean(("row",), rows="all").weights(where, rows).sum().item() == 0.5


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6),
    st.sampled_from([(), ("row",), ("sheet", "row"), ("sheet", "row", "turn")]),
)
def test_a_mean_adds_up_to_one_unless_it_is_empty(mask, levels):
    count = len(mask)
    rows = batch(mask, sheet=torch.arange(count) % 2, turn=(torch.arange(count * 5) % 3).reshape(count, 5))
    weights = Mean(levels).weights(rows.mask, rows)
    assert weights.sum().item() == pytest.approx(float(rows.mask.any()))
    assert not weights[~rows.mask].any()


def test_sum_divides_by_the_limit_and_the_number_of_rows():
    rows = batch([[1, 1], [1, 0], [0, 0]], token_limit=torch.tensor(4.0))
    assert Sum().weights(rows.mask, rows)[0, 0].item() == 1 / 8
    assert Sum(divisor=10.0, per_row=False).weights(rows.mask, rows)[0, 0].item() == 0.1
    with pytest.raises(ConfigError, match="divisor 3 is below the token limit 4"):
        Sum(divisor=3.0).weights(rows.mask, rows)


def test_an_unknown_level_is_named():
    rows = batch([[1]])
    with pytest.raises(ConfigError, match="'trajectory', but the batch has no such column"):
        Mean(("trajectory",)).weights(rows.mask, rows)
