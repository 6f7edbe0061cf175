"""What a rollout batch says about collapse: rewards, entropy, and the covariance that will move it.

Names are `area/name/statistic`. Entropies are those of the policy that sampled the batch, at its temperature.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from uncollapse.measure.covariance import FRACTIONS, covariance_profile, token_covariance
from uncollapse.policy.batch import Batch, Stat
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.stages.segments import equal_groups, group_index
from uncollapse.policy.stats import Entropy, Logp


def rollout_stats(recipe: Recipe) -> frozenset[Stat]:
    """What an engine measures of a rollout batch: what the recipe reads, and what `rollout_metrics` does."""
    return recipe.stats("rollout") | {Logp("old"), Entropy("old")}


def rollout_metrics(raw: Batch, prepared: Batch) -> dict[str, float]:
    """Metrics of one rollout batch: `raw` as scored by the verifier, `prepared` as it enters the loss.

    Entropy and covariance in nats, length in tokens; `covariance/top/<f>` is the mean of the largest fraction f.
    NaN where there is nothing to measure. Only rows of part `policy` count: tempered or replayed ones are not what the
    policy does.
    """
    raw, prepared = raw.of_parts("policy"), prepared.of_parts("policy")
    reward = raw.reward[~torch.isnan(raw.reward)].double()
    index, groups = group_index(raw.group)
    entropy = raw.stats[Entropy("old")][raw.mask].double()
    length = raw.columns["length"].double()
    covariance = token_covariance(raw.stats[Logp("old")], prepared.advantage, prepared.mask)
    profile = covariance_profile(covariance, prepared.mask, FRACTIONS)
    found = {
        "reward/mean": _mean(reward),
        "reward/std": float(reward.std()) if len(reward) > 1 else float("nan"),
        "reward/unscorable": _mean(torch.isnan(raw.reward).double()),
        "reward/zero_variance_groups": _mean(equal_groups(raw.reward, index, groups).double()),
        "entropy/token/mean": _mean(entropy),
        "entropy/token/p10": _quantile(entropy, 0.1),
        "entropy/token/p90": _quantile(entropy, 0.9),
        "length/mean": _mean(length),
        "length/truncated": _mean((~raw.columns["finished"].bool()).double()),
        "rows/kept": _mean(prepared.mask.any(dim=1).double()),
        "covariance/token/mean": float(profile.mean[-1]),
    }
    tops = zip(profile.fractions, profile.mean.tolist(), strict=True)
    return found | {f"covariance/top/{fraction:g}": value for fraction, value in tops}


def useful_rows(prepared: Batch) -> Bool[Tensor, " row"]:
    """Rows of a rollout batch that teach something: a token in the loss whose advantage is not 0."""
    return ((prepared.advantage != 0) & prepared.mask).any(dim=1)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _quantile(values: Tensor, q: float) -> float:
    """Sorts rather than calling `torch.quantile`, which refuses more than 16 million values."""
    if not len(values):
        return float("nan")
    return float(values.sort().values[round(q * (len(values) - 1))])
