"""The experiments of the entropy-mechanism study: bandits, Clip-Cov and KL-Cov with controls, the entropy law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from uncollapse.measure.entropy_law import LawComparison, compare_laws
from uncollapse.policy.batch import Batch, Columns
from uncollapse.policy.entropy_mechanism import (
    ClipCov,
    KLCov,
    entropy_change_first_order,
    kl_cov_mask,
    policy_gradient_dlogits,
)
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.reduction import Mean
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip, Unclipped
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.modsum import ModSum
from uncollapse.studies.testbeds.training import Curves, train_charlm, train_modsum

KL_FRACTION = 0.2
CLIP_FRACTION = 0.02
CONTROLS = {"kl-cov": "random-kl", "clip-cov": "random-clip"}
FIRST = 0.15
"""Share of a run that the law is fitted to before it predicts the rest: the paper's."""


@dataclass(frozen=True)
class RandomDrop(ClipCov):
    """Control: drops as many tokens as Clip-Cov would, but any that PPO's clip has not silenced."""

    def __call__(self, batch: Batch) -> Columns:
        """`weight`."""
        chosen = super().__call__(batch)["weight"] == 0
        count, pool = int((chosen & batch.mask).sum()), batch.mask & ~batch.columns["clipped"]
        if not count:
            return {"weight": torch.ones_like(batch.advantage)}
        keys = torch.where(pool, batch.clock.uniform(batch.uid, pool.shape[1], "random-drop"), torch.inf)
        dropped = (keys <= keys.flatten().kthvalue(count).values) & pool
        return {"weight": (~dropped).to(batch.advantage.dtype)}


@dataclass(frozen=True)
class RandomPenalty(KLCov):
    """Control: penalises as many tokens as KL-Cov would, but any."""

    def decide(self, batch: Batch) -> Columns:
        """The penalised tokens."""
        keys = batch.clock.uniform(batch.uid, batch.mask.shape[1], "random-penalty")
        flat = torch.zeros_like(batch.advantage)
        return {"penalised": kl_cov_mask(flat, batch.mask, self.fraction, uniform=keys)}


def arms() -> dict[str, Recipe]:
    """The recipes of E2: they differ from GRPO in the policy loss alone (16 samples, token mean, no group filter)."""
    base = replace(recipe("grpo"), sampler=PlainSampler(samples=16), mean=Mean())

    def clip(stage: ClipCov, name: str) -> Recipe:
        return replace(base, name=name, surrogate=PPOClip(low=1.0, high=1.0), weights=(stage,))

    def kl(stage: KLCov, name: str) -> Recipe:
        return replace(base, name=name, surrogate=Unclipped(), regularizers=(Weighted(stage, coef=1.0),))

    return {
        "grpo": base,
        "kl-cov": kl(KLCov(fraction=KL_FRACTION), "kl-cov"),
        "clip-cov": clip(ClipCov(fraction=CLIP_FRACTION), "clip-cov"),
        "random-kl": kl(RandomPenalty(fraction=KL_FRACTION), "random-kl"),
        "random-clip": clip(RandomDrop(fraction=CLIP_FRACTION), "random-clip"),
        "unclipped": replace(base, name="unclipped", surrogate=Unclipped()),
        "kl-cov-default": kl(KLCov(), "kl-cov-default"),
        "clip-cov-default": clip(ClipCov(), "clip-cov-default"),
    }


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    bandit_seeds: int = 4
    bandit_steps: int = 300
    seeds: int = 5
    modsum_steps: int = 150
    charlm_steps: int = 100
    charlm_every: int = 2
    warm_up_steps: int = 220


QUICK = Size(
    bandit_seeds=1,
    bandit_steps=20,
    seeds=2,
    modsum_steps=20,
    charlm_steps=18,
    charlm_every=1,
    warm_up_steps=60,
)


# ---- E1 ----------------------------------------------------------------------------------------------------------


def bandit_fit(seed: int, steps: int, *, natural: bool, lr: float) -> dict[str, float]:
    """Regress the measured entropy change per step on minus the covariance: 64 softmax bandits with 200 arms.

    Logits and action values ~ N(0, 1), values fixed; advantages are the values minus their mean under the current
    policy, without which the step would not be the policy gradient. One pooled regression over steps and states.
    """
    generator = torch.Generator().manual_seed(seed)
    z, value = torch.randn(2, 64, 200, generator=generator, dtype=torch.float64)
    predicted, measured = [], []
    for _ in range(steps):
        advantage = value - (z.softmax(-1) * value).sum(-1, keepdim=True)
        dz = policy_gradient_dlogits(z, advantage, lr, natural=natural)
        predicted.append(entropy_change_first_order(z, dz))
        measured.append(_entropy(z + dz) - _entropy(z))
        z = z + dz
    x, y = torch.cat(predicted).numpy(), torch.cat(measured).numpy()
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - slope * x - intercept
    return {"slope": float(slope), "r2": float(1 - residual.var() / y.var())}


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def _measure_bandits(size: Size, trials: Trials) -> dict[str, Estimate]:
    estimates = {}
    seeds = range(size.bandit_seeds)
    for name, natural, lr in (("npg", True, 0.02), ("pg", False, 0.1)):
        fits = [
            trials.trial(
                f"E1 {name} seed {seed}",
                partial(bandit_fit, seed, size.bandit_steps, natural=natural, lr=lr),
            )
            for seed in seeds
        ]
        estimates[f"bandit/{name}/slope"] = mean_over_seeds([f["slope"] for f in fits], seeds)
        estimates[f"bandit/{name}/r2"] = mean_over_seeds([f["r2"] for f in fits], seeds)
    return estimates


