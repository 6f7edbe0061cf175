"""BAPO: clip bounds that move at every update until positive tokens carry a set share of the loss.

Paper: Xi, Guo, Nan, Zhou, ..., Huang, "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy
Optimization with Adaptive Clipping", 2025, arXiv 2510.18927. Official code: WooooDyy/BAPO, `recipe/bapo/policy_loss.py`
(the authors say that the paper's runs used another, private framework).

The bounds `low` and `high` are ratios, not distances from 1. With P and N what positive and negative tokens carry,

    P(high) = sum_{A>0} A min(r, high),    N(low) = sum_{A<0} |A| max(r, low),    share = P / (P + N),

the search raises `high`, then `low`, step by step, until the share reaches its target.

Two things to know:
- N grows with `low`, so raising `low` can only lower the share that the search wants to raise: once entered, the
  published search for `low` runs to its end. What raising `low` does is silence negative tokens with r < low.
  `contribution="gradient"` counts only tokens that still have a gradient (r < high, r > low): then both moves help.
- At r = 1 the share is L+ A+ / (L+ A+ + L- A-), whatever the bounds. Advantages of a group add up to 0, so with answers
  of equal length it is 1/2 and the published target of 0.4 never starts a search: BAPO is then a fixed clip.

Differs from the paper / the official code:
- The pool is the optimiser step. The official loss searches in each micro-batch; `scope="microbatch"` does that.
- No loop: sums over the cells of the grid of bounds give the share at every step of the search at once, in float64, with
  integer step indices, so that no step is lost to rounding; the target is reached within 1e-9 of it (relative).
- Where P and N are both 0 (all groups without variance) the share is 1 and nothing is searched, not 0/0; the official
  1e-8 beside N is left out.
- In Algorithm 1 a lower bound without room to move ends the search for the upper one too; here it does not.
- The paper weighs each term of the share by the sampling probability; as a mean over samples that weight is already in
  the sampling, and the code has none. `token_weight` takes one.
- A ratio counts as at most e^20 everywhere, as the official clamp of the log ratio has it, also where ratios are given.
- The share is that of the plain sum over tokens, as published, also under another mean than the token mean, and it knows
  neither the dual clip nor the weights of other stages.
- The official code clips negatives twice (dual clip at 3); the paper does not. The paper samples at temperature 0.6;
  the recipes sample as `grpo` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.policy.baselines import grpo
from uncollapse.policy.batch import Batch, Columns, TokenMap, TokenMask
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.protocols import Metrics, Needs, Scope
from uncollapse.policy.recipe import register
from uncollapse.policy.reduction import Mean
from uncollapse.policy.stages.surrogates import FARTHEST, clipped_loss, ratio_of, silenced_by_clip
from uncollapse.policy.stats import Logp

__all__ = [
    "PRESETS",
    "BalancedClip",
    "ClipBounds",
    "balanced_clip_bounds",
    "clipped_surrogate",
    "entropy_clip_contributions",
    "positive_share",
    "share_of_ratio",
]

Range: TypeAlias = tuple[float, ...]
"""Start, end and step of a bound."""
Contribution: TypeAlias = Literal["loss", "gradient"]
Order: TypeAlias = Literal["high_first", "low_first"]
End: TypeAlias = Literal["stop", "clamp"]
Aggregation: TypeAlias = Literal["token-mean", "seq-mean-token-mean"]

TOLERANCE = 1e-9
"""How far below its target, relatively, a share counts as having reached it: rounding is no imbalance."""


class ClipBounds(NamedTuple):
    """Where the search ended; numbers as 0-dim tensors on the device of the input.

    `low` and `high` are bounds of the ratio, `share` is reached with them and `start_share` was there before the search;
    `steps` counts the moves of both bounds, `satisfied` says whether the target was reached.
    """

    low: Float[Tensor, ""]
    high: Float[Tensor, ""]
    share: Float[Tensor, ""]
    start_share: Float[Tensor, ""]
    steps: Int[Tensor, ""]
    satisfied: Bool[Tensor, ""]


def share_of_ratio(ratio: float) -> float:
    """The share P / (P + N) that a target for P / N means: tau / (1 + tau). Raises `ConfigError` below 0.

    The official configuration gives P / N, the paper P / (P + N): 1 is a share of 0.5, 0.5 one of 1/3.
    """
    if ratio < 0:
        raise ConfigError(f"a target for P / N is at least 0; got {ratio:g}")
    return ratio / (1 + ratio)


@torch.no_grad()
def positive_share(
    ratio: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    low: float,
    high: float,
    *,
    contribution: Contribution = "loss",
    token_weight: Float[Tensor, "*pool"] | None = None,
) -> Float[Tensor, ""]:
    """Share P / (P + N) of the positive tokens at these bounds, in [0, 1]; 1 where nothing carries anything.

    `contribution="loss"`: P = sum_{A>0} A min(r, high), N = sum_{A<0} |A| max(r, low) (arXiv 2510.18927, Eq. 8).
    `contribution="gradient"`: only tokens that the clip leaves a gradient, P = sum_{A>0, r<high} A r and
    N = sum_{A<0, r>low} |A| r (the indicator of Eq. 5). Tokens with A = 0 or outside `mask` belong to neither side.
    """
    _one_of("contribution", contribution, Contribution)
    bounds = torch.tensor([[low], [high]], dtype=torch.float64, device=ratio.device)
    sizes, inside = _sides(ratio, advantages, mask, token_weight)
    return _share(
        _carried_by_positives(inside, sizes[0], bounds[1], contribution),
        _carried_by_negatives(inside, sizes[1], bounds[0], contribution),
    )[0]


@torch.no_grad()
def balanced_clip_bounds(
    ratio: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    *,
    target: float = 0.4,
    low: Range = (0.6, 0.9, 0.02),
    high: Range = (1.2, 3.0, 0.05),
    order: Order = "high_first",
    contribution: Contribution = "loss",
    end: End = "stop",
    token_weight: Float[Tensor, "*pool"] | None = None,
) -> ClipBounds:
    """Clip bounds at which positive tokens carry at least `target` of the sum P + N of `positive_share`.

    The bounds start at the first numbers of `low` and `high` (start, end, step) and move up one step at a time until
    the share reaches the target or no step is left: `high` to its end and then `low` (paper), or the other way round
    (official code). A step that would pass the end is not taken (`end="stop"`, paper) or shortened (`"clamp"`, code).
    Found without a loop: O(tokens log steps) time, O(tokens) memory, nothing is read back from the device.

    Raises `ConfigError` for a target outside [0, 1], and for ranges that are no ranges or overlap.

    Source: arXiv 2510.18927, Algorithm 1; official `recipe/bapo/policy_loss.py`.
    """
    _one_of("order", order, Order)
    _one_of("contribution", contribution, Contribution)
    lows, highs = _grids(target, low, high, end)
    if order == "high_first":
        path = [(0, j) for j in range(len(highs))] + [(i, len(highs) - 1) for i in range(1, len(lows))]
    else:
        path = [(i, 0) for i in range(len(lows))] + [(len(lows) - 1, j) for j in range(1, len(highs))]
    way_low, way_high = torch.tensor(path, device=ratio.device).unbind(1)
    low_grid, high_grid = (
        torch.tensor(grid, dtype=torch.float64, device=ratio.device) for grid in (lows, highs)
    )
    sizes, inside = _sides(ratio, advantages, mask, token_weight)
    share = _share(
        _carried_by_positives(inside, sizes[0], high_grid, contribution)[way_high],
        _carried_by_negatives(inside, sizes[1], low_grid, contribution)[way_low],
    )
    reached = share >= target * (1 - TOLERANCE)
    satisfied = reached.any()
    steps = torch.where(satisfied, reached.int().argmax(), len(path) - 1)
    return ClipBounds(
        low=low_grid[way_low].take(steps),
        high=high_grid[way_high].take(steps),
        share=share.take(steps),
        start_share=share[0],
        steps=steps,
        satisfied=satisfied,
    )


def clipped_surrogate(
    ratio: Float[Tensor, "row time"],
    adv: Float[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    low: float | Float[Tensor, ""],
    high: float | Float[Tensor, ""],
    dual_clip: float | None = None,
    agg: Aggregation = "token-mean",
) -> Float[Tensor, ""]:
    """Minus the clipped objective, min(r A, clip(r, low, high) A), averaged; differentiable in `ratio`.

    With `dual_clip` c the loss of a token with A < 0 is at most -c A. `agg` is the mean over all valid tokens, or over rows
    of the mean over a row's tokens; an empty mask gives 0. What stands outside `mask` may be anything, NaN included.

    From e^20 on the loss is constant in the ratio, so loss and gradient are finite for an infinite one. Make ratios of
    log-probabilities with `stages.surrogates.bounded_ratio`: the derivative of a plain `exp` that has overflowed (float32:
    from a log ratio of 89) is infinite, and gives NaN by the chain rule even for a token that the clip silences.

    Source: arXiv 2510.18927, Eq. 7; dual clip as in the official code (3.0), after arXiv 1912.09729.
    """
    _one_of("agg", agg, Aggregation)
    r, a = torch.where(mask, _finite(ratio), 1.0), torch.where(mask, adv, 0.0)
    loss = torch.where(mask, clipped_loss(r, a, *_bounds(r, low, high), dual_clip), 0.0)
    if agg == "token-mean":
        return loss.sum() / mask.sum().clamp(min=1)
    length = mask.sum(1)
    return (loss.sum(1) / length.clamp(min=1)).sum() / (length > 0).sum().clamp(min=1)


def entropy_clip_contributions(
    logits: Float[Tensor, "*state vocab"],
    advantages: Float[Tensor, "*state vocab"],
    clipped_mask: Bool[Tensor, "*state vocab"],
    natural: bool = False,
) -> Float[Tensor, "*state vocab"]:
    """What each action adds to the entropy change of a clipped policy-gradient step, per unit of step size, in nats.

    dH = -Cov_pi(log pi, dz) = -sum_a pi_a (log pi_a + H) dz_a, exact to first order for a softmax. With X = 0 at clipped
    actions and 1 elsewhere the logits move by dz = A X - E_pi[A X] (`natural` step, the paper's Eq. 6) or by
    dz = pi (A X - E_pi[A X]), the plain gradient, whose factor pi the paper drops. The sum over the vocabulary is dH.

    A clipped action is not without effect: it still moves relative to E_pi[A X], through the normalisation.
    `advantages` are those of every action, not of a sample; actions with logit -inf contribute 0.

    Source: arXiv 2510.18927, the entropy-clip rule.
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    surprise = torch.where(p > 0, logp, 0.0)
    surprise = surprise - (p * surprise).sum(-1, keepdim=True)
    kept = torch.where(clipped_mask | (p == 0), 0.0, advantages)
    move = kept - (p * kept).sum(-1, keepdim=True)
    return -p * surprise * (move if natural else p * move)


# ---- sums over the grid of bounds --------------------------------------------------------------------------------


def _one_of(name: str, value: str, choices: object) -> None:
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"{name} is {' or '.join(known)}; got {value!r}")


