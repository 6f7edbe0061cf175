"""The recipes that the field takes for granted, with their official hyperparameters."""

from __future__ import annotations

from dataclasses import replace

from uncollapse.policy.recipe import Recipe, Weighted, register
from uncollapse.policy.reduction import Mean, Sum
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.filters import DropDeadGroups
from uncollapse.policy.stages.regularizers import AdaptiveEntropy, EntropyBonus
from uncollapse.policy.stages.rewards import SoftOverlong
from uncollapse.policy.stages.samplers import DynamicSampler, PlainSampler
from uncollapse.policy.stages.surrogates import ClippedWeight, PPOClip, SequenceClip

grpo = register(
    Recipe(
        name="grpo",
        paper="2402.03300",
        summary="Group-relative policy optimisation: rewards normalised within the group, PPO clip, mean per row.",
        sampler=PlainSampler(samples=8),
        advantage=(GroupAdvantage(std=True),),
        surrogate=PPOClip(low=0.2, high=0.2),
        mean=Mean(("row",)),
    )
)
"""The paper adds a k3 KL penalty to a reference with coefficient 0.04; today's practice, and TRL's default, is none."""

dr_grpo = register(
    Recipe(
        name="dr-grpo",
        paper="2503.20783",
        summary="GRPO done right: no division by the group's deviation nor by the row's length.",
        sampler=PlainSampler(samples=8),
        advantage=(GroupAdvantage(std=False),),
        surrogate=PPOClip(low=0.2, high=0.2),
        mean=Sum(),
    )
)

dapo = register(
    Recipe(
        name="dapo",
        paper="2503.14476",
        summary="Clip-higher, dynamic sampling, token mean and a soft penalty for overlong answers.",
        sampler=DynamicSampler(samples=16),
        rewards=(SoftOverlong(),),
        filters=(DropDeadGroups(),),
        advantage=(GroupAdvantage(std=True),),
        surrogate=PPOClip(low=0.2, high=0.28),
        mean=Mean(),
    )
)

gspo = register(
    Recipe(
        name="gspo",
        paper="2507.18071",
        summary="Group sequence policy optimisation: ratio and clip per sequence instead of per token.",
        sampler=PlainSampler(samples=8),
        advantage=(GroupAdvantage(std=True),),
        surrogate=SequenceClip(low=3e-4, high=4e-4),
        mean=Mean(("row",)),
    )
)

cispo = register(
    Recipe(
        name="cispo",
        paper="2506.13585",
        summary="Clips the importance weight, not the update: every token keeps its gradient.",
        sampler=PlainSampler(samples=8),
        advantage=(GroupAdvantage(std=True),),
        surrogate=ClippedWeight(low=None, high=5.0),
        mean=Mean(),
    )
)

entropy_bonus = register(
    replace(
        grpo,
        name="entropy-bonus",
        paper="1602.01783",
        summary="GRPO with a fixed reward for entropy.",
        regularizers=(Weighted(EntropyBonus(), coef=1e-3),),
    )
)
"""Coefficient 0.001: long verl's default for language models."""

adaptive_entropy = register(
    replace(
        grpo,
        name="adaptive-entropy",
        paper="2505.22312",
        summary="GRPO with an entropy bonus steered towards a target entropy (Skywork-OR1).",
        regularizers=(Weighted(AdaptiveEntropy(target=0.2, step=0.005)),),
    )
)
