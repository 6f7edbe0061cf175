"""What scored completions say about their reward: which prompts have several best answers, and what would flip them.

A diagnosis before training: it needs rewards, no gradients, and no model. The "policy" of a prompt is a law over the
answers that were sampled for it; answers that nobody sampled are not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from uncollapse.errors import ConfigError, DataError
from uncollapse.policy.policy_cliff.bounds import tanh_bound
from uncollapse.policy.policy_cliff.stability import EXHAUSTIVE

ROUNDING = 1e-6
"""Rewards that differ by less, relative to what was added up and at least to 1, are tied: trainers keep rewards in float32,
whose rounding is 6e-8, and sum several."""

_CELLS = 1 << 22


@dataclass(frozen=True)
class RewardAudit:
    """Per prompt, how firmly its reward decides between the sampled answers. Entries are NaN where undefined.

    `completions`, `answers`: how many have a reward, and how many different ones those are. `ties`: how many answers
    share the best effective reward, which means being within `tolerance` of it; `ties_by_reward[:, k]` the same under each
    reward alone, among the answers that have it (0 if none has). `best`: the best effective reward. `gap`: best minus the
    next answer, 0 for a tie, NaN with fewer than two answers. `flip` = gap / 2: the smallest sup-norm change of the reward
    that can change the winner. `outside_gap`: best minus the best answer that is not tied with it.

    `hard_tv`: how far a change within `shift` can move the policy that is uniform over the best answers: (m - 1) / m for a
    tie of m, 1 once an answer outside can take over. Where 2 shift is `outside_gap`, within `tolerance`, the n answers there
    can join the m but not take over, which moves it by n / (m + n), if that is more. `soft_tv`: the same for the Gibbs law
    base exp(reward / alpha); exact where `exact`, else a lower bound, and never above `bound` = tanh(shift / (2 alpha)).
    `expected` reward and `entropy` (nats) of that law say what the temperature costs and buys.
    """

    completions: Int[np.ndarray, " prompt"]
    answers: Int[np.ndarray, " prompt"]
    ties: Int[np.ndarray, " prompt"]
    ties_by_reward: Int[np.ndarray, "prompt reward"]
    best: Float[np.ndarray, " prompt"]
    gap: Float[np.ndarray, " prompt"]
    outside_gap: Float[np.ndarray, " prompt"]
    hard_tv: Float[np.ndarray, " prompt"]
    soft_tv: Float[np.ndarray, " prompt"]
    exact: Bool[np.ndarray, " prompt"]
    expected: Float[np.ndarray, " prompt"]
    entropy: Float[np.ndarray, " prompt"]
    tolerance: Float[np.ndarray, " prompt"]
    alpha: float
    shift: float
    bound: float

    @property
    def flip(self) -> Float[np.ndarray, " prompt"]:
        """Smallest sup-norm reward change that can change the winner: gap / 2."""
        return self.gap / 2

    @property
    def comparable(self) -> Bool[np.ndarray, " prompt"]:
        """Prompts with at least two different scored answers; of the others nothing can be said."""
        return self.answers >= 2

    @property
    def tied(self) -> Bool[np.ndarray, " prompt"]:
        """Prompts with more than one best answer."""
        return self.ties >= 2

    def worst_first(self) -> Int[np.ndarray, " prompt"]:
        """Prompts by how little it takes to move them: ties first, the largest in front, then the smallest gap."""
        gap = np.where(self.comparable, self.gap, np.inf)
        moved = np.round(np.nan_to_num(self.soft_tv), 9)  # rounding must not decide the order
        return np.lexsort((np.arange(len(gap)), -moved, -self.ties, gap))


def audit_rewards(
    scores: Float[np.ndarray, "prompt sample reward"],
    weights: Float[np.ndarray, "*each reward"] | Sequence[float] | None = None,
    alpha: float = 0.1,
    *,
    shift: float = 0.01,
    answer: Int[np.ndarray, "prompt sample"] | None = None,
    base_logp: Float[np.ndarray, "prompt sample"] | None = None,
    tolerance: float | None = None,
) -> RewardAudit:
    """Audit a full table of rewards; NaN marks what was not sampled or not scored. `shift`: the largest reward change to
    guard against. Everything else as in `audit_completions`, with one entry for each prompt and sample.
    """
    prompts, samples, count = scores.shape
    kept = ~np.isnan(scores).all(2).ravel()
    prompt = np.repeat(np.arange(prompts), samples)
    return audit_completions(
        prompt[kept],
        scores.reshape(prompts * samples, count)[kept],
        weights,
        alpha,
        shift=shift,
        answer=None if answer is None else answer.ravel()[kept],
        base_logp=None if base_logp is None else base_logp.ravel()[kept],
        tolerance=tolerance,
        prompts=prompts,
    )


def audit_completions(
    prompt: Int[np.ndarray, " row"],
    scores: Float[np.ndarray, "row reward"],
    weights: Float[np.ndarray, "*each reward"] | Sequence[float] | None = None,
    alpha: float = 0.1,
    *,
    shift: float = 0.01,
    answer: Int[np.ndarray, " row"] | None = None,
    base_logp: Float[np.ndarray, " row"] | None = None,
    tolerance: float | None = None,
    prompts: int | None = None,
) -> RewardAudit:
    """Audit completions one per row, any number for each prompt; prompts are numbered from 0.

    The effective reward of a row is sum_k w_k R_k over the rewards that it has, as trainers of several domains add them
    up (TRL); NaN marks those that it has not, and rows without any are left out. `weights`: 1 each by default, (reward,),
    or (prompt, reward) where they depend on the prompt. `alpha`: temperature, reward per nat. `shift`: the largest reward
    change to guard against. Samples of a prompt with the same `answer` are one answer, whose rewards are their means (a
    judge may be noisy); without `answer` every row is one. The base law gives each answer the share of its samples, which
    estimates the policy that sampled them; with `base_logp`, the log-probability of each answer, it is that law
    restricted to the sampled answers, and equal answers count once. Rewards within `tolerance` are tied; the default is
    1e-6 max(1, |R|) for each prompt, with its largest |R_k|, and sum_k |w_k R_k| for the effective reward, since sums that
    cancel keep the rounding of their parts.

    Raises `DataError` for infinite rewards or arrays that do not fit, `ConfigError` for weights, alpha, shift or tolerance
    that make no sense. Cost: a few sorts of the rows, and 2^13 numbers per prompt of 14 answers.

    Source: arXiv 2507.20150, sections 2 and 4, for sampled answers; the exact worst case is derived here.
    """
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ConfigError(f"temperature {alpha:g} has to be above 0; the hard policy is reported beside it")
    if not (shift >= 0 and np.isfinite(shift)):
        raise ConfigError(f"shift {shift:g} has to be a number >= 0, in units of the reward")
    if tolerance is not None and not (tolerance >= 0 and np.isfinite(tolerance)):
        raise ConfigError(f"tolerance {tolerance:g} has to be a number >= 0, in units of the reward")
    infinite = np.isinf(scores).any(1)
    if infinite.any():
        raise DataError(
            f"the reward of completion {int(infinite.argmax())} (from 0) is infinite; beside it no other reward decides anything"
        )
    if len(prompt) != len(scores) or (len(prompt) and prompt.min() < 0):
        raise DataError(
            f"{len(prompt)} prompt numbers for {len(scores)} rows of rewards; give one from 0 for each"
        )
    total = (int(prompt.max()) + 1 if len(prompt) else 0) if prompts is None else prompts
    if len(prompt) and prompt.max() >= total:
        raise DataError(
            f"prompt number {int(prompt.max())} (from 0) of {total} prompts; give the number of them all"
        )
    w = _weights(scores.shape[1], weights, total)
    kept = ~np.isnan(scores).all(1)
    if base_logp is not None and not np.isfinite(base_logp[kept]).all():
        raise DataError(
            "base_logp is not finite for some scored row; a completion that was sampled has a probability"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        parts = scores * (w[prompt] if w.ndim == 2 else w)
        owner, columns, log_base, completions = _answers(
            prompt, np.column_stack([scores, np.nansum(parts, 1)]), answer, base_logp, kept, total
        )
    if np.isinf(columns).any() or np.isnan(columns[:, -1]).any():
        raise DataError("the weighted sum of the rewards overflows; scale them down")
    groups = _Groups(owner, total)
    top = groups.largest(np.where(np.isnan(columns), -np.inf, columns))
    if tolerance is None:
        size = groups.largest(np.abs(np.nan_to_num(columns)))
        np.maximum.at(size[:, -1], prompt[kept], np.nansum(np.abs(parts[kept]), 1))
        slack = ROUNDING * np.maximum(1.0, size)
    else:
        slack = np.full(top.shape, float(tolerance))
    tied = columns >= (top - slack)[owner]
    ties = groups.add(tied.astype(np.int64))
    effective, winners = columns[:, -1], tied[:, -1]
    outside = groups.largest(np.where(winners, -np.inf, effective)[:, None])[:, 0]
    answers = groups.count
    best = np.where(answers > 0, top[:, -1], np.nan)
    outside_gap = np.where(np.isneginf(outside), np.nan, best - outside)
    multiple = ties[:, -1]
    gap = np.where(answers < 2, np.nan, np.where(multiple > 1, 0.0, outside_gap))
    near = effective >= (top - slack)[owner, -1] - 2 * shift
    joining = groups.add((near & ~winners)[:, None].astype(np.int64))[:, 0]
    hard = _hard_tv(multiple, joining, outside_gap + slack[:, -1], shift)
    with np.errstate(over="ignore"):  # at a tiny temperature the others have probability 0
        logits = log_base + (effective - top[owner, -1]) / alpha
    p = np.exp(logits - groups.largest(logits[:, None])[owner, 0])
    p /= groups.add(p[:, None])[owner, 0]
    soft_tv, exact = _worst_tv(p, groups, shift, alpha)
    undefined = answers == 0

    def per_prompt(values: np.ndarray) -> np.ndarray:
        return np.where(undefined, np.nan, groups.add(values[:, None])[:, 0])

    return RewardAudit(
        completions=completions,
        answers=answers,
        ties=multiple,
        ties_by_reward=ties[:, :-1],
        best=best,
        gap=gap,
        outside_gap=outside_gap,
        hard_tv=np.where(undefined, np.nan, hard),
        soft_tv=np.where(undefined, np.nan, soft_tv),
        exact=exact,
        expected=per_prompt(p * effective),
        entropy=per_prompt(-p * np.log(np.where(p > 0, p, 1.0))) + 0.0,
        tolerance=np.where(undefined, np.nan, slack[:, -1]),
        alpha=float(alpha),
        shift=float(shift),
        bound=tanh_bound(shift, alpha),
    )


def gibbs_tv(
    reward: Float[np.ndarray, "*prompt sample"],
    changed: Float[np.ndarray, "*prompt sample"],
    alpha: float,
    base_logp: Float[np.ndarray, "*prompt sample"] | None = None,
) -> Float[np.ndarray, "*prompt"]:
    """TV between the Gibbs laws base exp(reward / alpha) of two given rewards; NaN marks answers that are not there."""
    there = ~(np.isnan(reward) | np.isnan(changed))
    base = np.zeros_like(reward) if base_logp is None else base_logp
    laws = []
    for one in (reward, changed):
        logits = np.where(there, base + np.where(there, one, 0.0) / alpha, -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        laws.append(p / p.sum(-1, keepdims=True))
    return np.asarray(0.5 * np.abs(laws[0] - laws[1]).sum(-1))


def _weights(count: int, weights: np.ndarray | Sequence[float] | None, prompts: int) -> np.ndarray:
    """(reward,) or (prompt, reward), checked."""
    if count == 0:
        raise DataError("there is no reward to audit")
    w = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape not in ((count,), (prompts, count)) or not np.isfinite(w).all() or not w.any(-1).all():
        given = w.tolist() if w.ndim == 1 else f"of shape {w.shape}"
        raise ConfigError(
            f"weights {given} do not fit; give {count} finite numbers, not all 0, once or for each prompt"
        )
    return w


def _answers(
    prompt: np.ndarray,
    scores: np.ndarray,
    answer: np.ndarray | None,
    base_logp: np.ndarray | None,
    kept: np.ndarray,
    total: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Different answers ordered by prompt: whose they are, mean of each score (NaN: none), log base mass; and kept rows
    per prompt."""
    rows = np.flatnonzero(kept)
    names = rows if answer is None else answer[rows]
    order = np.lexsort((names, prompt[rows]))
    rows, names = rows[order], names[order]
    mine = prompt[rows]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (mine[1:] != mine[:-1]) | (names[1:] != names[:-1])
    starts = np.flatnonzero(new)
    size = np.diff(np.append(starts, len(rows)))
    if not len(rows):
        return mine, scores[rows], np.zeros(0), np.zeros(total, dtype=np.int64)
    there = ~np.isnan(scores[rows])
    count = np.add.reduceat(there.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(there, scores[rows], 0.0), starts)
    most = np.maximum.reduceat(np.where(there, scores[rows], -np.inf), starts)
    least = np.minimum.reduceat(np.where(there, scores[rows], np.inf), starts)
    # rounding of a mean of equal numbers must not break a tie
    means = np.where(most == least, most, sums / np.maximum(count, 1))
    means = np.where(count > 0, means, np.nan)
    log_base = np.log(size) if base_logp is None else np.add.reduceat(base_logp[rows], starts) / size
    return mine[starts], means, log_base, np.bincount(mine, minlength=total)


