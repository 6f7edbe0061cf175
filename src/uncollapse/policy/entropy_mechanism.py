"""The entropy mechanism: why policy entropy falls, and Clip-Cov and KL-Cov, which spare the tokens that burn it.

Paper: Cui, Zhang, Chen, Yuan, Wang, Zuo, ..., Ding, "The Entropy Mechanism of Reinforcement Learning for Reasoning
Language Models", 2025, arXiv 2505.22617. Official code: PRIME-RL/Entropy-Mechanism-of-RL,
`verl/trainer/ppo/core_algos.py` (both losses), `verl/workers/actor/dp_actor.py` (where they are called).

Differs from the paper / the official code:
- Selection is a function over any pool of tokens. The paper says batch; the official code selects inside each GPU
  micro-batch, where "at least one token" makes the effective fraction 1 / (tokens of the micro-batch). Pass the
  tokens of one micro-batch to get that, those of the whole optimiser step to get what the paper says.
- Fractions are fractions. The official recipes give KL-Cov's in percent (`k_percent` 0.2 is our 0.002), verl in
  fractions.
- The random choice of Clip-Cov and the breaking of ties in KL-Cov read one explicit key per token, so they depend
  on no global generator and, with keys that belong to the token, on no row order, padding or split.
- KL-Cov's penalty is the code's |log pi - log pi_old| of the sampled token, not the KL divergence the paper writes.
- Means divide by the number of valid tokens, not by that + 1e-8; an empty mask gives loss 0 and no selection.
- `skip_flat` (off, as released): KL-Cov selects nothing when no token has positive covariance, where the released
  code still penalises arbitrary tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure.covariance import CovarianceProfile, covariance_profile, token_covariance
from uncollapse.measure.entropy_law import EntropyLaw, compare_laws, fit_entropy_law, fit_straight_line
from uncollapse.policy.baselines import grpo
from uncollapse.policy.batch import Batch, Columns, TokenMap
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.protocols import Needs, Scope
from uncollapse.policy.recipe import Weighted, register
from uncollapse.policy.reduction import Mean
from uncollapse.policy.stages.filters import DropDeadGroups
from uncollapse.policy.stages.surrogates import PPOClip, Unclipped, clip_losses, log_ratio
from uncollapse.policy.stats import Logp

__all__ = [
    "ClipCov",
    "CovarianceProfile",
    "EntropyLaw",
    "KLCov",
    "clip_cov_loss",
    "clip_cov_mask",
    "compare_laws",
    "covariance_profile",
    "entropy_change_first_order",
    "fit_entropy_law",
    "fit_straight_line",
    "kl_cov_loss",
    "kl_cov_mask",
    "policy_gradient_dlogits",
    "ppo_clipped",
    "sequence_covariance",
    "token_covariance",
]


def entropy_change_first_order(
    logits: Float[Tensor, "*state vocab"], dlogits: Float[Tensor, "*state vocab"]
) -> Float[Tensor, "*state"]:
    """First-order change of the entropy of softmax(logits) when the logits move by `dlogits`, in nats.

    dH = -Cov_{a ~ pi}(log pi_a, dz_a) = -sum_a pi_a (log pi_a + H) dz_a, per state. Adding a constant to `dlogits`
    changes nothing. Actions with logit -inf have probability 0 and contribute nothing. This holds the states
    (prefixes) fixed: the change of an on-policy average has a second part, the change of which states are visited.

    Source: arXiv 2505.22617, the entropy lemma (tabular softmax).
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    possible = p > 0
    logp = torch.where(possible, logp, 0.0)
    entropy = -(p * logp).sum(-1, keepdim=True)
    return -(p * (logp + entropy) * torch.where(possible, dlogits, 0.0)).sum(-1)


def policy_gradient_dlogits(
    logits: Float[Tensor, "*state vocab"],
    advantages: Float[Tensor, "*state vocab"],
    lr: float,
    natural: bool = False,
) -> Float[Tensor, "*state vocab"]:
    """Logit change of one exact policy-gradient step per state: lr pi_a A_a, or lr A_a if `natural`.

    `advantages` are A(s, a) of every action, not of a sample. lr pi_a A_a is the gradient step only for true
    advantages, whose mean under pi is 0; the natural step is exact for any A, up to a constant per state.

    Source: arXiv 2505.22617, theorems on (natural) policy gradient.
    """
    return lr * advantages if natural else lr * logits.softmax(-1) * advantages


