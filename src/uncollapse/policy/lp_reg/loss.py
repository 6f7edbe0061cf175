"""Lp-Reg as pure functions: the divergence from the proxy, the choice of tokens, the loss."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure.precision import at_least_float32
from uncollapse.policy.stages.surrogates import bounded_ratio

K3_LIMIT = 10.0
"""Where the official code cuts k3 off."""
KNEE = 2.610868638149876
"""log q - log pi there: the root of e^d - d - 1 = 10."""


# ---- the divergence ----------------------------------------------------------------------------------------------


def proxy_kl(
    logits: Float[Tensor, "*position vocab"], log_q: Float[Tensor, "*position vocab"]
) -> Float[Tensor, "*position"]:
    """KL(q || pi) over the vocabulary (nats), pi = softmax(logits). Its gradient with respect to the logits is pi - q.

    If q is the proxy of pi itself, it is -log Z: mass moves from noise to *all* kept tokens in proportion, and the sampled
    one is not favoured. In the dtype of the arguments, but at least float32.
    """
    logits = at_least_float32(logits)
    possible = log_q > -math.inf
    difference = torch.where(possible, log_q, 0.0) - torch.where(possible, logits.log_softmax(-1), 0.0)
    return (log_q.to(difference.dtype).exp() * difference).sum(-1)


def sampled_kl(gap: Float[Tensor, "*pool"], *, official_clamp: bool = False) -> Float[Tensor, "*pool"]:
    """k3 = e^d - d - 1 of `gap` d = log q - log pi at the sampled token; derivative in log pi: 1 - q/pi.

    From d = 2.61 on, where k3 = 10, it goes on along its tangent: the pull stays e^2.61 - 1 = 12.6. With
    `official_clamp` it stays 10 and there is no pull at all.
    """
    near = gap.clamp(max=KNEE)
    k3 = near.exp() - near - 1
    return k3 if official_clamp else k3 + math.expm1(KNEE) * (gap - near)


def stationary_ratio(advantage: float, beta: float = 1.0, kept_mass: float = 1.0) -> float:
    """Ratio r = pi / pi_old at which the pull of sampled k3 stops a push of `advantage` < 0 on one token.

    Root of |A| r + beta (1 - 1/(Z r)) = 0. At |A| = beta = Z = 1 it is 0.618; PPO's clip at 0.8 stops pushing earlier.
    At r = 1 the pull is only beta (1/Z - 1), of the order of the noise mass: a correction of drift, not a floor.
    """
    size, pull = abs(advantage), beta * kept_mass
    return (math.sqrt(pull**2 + 4 * size * pull) - pull) / (2 * size * kept_mass)


# ---- selection ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def lowest(
    values: Float[Tensor, "*pool"],
    pool: Bool[Tensor, "*pool"],
    rho: float,
    *,
    at_least: int = 0,
    skip_below: int = 0,
    uniform: Float[Tensor, "*pool"] | None = None,
) -> Bool[Tensor, "*pool"]:
    """The floor(rho n) smallest of the n values of `pool`, or `at_least` so many; none if that is below `skip_below`.

    Ties go to the smallest key of `uniform`, one number per token that belongs to it; without keys to the first in
    memory, as a stable sort. Nothing is sorted: two selections of the k-th value, linear in the pool, two numbers read back.
    """
    n = int(pool.sum())
    count = min(max(int(rho * n), at_least), n)
    if count < max(skip_below, 1):
        return torch.zeros_like(pool)
    threshold = values[pool].kthvalue(count).values
    below, tied = pool & (values < threshold), pool & (values == threshold)
    missing = count - int(below.sum())
    if uniform is None:
        uniform = torch.arange(pool.numel(), dtype=torch.float64, device=pool.device).view(pool.shape)
    return below | (tied & (uniform <= uniform[tied].kthvalue(missing).values))


@torch.no_grad()
def low_probability_mask(
    logp: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    log_q: Float[Tensor, "*pool"],
    rho: float = 0.01,
    pool: Literal["all", "negative"] = "all",
    *,
    at_least: int = 0,
    skip_below: int = 0,
    uniform: Float[Tensor, "*pool"] | None = None,
) -> Bool[Tensor, "*pool"]:
    """Tokens that Lp-Reg regularises: low probability, A < 0, and not noise (log q of the sampled token above -inf).

    Low: among the `lowest` fraction `rho` of all tokens of `mask` (paper), or of those with A < 0 (official code, with
    `skip_below=2`). The scope is what is passed: the tokens of a rollout batch, an optimiser step or a micro-batch.
    """
    negative = mask & (advantages < 0)
    low = lowest(
        logp,
        mask if pool == "all" else negative,
        rho,
        at_least=at_least,
        skip_below=skip_below,
        uniform=uniform,
    )
    return low & negative & (log_q > -math.inf)


# ---- the loss ----------------------------------------------------------------------------------------------------


def capped_surrogate(
    log_ratio: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    upper: float = 10.0,
    *,
    cap_negative: bool = True,
) -> Float[Tensor, "*pool"]:
    """-A clip(r, 0, U), unreduced: no lower clip. Without `cap_negative` (official code) r > U stays free for A < 0.

    log r is bounded at +-20 (`bounded_ratio`), so no ratio, capped or free, has a gradient that is not finite.
    """
    ratio = bounded_ratio(log_ratio)
    capped = -advantages * ratio.clamp(max=upper)
    return capped if cap_negative else torch.maximum(-advantages * ratio, capped)


def lp_reg_loss(
    logp: Float[Tensor, "*pool"],
    old_logp: Float[Tensor, "*pool"],
    advantages: Float[Tensor, "*pool"],
    mask: Bool[Tensor, "*pool"],
    log_q: Float[Tensor, "*pool"] | Float[Tensor, "*pool vocab"],
    selected: Bool[Tensor, "*pool"],
    *,
    beta: float = 1.0,
    upper: float = 10.0,
    kl: Literal["sampled", "full"] = "sampled",
    logits: Float[Tensor, "*pool vocab"] | None = None,
    cap_negative: bool = True,
    only_below: bool = False,
    official_clamp: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Token mean of the capped surrogate plus beta times the divergence at `selected`, and its metrics.

    `selected` comes from `low_probability_mask`. `kl="sampled"`: `log_q` of the sampled tokens; `kl="full"`: over the
    vocabulary, with `logits` of the current policy. `only_below` regularises only where pi < q at the sampled token, as
    the official code does (sampled only). The official loss is `cap_negative=False, only_below=True,
    official_clamp=True`. Raises `ConfigError` for `full` without logits, or with an option of the sampled estimate.

    Source: arXiv 2510.03222, eq. 6; official `compute_policy_loss_lp_reg`.
    """
    if kl == "full" and (logits is None or only_below or official_clamp):
        raise ConfigError(
            "lp_reg_loss: kl='full' needs logits, and only_below and official_clamp belong to 'sampled'"
        )
    zero = torch.zeros((), dtype=torch.promote_types(logp.dtype, torch.float32), device=logp.device)
    change = torch.where(mask, logp.to(zero.dtype) - old_logp, zero)
    loss = capped_surrogate(change, torch.where(mask, advantages, zero), upper, cap_negative=cap_negative)
    chosen = selected & mask
    if kl == "full":
        assert logits is not None
        # The chosen rows alone: about one in a hundred, and a `where` around all of them would let through NaN gradients.
        divergence = torch.zeros_like(loss).masked_scatter(
            chosen, proxy_kl(logits[chosen], log_q.detach()[chosen]).to(loss.dtype)
        )
    else:
        gap = torch.where(chosen, log_q.detach().to(zero.dtype) - logp, zero)
        chosen = chosen & (gap > 0) if only_below else chosen
        divergence = torch.where(chosen, sampled_kl(gap, official_clamp=official_clamp), zero)
    total = mask.sum().clamp(min=1)
    return (loss + beta * divergence).sum() / total, {
        "lp_reg/selected/frac": chosen.sum() / total,
        "lp_reg/kl/mean": divergence.detach().sum() / chosen.sum().clamp(min=1),
    }
