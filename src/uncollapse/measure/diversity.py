"""How much a group of answers still explores: pass@k, maj@k, distinct answers, n-grams, self-similarity.

Answers are integers: equal answers share an id (`answer_ids` makes them). All estimators are exact expectations
over draws *without* replacement from the n answers observed, unless they say otherwise; with k = n they are the
observation itself. A single answer per prompt says nothing about diversity.

Differs from the paper: none known.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from scipy.sparse import csr_array
from scipy.special import gammaln
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.precision import at_least_float32


def pass_at_k(
    samples: Int[np.ndarray, "..."] | int,
    correct: Int[np.ndarray, "..."] | int,
    k: Int[np.ndarray, "..."] | int,
) -> Float[np.ndarray, "..."]:
    """Unbiased estimate of the probability that at least one of k answers is right: 1 - C(n-c, k) / C(n, k).

    Computed as a product of ratios in logs, so that nothing overflows and small probabilities keep their digits.
    `1 - (1 - c/n)^k` would be biased low.

    Args:
        samples: n, answers per prompt.
        correct: c of them that are right.
        k: draws, 1 to n. The three broadcast like numpy arrays: c of shape (prompts, 1) and k of shape (ks,) give
            (prompts, ks).

    Raises:
        DataError: c outside 0..n.
        ConfigError: k outside 1..n (there is no unbiased estimate for k > n; sample more).

    Source: Chen et al. (2021), arXiv 2107.03374, eq. 1.
    """
    n, c, draws = np.broadcast_arrays(np.asarray(samples), np.asarray(correct), np.asarray(k))
    if ((c < 0) | (c > n)).any():
        raise DataError("pass_at_k: correct must lie between 0 and samples")
    if ((draws < 1) | (draws > n)).any():
        raise ConfigError(
            f"pass_at_k: k must lie between 1 and the {n.min() if n.size else 0} samples of every prompt"
        )
    out: np.ndarray = np.asarray(-np.expm1(_log_miss(n, c, draws)))
    return out


def _log_miss(n: np.ndarray, c: np.ndarray, k: np.ndarray) -> np.ndarray:
    """log C(n-c, k) / C(n, k), -inf if k draws cannot avoid all c; by symmetry the shorter product is summed."""
    long, short = np.maximum(c, k), np.minimum(c, k)
    steps = np.arange(int(short.max(initial=0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = long[..., None] / (n[..., None] - steps)
        terms = np.where(steps < short[..., None], np.log1p(-np.minimum(share, 1.0)), 0.0)
    out: np.ndarray = np.asarray(terms.sum(-1))
    return out


def expected_distinct(counts: Int[np.ndarray, "answer"], k: int) -> float:
    """Expected number of distinct answers among k draws without replacement (rarefaction), 1 <= value <= k.

    sum_a [1 - C(n - n_a, k) / C(n, k)] over the observed multiplicities n_a: the comparison of groups of different
    size at a common k. At k = n it is the number of distinct answers.

    Raises:
        DataError: negative counts.
        ConfigError: k outside 1..n.

    Source: Hurlbert (1971), eq. for the expected number of species.
    """
    if (counts < 0).any():
        raise DataError("expected_distinct: counts must not be negative")
    return float(pass_at_k(np.asarray(int(counts.sum())), counts, np.asarray(k)).sum())


def answer_ids(answers: Sequence[Hashable]) -> Int[np.ndarray, "answer"]:
    """Number equal answers alike, in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(answer, len(seen)) for answer in answers], dtype=np.int64)


def distinct_answers(answers: Sequence[Hashable]) -> int:
    """Count different answers in one group."""
    return len(set(answers))


