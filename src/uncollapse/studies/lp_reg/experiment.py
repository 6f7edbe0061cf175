"""The experiments of the Lp-Reg study: mechanism, noise, outcome, on the character LM with a spark."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from uncollapse.policy.batch import Batch
from uncollapse.policy.lp_reg import (
    LpReg,
    low_probability_mask,
    lowest,
    lp_reg_loss,
    min_p_proxy,
    proxy_kl,
    stationary_ratio,
)
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.regularizers import EntropyBonus
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip
from uncollapse.policy.stats import Logp
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.sparks import TEACHING, SparkLab, look, warm_up

RHO = 0.025
"""Share of tokens under the quantile: its probability is then about 0.06 to 0.1, the paper's 0.08; at 0.01 only noise is."""
KAPPAS = (0.005, 0.01, 0.02, 0.05, 0.1)
RHOS = (0.01, RHO, 0.05)
PROMPTS, SAMPLES = 16, 8
LR = 3e-4
DRIFT = 3
"""Optimiser steps on the rollout before the two updates are compared, so that the ratios have left 1."""
STEP = 0.3
"""Learning rate of the compared update: one plain gradient step, so that a difference is that of the term's gradient."""
EVALUATION = 1_000_000
ON_POLICY = frozenset({"grpo-on", "lp-reg-on"})


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    mechanism_seeds: int = 20
    outcome_seeds: int = 8
    steps: int = 80
    every: int = 8
    teaching: int = TEACHING
    fixed_point_steps: int = 4000


QUICK = Size(mechanism_seeds=2, outcome_seeds=2, steps=2, every=1, teaching=640, fixed_point_steps=100)


def arms() -> dict[str, Recipe]:
    """The recipes of part C: they differ from GRPO in the policy loss alone (8 samples, token mean).

    `capped` is Lp-Reg without its regulariser, the nearest fair control: Lp-Reg also removes PPO's lower clip.
    """
    base = replace(recipe("grpo"), sampler=PlainSampler(samples=SAMPLES), mean=recipe("lp-reg").mean)

    def lp(name: str, **options: Any) -> Recipe:
        return replace(base, name=name, surrogate=LpReg(rho=RHO, **options))

    return {
        "grpo": base,
        "capped": lp("capped", beta=0.0),
        "lp-reg": lp("lp-reg"),
        "lp-reg-full": lp("lp-reg-full", kl="full"),
        "bonus": replace(base, name="bonus", regularizers=(Weighted(EntropyBonus(), coef=0.01),)),
        "grpo-on": replace(base, name="grpo-on", surrogate=PPOClip()),
        "lp-reg-on": lp("lp-reg-on"),
    }


# ---- A: mechanism ------------------------------------------------------------------------------------------------


def fixed_point(size: float, kept_mass: float, steps: int) -> dict[str, float]:
    """Ratio reached by gradient descent on one token of three (p_old = 0.02), and the predicted one."""
    old = torch.tensor([0.02, 0.49, 0.49], dtype=torch.float64).log()
    logits, one = old.clone(), torch.tensor([True])
    log_q, advantage = old[:1] - torch.tensor(kept_mass).log(), torch.tensor([-size], dtype=torch.float64)
    for _ in range(steps):
        leaf = logits.requires_grad_()
        loss, _ = lp_reg_loss(leaf.log_softmax(-1)[:1], old[:1], advantage, one, log_q, one)
        logits = (leaf - 0.05 * torch.autograd.grad(loss, leaf)[0]).detach()
    return {
        "reached": float((logits.log_softmax(-1)[0] - old[0]).exp()),
        "predicted": stationary_ratio(-size, 1.0, kept_mass),
    }


class FreeLogits(nn.Module):
    """A policy whose logits at the positions of one rollout are its parameters: no two positions share any."""

    def __init__(self, table: Float[Tensor, "row time vocab"]) -> None:
        super().__init__()
        self.table = nn.Parameter(table)


class FreeLab(SparkLab):
    """The lab of `FreeLogits`: it can only measure."""

    def logits(self, policy: Any, prompts: Any, ids: Tensor) -> Float[Tensor, "row time vocab"]:
        """The table."""
        table: Tensor = policy.table
        return table


