"""Conflict tokens of one GTPO group, against counting over the vocabulary and comparing all pairs of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Goal
from uncollapse.policy.gtpo import conflict_weights

SUMMARY = (
    "`conflict_weights` of GTPO: which tokens occur at the same place in good and bad answers of a group, as leading and "
    "trailing runs, and their weights. *counting* is the official formulation, written anew from its description: two "
    "counters per (position, vocabulary) pair. At full size they need 5 GB each, so it runs on the first answers' "
    "positions only, where *ours, short* does the same. *all pairs* compares every answer with every other. "
    "Answers begin and end alike, have unequal lengths, and are random in between."
)
G, TIME, SHORT, V = 64, 4096, 256, 151_936
COUNTING, PAIRS, OURS_SHORT = "counting, short", "all pairs", "ours, short"
Problem = tuple[Tensor, Tensor, Tensor]


def problem(rows: int, time: int, vocabulary: int) -> Problem:
    """Ids, mask and advantages; the first and last eighth of an answer are one of four texts, the rest is random."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, time), generator=g)
    length = torch.randint(time - time // 64, time + 1, (rows, 1), generator=g)
    length[0] = time
    few = torch.randint(0, 4, (rows, 1), generator=g)  # four ways to begin and to end
    place = torch.arange(time)
    ids = torch.where(place < time // 8, (7 * place + few) % vocabulary, ids)
    ids = torch.where(place >= length - time // 8, (5 * (length - place) + few) % vocabulary, ids)
    return ids, place < length, torch.randn(rows, generator=g)


def run_weights(conflict: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """Weights of the leading run, on rows that start at the first column."""
    run = conflict.int().cumprod(1).bool() & mask
    return torch.where(run, torch.where(advantage > 0, 2.0, 0.0)[:, None], 1.0)


def both_runs(find: Callable[[Tensor, Tensor, Tensor], Tensor], given: Problem) -> Tensor:
    """Weights by any way to find conflicts: forward, and backward on rows turned round."""
    ids, mask, advantage = given
    time = torch.arange(ids.shape[1])
    turned = torch.where(mask, mask.sum(1, keepdim=True) - 1 - time, time)
    forward = run_weights(find(ids, mask, advantage), mask, advantage)
    backward = run_weights(find(ids.gather(1, turned), mask, advantage), mask, advantage)
    return forward * backward.gather(1, turned) * mask


def counting(vocabulary: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Two bincounts over (position, vocabulary)."""

    def find(ids: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
        size = ids.shape[1] * vocabulary
        key = torch.arange(ids.shape[1]) * vocabulary + ids
        good, bad = (mask & chosen[:, None] for chosen in (advantage > 0, advantage < 0))
        count_good = torch.bincount(key[good], minlength=size).clamp(max=1)
        count_bad = torch.bincount(key[bad], minlength=size).clamp(max=1)
        return (count_good.bool() & count_bad.bool())[key]

    return find


def all_pairs(ids: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """O(G^2 L) comparisons, one answer against all at a time."""
    found = torch.zeros_like(mask)
    for other, there, sign in zip(ids, mask, advantage, strict=True):
        found |= (ids == other) & there & (advantage * sign < 0)[:, None]
    return found & mask


def ours(given: Problem) -> Tensor:
    """Weights by sorted keys."""
    ids, mask, advantage = given
    return conflict_weights(ids, mask, advantage)[0]


def case() -> Case:
    """One group of 64 answers of up to 4096 tokens, a short one, and a tiny one to warm libraries up."""
    full, short, tiny = problem(G, TIME, V), problem(G, SHORT, V), problem(4, 16, 64)

    def check() -> dict[str, float]:
        mine, mine_short = ours(full), ours(short)
        if not (mine == 2).any() or not (mine[full[1]] == 0).any():
            raise RuntimeError("the input has no conflicts")
        return {
            PAIRS: (mine - both_runs(all_pairs, full)).abs().max().item(),
            COUNTING: (mine_short - both_runs(counting(V), short)).abs().max().item(),
        }

    def contestants(long: Problem, brief: Problem, vocabulary: int) -> dict[str, Callable[[], Any]]:
        return {
            OURS: lambda: ours(long),
            PAIRS: lambda: both_runs(all_pairs, long),
            OURS_SHORT: lambda: ours(brief),
            COUNTING: lambda: both_runs(counting(vocabulary), brief),
        }

    return Case(
        size=f"{G} answers of up to {TIME} tokens, V={V}; short: up to {SHORT} tokens",
        contestants=contestants(full, short, V),
        warm_up=contestants(tiny, tiny, 64),
        check=check,
        goals=(
            Goal("seconds for 64 answers of 4096 tokens", lambda r: r[OURS]["seconds"]["median"], 0.5, False),
            Goal("our extra peak memory (MB)", lambda r: r[OURS]["extra_peak_mb"], 100, False),
            Goal(
                "time of counting over ours, short",
                lambda r: r[COUNTING]["time_over_ours"] / r[OURS_SHORT]["time_over_ours"],
                10,
                True,
            ),
        ),
    )
