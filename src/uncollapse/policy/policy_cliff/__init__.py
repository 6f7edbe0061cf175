"""The policy cliff: where an arbitrarily small change of the reward moves the optimal policy by a finite jump.

Q* follows the reward smoothly, its argmax does not: where answers tie, any tie-breaker decides. Rewards that look at
the final answer alone tie all valid reasoning, so policies trained on them are brittle; an entropy or KL term makes
the policy Lipschitz in the reward, at a price in return. No recipe: an analyser of MDPs, token trees and scored
completions (`uncollapse cliff`), to be used before training.

Paper: Xingcheng Xu, "The Policy Cliff: A Theoretical Analysis of Reward-Policy Maps in Large Language Models", 2025,
arXiv 2507.20150. No algorithm code exists; the sources of the text are at SafeAGI-01/PolicyCliff.

The paper's: hard and soft Bellman equations, upper hemicontinuity, the tie-breaking reward, incomplete and effective
rewards, TV <= delta / (2 alpha (1 - gamma)), the price of regularisation.
Derived here: the exact stability radius and its witness, the exact local Lipschitz constant, TV <= tanh(delta / (2 alpha)),
the limit at temperature 0 on token trees, the bound for changed weights, the audit of sampled completions.

Differs from the paper:
- Ties are decided by a tolerance, which is reported, and never by rounding.
- Finite state and action sets only; the paper's continuous ones need bump functions where ours need one entry.
- An action that does not exist has reward -inf, instead of the same actions everywhere.
- The paper bounds; where an exact number can be had (radius, Lipschitz constant), that is what is returned.
"""

from uncollapse.policy.policy_cliff.audit import (
    RewardAudit,
    audit_completions,
    audit_rewards,
    gibbs_tv,
)
from uncollapse.policy.policy_cliff.bounds import (
    regularisation_price,
    soft_policy_bound,
    span_bound,
    tanh_bound,
    value_bound,
)
from uncollapse.policy.policy_cliff.mdp import (
    SoftSolution,
    Solution,
    inverse_bellman,
    policy_value,
    soft_solve,
    solve_mdp,
)
from uncollapse.policy.policy_cliff.profile import (
    CliffPoint,
    cliff_profile,
    policy_distance,
    policy_entropy,
    state_tv,
)
from uncollapse.policy.policy_cliff.rewards import (
    IncompleteReward,
    effective_reward,
    incomplete_reward,
    tie_break_reward,
    weight_bound,
)
from uncollapse.policy.policy_cliff.stability import (
    PolicyLipschitz,
    StabilityRadius,
    policy_lipschitz,
    stability_radius,
)
from uncollapse.policy.policy_cliff.tree import TokenTree, TreeSolution

__all__ = [
    "CliffPoint",
    "IncompleteReward",
    "PolicyLipschitz",
    "RewardAudit",
    "SoftSolution",
    "Solution",
    "StabilityRadius",
    "TokenTree",
    "TreeSolution",
    "audit_completions",
    "audit_rewards",
    "cliff_profile",
    "effective_reward",
    "gibbs_tv",
    "incomplete_reward",
    "inverse_bellman",
    "policy_distance",
    "policy_entropy",
    "policy_lipschitz",
    "policy_value",
    "regularisation_price",
    "soft_policy_bound",
    "soft_solve",
    "solve_mdp",
    "span_bound",
    "stability_radius",
    "state_tv",
    "tanh_bound",
    "tie_break_reward",
    "value_bound",
    "weight_bound",
]