@dataclass
class Scene:
    """One rollout of a warmed-up policy, the policy after `DRIFT` steps on it, and what Lp-Reg selects."""

    lab: SparkLab
    policy: nn.Module
    batch: Batch
    old: Float[Tensor, "row time vocab"]
    kept: Bool[Tensor, "row time vocab"]
    selected: Bool[Tensor, "row time"]
    recipe: Recipe

    def logp(self, policy: nn.Module) -> Float[Tensor, "row time vocab"]:
        """Log-probabilities of a policy at all positions of the rollout, in float64."""
        logits: Tensor = self.lab.logits(policy, self.batch.columns["prompt"], self.batch.ids)
        return logits.double().log_softmax(-1)

    def sampled(self, table: Shaped[Tensor, "row time vocab"]) -> Shaped[Tensor, "row time"]:
        """Entries of the sampled tokens."""
        token = self.batch.ids.clamp(max=table.shape[-1] - 1)
        return table.gather(-1, token[..., None])[..., 0]


def scene(seed: int, size: Size) -> Scene:
    """Sample, prepare, and move the policy off the rollout by steps of the capped surrogate without the term."""
    lab, policy = SparkLab(), warm_up(seed, rows=size.teaching)
    off, on = arms()["capped"], arms()["lp-reg"]
    engine = LogitsEngine(lab, policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    trainer = Trainer(on, engine, optimizer, seed=seed)
    batch = trainer.rollout(lab.fresh_prompts(4 * PROMPTS, seed=seed))
    with torch.no_grad():
        old = lab.logits(policy, batch.columns["prompt"], batch.ids).double()
    for _ in range(DRIFT):
        optimizer.zero_grad()
        replace(trainer, recipe=off).backward(batch)
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    selected = batch.columns["own/surrogate/selected"]
    return Scene(lab, policy, batch, old, min_p_proxy(old)[1], selected, on)


def stepped(here: Scene, made: Recipe) -> nn.Module:
    """The policy after one plain gradient step on the loss of a recipe, with the rollout as one optimiser step."""
    policy = copy.deepcopy(here.policy)
    plan = made.plan(here.batch)
    measured = LogitsEngine(here.lab, policy).measure(plan, made.stats("loss"), grad=True)
    value = made.loss(measured).loss
    parameters = list(policy.parameters())
    slopes = torch.autograd.grad(value, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, slope in zip(parameters, slopes, strict=True):
            if slope is not None:
                parameter.sub_(slope, alpha=STEP)
    return policy


def mechanism(seed: int, size: Size) -> dict[str, Any]:
    """A(ii), A(iii) and B on one rollout."""
    here = scene(seed, size)
    mask, old = here.batch.mask, here.batch.stats[Logp("old")]
    without, treated = (stepped(here, made) for made in (arms()["capped"], here.recipe))
    with torch.no_grad():
        start, base, lp = (here.logp(policy) for policy in (here.policy, without, treated))
        chosen = here.selected & (here.sampled(start) < old)  # r < 1: the sampled token was pushed down
        lifted = (here.sampled(lp) - here.sampled(base))[chosen]
        noise_here = [_noise(table, here)[chosen].mean() for table in (base, lp)]
        found: dict[str, Any] = {
            "tokens": int(mask.sum()),
            "chosen": int(chosen.sum()),
            "lifted": float((lifted > 0).double().mean()),
            "lift": float(lifted.mean()),
            "noise-at-chosen": float(noise_here[1] - noise_here[0]),
            "ratio": float((here.sampled(start) - old).exp()[chosen].mean()),
        }
    free = replace(here, lab=FreeLab(), policy=FreeLogits(start))
    base_free, lp_free = (free.logp(stepped(free, made)).detach() for made in (arms()["capped"], here.recipe))
    found["lifted-free"] = float((here.sampled(lp_free) > here.sampled(base_free))[chosen].double().mean())
    found["noise-free"] = float((_noise(lp_free, here) - _noise(base_free, here))[chosen].mean())
    with torch.no_grad():
        found |= _bonus_matched(here, base, lp) | _filter(here)
    return found


def _noise(logp: Float[Tensor, "row time vocab"], here: Scene) -> Float[Tensor, "row time"]:
    """Mass of the tokens that the filter took for noise at the start."""
    return torch.where(here.kept, 0.0, logp.exp()).sum(-1)


def _entropy(logp: Float[Tensor, "row time vocab"]) -> Float[Tensor, "row time"]:
    return -(logp.exp() * logp).sum(-1)


def _bonus_matched(here: Scene, base: Tensor, lp: Tensor) -> dict[str, float]:
    """Noise mass under Lp-Reg and under an entropy bonus that gains as much entropy over the update without either."""
    mask = here.batch.mask
    gain = float((_entropy(lp) - _entropy(base))[mask].mean())
    capped = arms()["capped"]

    def with_bonus(coef: float) -> Tensor:
        made = replace(capped, name="b", regularizers=(Weighted(EntropyBonus(), coef=coef),))
        with torch.enable_grad():
            policy = stepped(here, made)
        return here.logp(policy)

    def gained(table: Tensor) -> float:
        return float((_entropy(table) - _entropy(base))[mask].mean())

    # The gain of one small step is all but linear in the coefficient: a few secant steps find the matching one.
    coef, table = 0.01, with_bonus(0.01)
    for _ in range(6):
        if abs(gained(table) - gain) <= 1e-3 * abs(gain):
            break
        coef *= gain / gained(table)
        table = with_bonus(coef)
    noise = [float(_noise(t, here)[mask].mean()) for t in (base, lp, table)]
    return {
        "entropy-gain": gain,
        "bonus-gain": gained(table),
        "bonus-coef": coef,
        "noise": noise[0],
        "lp-reg-noise": noise[1] - noise[0],
        "bonus-noise": noise[2] - noise[0],
    }


def _filter(here: Scene) -> dict[str, Any]:
    """Of the old policy: kept mass, filtered and selected shares over kappa and rho, and the divergence against -log Z."""
    mask, advantage = here.batch.mask, here.batch.advantage
    logp = here.sampled(here.old.log_softmax(-1))
    found: dict[str, Any] = {}
    for kappa in KAPPAS:
        log_q, keep, log_mass = min_p_proxy(here.old, kappa=kappa)
        mine, noise = here.sampled(log_q), ~here.sampled(keep)
        found[f"kept-mass/{kappa:g}"] = float(log_mass.exp()[mask].mean())
        found[f"filtered/{kappa:g}"] = float(noise[mask].double().mean())
        error = float((proxy_kl(here.old, log_q) + log_mass)[mask].abs().max())
        found["identity-error"] = max(found.get("identity-error", 0.0), error)
        for rho in RHOS:
            chosen = low_probability_mask(logp, advantage, mask, mine, rho)
            found[f"selected/{kappa:g}/{rho:g}"] = float(chosen.sum() / mask.sum())
    for rho in RHOS:
        low = lowest(logp, mask, rho)
        found[f"quantile/{rho:g}"] = float(logp[low].max().exp())
        found[f"low-kept/{rho:g}"] = float(here.sampled(here.kept)[low].double().mean())
    return found


# ---- C: outcome --------------------------------------------------------------------------------------------------


def outcome(arm: str, seed: int, size: Size) -> dict[str, list[float]]:
    """Training curves of an arm: what `look` sees on the same evaluation prompts, every `size.every` rollouts.

    `seed` decides the warm-up, the prompts and all sampling, so arms with one seed start from one policy. Four optimiser
    steps per rollout, one for the arms `ON_POLICY`.
    """
    lab, policy = SparkLab(), warm_up(seed, rows=size.teaching)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    trainer = Trainer(
        arms()[arm],
        LogitsEngine(lab, policy),
        optimizer,
        seed=seed,
        total=size.steps,
        minibatches=1 if arm in ON_POLICY else 4,
    )
    curves: dict[str, list[float]] = {"step": []}
    selected: list[float] = []
    for step in range(size.steps + 1):
        if step % size.every == 0:
            for name, value in vars(look(policy, seed + EVALUATION)).items():
                curves.setdefault(name, []).append(value)
            curves["step"].append(float(step))
        if step < size.steps:
            batch, _ = trainer.step(lab.fresh_prompts(PROMPTS, seed=seed * 10_007 + step))
            chosen = batch.columns.get("own/surrogate/selected")
            selected.append(0.0 if chosen is None else float(chosen.sum() / batch.mask.sum()))
    return curves | {"selected": [sum(selected) / len(selected)]}


# ---- the study -----------------------------------------------------------------------------------------------------


def sign_test(values: Sequence[float]) -> float:
    """One-sided p-value of the sign test that values are positive; zeros and NaN count against it."""
    n, up = len(values), sum(value > 0 for value in values)
    return float(sum(comb(n, k) for k in range(up, n + 1)) / 2**n)


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run A, B and C."""
    size = QUICK if quick else Size()
    seeds, few = tuple(range(size.mechanism_seeds)), tuple(range(size.outcome_seeds))
    recipes = arms()
    trials.plan(len(FIXED_POINTS) + len(seeds) + len(recipes) * len(few))
    estimates: dict[str, Estimate] = {}
    misses = []
    for strength, mass in FIXED_POINTS:
        run = partial(fixed_point, strength, mass, size.fixed_point_steps)
        found = trials.trial(f"A fixed point {strength:g} {mass:g}", run)
        misses.append(abs(found["reached"] - found["predicted"]))
        estimates[f"fixed-point/{strength:g}/{mass:g}"] = exact(found["reached"])
    estimates["fixed-point/error"] = exact(max(misses))
    scenes = []
    curves: dict[str, list[dict[str, list[float]]]] = {arm: [] for arm in recipes}
    for seed in seeds:  # all that starts from one warm-up in a row, since few are kept
        scenes.append(trials.trial(f"A and B seed {seed}", partial(mechanism, seed, size)))
        for arm in recipes if seed in few else ():
            run_arm = partial(outcome, arm, seed, size)
            curves[arm].append(trials.trial(f"C {arm} seed {seed}", run_arm))
    estimates |= _estimate_mechanism(scenes, seeds) | _estimate_outcome(curves, few)
    return Measurements(estimates, {"outcome": curves, "scenes": scenes}, seeds)


FIXED_POINTS = ((1.0, 1.0), (2.0, 1.0), (1.0, 0.9))
"""Size of the advantage and kept mass."""


def _estimate_mechanism(scenes: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Estimate]:
    columns = {name: [float(row[name]) for row in scenes] for name in scenes[0]}
    found = {f"mechanism/{name}": mean_over_seeds(values, seeds) for name, values in columns.items()}
    found["mechanism/identity-error"] = exact(max(columns["identity-error"]))
    bonus, lp = columns["bonus-noise"], columns["lp-reg-noise"]
    found["noise/bonus-up/p"] = exact(sign_test(bonus))
    found["noise/lp-reg-up/p"] = exact(sign_test(lp))
    found["noise/lp-reg-down/p"] = exact(sign_test([-value for value in lp]))
    found["noise/bonus-minus-lp-reg"] = paired_difference(bonus, lp, seeds)
    found["noise/bonus-above-lp-reg/p"] = exact(sign_test([b - x for b, x in zip(bonus, lp, strict=True)]))
    return found


def _estimate_outcome(
    curves: Mapping[str, Sequence[Mapping[str, list[float]]]], seeds: Sequence[int]
) -> dict[str, Estimate]:
    names = ("success", "spark", "checked", "entropy")
    last = {arm: {n: [run[n][-1] for run in runs] for n in names} for arm, runs in curves.items()}
    for arm, runs in curves.items():
        last[arm]["mean-success"] = [sum(run["success"]) / len(run["success"]) for run in runs]
    found = {f"start/{n}": mean_over_seeds([run[n][0] for run in curves["grpo"]], seeds) for n in names}
    for arm, row in last.items():
        found |= {f"{arm}/{n}": mean_over_seeds(values, seeds) for n, values in row.items()}
        found[f"{arm}/selected"] = mean_over_seeds([run["selected"][0] for run in curves[arm]], seeds)
    for arm, control in PAIRS:
        for n in (*names, "mean-success"):
            found[f"{arm}-minus-{control}/{n}"] = paired_difference(last[arm][n], last[control][n], seeds)
    return found


PAIRS = (
    ("lp-reg", "capped"),
    ("lp-reg-full", "capped"),
    ("lp-reg", "grpo"),
    ("capped", "grpo"),
    ("bonus", "grpo"),
    ("lp-reg-on", "grpo-on"),
)
"""Which arm is compared with which control, paired by seed."""
