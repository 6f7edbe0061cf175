"""Attribution of entropy to tokens: against a naive loop, and against the exact change of a softmax policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.diagnose.attribution import FRACTIONS, QUADRANTS, attribute
from uncollapse.errors import DataError
from uncollapse.token_dump import TokenDump, Tokens


def step(number, seed, count=47, vocab=5, **given):
    random = np.random.default_rng(seed)
    columns = {
        "token": random.integers(0, vocab, count),
        "position": random.integers(0, 9, count),
        "old_logp": -random.exponential(size=count),
        "logp": np.full(count, np.nan),
        "advantage": random.normal(size=count),
        "entropy": random.random(count),
        "mask": random.random(count) < 0.8,
        "text": np.array([""] * count, dtype=object),
        **given,
    }
    columns["text"] = np.array([f"<{token}>" for token in columns["token"]], dtype=object)
    return Tokens(number, columns)


def naive(steps):
    """Drives by token, by position and in all, with plain loops."""
    by_token, by_position, total = {}, {}, 0.0
    for tokens in steps:
        kept = [i for i in range(len(tokens)) if tokens.mask[i]]
        logp, advantage = tokens.number("old_logp"), tokens.number("advantage")
        mean_p = sum(logp[i] for i in kept) / len(kept)
        mean_a = sum(advantage[i] for i in kept) / len(kept)
        for i in kept:
            drive = -(logp[i] - mean_p) * (advantage[i] - mean_a) / len(kept)
            token, position = int(tokens.columns["token"][i]), int(tokens.columns["position"][i])
            by_token[token] = by_token.get(token, 0.0) + drive
            by_position[position] = by_position.get(position, 0.0) + drive
            total += drive
    return by_token, by_position, total


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_equals_the_naive_loops(seed):
    steps = [step(0, seed), step(1, seed + 1, count=3, mask=np.ones(3, bool)), step(4, seed + 2, count=31)]
    found = attribute(steps, top=50)
    by_token, by_position, total = naive(steps)
    drives = {entry.token: entry.drive for entry in (*found.spenders, *found.keepers)}
    assert drives.keys() == by_token.keys()
    for token, drive in by_token.items():
        assert math.isclose(drives[token], drive, rel_tol=1e-9, abs_tol=1e-12)
    for position, drive in by_position.items():
        assert math.isclose(found.positions[position], drive, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(found.drive, total, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(sum(q.drive for q in found.quadrants.values()), total, rel_tol=1e-9, abs_tol=1e-12)
    assert sum(q.tokens for q in found.quadrants.values()) == found.tokens == found.position_tokens.sum()
    assert [s.step for s in found.steps] == [0, 1, 4]
    assert [e.drive for e in found.spenders] == sorted(e.drive for e in found.spenders)
    assert all(entry.text == f"<{entry.token}>" for entry in found.spenders)


def test_the_drive_is_the_first_order_change_of_a_softmax_policys_entropy():
    """Exact expectation: every action once per its probability, the gradient step of a tabular policy."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64)
    advantage = torch.randn(6, dtype=torch.float64)
    copies = 60_000
    counts = (torch.softmax(logits, 0) * copies).round().long()
    probability = counts.double() / counts.sum()  # so that the empirical frequencies are exactly the policy's
    logits = probability.log()
    actions = torch.repeat_interleave(torch.arange(6), counts).numpy()
    tokens = step(
        0, 0, len(actions), token=actions, position=np.zeros(len(actions), int), mask=np.ones(len(actions), bool),
        old_logp=logits.numpy()[actions], advantage=advantage.numpy()[actions],
    )  # fmt: skip

    def entropy(values):
        logp = torch.log_softmax(values, 0)
        return -(logp.exp() * logp).sum()

    # Natural gradient: the logit of an action moves by eta times its advantage, as in the paper's derivation.
    eta = 1e-6
    change = (entropy(logits + eta * advantage) - entropy(logits)) / eta
    assert math.isclose(attribute([tokens]).drive, float(change), rel_tol=1e-4)


def test_logp_of_the_trained_policy_goes_first_and_bad_numbers_are_left_out():
    plain = step(0, 3)
    trained = step(0, 3, logp=plain.number("old_logp"), old_logp=np.full(47, -1.0))
    assert attribute([trained]).drive == attribute([plain]).drive
    dirty = step(0, 3)
    dirty.columns["advantage"][5] = np.nan
    dirty.columns["old_logp"][6] = -np.inf
    dirty.columns["mask"][[5, 6]] = True
    clean = step(0, 3)
    clean.columns["mask"][[5, 6]] = False
    assert attribute([dirty]).drive == attribute([clean]).drive


def test_few_tokens_carry_the_covariance_where_they_do():
    count = 10_000
    logp, advantage = np.full(count, -1.0), np.zeros(count)
    logp[:20], advantage[:20] = -9.0, -5.0
    found = attribute([step(0, 0, count, old_logp=logp, advantage=advantage, mask=np.ones(count, bool))])
    assert found.top_tokens == (2, 20, 200, 2000)
    assert found.shares[0] == pytest.approx(0.1, abs=0.01)
    assert found.shares[1] > 0.99
    assert found.quadrants["rare punished"].tokens == 20
    assert found.quadrants["rare punished"].drive < 0
    assert set(found.quadrants) == set(QUADRANTS)
    assert len(found.steps[0].shares) == len(FRACTIONS)


def test_a_dump_on_disk(tmp_path):
    dump = TokenDump(tmp_path)
    random = np.random.default_rng(1)
    for number in range(3):
        dump.write(number, token=random.integers(0, 9, (4, 6)), mask=np.ones((4, 6)), old_logp=-random.random((4, 6)),
                   advantage=random.normal(size=4))  # fmt: skip
    found = attribute(tmp_path)
    assert found.tokens == 72
    assert all(math.isnan(entry.entropy) for entry in found.spenders)
    assert all(math.isnan(one.entropy) for one in found.steps)


def test_nothing_to_account_for():
    with pytest.raises(DataError, match="no trained token"):
        attribute([step(0, 0, mask=np.zeros(47, bool))])
    constant = attribute([step(0, 0, advantage=np.ones(47))])
    assert constant.drive == 0
    assert constant.shares == (0.0,) * len(FRACTIONS)
