"""The experiments of the policy-cliff study: token trees, random MDPs, and two equally right formats trained by GRPO."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from uncollapse.policy.policy_cliff import (
    TokenTree,
    policy_entropy,
    policy_lipschitz,
    policy_value,
    soft_solve,
    solve_mdp,
    stability_radius,
    tanh_bound,
)
from uncollapse.policy.policy_cliff.profile import ALPHAS
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.advantages import GroupAdvantage
from uncollapse.policy.stages.regularizers import EntropyBonus
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.two_formats import (
    FormatPolicy,
    TwoFormats,
    TwoFormatsLab,
    exact_accuracy,
    exact_share,
)

GAMMA = 0.9
TREE_ALPHA = 0.2
EPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CORRECT = 10
"""Right answers of the tree's 81."""
COEFFICIENT = 0.1
"""Of the entropy bonus in part D, reward per nat."""
BONUS = 0.01
LARGER = (0.03, 0.1)
"""Further bonuses, trained with the entropy term alone, for the slope."""
SMALLEST = 1e-6
"""Lipschitz constants below have no finite difference in float64."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    seeds: int = 3
    mdps: int = 200
    signs: int = 200
    smooth_mdps: int = 20
    directions: int = 10
    runs: int = 10
    steps: int = 400


QUICK = Size(seeds=2, mdps=5, signs=20, smooth_mdps=2, directions=2, runs=3, steps=8)


def garnet(
    rng: np.random.Generator, states: int = 8, actions: int = 4, branching: int = 3
) -> tuple[Float[np.ndarray, "state action"], Float[np.ndarray, "state action state"]]:
    """A random MDP: rewards uniform in [0, 1], `branching` random successors for each state and action."""
    P = np.zeros((states, actions, states))
    for s, a in itertools.product(range(states), range(actions)):
        P[s, a, rng.choice(states, branching, replace=False)] = rng.dirichlet(np.ones(branching))
    return rng.uniform(size=(states, actions)), P


# ---- A: cliff and slope on a tree ----------------------------------------------------------------------------------


def tree_profile(seed: int) -> dict[str, list[float]]:
    """TV between laws of answers before and after a bonus eps on one of the right ones, hard and soft, per eps."""
    rng, tree = np.random.default_rng(seed), TokenTree(3, 4)
    right = rng.choice(tree.leaves, CORRECT, replace=False)
    reward = np.zeros(tree.leaves)
    reward[right] = 1.0
    bonus = np.array(EPS)[:, None] * (np.arange(tree.leaves) == right[0])
    laws = {
        "answers": (tree.cold(reward).law, tree.cold(reward + bonus).law),
        "tokens": (tree.hard(reward).law, tree.hard(reward + bonus).law),
        "soft": (tree.gibbs(reward, TREE_ALPHA).law, tree.gibbs(reward + bonus, TREE_ALPHA).law),
    }
    return {name: (0.5 * np.abs(after - before).sum(1)).tolist() for name, (before, after) in laws.items()}


def _measure_tree(size: Size, trials: Trials) -> tuple[dict[str, Estimate], dict[str, Any]]:
    seeds = range(size.seeds)
    runs = [trials.trial(f"A seed {seed}", partial(tree_profile, seed)) for seed in seeds]
    hard, soft = (np.array([run[name] for run in runs]) for name in ("answers", "soft"))
    low, high = EPS.index(1e-6), EPS.index(1e-3)
    slope = np.log(soft[:, high] / soft[:, low]) / np.log(EPS[high] / EPS[low])
    bound = np.array([tanh_bound(eps, TREE_ALPHA) for eps in EPS])
    estimates = {
        "tree/hard/error": exact(float(np.abs(hard - (CORRECT - 1) / CORRECT).max())),
        "tree/hard/tv": mean_over_seeds(hard[:, 0].tolist(), seeds),
        "tree/soft/slope": mean_over_seeds(slope.tolist(), seeds),
        "tree/soft/bound-ratio": exact(float((soft / bound).max())),
    }
    for eps, column in zip(EPS, soft.T, strict=True):
        estimates[f"tree/soft/tv-{eps:g}"] = mean_over_seeds(column.tolist(), seeds)
    return estimates, runs[0]


# ---- B: the radius -------------------------------------------------------------------------------------------------


def radius_trial(seed: int, mdps: int, signs: int) -> dict[str, Any]:
    """Shares of random MDPs whose policy changes just inside and just outside the radius, and its gain over the bound."""
    rng = np.random.default_rng(seed)
    inside, outside, random, gains = [], [], [], []
    for _ in range(mdps):
        R, P = garnet(rng)
        solved = solve_mdp(R, P, GAMMA)
        rho, _, witness = stability_radius(R, P, GAMMA)

        def changed(factor: float, R: Any = R, P: Any = P, witness: Any = witness, was: Any = solved) -> bool:
            # ties at 1e-6 of the radius are far above rounding, hence the small tolerance
            moved = solve_mdp(R + factor * (witness - R), P, GAMMA, tolerance=1e-13)
            return bool((moved.policy != was.policy).any())

        inside.append(changed(1 - 1e-6))
        outside.append(changed(1 + 1e-6))
        random.append(_random_change(R, P, solved.policy, 0.999 * rho, rng, signs))
        gains.append(rho / ((1 - GAMMA) / 2 * solved.gaps.min()))
    return {
        "inside": float(np.mean(inside)),
        "outside": float(np.mean(outside)),
        "random": float(np.mean(random)),
        "gain": float(np.mean(gains)),
        "gains": gains,
    }


def _random_change(
    R: np.ndarray, P: np.ndarray, policy: np.ndarray, size: float, rng: np.random.Generator, count: int
) -> bool:
    """Whether any of `count` random sign changes of this size makes another action better than the policy's."""
    states = np.arange(len(R))
    moved = R + size * rng.choice([-1.0, 1.0], (count, *R.shape))
    inverse = np.linalg.inv(np.eye(len(R)) - GAMMA * P[states, policy])
    V = moved[:, states, policy] @ inverse.T
    Q = moved + GAMMA * np.einsum("sat,nt->nsa", P, V)
    return bool((Q.argmax(2) != policy).any())