@torch.no_grad()
def sequence_covariance(
    logp: Float[Tensor, "row time"],
    advantage: Float[Tensor, " row"],
    mask: Bool[Tensor, "row time"],
    group: Int[Tensor, " row"],
) -> Float[Tensor, " group"]:
    """Per prompt, the covariance over its answers of mean token log-probability and advantage.

    Cov_i((1/|y_i|) sum_t log pi(y_it), A_i) with 1/n, in nats times the unit of the advantage, ordered by group id; the
    mean over groups is what the paper plots against the fall of entropy per step (same shape in time, other scale).
    Rows without valid tokens are left out; a group of fewer than two rows has covariance 0.

    Source: arXiv 2505.22617, the sequence-level covariance used to verify the theorem.
    """
    names, index = group.unique(return_inverse=True)
    wide = torch.promote_types(logp.dtype, torch.float32)
    length = mask.sum(1)
    mean_logp = torch.where(mask, logp.to(wide), 0.0).sum(1) / length.clamp(min=1)
    count = torch.zeros(len(names), dtype=wide, device=logp.device)

    def per_group(values: Tensor) -> Tensor:
        return count.new_zeros(len(names)).index_add(0, index, torch.where(length > 0, values, 0.0))

    count = per_group(torch.ones_like(mean_logp)).clamp(min=1)
    a = advantage.to(wide)
    a = a - (per_group(a) / count)[index]
    return per_group(a * (mean_logp - (per_group(mean_logp) / count)[index])) / count


def ppo_clipped(
    logp: Float[Tensor, "*pool"],
    old_logp: Float[Tensor, "*pool"],
    advantage: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
) -> Bool[Tensor, "*pool"]:
    """Valid tokens that PPO's clip has silenced: the clipped loss exceeds the plain one, so their gradient is zero.

    Bounds as in `clip_cov_loss`. Clip-Cov must not spend its choice on them.
    """
    plain, clipped = _ppo_losses(logp.detach(), old_logp, advantage, mask, clip_low, clip_high)
    return (clipped > plain) & mask


@torch.no_grad()
def clip_cov_mask(
    covariance: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    exclude: Bool[Tensor, "*pool"] | None = None,
    *,
    uniform: Float[Tensor, "*pool"] | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*pool"]:
    """Tokens whose gradient Clip-Cov drops: a random few of those with covariance strictly between `low` and `high`.

    Of the N tokens of `mask`, min(max(int(fraction N), 1), number of candidates) are chosen without replacement:
    those with the smallest keys. Candidates are valid, not in `exclude` (tokens that PPO's clip already silenced)
    and low < c < high; `high` keeps outliers out, for stability. Defaults: the official scripts (fraction 2e-4 of the
    tokens; bounds in nats times the unit of the advantage).

    Give exactly one of `uniform`, one number per token that belongs to the token (then the choice does not depend
    on row order, padding or split), and `generator`, which draws such numbers by position. Raises `ConfigError`
    for neither or both, and for a fraction outside (0, 1]. Cost: one sort of the pool, one number read back.

    Source: arXiv 2505.22617, Clip-Cov; official `compute_policy_loss_clip_cov`.
    """
    if (uniform is None) == (generator is None):
        raise ConfigError("clip_cov_mask: give either uniform (a key per token) or generator, not both")
    count = _count(fraction, mask)
    if uniform is None:
        assert generator is not None
        uniform = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device)
    candidate = mask & (covariance > low) & (covariance < high)
    if exclude is not None:
        candidate = candidate & ~exclude
    return _first(torch.where(candidate, uniform, torch.inf).flatten().argsort(stable=True), count, candidate)


