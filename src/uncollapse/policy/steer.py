"""STEER: weights that keep any one token from moving the entropy much, in either direction.

Paper: Hao, Wang, Liu, Luo, Yu, Dong, Lin, Wang, Chen, "Rethinking Entropy Interventions in RLVR: An Entropy Change
Perspective", 2025, arXiv 2510.10150. Official code: zz-haooo/STEER, `verl/trainer/ppo/core_algos.py`
(`compute_token_weights`, `compute_policy_loss_with_entropy`) and `verl/workers/actor/dp_actor.py`.

For every token the entropy change Omega of its state is estimated (`uncollapse.measure.entropy_change`), and the token's
policy loss is multiplied by a weight that falls with |Omega|: from 1 where nothing moves to `w_min` at the largest.

Differs from the paper / the official code:
- The largest |Omega| is that of all tokens of the optimiser step. The released code takes it within each micro-batch, so
  that the method changes with the split; recipe `steer-released` does so too, for parity, and is marked split-dependent.
- `w_min` is 0.7, the paper's; the released script has 0.8, and so has `steer-released`. The bounds do not change with the
  mode: `linear` keeps 0.7 and 1 unless told, and `steer-released-linear` has the 0.8 and 1.2 of the released script.
- The estimator is the released one by default, for parity. It lacks a factor p, so that one rare token sets the scale for all
  others. `theorem` is what the paper derives for one sampled token, at the same cost; `exact`, the derivative itself, needs
  one more statistic per token and was the best of the three in our study.
- Options that the paper has not, off by default: `quantile` (the scale is a quantile instead of the maximum, which one
  outlier decides), `respect_clip` (tokens that the clip has silenced count as Omega = 0, as in the paper's theorem but
  not in its code), `length_norm` (1 / length of the group, as in the theorem).
- The binary mapping of the paper's ablation is not here: its rule is not published in what we could read.
- In the recipes the log-ratio is not clamped to [-20, 20]; the dual clip and PPO's clip decide the loss long before. The
  pure `steer_loss` clamps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, UnknownName
from uncollapse.measure.entropy_change import (
    ESTIMATORS,
    LOG_RATIO,
    Estimator,
    collision_term,
    entropy_quadrants,
    exact_entropy_change,
    token_entropy_change,
)
from uncollapse.policy.baselines import grpo
from uncollapse.policy.batch import Batch, Columns, TokenMap
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.protocols import Metrics, Needs, Scope
from uncollapse.policy.recipe import register
from uncollapse.policy.reduction import Mean
from uncollapse.policy.stages.segments import group_index
from uncollapse.policy.stages.surrogates import PPOClip, clipped_loss, silenced_by_clip
from uncollapse.policy.stats import Collision, Entropy, Logp

__all__ = [
    "Steer",
    "collision_term",
    "entropy_quadrants",
    "exact_entropy_change",
    "steer_loss",
    "steer_weights",
    "token_entropy_change",
]

Mode: TypeAlias = Literal["exp", "linear", "asymmetric"]
MODES: tuple[Mode, ...] = get_args(Mode)


@torch.no_grad()
def steer_weights(
    omega: Float[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    mode: str = "exp",
    w_min: float = 0.7,
    w_max: float = 1.0,
    floor: float = 0.02,
    pool: Int[Tensor, " row"] | None = None,
    *,
    quantile: float = 1.0,
) -> Float[Tensor, "row time"]:
    """Weight of each token from its entropy change Omega; 0 outside `mask`, no gradient, no renormalisation.

    With M the largest and m the smallest |Omega| over the valid tokens of a pool, and kappa = -ln(w_min) / max(M, floor):

    - `exp` (the paper's): exp(-kappa |Omega|), within [w_min, w_max], w_max at most 1;
    - `linear`: from w_max at m down to w_min at M; all (w_min + w_max) / 2 if m = M. Released defaults [0.8, 1.2];
    - `asymmetric`: exp(-kappa Omega) within [w_min, w_max]: tokens that raise entropy gain weight, if w_max > 1.

    Args:
        omega: entropy change (advantage x nats) as `token_entropy_change` has it, positive where entropy falls; what is not
            finite counts as 0.
        mask: valid tokens.
        mode: `exp`, `linear` or `asymmetric`.
        w_min: smallest weight, in (0, 1]. 1 turns `exp` off exactly.
        w_max: largest weight, at least `w_min`.
        floor: an M below this (advantage x nats) is taken for this, so that weights are near 1 when nothing moves.
        pool: number of the pool of each row, for instance its micro-batch; None: all rows are one pool.
        quantile: M is this quantile of |Omega| in (0, 1]; above it tokens get w_min. 1 is the maximum, as in the paper.

    Raises `ConfigError` for options out of range, `UnknownName` for another mode.

    Source: arXiv 2510.10150, Eq. 9; official `compute_token_weights`.
    """
    _check(mode, w_min, w_max, floor, quantile)
    omega = torch.where(mask & omega.isfinite(), omega, 0.0)
    size = omega.abs()
    low, high = _bounds(size, mask, pool, quantile)
    if mode == "linear":
        spread = high - low
        share = torch.where(spread > 0, (size - low) / spread, 0.5)
        weights = w_max - share * (w_max - w_min)
    else:
        rate = -math.log(w_min) / high.clamp(min=floor)
        weights = (-rate * (size if mode == "exp" else omega)).exp()
    return torch.where(mask, weights.clamp(w_min, w_max), 0.0)


def _check(mode: str, w_min: float, w_max: float, floor: float, quantile: float) -> None:
    if mode not in MODES:
        raise UnknownName("mode of steer", mode, MODES)
    if not 0 < w_min <= min(w_max, 1.0):
        raise ConfigError(f"steer: needs 0 < w_min <= 1 and w_min <= w_max; got {w_min:g} and {w_max:g}")
    if mode == "exp" and w_max > 1:
        raise ConfigError(f"steer: weights of mode 'exp' never exceed 1, but w_max is {w_max:g}; set it to 1")
    if floor < 0 or not 0 < quantile <= 1:
        raise ConfigError(f"steer: needs floor >= 0 and 0 < quantile <= 1; got {floor:g} and {quantile:g}")


def _bounds(
    size: Tensor, mask: Tensor, pool: Tensor | None, quantile: float
) -> tuple[Float[Tensor, "row 1"], Float[Tensor, "row 1"]]:
    """Smallest and largest (or the quantile of) `size` over the valid tokens of each row's pool."""
    rows = len(size)
    if pool is None:
        index, pools = torch.zeros(rows, dtype=torch.long, device=size.device), 1
    else:
        names, index = pool.unique(return_inverse=True)
        pools = len(names)
    if not size.numel():
        return size.new_zeros(rows, 1), size.new_zeros(rows, 1)
    least = torch.where(mask, size, torch.inf).amin(1)
    low = size.new_full((pools,), torch.inf).scatter_reduce(0, index, least, "amin")
    if quantile == 1:
        high = size.new_zeros(pools).scatter_reduce(0, index, size.amax(1), "amax")
    else:
        high = _quantile(size, mask, index, pools, quantile)
    return low[index, None], high[index, None]


def _quantile(size: Tensor, mask: Tensor, index: Tensor, pools: int, q: float) -> Float[Tensor, " pool"]:
    """The value of rank round(q (n - 1)) among the n valid ones of each pool; two sorts, no loop over pools."""
    time = size.shape[1]
    member = index.repeat_interleave(time)
    values = torch.where(mask, size, torch.inf).flatten()
    order = values.argsort(stable=True)
    order = order[member[order].argsort(stable=True)]
    tokens = torch.bincount(member, minlength=pools)
    valid = torch.zeros_like(tokens).index_add(0, index, mask.sum(1))
    rank = (q * (valid - 1).clamp(min=0)).round().long()
    return torch.where(valid > 0, values[order[tokens.cumsum(0) - tokens + rank]], 0.0)


def steer_loss(
    log_prob: Float[Tensor, "*pool"],
    old_log_prob: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    weights: Float[Tensor, "*pool"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float = 10.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """PPO's loss with dual clip, each token times its weight (from `steer_weights`), and its metrics.

    (1/N) sum_t w_t l_t with l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -dual A, and
    r = exp(clamp(log_prob - old_log_prob, -20, 20)). N counts the valid tokens, not their weights, so smaller weights are a
    smaller step. Weights carry no gradient. Defaults: the official scripts.

    Metrics: `steer/weight/mean`, `/min`, `/max`; `clip/high/frac` and `clip/low/frac`, shares of tokens that a clip silenced.

    Source: arXiv 2510.10150; official `compute_policy_loss_with_entropy`.
    """
    wide = torch.promote_types(log_prob.dtype, torch.float32)
    log_ratio = torch.where(mask, log_prob.to(wide) - old_log_prob.to(wide), 0.0)
    a = torch.where(mask, advantages, 0.0).to(wide)
    ratio = log_ratio.clamp(-LOG_RATIO, LOG_RATIO).exp()
    clip = 1 - clip_low, 1 + clip_high, dual
    loss, silenced = clipped_loss(ratio, a, *clip), silenced_by_clip(ratio, a, *clip)
    w = torch.where(mask, weights.detach(), 0.0)
    count = mask.sum().clamp(min=1)
    return (w * loss).sum() / count, {
        "steer/weight/mean": w.sum() / count,
        "steer/weight/min": torch.where(mask, w, torch.inf).amin() if mask.any() else w.new_zeros(()),
        "steer/weight/max": w.amax() if mask.any() else w.new_zeros(()),
        "clip/high/frac": (silenced & (a > 0)).sum() / count,
        "clip/low/frac": (silenced & (a < 0)).sum() / count,
    }


# ---- stage and recipes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steer:
    """Weights of `steer_weights`, from the entropy change of every token; options as there and as in the head of the module.

    The pool is the optimiser step by default. `scope="rollout"` decides once from the old policy, where every ratio is 1,
    and costs no forward pass; `scope="microbatch"` is what the released code does. `released` and `theorem` read the
    entropy of the policy that sampled, as the released code does; `exact` reads that of the current one. `length_norm`
    divides by the tokens of the group, relative to the mean group, and needs whole groups, hence the scope `rollout`.
    """

    estimator: Estimator = "released"
    mode: Mode = "exp"
    w_min: float = 0.7
    w_max: float = 1.0
    floor: float = 0.02
    quantile: float = 1.0
    respect_clip: bool = False
    length_norm: bool = False
    scope: Scope = "minibatch"
    gives: frozenset[str] = frozenset({"weight", "steer_weight", "steer_change"})

    def __post_init__(self) -> None:
        _check(self.mode, self.w_min, self.w_max, self.floor, self.quantile)
        if self.estimator not in ESTIMATORS:
            raise UnknownName("estimator", self.estimator, ESTIMATORS)
        if self.length_norm and self.scope != "rollout":
            raise ConfigError(
                "steer: length_norm divides by the tokens of a whole group, which an optimiser step may cut; "
                "set scope to rollout"
            )

    @property
    def needs(self) -> Needs:
        """Log-probabilities, advantage and entropy; what the options add to them."""
        found: set[str | Entropy | Logp | Collision] = {"advantage", "old_logp", Logp("now")}
        found |= {Entropy("now"), Collision("now")} if self.estimator == "exact" else {Entropy("old")}
        if self.respect_clip:
            found.add("clipped")
        if self.length_norm:
            found.add("group")
        return frozenset(found)

    def __call__(self, batch: Batch) -> Columns:
        """`weight`; beside it `steer_weight` and `steer_change` (Omega, advantage x nats) for the log."""
        omega = self._change(batch)
        weights = steer_weights(
            omega, batch.mask, self.mode, self.w_min, self.w_max, self.floor, quantile=self.quantile
        ).to(batch.advantage.dtype)
        return {"weight": weights, "steer_weight": weights, "steer_change": omega}

    def _change(self, batch: Batch) -> TokenMap:
        exact = self.estimator == "exact"
        omega = token_entropy_change(
            batch.stats[Logp("now")],
            batch.old_logp,
            batch.stats[Entropy("now" if exact else "old")],
            batch.advantage,
            estimator=self.estimator,
            collision=batch.stats[Collision("now")] if exact else None,
        )
        if self.respect_clip:
            omega = torch.where(batch.columns["clipped"], 0.0, omega)
        if self.length_norm:
            omega = omega / _relative_length(batch)[:, None].to(omega.dtype)
        return torch.where(batch.mask, omega, 0.0)

    def metrics(self, batch: Batch, own: Columns) -> Metrics:
        """What the weights are, how many tokens they hold back, and the predicted change of entropy."""
        mask, weights, omega = batch.mask, batch.columns["steer_weight"], batch.columns["steer_change"]
        tokens = mask.double().sum()
        damped = (mask & (weights < 0.99 * self.w_max)).double()
        return {
            "steer/weight/mean": (weights.double().sum(), tokens),
            "steer/damped/frac": (damped.sum(), tokens),
            "steer/change/mean": (-omega.double().sum(), tokens),
            "steer/change/abs": (omega.double().abs().sum(), tokens),
        }


def _relative_length(batch: Batch) -> Float[Tensor, " row"]:
    """Trainable tokens of each row's group over those of the mean group that has any."""
    index, groups = group_index(batch.group)
    length = torch.zeros(groups, dtype=torch.float64, device=batch.mask.device)
    length = length.index_add(0, index, batch.mask.sum(1).double())
    mean = length.sum() / (length > 0).sum().clamp(min=1)
    return (length / mean).clamp(min=1e-12)[index]


steer = register(
    replace(
        grpo,
        name="steer",
        paper="2510.10150",
        summary="Damps the tokens that would move the entropy of their state the most, up or down.",
        surrogate=PPOClip(low=0.2, high=0.28, dual=10.0),
        weights=(Steer(),),
        mean=Mean(),
    )
)

steer_released = register(
    replace(
        steer,
        name="steer-released",
        summary="STEER as its code has it: weights relative to each micro-batch, smallest weight 0.8.",
        weights=(Steer(w_min=0.8, scope="microbatch"),),
    )
)

steer_released_linear = register(
    replace(
        steer_released,
        name="steer-released-linear",
        summary="STEER as its linear script has it: weights from 1.2 down to 0.8, relative to each micro-batch.",
        weights=(Steer(mode="linear", w_min=0.8, w_max=1.2, scope="microbatch"),),
    )
)

register_stage("weights", "steer", Steer)