def _measure_radius(size: Size, trials: Trials) -> tuple[dict[str, Estimate], list[float]]:
    seeds = range(size.seeds)
    runs = [
        trials.trial(f"B seed {seed}", partial(radius_trial, seed, size.mdps, size.signs)) for seed in seeds
    ]
    names = ("inside", "outside", "random", "gain")
    estimates = {f"radius/{name}": mean_over_seeds([run[name] for run in runs], seeds) for name in names}
    return estimates, runs[0]["gains"]


# ---- C: the Lipschitz constant against temperature -----------------------------------------------------------------


def lipschitz_trial(seed: int, mdps: int, directions: int) -> dict[str, Any]:
    """Exact constants against finite differences, and what each temperature costs, over random MDPs."""
    rng = np.random.default_rng(10_000 + seed)
    problems = [garnet(rng) for _ in range(mdps)]
    rows: dict[str, dict[str, float]] = {}
    constants = []
    for alpha in ALPHAS:
        found = [_smoothness(R, P, alpha, rng, directions) for R, P in problems]
        constants.append([one["constant"] for one in found])
        rows[f"{alpha:g}"] = {key: float(np.mean([one[key] for one in found])) for key in found[0]} | {
            "error": float(np.nanmax([one["error"] for one in found], initial=0.0)),
            "checked": float(np.mean([not np.isnan(one["error"]) for one in found])),
            "excess": float(np.max([one["excess"] for one in found])),
            "bound-ratio": float(np.max([one["bound-ratio"] for one in found])),
        }
    cold, mid = constants[ALPHAS.index(0.01)], constants[ALPHAS.index(0.1)]
    return {"rows": rows, "flat-when-cold": float(np.mean(np.less(cold, mid)))}