@dataclass(frozen=True)
class _Groups:
    """Sums and maxima over the answers of each prompt, whose rows stand together."""

    owner: np.ndarray
    total: int

    @property
    def count(self) -> np.ndarray:
        return np.bincount(self.owner, minlength=self.total)

    def largest(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(np.maximum, values, -np.inf)

    def add(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(np.add, values, 0.0)

    def _reduce(self, operation: np.ufunc, values: np.ndarray, empty: float) -> np.ndarray:
        found = np.full((self.total, values.shape[1]), empty, dtype=values.dtype)
        if len(values):
            starts = np.flatnonzero(np.diff(self.owner, prepend=-1))
            found[self.owner[starts]] = operation.reduceat(values, starts)
        return found


def _hard_tv(ties: np.ndarray, joining: np.ndarray, firm: np.ndarray, shift: float) -> np.ndarray:
    """TV that a change within shift can reach: from `ties` best answers to one of them, to all of them and `joining` others,
    or to others alone if twice the shift is beyond `firm`, their distance (NaN: there are none)."""
    broken = np.where(shift > 0, (ties - 1) / np.maximum(ties, 1), 0.0)
    joined = joining / np.maximum(ties + joining, 1)
    return np.where(2 * shift > np.nan_to_num(firm, nan=np.inf), 1.0, np.maximum(broken, joined))


def _worst_tv(p: np.ndarray, groups: _Groups, shift: float, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Largest TV of the Gibbs law over |dR| <= shift, and whether it is exact.

    The worst change adds shift on a set U of answers and takes it from the rest, so only the mass p_U counts: TV = p' - p
    with odds(p') = odds(p) exp(2 shift / alpha), which peaks at p_U = 1 / (1 + exp(shift / alpha)). All subsets of at most 14
    answers; beyond, greedy filling up to the peak, likeliest answers first.
    """
    count = groups.count
    starts = np.cumsum(count) - count
    found = np.zeros(groups.total)
    for size in np.unique(count[(count >= 2) & (count <= EXHAUSTIVE)]):
        chosen = np.flatnonzero(count == size)
        half = ((np.arange(2 ** (size - 1))[:, None] >> np.arange(size)) & 1).astype(np.float64)
        for some in np.array_split(chosen, -(-len(chosen) * len(half) // _CELLS)):
            each = p[starts[some][:, None] + np.arange(size)]
            # the rest is added up, not taken from 1: what is left beside a likely answer would be rounding
            mass, rest = each @ half.T, each @ (1 - half).T
            found[some] = np.maximum(_moved(mass, rest, shift, alpha), _moved(rest, mass, shift, alpha)).max(
                1
            )
    large = np.flatnonzero(count > EXHAUSTIVE)
    if len(large):
        found[large] = _greedy(p, groups, large, starts, shift, alpha)
    return found, count <= EXHAUSTIVE


def _moved(mass: np.ndarray, rest: np.ndarray, shift: float, alpha: float) -> np.ndarray:
    """p' - p for odds(p') = odds(p) exp(2 shift / alpha), without overflow; `rest` is 1 - p."""
    gain, factor = -np.expm1(-2 * shift / alpha), np.exp(-2 * shift / alpha)
    return mass * rest * gain / np.maximum(mass + rest * factor, np.finfo(np.float64).tiny)


def _greedy(
    p: np.ndarray, groups: _Groups, large: np.ndarray, starts: np.ndarray, shift: float, alpha: float
) -> np.ndarray:
    """Worst TV over nested sets: likeliest first, an answer joins if the mass stays at or below the peak."""
    order = np.lexsort((-p, groups.owner))
    ranked, count = p[order], groups.count
    peak = 1 / (1 + np.exp(min(shift / alpha, 700.0)))
    mass, best = np.zeros(len(large)), np.zeros(len(large))
    for rank in range(int(count[large].max())):
        here = np.flatnonzero(count[large] > rank)
        grown = mass[here] + ranked[starts[large[here]] + rank]
        rest = np.maximum(1 - grown, 0.0)
        moved = np.maximum(_moved(grown, rest, shift, alpha), _moved(rest, grown, shift, alpha))
        best[here] = np.maximum(best[here], moved)
        mass[here] = np.where(grown <= peak, grown, mass[here])
    return best