@torch.no_grad()
def kl_cov_mask(
    covariance: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    fraction: float = 2e-3,
    *,
    uniform: Float[Tensor, "*pool"] | None = None,
    skip_flat: bool = False,
) -> Bool[Tensor, "*pool"]:
    """Tokens that KL-Cov penalises: the max(int(fraction N), 1) valid ones with the largest covariance.

    Ties go to the smallest key of `uniform`, one number per token that belongs to the token; without keys they go
    to the first position in memory, which depends on row order. `skip_flat`: select nothing when no covariance is
    positive (all advantages equal), where the released code penalises arbitrary tokens. Default fraction: 2e-3,
    the official 7B script (`k_percent` 0.2, a percentage; 32B: 2e-4). Raises `ConfigError` for a fraction outside
    (0, 1]. Cost: one or two sorts of the pool, one number read back.

    Source: arXiv 2505.22617, KL-Cov; official `compute_policy_loss_kl_cov`.
    """
    count = _count(fraction, mask)
    order = torch.where(mask, -covariance, torch.inf).flatten()
    if uniform is None:
        ranked = order.argsort(stable=True)
    else:
        by_key = uniform.flatten().argsort(stable=True)
        ranked = by_key[order[by_key].argsort(stable=True)]
    eligible = mask & (covariance.amax() > 0) if skip_flat and mask.numel() else mask
    return _first(ranked, count, eligible)