def _smoothness(
    R: np.ndarray, P: np.ndarray, alpha: float, rng: np.random.Generator, directions: int
) -> dict[str, float]:
    """Largest constant over states; its error along the worst direction; how far random ones exceed it; the price."""
    found, soft = policy_lipschitz(R, P, GAMMA, alpha), soft_solve(R, P, GAMMA, alpha)
    state = int(found.per_state.argmax())
    constant = float(found.per_state[state])
    worst = _worst_direction(P, soft.policy, state).reshape(R.shape)
    rates = [_rate(R, P, alpha, worst, state)]
    rates += [_rate(R, P, alpha, rng.choice([-1.0, 1.0], R.shape), state) for _ in range(directions)]
    measurable = constant >= SMALLEST
    return {
        "constant": constant,
        "error": abs(rates[0] / constant - 1) if measurable else float("nan"),
        "excess": max(rates) / constant - 1 if measurable else -1.0,
        "bound-ratio": constant / found.bound,
        "loss": float((solve_mdp(R, P, GAMMA).V - policy_value(R, P, GAMMA, soft.policy)).mean()),
        "entropy": float(policy_entropy(soft.policy).mean()),
    }


def _rate(R: np.ndarray, P: np.ndarray, alpha: float, direction: np.ndarray, state: int) -> float:
    """TV of the state's policy per unit of reward change, by a central difference."""
    step = 1e-4 * alpha
    ahead, behind = (soft_solve(R + s * step * direction, P, GAMMA, alpha).policy[state] for s in (1, -1))
    return float(0.5 * np.abs(ahead - behind).sum() / (2 * step))


def _worst_direction(P: np.ndarray, pi: np.ndarray, state: int) -> np.ndarray:
    """Signs of the reward change that moves the state's policy most, from the Jacobian on state-action pairs."""
    states, actions = pi.shape
    pairs = np.einsum("sat,tb->satb", P, pi).reshape(states * actions, -1)
    M = np.linalg.inv(np.eye(len(pairs)) - GAMMA * pairs).reshape(states, actions, -1)[state]
    jacobian = pi[state][:, None] * (M - pi[state] @ M)
    chosen = ((np.arange(1, 2 ** (actions - 1))[:, None] >> np.arange(actions)) & 1) @ jacobian
    return np.sign(chosen[np.abs(chosen).sum(1).argmax()])


def _measure_lipschitz(size: Size, trials: Trials) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
    seeds = range(size.seeds)
    runs = [
        trials.trial(f"C seed {seed}", partial(lipschitz_trial, seed, size.smooth_mdps, size.directions))
        for seed in seeds
    ]

    def worst(name: str) -> Estimate:
        return exact(max(row[name] for run in runs for row in run["rows"].values()))

    estimates = {f"lipschitz/{name}": worst(name) for name in ("error", "excess", "bound-ratio")}
    estimates["lipschitz/flat-when-cold"] = mean_over_seeds([run["flat-when-cold"] for run in runs], seeds)
    for alpha, name in itertools.product(runs[0]["rows"], ("constant", "loss", "entropy", "checked")):
        values = [run["rows"][alpha][name] for run in runs]
        estimates[f"lipschitz/{name}-{alpha}"] = mean_over_seeds(values, seeds)
    return estimates, runs


# ---- D: trained, not solved ----------------------------------------------------------------------------------------


def arms() -> dict[str, tuple[Recipe, float]]:
    """Recipe and bonus of each arm: advantages divided by the group's deviation (`grpo`) or not (`centred`)."""
    base = {
        "grpo": recipe("grpo"),
        "grpo-entropy": replace(
            recipe("entropy-bonus"), regularizers=(Weighted(EntropyBonus(), coef=COEFFICIENT),)
        ),
    }
    centred = {
        f"centred{name.removeprefix('grpo')}": replace(made, advantage=(GroupAdvantage(std=False),))
        for name, made in base.items()
    }
    found: dict[str, tuple[Recipe, float]] = {}
    for name, made in (base | centred).items():
        bonuses = (0.0, BONUS, *LARGER) if name.endswith("entropy") else (0.0, BONUS)
        found |= {f"{name}/{bonus:g}": (made, bonus) for bonus in bonuses}
    return found


