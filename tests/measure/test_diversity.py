"""Diversity measures against brute force over subsets, and by hand."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.diversity import (
    answer_ids,
    cosine_similarity,
    distinct_answers,
    distinct_n,
    expected_distinct,
    jaccard_similarity,
    majority_at_k,
    pass_at_k,
    self_similarity,
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_mean_over_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [i < c for i in range(n)]
    exact = np.mean([any(right[i] for i in chosen) for chosen in combinations(range(n), k)])
    assert float(pass_at_k(n, c, k)) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_broadcasts_and_stays_exact_at_scale():
    n, c, k = 10_000, np.array([[0], [1], [9_999]]), np.array([1, 100, 10_000])
    expected = [
        [
            float(1 - math.comb(n - int(ci), int(ki)) / math.comb(n, int(ki))) if ci + ki <= n else 1.0
            for ki in k
        ]
        for ci in c[:, 0]
    ]
    expected[0] = [0.0, 0.0, 0.0]
    expected[1] = [1e-4, 1e-2, 1.0]
    result = pass_at_k(n, c, k)
    assert result.shape == (3, 3)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=0)
    assert float(pass_at_k(10**6, 1, 1)) == pytest.approx(1e-6, rel=1e-12)


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    correct = rng.binomial(8, 0.2, size=20_000)
    assert pass_at_k(8, correct, 4).mean() == pytest.approx(1 - 0.8**4, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(st.integers(0, 3), min_size=1, max_size=7), data=st.data())
def test_expected_distinct_is_the_mean_over_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    exact = np.mean([len(set(chosen)) for chosen in combinations(answers, k)])
    assert expected_distinct(np.bincount(answers), k) == pytest.approx(exact, abs=1e-12)
    assert expected_distinct(np.bincount(answers), len(answers)) == pytest.approx(distinct_answers(answers))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    k=st.integers(1, 5),
    data=st.data(),
)
def test_majority_at_k_is_the_mean_over_votes(counts, k, data):
    correct = data.draw(st.integers(0, len(counts) - 1))
    share = np.array(counts) / sum(counts)
    exact = 0.0
    for votes in product(range(len(counts)), repeat=k):
        tally = np.bincount(votes, minlength=len(counts))
        winners = np.flatnonzero(tally == tally.max())
        exact += np.prod(share[list(votes)]) * (correct in winners) / len(winners)
    assert majority_at_k(np.array(counts), correct, k) == pytest.approx(exact, abs=1e-12)


def test_majority_at_k_sampled():
    counts = np.array([6, 5, 4, 3, 2, 1, 1, 1])
    sampled = majority_at_k(counts, 0, 64)
    assert sampled == majority_at_k(counts, 0, 64)
    assert sampled != majority_at_k(counts, 0, 64, seed=1)
    two = majority_at_k(np.array([3, 2]), 0, 101)
    binomial = sum(math.comb(101, i) * 0.6**i * 0.4 ** (101 - i) for i in range(51, 102))
    assert two == pytest.approx(binomial, abs=1e-12)
    assert majority_at_k(counts, -1, 3) == 0
    assert majority_at_k(np.array([4]), 0, 200) == 1


def test_answers():
    assert answer_ids(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert answer_ids([]).tolist() == []
    assert distinct_answers(["b", "a", "b"]) == 2


def test_distinct_n():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], n=2) == 3 / 4
    assert distinct_n([[1, 2, 3], [1, 2, 4]], n=1) == 4 / 6
    assert math.isnan(distinct_n([[1], []], n=2))


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6), n=st.integers(1, 3)
)
def test_jaccard_against_sets(sequences, n):
    sets = [{tuple(s[i : i + n]) for i in range(len(s) - n + 1)} for s in sequences]
    expected = [[len(a & b) / len(a | b) if a | b else 1.0 for b in sets] for a in sets]
    np.testing.assert_allclose(jaccard_similarity(sequences, n=n), expected, atol=1e-15)


def test_similarity():
    same = jaccard_similarity([[1, 2, 3, 4]] * 3)
    assert self_similarity(same) == 1
    assert self_similarity(jaccard_similarity([[1, 2, 3], [4, 5, 6]])) == 0
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(cosine_similarity(x), expected)
    assert self_similarity(cosine_similarity(x[:3])) == pytest.approx(1 / 3)
    assert math.isnan(self_similarity(np.ones((1, 1))))
    assert math.isnan(self_similarity(np.ones((0, 0))))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pass_at_k(4, 5, 1), DataError, "between 0 and samples"),
        (lambda: pass_at_k(4, 1, 5), ConfigError, "between 1 and the 4 samples"),
        (lambda: expected_distinct(np.array([2, -1]), 1), DataError, "negative"),
        (lambda: expected_distinct(np.array([2, 1]), 4), ConfigError, "between 1 and the 3 samples"),
        (lambda: majority_at_k(np.array([0, 0]), 0, 1), DataError, "not all zero"),
        (lambda: majority_at_k(np.array([1, 1]), 2, 1), DataError, "correct is 2 with 2 answers"),
        (lambda: majority_at_k(np.array([1, 1]), 0, 0), ConfigError, "k is 0"),
        (lambda: distinct_n([[1]], n=0), ConfigError, "n is 0"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