def _grids(target: float, low: Range, high: Range, end: End) -> tuple[list[float], list[float]]:
    """All positions of the lower and of the upper bound."""
    if not 0 <= target <= 1:
        raise ConfigError(
            f"target {target:g} is no share P / (P + N), in [0, 1]; share_of_ratio turns a target for P / N into one"
        )
    _one_of("end", end, End)
    lows, highs = _grid("low", low, end), _grid("high", high, end)
    if lows[-1] > highs[0]:
        raise ConfigError(f"low ends at {lows[-1]:g}, above {highs[0]:g}, where high starts; keep them apart")
    return lows, highs


def _grid(name: str, bound: Range, end: End) -> list[float]:
    if len(bound) != 3:
        raise ConfigError(f"{name}: give start, end and step; got {tuple(bound)}")
    start, stop, step = bound
    if not 0 <= start <= stop or (start < stop and not 0 < step < float("inf") > stop):
        raise ConfigError(f"{name}: needs 0 <= start <= end, finite, and step > 0; got {tuple(bound)}")
    if start == stop:
        return [start]
    whole = int((stop - start) / step + TOLERANCE)
    values = [min(start + k * step, stop) for k in range(whole + 1)]
    if end == "clamp" and stop - values[-1] > TOLERANCE * step:
        values.append(stop)
    return values


