"""Lp-Reg: improbable tokens that are not noise are held up where a failed answer would push them down.

Paper: Huang, Xu, Wang et al., "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable
Reward", 2025, arXiv 2510.03222 (v2). Official code: CarlanLark/Lp-Reg announces it; what runs is
CarlanLark/Lp-Reg-dev, `verl/trainer/ppo/core_algos.py` (loss), `verl/workers/actor/dp_actor.py` (filter).

The min-p filter takes noise tokens out of the policy that sampled; the rest, renormalised, is the proxy q. Of the sampled
tokens those are *selected* that are among the least probable (the fraction rho), belong to a worse than average answer (A < 0)
and are not noise (q > 0). There the loss gets beta KL(q || pi):

    mean over tokens of  -A clip(r, 0, U) + beta 1{selected} KL(q || pi),    r = pi / pi_old.

Four recipes, one surrogate (`LpReg`):
- `lp-reg`: selection, clip and pool of the paper; the divergence by its sampled estimate k3, which any engine can
  measure. As a loss k3 is an unbiased estimate of the divergence's gradient while pi is the policy that sampled.
- `lp-reg-full`: the divergence over the whole vocabulary, as the paper writes it. It needs the logits of two policies at
  once, so it runs on the testbed and is refused elsewhere, with that reason.
- `lp-reg-on-policy`: the divergence over the whole vocabulary with one optimiser step per rollout batch, the setting of the
  paper's best result. Then q is the proxy of the policy itself and the divergence -log Z, which takes one policy's logits,
  so that any engine can measure it.
- `lp-reg-released`: the official code, but for the pool.

Differs from the paper / the official code:
- Pool. Paper: all tokens of the batch, here those of the rollout batch, by the old policy. Code: tokens with A < 0 of one GPU
  micro-batch, by the current policy, and none if fewer than two are due. `lp-reg-released` takes those of the optimiser
  step, so that the choice does not depend on packing; `scope="microbatch"` is the code's.
- Ties at the quantile go to the smallest hash of the token, not to the first in memory.
- The most probable token is never noise; the paper's strict threshold keeps nothing at kappa = 1 or a large tau.
- k3 of the code is cut off at 10, where its gradient vanishes: at pi < 0.0735 q, where help is needed most. Here it goes
  on along its tangent, so that the pull is bounded and stays; `official_clamp` cuts.
- The code removes noise by a logit of -1e4 and so leaves q > 0 everywhere; its gate (only where pi < q) drops those
  tokens. Here q = 0 there, with the same selection.
- `rho_positive` (the paper's ablation, `logp_pos_k_percent` of the code) adds the term to a clipped token as well, where the
  code replaces it; that differs for r > U alone.
- An empty mask gives loss 0.
"""

from __future__ import annotations

from dataclasses import replace

from uncollapse.measure.min_p import min_p_proxy
from uncollapse.policy.baselines import grpo
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.lp_reg.loss import (
    capped_surrogate,
    low_probability_mask,
    lowest,
    lp_reg_loss,
    proxy_kl,
    sampled_kl,
    stationary_ratio,
)
from uncollapse.policy.lp_reg.stages import LogMassAbove, LpReg, ProxyKL, SparkTracker
from uncollapse.policy.recipe import register
from uncollapse.policy.reduction import Mean

__all__ = [
    "LogMassAbove",
    "LpReg",
    "ProxyKL",
    "SparkTracker",
    "capped_surrogate",
    "low_probability_mask",
    "lowest",
    "lp_reg_loss",
    "min_p_proxy",
    "proxy_kl",
    "sampled_kl",
    "stationary_ratio",
]

lp_reg = register(
    replace(
        grpo,
        name="lp-reg",
        paper="2510.03222",
        summary="Holds up improbable tokens that are not noise where a failed answer pushes them down.",
        surrogate=LpReg(),
        mean=Mean(),
    )
)

lp_reg_full = register(
    replace(
        lp_reg,
        name="lp-reg-full",
        summary="Lp-Reg with the divergence over the whole vocabulary, as the paper writes it.",
        surrogate=LpReg(kl="full"),
    )
)

lp_reg_on_policy = register(
    replace(
        lp_reg,
        name="lp-reg-on-policy",
        summary="Lp-Reg with the divergence over the whole vocabulary, for one optimiser step per rollout batch.",
        surrogate=LpReg(kl="own"),
    )
)

lp_reg_released = register(
    replace(
        lp_reg,
        name="lp-reg-released",
        summary="Lp-Reg as its code has it: quantile of the negative tokens, gated and cut-off estimate.",
        surrogate=LpReg(
            pool="negative",
            scope="minibatch",
            keep_equal=True,
            cap_negative=False,
            only_below=True,
            official_clamp=True,
            skip_below=2,
        ),
    )
)

register_stage("surrogate", "lp-reg", LpReg)
register_stage("weights", "spark-tracker", SparkTracker)
