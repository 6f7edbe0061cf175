"""What every framework calls the columns that we know: one table.

Where several names of one log mean the same column, ours comes first and then the order of the table; the others stay
in `Log.other`. Transformers puts `train/` before a name in TensorBoard, W&B and trackio; it is looked up without.
Checked against TRL 1.16 and verl 0.9.1; the names of other frameworks are theirs as published, and were not run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from uncollapse.diagnose.names import KNOWN, is_known
from uncollapse.errors import UnknownName


class Alias(NamedTuple):
    """A framework's name for a known column. `*` in `name` is any text (verl's data sources have slashes)."""

    known: str
    framework: str
    name: str
    remark: str = ""


_SIGN = "the entropy itself in spite of its name; negated if it is never above 0"
"""An entropy is not negative, so the sign of the column tells whether it was logged as a loss."""

ALIASES: tuple[Alias, ...] = (
    Alias("entropy/token/mean", "TRL", "entropy"),
    Alias("entropy/token/mean", "verl", "actor/entropy", "averaged as `loss_agg_mode` says, over tokens by default"),
    Alias("entropy/token/mean", "verl", "actor/entropy_loss", _SIGN),
    Alias("entropy/token/mean", "OpenRLHF, slime, Stable-Baselines3", "entropy_loss", _SIGN),
    Alias("entropy/token/mean", "NeMo-RL", "approx_entropy", "estimated from the sampled tokens alone"),
    Alias("entropy/token/mean", "CleanRL", "losses/entropy"),
    Alias("entropy/token/mean", "other", "policy_entropy"),
    Alias("entropy/token/mean", "other", "policy/entropy"),
    Alias("entropy/token/mean", "other", "token_entropy"),
    Alias("entropy/token/mean", "other", "mean_entropy"),
    Alias("entropy/token/mean", "other", "entropy_mean"),
    Alias("entropy/token/mean", "other", "entropy/mean"),
    Alias("entropy/token/mean", "other", "avg_entropy"),
    Alias("reward/mean", "TRL, OpenRLHF, NeMo-RL", "reward"),
    Alias("reward/mean", "verl", "critic/score/mean", "before a KL penalty"),
    Alias("reward/mean", "verl", "critic/rewards/mean", "after a KL penalty, if the reward has one"),
    Alias("reward/mean", "slime", "rollout/raw_reward"),
    Alias("reward/mean", "Stable-Baselines3", "rollout/ep_rew_mean"),
    Alias("reward/mean", "other", "mean_reward"),
    Alias("reward/mean", "other", "reward_mean"),
    Alias("reward/mean", "other", "rewards/mean"),
    Alias("reward/mean", "other", "avg_reward"),
    Alias("reward/mean", "other", "score"),
    Alias("reward/std", "TRL", "reward_std", "of all answers, or the mean over groups in older versions"),
    Alias("reward/std", "other", "std_reward"),
    Alias("reward/zero_variance_groups", "TRL", "frac_reward_zero_std"),
    Alias("eval/reward", "TRL", "eval_reward"),
    Alias("eval/reward", "verl", "val-core/*/acc/mean@*", "the first data source"),
    Alias("eval/reward", "verl", "val-core/*/reward/mean@*", "the first data source"),
    Alias("eval/reward", "NeMo-RL", "validation/accuracy"),
    Alias("eval/pass@<k>", "verl", "val-core/*/acc/best@*/mean", "a bootstrap estimate; the first data source"),
    Alias("length/mean", "TRL", "completions/mean_length"),
    Alias("length/mean", "verl", "response_length/mean"),
    Alias("length/mean", "OpenRLHF", "response_length"),
    Alias("length/mean", "slime", "rollout/response_len/mean"),
    Alias("length/mean", "NeMo-RL", "mean_gen_tokens_per_sample"),
    Alias("length/mean", "TRL (before 0.16)", "completion_length"),
    Alias("length/mean", "other", "mean_length"),
    Alias("length/max", "TRL", "completions/max_length"),
    Alias("length/max", "verl", "response_length/max"),
    Alias("length/min", "TRL", "completions/min_length"),
    Alias("length/min", "verl", "response_length/min"),
    Alias("length/truncated", "TRL", "completions/clipped_ratio"),
    Alias("length/truncated", "verl", "response_length/clip_ratio", "answers of the longest possible length"),
    Alias("length/truncated", "slime", "rollout/truncated_ratio"),
    Alias("clip/high/frac", "TRL", "clip_ratio/high_mean"),
    Alias("clip/low/frac", "TRL", "clip_ratio/low_mean"),
    Alias("clip/ppo/frac", "TRL", "clip_ratio/region_mean"),
    Alias("clip/ppo/frac", "TRL (before 0.17)", "clip_ratio"),
    Alias("clip/ppo/frac", "verl", "actor/pg_clipfrac"),
    Alias("clip/ppo/frac", "slime", "pg_clipfrac"),
    Alias("clip/ppo/frac", "Stable-Baselines3", "clip_fraction"),
    Alias("kl/old/k1", "verl", "actor/ppo_kl", "mean of old minus new log-probability; may be negative"),
    Alias("kl/old/k1", "OpenRLHF, slime", "ppo_kl", "the same"),
    Alias("kl/old/k3", "Stable-Baselines3", "approx_kl"),
    Alias("kl/ref/mean", "TRL, OpenRLHF", "kl"),
    Alias("kl/ref/mean", "verl", "actor/kl_loss", "estimator as `kl_loss_type` says"),
    Alias("kl/ref/mean", "verl", "actor/reward_kl_penalty", "where the penalty is in the reward"),
    Alias("kl/ref/mean", "slime", "kl_loss"),
    Alias("mismatch/logp/mean", "TRL", "sampling/sampling_logp_difference/mean"),
    Alias("mismatch/logp/mean", "slime", "train_rollout_logprob_abs_diff"),
    Alias("mismatch/logp/max", "TRL", "sampling/sampling_logp_difference/max"),
    Alias("mismatch/prob/mean", "verl", "training/rollout_probs_diff_mean", "of probabilities, not of their logarithms"),
    Alias("mismatch/prob/max", "verl", "training/rollout_probs_diff_max", "the same"),
    Alias("mismatch/kl/mean", "verl", "rollout_corr/k3_kl"),
    Alias("mismatch/kl/mean", "verl", "rollout_corr/kl", "k1: may be negative"),
    Alias("mismatch/kl/mean", "NeMo-RL", "gen_kl_error"),
    Alias("mismatch/ratio/mean", "TRL", "sampling/importance_sampling_ratio/mean"),
    Alias("mismatch/ratio/mean", "verl", "rollout_corr/rollout_is_mean"),
    Alias("mismatch/ratio/mean", "NeMo-RL", "sampling_importance_ratio"),
    Alias("grad/norm", "TRL, NeMo-RL, slime", "grad_norm"),
    Alias("grad/norm", "verl", "actor/grad_norm"),
    Alias("grad/norm", "OpenRLHF", "actor_grad_norm"),
    Alias("loss/total", "TRL, NeMo-RL, slime", "loss"),
    Alias("loss/total", "verl", "actor/loss"),
    Alias("lr", "TRL", "learning_rate"),
    Alias("lr", "verl", "actor/lr"),
    Alias("lr", "OpenRLHF", "actor_lr"),
    Alias("lr", "slime", "lr-pg_0"),
    Alias("time/step", "TRL", "step_time"),
    Alias("time/step", "verl", "timing_s/step"),
    Alias("time/step", "verl", "perf/time_per_step"),
)  # fmt: skip

SHORT: Mapping[str, str] = {
    "entropy": "entropy/token/mean",
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "zero_variance": "reward/zero_variance_groups",
    "eval_reward": "eval/reward",
    "length": "length/mean",
    "truncated": "length/truncated",
    "clip": "clip/ppo/frac",
    "clip_high": "clip/high/frac",
    "clip_low": "clip/low/frac",
    "kl": "kl/ref/mean",
    "mismatch": "mismatch/logp/mean",
    "grad_norm": "grad/norm",
    "loss": "loss/total",
}
"""Short names for a mapping given by hand; `step` and `run` there name the columns that count and that tell runs apart."""

STEP, RUN = "step", "run"
STEP_COLUMNS = (
    "global_step", "train/global_step", "training/global_step", "trainer/global_step", "_step", "step",
    "train/step", "rollout/step", "training_step", "train_step", "iteration", "iter", "update", "updates",
)  # fmt: skip
"""Columns that count steps, the first that is there; letters of either case."""
RUN_COLUMNS = ("run_id", "run_name", "run", "experiment", "trial", "seed")
"""Columns that tell runs of one file apart."""

_EXACT = {alias.name: (rank, alias) for rank, alias in reversed(list(enumerate(ALIASES, start=1)))}
_WILD = [
    (re.compile("(.{1,200})".join(map(re.escape, alias.name.split("*")))), rank, alias)
    for rank, alias in enumerate(ALIASES, start=1)
    if "*" in alias.name
]


@lru_cache(maxsize=4096)
def meaning(name: str) -> tuple[str, int] | None:
    """The known column that a name stands for and its rank, the smaller the surer; None if it is not known."""
    for spelled in dict.fromkeys((name, name.removeprefix("train/"))):
        if is_known(spelled):
            return spelled, 0
    for spelled in dict.fromkeys((name, name.removeprefix("train/"), name.lower())):
        if spelled in _EXACT:
            rank, alias = _EXACT[spelled]
            return alias.known, rank
        for pattern, rank, alias in _WILD:
            match = pattern.fullmatch(spelled)
            if match is None:
                continue
            known = alias.known.replace("<k>", match.groups()[-1])
            return (known, rank) if is_known(known) else None
    return None


def may_be_negated(name: str) -> bool:
    """Whether a column of this name may hold minus the entropy."""
    found = _EXACT.get(name) or _EXACT.get(name.removeprefix("train/"))
    return found is not None and found[1].remark == _SIGN


def full_mapping(mapping: Mapping[str, str]) -> dict[str, str]:
    """A mapping given by hand, with short names written out. Raises `UnknownName`."""
    full = {}
    for given, column in mapping.items():
        name = SHORT.get(given, given)
        if not (is_known(name) or name in (STEP, RUN)):
            raise UnknownName("column", given, [*SHORT, *KNOWN, STEP, RUN])
        full[name] = column
    return full