def majority_at_k(
    counts: Int[np.ndarray, "answer"], correct: int, k: int, *, draws: int = 20_000, seed: int = 0
) -> float:
    """Probability that the majority vote of k answers, ties broken at random, picks the correct answer.

    The k answers are drawn *with* replacement from the observed frequencies: the plug-in estimate of maj@k of the
    model that produced them, biased as any plug-in for k near or above n. Exact (enumeration of all outcomes of
    the multinomial) while there are at most 20,000 of them, beyond that a Monte Carlo mean over `draws` seeded
    votes with standard error below 0.5 / sqrt(draws), 0.0035 by default. k = 1 is the correct answer's frequency.

    Args:
        counts: multiplicity of each distinct answer.
        correct: index into `counts` of the right answer; -1 if it was never given.
        k: number of votes, >= 1.
        draws: Monte Carlo votes.
        seed: of the Monte Carlo draw.

    Raises:
        DataError: no counts, negative counts, `correct` out of range.
        ConfigError: k or draws below 1.
    """
    if counts.size == 0 or (counts < 0).any() or counts.sum() == 0:
        raise DataError("majority_at_k: counts must be non-negative and not all zero")
    if not -1 <= correct < counts.size:
        raise DataError(
            f"majority_at_k: correct is {correct} with {counts.size} answers; give an index, or -1"
        )
    if k < 1 or draws < 1:
        raise ConfigError(f"majority_at_k: k is {k} and draws is {draws}; give at least 1")
    if correct == -1 or counts[correct] == 0:
        return 0.0
    order = np.r_[correct, np.delete(np.arange(counts.size), correct)]
    share = counts[order][counts[order] > 0] / counts.sum()
    if math.comb(k + len(share) - 1, k) <= 20_000:
        votes = np.array(list(_compositions(k, len(share))))
        with np.errstate(divide="ignore"):
            log_weight = gammaln(k + 1) - gammaln(votes + 1).sum(1) + (votes * np.log(share)).sum(1)
        return float((np.exp(log_weight) * _wins(votes)).sum())
    return float(_wins(np.random.default_rng(seed).multinomial(k, share, size=draws)).mean())


def _wins(votes: np.ndarray) -> np.ndarray:
    """Chance that column 0 wins each vote: 1 / number of winners if it is among them."""
    top = votes == votes.max(1, keepdims=True)
    out: np.ndarray = top[:, 0] / top.sum(1)
    return out


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` numbers >= 0."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def distinct_n(sequences: Sequence[Sequence[Hashable]], *, n: int = 2) -> float:
    """Distinct n-grams over all n-grams of a group of token sequences, in (0, 1]; NaN if there are none.

    Falls with total length (Heaps' law), so compare only groups of similar length.

    Raises:
        ConfigError: n below 1.

    Source: Li et al. (2016), arXiv 1510.03055.
    """
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _grams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ConfigError(f"n-grams: n is {n}; give at least 1")
    return list(zip(*(sequence[i:] for i in range(n)), strict=False))


def jaccard_similarity(
    sequences: Sequence[Sequence[Hashable]], *, n: int = 3
) -> Float[np.ndarray, "sample sample"]:
    """Jaccard index |A & B| / |A | B| of the n-gram sets of every two token sequences, in [0, 1].

    One sparse product: memory grows with the total number of n-grams plus samples^2. Sequences shorter than n have
    no n-grams; two such are counted equal (1), and unlike any other (0).

    Raises:
        ConfigError: n below 1.
    """
    sets = [set(_grams(sequence, n)) for sequence in sequences]
    number: dict[tuple[Hashable, ...], int] = {}
    columns = [number.setdefault(gram, len(number)) for grams in sets for gram in grams]
    size = np.array([len(grams) for grams in sets], dtype=np.int64)
    ends = np.r_[0, size.cumsum()]
    table = csr_array((np.ones(len(columns)), columns, ends), shape=(len(sets), max(1, len(number))))
    common = (table @ table.T).toarray()
    union = size[:, None] + size[None, :] - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0)


def cosine_similarity(embeddings: Num[Tensor, "sample feature"]) -> Float[Tensor, "sample sample"]:
    """Cosine of every two embeddings, in [-1, 1]; a zero vector is similar to nothing (0)."""
    x = at_least_float32(embeddings)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / length.clamp(min=torch.finfo(x.dtype).tiny)
    return (unit @ unit.T).clamp(-1, 1)


def self_similarity(similarity: Num[np.ndarray, "sample sample"] | Num[Tensor, "sample sample"]) -> float:
    """Mean similarity of two different members of a group; NaN for fewer than two members.

    Takes the matrix of `jaccard_similarity`, `cosine_similarity` or any other. 1 means collapse onto one answer.
    """
    n = len(similarity)
    if n < 2:
        return math.nan
    return float((similarity.sum() - similarity.trace()) / (n * (n - 1)))