# ---- E2 ----------------------------------------------------------------------------------------------------------


def _measure_control(runs: Mapping[str, Sequence[Curves]], seeds: Sequence[int]) -> dict[str, Estimate]:
    last = {
        arm: {
            "entropy": [run["entropy"][-1] for run in several],
            "reward": [run["reward"][-1] for run in several],
            "distinct": [float(np.mean(run["distinct"])) for run in several],
        }
        for arm, several in runs.items()
    }
    estimates = {
        f"modsum/{arm}/{name}": mean_over_seeds(values, seeds)
        for arm, row in last.items()
        for name, values in row.items()
    }
    pairs = [(arm, "grpo") for arm in runs if arm != "grpo"]
    pairs += [(method, control) for method, control in CONTROLS.items()] + [
        ("kl-cov", "unclipped"),
        ("clip-cov", "unclipped"),
    ]
    for arm, control in pairs:
        for name in ("entropy", "reward", "distinct"):
            estimates[f"modsum/{arm}-minus-{control}/{name}"] = paired_difference(
                last[arm][name], last[control][name], seeds
            )
    grpo = runs["grpo"]
    falls = [-np.diff(run["entropy"]) for run in grpo]
    estimates |= {
        "modsum/grpo/covariance-correlation": mean_over_seeds(
            [float(np.corrcoef(f, run["covariance"])[0, 1]) for f, run in zip(falls, grpo, strict=True)],
            seeds,
        ),
        "modsum/grpo/top-fifth-share": mean_over_seeds([float(np.mean(run["share"])) for run in grpo], seeds),
        "modsum/grpo/fixed-state-part": mean_over_seeds(
            [float(-np.sum(run["fixed"]) / f.sum()) for f, run in zip(falls, grpo, strict=True)], seeds
        ),
    }
    return estimates


# ---- E3 ----------------------------------------------------------------------------------------------------------


def _measure_law(
    name: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]], seeds: Sequence[int]
) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
    """Both laws on the (entropy, reward) curve of every seed."""
    found = [compare_laws(list(h), list(r)) for h, r in curves]
    rows = [_law_row(seed, comparison) for seed, comparison in zip(seeds, found, strict=True)]
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    estimates = {f"law/{name}/{key}": mean_over_seeds([row[key] for row in rows], seeds) for key in keys}
    return estimates, rows


def _law_row(seed: int, comparison: LawComparison) -> dict[str, Any]:
    row: dict[str, Any] = {
        "seed": seed,
        "verdict": comparison.verdict.value,
        "delta-aic": comparison.delta_aic,
        "effective-delta-aic": comparison.effective_delta_aic,
        "effective-n": comparison.effective_n,
    }
    for label, law in (("exponential", comparison.exponential), ("line", comparison.straight_line)):
        ahead = law.extrapolate(FIRST)
        tail = max(1, law.n // 10)
        predicted = ahead.law.predict(law.entropy[-tail:])
        row |= {
            f"{label}/a": law.a,
            f"{label}/b": law.b,
            f"{label}/r2": law.r2,
            f"{label}/aic": law.aic,
            f"{label}/ceiling": law.ceiling,
            f"{label}/ceiling-se": law.ceiling_se,
            f"{label}/early-ceiling": ahead.law.ceiling,
            f"{label}/early-rmse": ahead.rmse,
            f"{label}/early-end-error": float(abs(np.mean(predicted) - np.mean(law.reward[-tail:]))),
        }
    return row


# ---- the study -----------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run E1, E2 and E3."""
    size = QUICK if quick else Size()
    seeds, recipes = tuple(range(size.seeds)), arms()
    trials.plan(2 * size.bandit_seeds + len(recipes) * size.seeds + size.seeds)
    estimates = _measure_bandits(size, trials)
    modsum = {
        arm: [
            trials.trial(f"E2 {arm} seed {seed}", partial(train_modsum, chosen, seed, size.modsum_steps))
            for seed in seeds
        ]
        for arm, chosen in recipes.items()
    }
    estimates |= _measure_control(modsum, seeds)
    grpo = replace(recipes["grpo"], sampler=PlainSampler(samples=8))
    settings = {"every": size.charlm_every, "warm_up_steps": size.warm_up_steps}
    charlm = [
        trials.trial(
            f"E3 charlm seed {seed}", partial(train_charlm, grpo, seed, size.charlm_steps, **settings)
        )
        for seed in seeds
    ]
    for name in ("accuracy", "length", "entropy"):
        for when, index in (("start", 0), ("end", -1)):
            values = [run[name][index] for run in charlm]
            estimates[f"charlm/{when}/{name}"] = mean_over_seeds(values, seeds)
    laws = {}
    for bed, curves in (
        ("modsum", [(run["entropy"], run["reward"]) for run in modsum["grpo"]]),
        ("charlm", [(run["entropy"], run["accuracy"]) for run in charlm]),
    ):
        more, laws[bed] = _measure_law(bed, curves, seeds)
        estimates |= more
    estimates["modsum/optimum/entropy"] = exact(ModSum().max_entropy_optimum)
    details = {
        "laws": laws,
        "modsum": {arm: [_thin(run) for run in several] for arm, several in modsum.items()},
        "charlm": charlm,
    }
    return Measurements(estimates, details, seeds)


def _thin(run: Curves) -> dict[str, list[float]]:
    """What the figure draws: every fifth step."""
    return {name: run[name][::5] for name in ("entropy", "reward")}
