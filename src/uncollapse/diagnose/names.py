"""The names under which a log's columns are known, whatever framework wrote it."""

from __future__ import annotations

import re

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
    "kl/old/k1": "nats",
    "kl/ref/mean": "nats",
    "mismatch/logp/mean": "nats",
    "mismatch/logp/max": "nats",
    "mismatch/prob/mean": "probability",
    "mismatch/prob/max": "probability",
    "mismatch/kl/mean": "nats",
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

PASS_AT_K = re.compile(r"eval/pass@\d{1,9}")


def is_known(name: str) -> bool:
    """Whether this is the name of a known column."""
    return name in KNOWN or PASS_AT_K.fullmatch(name) is not None


def unit(name: str) -> str:
    """The unit of a known column; empty where it has none."""
    return "share of prompts" if PASS_AT_K.fullmatch(name) else KNOWN.get(name, "")
