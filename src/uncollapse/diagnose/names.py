"""The names under which a log's columns are known, whatever framework wrote it."""

from __future__ import annotations

KNOWN: dict[str, str] = {
    "entropy/token/mean": "nats",
    "reward/mean": "reward",
    "reward/std": "reward",
    "reward/zero_variance_groups": "share of groups",
    "eval/reward": "reward",
    "length/mean": "tokens",
    "length/max": "tokens",
    "length/min": "tokens",
    "length/truncated": "share of answers",
    "clip/high/frac": "share of tokens",
    "clip/low/frac": "share of tokens",
    "clip/ppo/frac": "share of tokens",
    "kl/old/k3": "nats",
    "kl/ref/mean": "nats",
    "mismatch/logp/mean": "nats",
    "mismatch/logp/max": "nats",
    "mismatch/ratio/mean": "ratio",
    "diversity/distinct": "share of answers",
    "eval/distinct": "per prompt",
    "covariance/token/mean": "advantage x nats",
    "grad/norm": "",
    "loss/total": "",
    "lr": "",
    "time/step": "s",
}
"""Known columns and their units. `eval/pass@<k>` is known for every k."""