def _sides(
    ratio: Tensor, advantages: Tensor, mask: Tensor, token_weight: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """|A| of positive and of negative tokens (0 elsewhere), and the ratio, flat in float64; 1 outside the mask."""
    size = torch.where(mask, advantages, 0.0).double()
    if token_weight is not None:
        size = size * torch.where(mask, token_weight, 0.0).double()
    size = size.flatten()
    inside = torch.where(mask, _finite(ratio.detach()), 1.0).double().flatten()
    return (size.clamp(min=0), (-size).clamp(min=0)), inside


def _carried_by_positives(
    ratio: Float[Tensor, " n"],
    size: Float[Tensor, " n"],
    grid: Float[Tensor, " bound"],
    contribution: Contribution,
) -> Float[Tensor, " bound"]:
    """P at every upper bound of the grid."""
    silenced_at = torch.searchsorted(
        grid, ratio, right=True
    )  # bounds at or below the ratio silence the token
    below = _per_cell(ratio, size, silenced_at, len(grid)).cumsum(1)
    mass, moved = below[0], below[1]
    if contribution == "gradient":
        return moved[:-1]
    return moved[:-1] + _times(grid, mass[-1] - mass[:-1])


def _carried_by_negatives(
    ratio: Float[Tensor, " n"],
    size: Float[Tensor, " n"],
    grid: Float[Tensor, " bound"],
    contribution: Contribution,
) -> Float[Tensor, " bound"]:
    """N at every lower bound of the grid."""
    free_at = torch.searchsorted(grid, ratio)  # bounds below the ratio leave the token its gradient
    below = _per_cell(ratio, size, free_at, len(grid)).cumsum(1)
    mass, moved = below[0], below[1]
    free = moved[-1] - moved[:-1]
    if contribution == "gradient":
        return free
    return free + _times(grid, mass[:-1])


def _per_cell(ratio: Tensor, size: Tensor, cell: Tensor, bounds: int) -> Float[Tensor, "2 cell"]:
    """Sums of |A| and of |A| r over the tokens between neighbouring bounds."""
    moved = torch.where(size > 0, size * ratio, 0.0)
    return ratio.new_zeros(2, bounds + 1).index_add(1, cell, torch.stack([size, moved]))


def _times(bound: Tensor, mass: Tensor) -> Tensor:
    """bound x mass, 0 for no mass, also at an infinite bound."""
    return torch.where(mass > 0, bound * mass, 0.0)


def _share(positive: Tensor, negative: Tensor) -> Tensor:
    total = positive + negative
    return torch.where(total > 0, positive / torch.where(total > 0, total, 1.0), 1.0)


def _finite(ratio: Tensor) -> Tensor:
    """The ratio, at most e^20; there is no such bound from below, where nothing overflows."""
    return ratio.clamp(max=math.exp(FARTHEST))


def _bounds(ratio: Tensor, low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """Both bounds as tensors beside the ratio."""
    low, high = (torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device) for bound in (low, high))
    return low, high


# ---- stage and recipes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalancedClip:
    """PPO's clip with the bounds of `balanced_clip_bounds`, found anew at every optimiser step.

    `target` is the share P / (P + N); `low` and `high` are start, end and step of the bounds of the ratio; `order`, `end` and
    `contribution` as there. `dual`, above 1, adds a dual clip. The search needs ratios that have moved, so it cannot
    be made once per rollout; `scope="microbatch"` is what the released code does.
    """

    target: float = 0.4
    low: Range = (0.6, 0.9, 0.02)
    high: Range = (1.2, 3.0, 0.05)
    order: Order = "high_first"
    contribution: Contribution = "loss"
    end: End = "stop"
    dual: float | None = None
    scope: Scope = "minibatch"
    needs: Needs = frozenset({"old_logp", "advantage", Logp("now")})

    def __post_init__(self) -> None:
        _one_of("order", self.order, Order)
        _one_of("contribution", self.contribution, Contribution)
        _grids(self.target, self.low, self.high, self.end)
        if self.dual is not None and self.dual <= 1:
            raise ConfigError(f"balanced-clip: dual must be above 1; got {self.dual:g}")
        if self.scope == "rollout":
            raise ConfigError(
                "balanced-clip: before the first update every ratio is 1 and no bound changes the share, so scope "
                "rollout has nothing to search; use minibatch"
            )

    def decide(self, batch: Batch) -> Columns:
        """The bounds and what the search found, as numbers."""
        found = balanced_clip_bounds(
            ratio_of(batch),
            batch.advantage,
            batch.mask,
            target=self.target,
            low=self.low,
            high=self.high,
            order=self.order,
            contribution=self.contribution,
            end=self.end,
        )
        return {name: value.double() for name, value in found._asdict().items()}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced loss."""
        ratio = ratio_of(batch)
        return clipped_loss(ratio, batch.advantage, *_bounds(ratio, own["low"], own["high"]), self.dual)

    def clipped(self, batch: Batch, own: Columns) -> TokenMask:
        """Tokens that the clip, single or dual, has silenced."""
        ratio = ratio_of(batch)
        return silenced_by_clip(ratio, batch.advantage, *_bounds(ratio, own["low"], own["high"]), self.dual)

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """What the search did, as means over the rows that train: a step counts by its rows."""
        rows = batch.mask.any(dim=1)
        count = rows.double().sum()
        return {
            name: (torch.where(rows, own[key].expand(len(rows), 1)[:, 0], 0.0).sum(), count)
            for name, key in _METRICS.items()
        }


_METRICS = {
    "bapo/low/mean": "low",
    "bapo/high/mean": "high",
    "bapo/share_before/mean": "start_share",
    "bapo/share_after/mean": "share",
    "bapo/steps/mean": "steps",
    "bapo/satisfied/frac": "satisfied",
}


_RELEASED = BalancedClip(
    target=share_of_ratio(1.0),
    low=(0.6, 0.8, 0.05),
    high=(1.2, 2.0, 0.05),
    order="low_first",
    end="clamp",
    dual=3.0,
)

PRESETS = {
    "paper": BalancedClip(),
    "readme": BalancedClip(target=0.5),
    "yaml": _RELEASED,
    "script": replace(_RELEASED, target=share_of_ratio(0.5), low=(0.8, 0.95, 0.05), high=(1.2, 2.0, 0.1)),
    "llama": BalancedClip(target=0.45, low=(0.8, 0.9, 0.02), high=(1.2, 2.0, 0.05)),
}
"""The published settings by where they stand: the paper, the repository's README, its configuration file, its run
script, and the paper's run of a mid-trained Llama 3B. README and Llama run name no steps: those of the paper."""

bapo = register(
    replace(
        grpo,
        name="bapo",
        paper="2510.18927",
        summary="Moves the clip bounds at every update until positive tokens carry 40 % of the loss.",
        surrogate=PRESETS["paper"],
        mean=Mean(),
    )
)

bapo_gradient = register(
    replace(
        bapo,
        name="bapo-gradient",
        summary="BAPO whose share counts the tokens that the clip leaves a gradient, so that both bounds help.",
        surrogate=replace(PRESETS["paper"], contribution="gradient"),
    )
)

bapo_released = register(
    replace(
        bapo,
        name="bapo-released",
        summary="BAPO with the released configuration: half of the loss, lower bound first, dual clip at 3.",
        surrogate=PRESETS["yaml"],
    )
)

bapo_script = register(
    replace(
        bapo,
        name="bapo-script",
        summary="BAPO with the released run script: a third of the loss, lower bound first, dual clip at 3.",
        surrogate=PRESETS["script"],
    )
)

register_stage("surrogate", "balanced-clip", BalancedClip)