def train_two_formats(made: Recipe, bonus: float, seed: int, steps: int) -> dict[str, Any]:
    """Train on two formats: all prompts every step, Adam, learning rate 0.05; the exact share of format 0 as it goes."""
    task = TwoFormats(bonus=bonus)
    policy = FormatPolicy(task, seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    trainer = Trainer(made, LogitsEngine(TwoFormatsLab(task), policy), optimizer, seed=seed, total=steps)
    course = []
    for step in range(steps + 1):
        if step % max(1, steps // 20) == 0:
            with torch.no_grad():
                course.append(exact_share(task, policy))
        if step < steps:
            trainer.step(list(range(task.prompts)))
    with torch.no_grad():
        return {
            "share": exact_share(task, policy),
            "accuracy": exact_accuracy(task, policy),
            "course": course,
        }


def spread_ratio(
    wide: Sequence[float], narrow: Sequence[float], seeds: Sequence[int]
) -> tuple[Estimate, Estimate]:
    """Ratio of standard deviations over seeds with its percentile bootstrap interval, and an exact permutation p-value.

    Under the null hypothesis the two deviations of a seed from the means of their arms can be swapped; the p-value is
    the share of the 2^n swaps whose ratio is at least the one found. Arms are paired by seed.
    """
    a, b = np.asarray(wide), np.asarray(narrow)
    ratio = float(_spread(a) / _spread(b))
    draws = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    ratios = _spread(a[draws]) / np.maximum(_spread(b[draws]), np.finfo(float).tiny)
    low, high = np.quantile(ratios, [0.025, 0.975])
    estimate = Estimate(ratio, float(low), float(high), "bootstrap", seeds=tuple(seeds))
    x, y = (a - a.mean()) ** 2, (b - b.mean()) ** 2
    swap = (np.arange(2 ** len(a))[:, None] >> np.arange(len(a))) & 1
    numerator, denominator = np.where(swap, y, x).sum(1), np.where(swap, x, y).sum(1)
    least = numerator[0] / denominator[0] * (1 - 1e-12)
    return estimate, exact(float(np.mean(numerator >= least * denominator)))


def _spread(values: np.ndarray) -> Any:
    return values.std(axis=-1, ddof=1)


def _measure_formats(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]
) -> dict[str, Estimate]:
    share = {arm: [run["share"] for run in several] for arm, several in runs.items()}
    estimates = {f"formats/{arm}/share": mean_over_seeds(values, seeds) for arm, values in share.items()}
    for arm, several in runs.items():
        estimates[f"formats/{arm}/accuracy"] = mean_over_seeds([run["accuracy"] for run in several], seeds)
        estimates[f"formats/{arm}/spread"] = exact(float(_spread(np.array(share[arm]))))
        winners = np.mean(np.array(share[arm]) > 0.5)
        estimates[f"formats/{arm}/format-0-wins"] = exact(float(winners))
    for name in ("grpo", "centred"):
        ratio, p = spread_ratio(share[f"{name}/0"], share[f"{name}-entropy/0"], seeds)
        estimates |= {f"formats/{name}/spread-ratio": ratio, f"formats/{name}/spread-p": p}
        for arm in (name, f"{name}-entropy"):
            response = paired_difference(share[f"{arm}/{BONUS:g}"], share[f"{arm}/0"], seeds)
            estimates[f"formats/{arm}/response"] = response
    return estimates


# ---- the study -----------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run A to D."""
    size = QUICK if quick else Size()
    chosen, seeds = arms(), tuple(range(size.runs))
    trials.plan(3 * size.seeds + len(chosen) * size.runs)
    estimates, tree = _measure_tree(size, trials)
    more, gains = _measure_radius(size, trials)
    estimates |= more
    more, smooth = _measure_lipschitz(size, trials)
    estimates |= more
    runs = {
        arm: [
            trials.trial(f"D {arm} seed {seed}", partial(train_two_formats, made, bonus, seed, size.steps))
            for seed in seeds
        ]
        for arm, (made, bonus) in chosen.items()
    }
    estimates |= _measure_formats(runs, seeds)
    details = {
        "tree": tree,
        "gains": gains,
        "lipschitz": smooth[0]["rows"],
        "formats": {arm: [run["share"] for run in several] for arm, several in runs.items()},
        "courses": {arm: [run["course"] for run in several] for arm, several in runs.items()},
    }
    return Measurements(estimates, details, seeds)
