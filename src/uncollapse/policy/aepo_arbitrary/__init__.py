"""Arbitrary Entropy Policy Optimization: set the entropy by choosing at which temperature right answers are imitated.

Paper: Chen Wang, Zhaochun Li, Jionghao Bai, Yuzhi Zhang, Shisheng Cui, Zhou Zhao, Yue Wang, "Arbitrary Entropy Policy
Optimization: Entropy Is Controllable in Reinforcement Fine-tuning", 2025, arXiv 2510.08141; later versions of the same id
are called SCOPE-RL. Official code: 597358816/AEPO (`verl/trainer/ray_trainer.py`). Not to be confused with Agentic
Entropy-Balanced Policy Optimization, also abbreviated AEPO.

`formulas` holds the pure functions, `controller` the rule with memory that chooses the temperature, `stages` what a
recipe is made of. Four recipes: `aepo-arbitrary` (the term is added to the loss), `aepo-arbitrary-scope` (the later
version's settings), `aepo-arbitrary-replace` (the released code, which replaces rows), `aepo-arbitrary-reweight` (its
unpublished branch DCPO, without extra answers).

Differs from the paper / the official code:
- `aepo-arbitrary` centres rewards by the group and does not divide by its deviation: towards success that division
  multiplies GRPO's pull by sqrt(group size) while the tempered term stays, and control is lost unless alpha grows with it
  (`group_advantage_gain`, study). Paper and code divide; the two recipes that follow them do too.
- The entropy is the exact one of the policy's own rows at its own temperature. The released code takes -log pi of all
  training tokens, tempered rows included; `aepo-arbitrary-replace` does as well, but over the step's tokens, from the
  policy before the update, rather than as a mean of micro-batches.
- A positive is an answer with reward 1, as in the formula, so groups that are right throughout count. The released code
  asks for a group-normalised advantage above 0.05, which drops them; so does `aepo-arbitrary-replace`.
- Of several processes each draws its own share of prompts again, and each of `aepo-arbitrary-replace` replaces up to 60 of
  its own rows; the released code up to 60 of all.
- Which prompts are sampled again is drawn by the clock; the released code takes the first quarter of a shuffled batch.
- No positive: the term is left out, where the released code fails.
- A target out of reach is noticed (`EntropyController.patience`); `aepo-arbitrary-replace` has that off.
- Tempered answers are sampled from softmax(logits / T) without the released code's top-p of 0.99.
- DCPO uses the reward, not the normalised advantage, to say what is right, and leaves the advantage alone when
  nothing is right.
"""

from __future__ import annotations

from dataclasses import replace

from uncollapse.policy.aepo_arbitrary.controller import EntropyController
from uncollapse.policy.aepo_arbitrary.formulas import (
    auxiliary_temperature,
    expected_aux_gradient,
    group_advantage_gain,
    reachable_entropy,
    reweighting_share,
    tempered_positive_loss,
    tempered_reweighting,
)
from uncollapse.policy.aepo_arbitrary.stages import (
    DropReplaced,
    ReplacingSampler,
    TemperedPositives,
    TemperedReweighting,
    TemperedSampler,
    policy_entropy,
)
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.recipe import Recipe, register
from uncollapse.policy.reduction import Mean
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip

__all__ = [
    "DropReplaced",
    "EntropyController",
    "ReplacingSampler",
    "TemperedPositives",
    "TemperedReweighting",
    "TemperedSampler",
    "auxiliary_temperature",
    "expected_aux_gradient",
    "group_advantage_gain",
    "policy_entropy",
    "reachable_entropy",
    "reweighting_share",
    "tempered_positive_loss",
    "tempered_reweighting",
]

aepo_arbitrary = register(
    Recipe(
        name="aepo-arbitrary",
        paper="2510.08141",
        summary="Imitates right answers sampled hot or cold, whichever moves the entropy towards its target.",
        sampler=TemperedSampler(),
        advantage=(GroupAdvantage(std=False), TemperedPositives()),
        surrogate=PPOClip(low=0.2, high=0.2, dual=3.0),
        mean=Mean(("row",)),
    )
)

aepo_arbitrary_scope = register(
    replace(
        aepo_arbitrary,
        name="aepo-arbitrary-scope",
        summary="The same with the later version's settings: temperature in proportion to the gap, normalised advantages.",
        sampler=TemperedSampler(mode="clip"),
        advantage=(GroupAdvantage(std=True), TemperedPositives()),
    )
)

aepo_arbitrary_replace = register(
    replace(
        aepo_arbitrary,
        name="aepo-arbitrary-replace",
        summary="The released code: right tempered answers take the place of up to 60 of the policy's rows.",
        sampler=ReplacingSampler(),
        filters=(DropReplaced(),),
        advantage=(GroupAdvantage(std=True), TemperedPositives()),
        mean=Mean(joint=True),
    )
)

aepo_arbitrary_reweight = register(
    replace(
        aepo_arbitrary,
        name="aepo-arbitrary-reweight",
        summary="Re-weights right answers towards another temperature instead of sampling at it (DCPO).",
        sampler=PlainSampler(samples=5),
        advantage=(GroupAdvantage(std=True), TemperedReweighting()),
        mean=Mean(),
    )
)

register_stage("sampler", "tempered-sampler", TemperedSampler)
register_stage("sampler", "replacing-sampler", ReplacingSampler)
register_stage("filters", "drop-replaced", DropReplaced)
register_stage("advantage", "tempered-positives", TemperedPositives)
register_stage("advantage", "tempered-reweighting", TemperedReweighting)
