"""E1: how well each estimator of a token's entropy change tracks the measured change, on random softmax states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from uncollapse.measure.covariance import token_covariance
from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.measure.entropy_change import ESTIMATORS, token_entropy_change
from uncollapse.measure.statistics import Collision, Entropy, Logp
from uncollapse.measure.token_stats import token_stats_from_logits
from uncollapse.studies.statistics import Estimate, mean_over_seeds, paired_difference

Tracking: TypeAlias = dict[str, float]

WORLDS = {8: 2.0, 100: 3.0, 1000: 4.0}
"""Vocabulary to scale of the logits: N(0, 1) times the scale times U(0, 1), one uniform number per state."""
LR = 1e-3
GROUP = 16
"""Samples per state where they are summed."""
PREDICTORS = (*ESTIMATORS, "cov", "state-cov")
"""The estimators; the centred product of log-probability and advantage; the product centred by the state's entropy."""
SETTINGS = ("single", "group", "uncentred-group")
_CHUNK = 2000


def track(seed: int, vocab: int, setting: str, states: int) -> Tracking:
    """Correlation and error of every predictor against the measured entropy change of `states` random states.

    `single`: one sampled token per state, A ~ N(0, 1). `group`: 16 samples per state whose pushes are summed, with a 0/1
    reward per action, advantages centred and scaled over the 16. `uncentred-group`: 16 samples with A ~ N(0, 1). The
    step on the logits has size 1e-3, everything is float64. All covariances are centred over all samples, except
    `state-cov`, A (log p + H).
    """
    parts = list(_draw(seed, vocab, setting, states))
    measured = torch.cat([part["measured"] for part in parts]).numpy()
    numbers = {
        name: torch.cat([part[name] for part in parts])
        for name in ("logp", "entropy", "collision", "advantage")
    }
    logp, h, a = numbers["logp"], numbers["entropy"], numbers["advantage"]
    per_token: dict[str, Tensor] = {
        name: token_entropy_change(logp, logp, h, a, estimator=name, collision=numbers["collision"])
        for name in ESTIMATORS
    }
    per_token["cov"] = token_covariance(logp, a, torch.ones_like(logp, dtype=torch.bool))
    per_token["state-cov"] = a * (logp + h)
    found: Tracking = {"variance": float(measured.var())}
    for name in PREDICTORS:
        predicted = -LR * per_token[name].sum(1).numpy()
        found[f"{name}/pearson"] = float(stats.pearsonr(predicted, measured).statistic)
        found[f"{name}/spearman"] = float(stats.spearmanr(predicted, measured).statistic)
        size = stats.spearmanr(np.abs(predicted), np.abs(measured)).statistic
        found[f"{name}/abs-spearman"] = float(size)
        found[f"{name}/mse"] = float(np.mean((predicted - measured) ** 2))
        top = int(per_token[name].abs().argmax())
        found[f"{name}/top-probability"] = float(logp.flatten()[top].exp())
    return found


def _draw(seed: int, vocab: int, setting: str, states: int) -> Iterator[dict[str, Tensor]]:
    """Blocks of states: what is known of their sampled tokens, and the measured change of their entropy."""
    generator = torch.Generator().manual_seed(1000 * seed + vocab)
    samples = 1 if setting == "single" else GROUP
    for start in range(0, states, _CHUNK):
        count = min(_CHUNK, states - start)
        spread = WORLDS[vocab] * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        z = spread * torch.randn(count, vocab, generator=generator, dtype=torch.float64)
        p = z.softmax(-1)
        token = torch.multinomial(p, samples, replacement=True, generator=generator)
        if setting == "group":
            reward = (torch.rand(count, vocab, generator=generator) < 0.5).double().gather(1, token)
            centred = reward - reward.mean(1, keepdim=True)
            advantage = centred / (reward.std(1, keepdim=True) + 1e-4)
        else:
            advantage = torch.randn(count, samples, generator=generator, dtype=torch.float64)
        dz = torch.zeros_like(z).scatter_add(1, token, advantage) - p * advantage.sum(1, keepdim=True)
        after = shannon_entropy_from_logits(z + LR * dz)
        per_state = token_stats_from_logits(z, token[:, 0], stats=(Entropy(), Collision(), Logp()))
        entropy, collision = per_state[Entropy()], per_state[Collision()]
        yield {
            "measured": after - entropy,
            "logp": z.log_softmax(-1).gather(1, token),
            "advantage": advantage,
            "entropy": entropy[:, None].expand(count, samples),
            "collision": collision[:, None].expand(count, samples),
        }


PAIRS = (("released", "cov"), ("theorem", "released"), ("theorem", "cov"), ("released", "state-cov"))
"""Differences that are claimed or reported."""


def summarise(runs: Mapping[str, Mapping[int, Sequence[Any]]], seeds: Sequence[int]) -> dict[str, Estimate]:
    """Estimates `bandit/<setting>/V<vocabulary>/<predictor>/<measure>` and their differences paired by seed."""
    estimates: dict[str, Estimate] = {}
    for setting, worlds in runs.items():
        for vocab, several in worlds.items():
            where = f"bandit/{setting}/V{vocab}"
            values = {key: [run[key] for run in several] for key in several[0]}
            estimates |= {f"{where}/{key}": mean_over_seeds(v, seeds) for key, v in values.items()}
            for one, other in PAIRS:
                for key in ("pearson", "spearman", "abs-spearman"):
                    difference = paired_difference(values[f"{one}/{key}"], values[f"{other}/{key}"], seeds)
                    estimates[f"{where}/{one}-minus-{other}/{key}"] = difference
    return estimates
