"""CURE: sample again from where the policy was undecided, and train on originals and branches as one group.

Paper: Li, Xue, Wang, Zhou, Li, Ji, Wang, Liu, Yang, Qiu, Yang, "CURE: Critical-Token-Guided Re-Concatenation for
Entropy-Collapse Prevention", 2025, arXiv 2508.11016. Official code: bytedance/CURE,
`recipe/CURE_First_Stage/dapo_ray_trainer.py` (branching), `recipe/CURE_Second_Stage/dapo_ray_trainer.py` (plain DAPO).

Stage 1: of every first-round answer one of the positions with the highest entropy is drawn, the answer is cut just
before it, and the kept prefix is continued anew a few times. Originals and branches of a prompt are one group of
DAPO. A prefix is given, not sampled: it has no gradient in a branch. Stage 2: DAPO from the prompts alone.

Differs from the paper / the official code:
- Tokens that are never critical (special ones, and those whose text has at most one character, an option) are a table
  over the vocabulary, made once, instead of a call of the tokenizer per token.
- Where a limit on the prefix applies, cuts beyond it are not candidates (`keep="reject"`). The released code keeps the
  first tokens of prompt and prefix, so that the branch silently starts before the critical token: `keep="head"`.
- The released code fills up a step with fresh groups for those whose rewards are all equal (at most ten rounds). Here
  they are dropped from the loss, and replaced only with `rounds` above 1, since that costs generation.
- Groups are formed by number, in any batch size; the released code cuts the rollouts into chunks of a fixed size.
- The README speaks of keeping the clauses before the critical token. The code cuts at the token; so do we.
- An answer without any candidate is sampled again as a whole, as released.
- Ours: family statistics, `FamilyAdvantage`, a plateau rule for the second stage.
"""

from __future__ import annotations

from dataclasses import replace

from uncollapse.policy.baselines import dapo
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.cure.families import FamilyAdvantage, effective_samples, family_variance
from uncollapse.policy.cure.positions import (
    branch_prompts,
    critical_positions,
    critical_tokens,
    expected_tokens,
    left_pad,
)
from uncollapse.policy.cure.sampler import CureSampler, RolloutGroup
from uncollapse.policy.cure.two_stages import TwoStageSampler, TwoStageSchedule
from uncollapse.policy.cure.writer import ModelWriter
from uncollapse.policy.recipe import register
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.rewards import SoftOverlong
from uncollapse.policy.stages.surrogates import PPOClip

__all__ = [
    "CureSampler",
    "FamilyAdvantage",
    "ModelWriter",
    "RolloutGroup",
    "TwoStageSampler",
    "TwoStageSchedule",
    "branch_prompts",
    "critical_positions",
    "critical_tokens",
    "effective_samples",
    "expected_tokens",
    "family_variance",
    "left_pad",
]

cure = register(
    replace(
        dapo,
        name="cure",
        paper="2508.11016",
        summary="Branches answers anew at undecided tokens and trains on originals and branches as one group.",
        sampler=CureSampler(),
        rewards=(SoftOverlong(cache=512 / 2596),),
        advantage=(GroupAdvantage(std=True, eps=1e-6),),
        surrogate=PPOClip(low=0.2, high=0.28, dual=10.0),
    )
)
"""Stage 1 of the official scripts: 2596 response tokens in either round, the last 512 of them penalised."""

cure_two_stage = register(
    replace(
        cure,
        name="cure-two-stage",
        summary="CURE for 300 steps, then DAPO from the prompts alone.",
        sampler=TwoStageSampler(),
    )
)

register_stage("sampler", "cure-sampler", CureSampler)
register_stage("sampler", "two-stage-sampler", TwoStageSampler)
register_stage("advantage", "family-advantage", FamilyAdvantage)