def clip_cov_loss(
    logp: Float[Tensor, "*pool"],
    old_logp: Float[Tensor, "*pool"],
    advantage: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    dropped: Bool[Tensor, "*pool"],
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """PPO-clip loss without the tokens of `dropped` (from `clip_cov_mask`), and its metrics.

    (1/N) sum_t w_t max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logp - old_logp), w = 0 at dropped tokens;
    N counts all valid tokens, dropped ones included. No dual clip. Default bounds 1: the official scripts, r clipped
    to [0, 2], which all but turns PPO's clip off (verl's own default is 0.2).

    Source: arXiv 2505.22617, Clip-Cov; official `compute_policy_loss_clip_cov`.
    """
    plain, clipped = _ppo_losses(logp, old_logp, advantage, mask, clip_low, clip_high)
    loss = _token_mean(torch.where(dropped, 0.0, torch.maximum(plain, clipped)), mask)
    return loss, {
        "clip_cov/dropped/frac": _token_mean(dropped.to(loss.dtype), mask),
        "clip/ppo/frac": _token_mean((clipped > plain).to(loss.dtype), mask),
        "kl/old_k1/mean": _token_mean(-_log_ratio(logp, old_logp, mask).detach(), mask),
    }


def kl_cov_loss(
    logp: Float[Tensor, "*pool"],
    old_logp: Float[Tensor, "*pool"],
    advantage: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    penalised: Bool[Tensor, "*pool"],
    *,
    coef: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Unclipped surrogate with a penalty at the tokens of `penalised` (from `kl_cov_mask`), and its metrics.

    (1/N) sum_t (-A r + coef 1{t penalised} |logp - old_logp|), r = exp(logp - old_logp). At logp = old_logp the penalty and
    its (sub)gradient vanish: with one update per rollout KL-Cov does exactly nothing. Default coef 1: the official
    scripts (verl's configuration says 0.1).

    Source: arXiv 2505.22617, KL-Cov; official `compute_policy_loss_kl_cov`.
    """
    log_ratio = _log_ratio(logp, old_logp, mask)
    surrogate = -torch.where(mask, advantage, 0.0) * log_ratio.exp()
    loss = _token_mean(surrogate + coef * torch.where(penalised, log_ratio.abs(), 0.0), mask)
    chosen = (penalised & mask).sum().clamp(min=1)
    return loss, {
        "kl_cov/penalised/frac": _token_mean(penalised.to(loss.dtype), mask),
        "kl_cov/penalty/mean": torch.where(penalised, log_ratio.detach().abs(), 0.0).sum() / chosen,
        "kl/old_k1/mean": _token_mean(-log_ratio.detach(), mask),
    }


def _ppo_losses(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    ratio = _log_ratio(logp, old_logp, mask).exp()
    a = torch.where(mask, advantage, 0.0)
    return clip_losses(ratio, a, 1 - clip_low, 1 + clip_high)


def _log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    wide = torch.promote_types(logp.dtype, torch.float32)
    return torch.where(mask, logp.to(wide) - old_logp.to(wide), 0.0)


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _count(fraction: float, mask: Tensor) -> int:
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction {fraction:g} is outside (0, 1]; fractions are shares, 0.2 % is 0.002")
    return max(int(fraction * int(mask.sum())), 1)


def _first(order: Tensor, count: int, eligible: Tensor) -> Tensor:
    """The first `count` positions of `order` (flat, eligible ones in front) that are eligible."""
    chosen = torch.zeros(eligible.numel(), dtype=torch.bool, device=eligible.device)
    chosen[order[:count]] = True
    return chosen.view(eligible.shape) & eligible


# ---- stages and recipes ------------------------------------------------------------------------------------


def _covariance(batch: Batch) -> TokenMap:
    return token_covariance(batch.stats[Logp("now")], batch.advantage, batch.mask)


@dataclass(frozen=True)
class ClipCov:
    """Weight 0 on the tokens that `clip_cov_mask` chooses, 1 elsewhere; they still count in the mean.

    `fraction` of the trainable tokens, covariance bounds `low` and `high` (nats times the unit of the advantage). The
    pool is the optimiser step by default; `scope="rollout"` decides once from the old policy and costs no forward
    pass, `scope="microbatch"` is what the released code does.
    """

    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    scope: Scope = "minibatch"
    needs: Needs = frozenset({"advantage", "clipped", Logp("now")})
    gives: frozenset[str] = frozenset({"weight"})

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or self.low >= self.high:
            raise ConfigError(
                f"clip-cov: needs 0 < fraction <= 1 and low < high; got {self.fraction}, {self.low}, {self.high}"
            )

    def __call__(self, batch: Batch) -> Columns:
        """`weight`."""
        dropped = clip_cov_mask(
            _covariance(batch),
            batch.mask,
            self.fraction,
            self.low,
            self.high,
            batch.columns["clipped"],
            uniform=batch.clock.uniform(batch.uid, batch.mask.shape[1], "clip-cov"),
        )
        return {"weight": (~dropped).to(batch.advantage.dtype)}


@dataclass(frozen=True)
class KLCov:
    """`|log pi - log pi_old|` at the tokens that `kl_cov_mask` chooses, 0 elsewhere.

    With one optimiser step per rollout batch the penalty and its gradient are exactly 0.
    """

    fraction: float = 2e-3
    skip_flat: bool = False
    scope: Scope = "minibatch"
    needs: Needs = frozenset({"advantage", "old_logp", Logp("now")})

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"kl-cov: needs 0 < fraction <= 1; got {self.fraction}")

    def decide(self, batch: Batch) -> Columns:
        """The penalised tokens."""
        uniform = batch.clock.uniform(batch.uid, batch.mask.shape[1], "kl-cov")
        chosen = kl_cov_mask(
            _covariance(batch), batch.mask, self.fraction, uniform=uniform, skip_flat=self.skip_flat
        )
        return {"penalised": chosen}

    def __call__(self, batch: Batch, own: Columns) -> TokenMap:
        """Unreduced penalty (nats)."""
        return torch.where(own["penalised"], log_ratio(batch).abs(), 0.0)


clip_cov = register(
    replace(
        grpo,
        name="clip-cov",
        paper="2505.22617",
        summary="Drops the gradient of a random few of the tokens whose covariance burns entropy.",
        filters=(DropDeadGroups(),),
        surrogate=PPOClip(low=1.0, high=1.0),
        weights=(ClipCov(),),
        mean=Mean(),
    )
)

kl_cov = register(
    replace(
        grpo,
        name="kl-cov",
        paper="2505.22617",
        summary="Penalises leaving the old policy at the tokens with the largest covariance.",
        filters=(DropDeadGroups(),),
        surrogate=Unclipped(),
        regularizers=(Weighted(KLCov(), coef=1.0),),
        mean=Mean(),
    )
)

register_stage("weights", "clip-cov", ClipCov)
register_stage("regularizers", "kl-cov", KLCov)
