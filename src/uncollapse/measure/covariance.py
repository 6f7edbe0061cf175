"""Covariance of log-probability and advantage per token: where policy entropy is spent, and how concentrated that is.

For softmax policies the entropy lost in one step is, to first order, the covariance under the policy of
log-probability and logit change (Cui et al., arXiv 2505.22617); a tiny share of the tokens carries most of it.

Differs from the official code (PRIME-RL/Entropy-Mechanism-of-RL, `verl/trainer/ppo/core_algos.py`):
- Works on any pool of tokens, so a caller can take the whole optimiser step rather than one micro-batch.
- Detached always; means are exact (sum / N, not sum / (N + 1e-8)); what padded positions hold never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.measure.precision import at_least_float32

FRACTIONS = (2e-4, 2e-3, 0.02, 0.2, 0.5, 1.0)
"""Top fractions of the paper's table of covariances."""


@dataclass(frozen=True)
class CovarianceProfile:
    """Concentration of the covariance: per fraction, the number of `tokens` in the top, their `mean` and `share`.

    `mean` is in nats times the unit of the advantage; `share` is the part of the total positive covariance that the
    top tokens' positive values add up to, in [0, 1]; both are 0 when there is no token, `share` also when no
    covariance is positive.
    """

    fractions: tuple[float, ...]
    tokens: tuple[int, ...]
    mean: Float[Tensor, " fraction"]
    share: Float[Tensor, " fraction"]


@torch.no_grad()
def token_covariance(
    logp: Float[Tensor, "*pool"], advantage: Float[Tensor, "*pool"], mask: Shaped[Tensor, "*pool"]
) -> Float[Tensor, "*pool"]:
    """Centred product of log-probability and advantage at every valid token.

    c = (A - mean A) (logp - mean logp), both means over the tokens of `mask` in the whole pool, so that the mean of c
    over the pool is the (1/N) covariance. `logp` (nats) is the CURRENT policy's log-probability of the sampled token;
    `mask` is true (or nonzero) at valid tokens. Returns c, detached, 0 outside `mask`, in the input's dtype but at
    least float32. An empty pool gives zeros. Cost: O(N) time and memory.

    Source: arXiv 2505.22617, token covariance of Clip-Cov and KL-Cov; official `compute_policy_loss_clip_cov`.
    """
    valid = mask.bool()
    a, p = (_centred(values, valid) for values in (advantage, logp))
    return a * p


def _centred(values: Tensor, valid: Tensor) -> Tensor:
    values = values.detach()
    wide = at_least_float32(values)
    clean = torch.where(valid, wide, 0.0)
    return torch.where(valid, clean - clean.sum() / valid.sum().clamp(min=1), 0.0)


@torch.no_grad()
def covariance_profile(
    covariance: Float[Tensor, "*pool"], mask: Shaped[Tensor, "*pool"], fractions: Sequence[float] = FRACTIONS
) -> CovarianceProfile:
    """How concentrated the covariance is: mean and share of the positive total in the top fractions of the tokens.

    A fraction f of N valid tokens means the max(int(f N), 1) largest values. `fractions` lie in (0, 1] and default
    to the paper's. With few tokens the smallest fractions all mean one token: read `tokens` beside the means.
    Raises `ConfigError` for a fraction outside (0, 1]. Cost: one sort.

    Source: arXiv 2505.22617, table of covariances (Qwen2.5-7B: 5.65 for the top 0.02 %, 0.003 for all).
    """
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"fraction {fraction:g} is outside (0, 1]; fractions are shares, 0.2 % is 0.002"
            )
    top = covariance.detach()[mask.bool()].sort(descending=True).values
    top = at_least_float32(top)
    n = top.numel()
    tokens = tuple(min(max(int(fraction * n), 1), n) for fraction in fractions)
    if n == 0:
        zero = top.new_zeros(len(tokens))
        return CovarianceProfile(tuple(fractions), tokens, zero, zero.clone())
    last = torch.tensor(tokens, device=top.device) - 1
    mean = top.cumsum(0)[last] / (last + 1)
    positive = top.clamp(min=0).cumsum(0)
    share = torch.where(
        positive[-1] > 0, positive[last] / positive[-1].clamp(min=torch.finfo(top.dtype).tiny), 0.0
    )
    return CovarianceProfile(tuple(fractions), tokens, mean, share)
