"""What single tokens of a dump are predicted to do to the entropy of their state."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uncollapse.diagnose.attribution import QUADRANTS, attribute
from uncollapse.diagnose.predicted import LONGEST, predict, tell
from uncollapse.measure import entropy_change
from uncollapse.token_dump import Tokens


def step(number=0, seed=0, answers=5, length=9, **given):
    random = np.random.default_rng(seed)
    count = answers * length
    columns = {
        "token": random.integers(0, 5, count),
        "uid": np.repeat(np.arange(answers) + 10, length),
        "position": np.tile(np.arange(length), answers),
        "old_logp": -random.exponential(size=count),
        "logp": np.full(count, np.nan),
        "advantage": np.repeat(random.normal(size=answers), length),
        "entropy": 2 * random.random(count),
        "reward": np.repeat(random.random(answers), length),
        "mask": random.random(count) < 0.8,
        "text": np.array([f"<{i}>" for i in range(count)], dtype=object),
        **given,
    }
    return Tokens(number, columns)


def test_quadrants_have_the_names_of_the_instrument():
    assert QUADRANTS == entropy_change.QUADRANTS


@pytest.mark.parametrize("seed", range(5))
def test_the_prediction_is_the_theorem_token_by_token(seed):
    tokens = step(seed=seed)
    found = predict(tokens)
    for i in range(len(tokens)):
        logp, h, a = (float(tokens.number(name)[i]) for name in ("old_logp", "entropy", "advantage"))
        if not tokens.mask[i]:
            assert math.isnan(found.change[i])
            assert found.quadrant[i] == -1
            continue
        p = math.exp(logp)
        assert found.change[i] == pytest.approx(-a * p * (1 - p) * (logp + h), abs=1e-14)
        assert QUADRANTS[found.quadrant[i]] == ("probable" if -logp < h else "rare") + (
            " rewarded" if a > 0 else " punished"
        )


def test_the_account_adds_up_the_quadrants_of_all_steps():
    steps = [step(0, 1), step(1, 2)]
    account = attribute(steps)
    mean = sum(np.nanmean(predict(one).change) for one in steps)
    assert sum(one.drive for one in account.predicted.values()) == pytest.approx(mean)
    assert sum(one.tokens for one in account.predicted.values()) == account.tokens
    assert [one.drive < 0 for one in account.predicted.values()] == [True, False, False, True]
    assert {one.step for one in account.answers} == {1}


def test_the_answers_that_change_most_come_first_in_the_order_of_their_tokens():
    tokens = step(seed=3)
    shuffled = np.random.default_rng(0).permutation(len(tokens))
    mixed = Tokens(0, {name: values[shuffled] for name, values in tokens.columns.items()})
    found, again = tell(tokens, most=3), tell(mixed, most=3)
    assert [one.uid for one in found] == [one.uid for one in again]
    assert len(found) == 3
    size = [np.nanmean(np.abs(one.changes.change)) for one in found]
    assert size == sorted(size, reverse=True)
    for one, other in zip(found, again, strict=True):
        assert one.texts == other.texts == tuple(f"<{9 * (one.uid - 10) + i}>" for i in range(9))
        np.testing.assert_array_equal(one.changes.change, other.changes.change)


@pytest.mark.parametrize("lacks", ["entropy", "text", "mask"])
def test_a_dump_without_what_it_needs_tells_nothing(lacks):
    empty = {
        "entropy": np.full(45, np.nan),
        "text": np.array([""] * 45, dtype=object),
        "mask": np.zeros(45, bool),
    }
    assert tell(step(**{lacks: empty[lacks]})) == ()
    if lacks == "entropy":
        assert attribute([step(entropy=empty["entropy"])]).predicted == {}


def test_missing_numbers_leave_single_tokens_out():
    tokens = step(mask=np.ones(45, bool))
    clean = predict(tokens).change.copy()
    tokens.columns["entropy"][4] = np.nan
    tokens.columns["old_logp"][7] = -np.inf
    found = predict(tokens)
    assert np.flatnonzero(~found.known).tolist() == [4, 7]
    np.testing.assert_array_equal(found.change[found.known], clean[found.known])


def test_long_answers_are_cut():
    (one,) = tell(step(answers=1, length=LONGEST + 5))
    assert len(one.texts) == LONGEST
    assert one.length == LONGEST + 5
