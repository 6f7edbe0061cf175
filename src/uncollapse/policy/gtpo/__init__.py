"""GTPO: spare the tokens that good and bad answers share, and learn nothing from answers that are too uncertain.

Paper: Simoni, Fontana, Rossolini, Saracino, "GTPO: Trajectory-Based Policy Optimization in Large Language Models"
(v5: "Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control"), 2025, arXiv 2508.03772. Not the
"Group Token Policy Optimization" of arXiv 2508.04349. Official code: winstonsmith1897/GTPO, `gtpo/gtpo_training.py`.

    J = (1/G) sum_i delta_i (A_i - gamma H_i) / |o_i| sum_t r_it lambda_it,    A_i = R_i - mean R,   r_it = 1

Four stages, each of use without the others: `ConflictWeights` (lambda), `EntropyFilter` (delta), `EntropyShaping` (gamma)
and the surrogate `Reinforce` (r: the ratio of the policy to itself, value 1, with gradient).

Differs from the paper / the official code:
- Conflicts are found by sorting exact keys (group, position, id) of the tokens present. The official code counts into
  two arrays of vocabulary x length (5 GB each for 4096 tokens of 151,936), one group at a time.
- A position is the number of trainable tokens before it (after it, for trailing runs), so that neither padding, nor a
  given prefix, nor masked turns matter. For plain right-padded answers this is the official position.
- The initial entropy is the mean over answers of their mean entropy in the first rollout batch; the README that states
  the rule does not say how it is measured. The official code has no such branch and filters above 0.7.
- The sign of an advantage that decides conflicts is 0 within 1e-6 of the group's reward range: the official A > 0, in
  floats, lets rounding decide what an average answer is.
- Recipe `gtpo-released` also does what the code does and the formula does not: it divides an answer's loss by a count of
  its conflict tokens (wrong in the code: the longer of the two runs instead of their union), and sums over the answers
  of a prompt instead of averaging. Its entropy is exact; the code clamps probabilities at 1e-6 inside the logarithm,
  which is not offered.
- A threshold that silences a whole rollout batch warns; the official code goes on with zero gradients.
"""

from __future__ import annotations

from dataclasses import replace

from uncollapse.policy.baselines import grpo
from uncollapse.policy.config.names import register_stage
from uncollapse.policy.gtpo.conflicts import advantage_sign, conflict_count, conflict_weights
from uncollapse.policy.gtpo.objective import LN2, entropy_filter, gtpo_loss, trajectory_entropy
from uncollapse.policy.gtpo.stages import (
    ConflictWeights,
    EntropyFilter,
    EntropyShaping,
    Reinforce,
    SumOverGroup,
)
from uncollapse.policy.recipe import register
from uncollapse.policy.reduction import Mean
from uncollapse.policy.stages.advantages import GroupAdvantage

__all__ = [
    "LN2",
    "ConflictWeights",
    "EntropyFilter",
    "EntropyShaping",
    "Reinforce",
    "SumOverGroup",
    "advantage_sign",
    "conflict_count",
    "conflict_weights",
    "entropy_filter",
    "gtpo_loss",
    "trajectory_entropy",
]

gtpo = register(
    replace(
        grpo,
        name="gtpo",
        paper="2508.03772",
        summary="Spares and amplifies tokens that good and bad answers share; drops answers above ln 2 nats.",
        advantage=(GroupAdvantage(std=False), EntropyShaping(gamma=0.1)),
        weights=(ConflictWeights(amplify=2.0), EntropyFilter(threshold=LN2)),
        surrogate=Reinforce(),
        mean=Mean(("row",)),
    )
)

gtpo_released = register(
    replace(
        gtpo,
        name="gtpo-released",
        summary="GTPO as its code has it: filter at 0.7 nats always, loss over a conflict count, sum over answers.",
        weights=(
            ConflictWeights(amplify=2.0, normalise="released"),
            EntropyFilter(threshold=0.7, spare_high_start=False),
            SumOverGroup(),
        ),
    )
)

register_stage("advantage", "entropy-shaping", EntropyShaping)
register_stage("weights", "conflict-weights", ConflictWeights)
register_stage("weights", "entropy-filter", EntropyFilter)
register_stage("weights", "sum-over-group", SumOverGroup)
register_stage("surrogate", "reinforce", Reinforce)
