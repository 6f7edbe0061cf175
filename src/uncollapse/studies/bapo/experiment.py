"""The experiments of the BAPO study: stale training on answers of unequal and of equal length, and the entropy-clip rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uncollapse.policy.bapo import PRESETS, BalancedClip, clipped_surrogate
from uncollapse.policy.batch import Batch
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import PPOClip
from uncollapse.policy.stats import Entropy, Logp
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.engine import Lab, LogitsEngine, Trainer
from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, TablePolicy, exact_entropy, exact_reward
from uncollapse.studies.testbeds.walk import Walk, WalkLab, look

UPDATES = 8
"""Optimiser steps on the same rollout batch: the staleness."""

LR = 0.05
SAMPLES = 8
READ = 15
"""Rollout batches after which success is compared. Fixed on seeds 100 to 102, which the study does not use, and by `clip`
alone: there its success is 0.73 to 0.90, so that neither side is at its ceiling."""

LEVELS = tuple(0.5 + 0.05 * k for k in range(9))
"""Success levels, 0.5 to 0.9, at which entropies are compared."""

Curves = dict[str, list[float]]


def arms() -> dict[str, Recipe]:
    """The recipes compared; they differ in the clip alone.

    `start`, `end` and `wide` are fixed bounds out of BAPO's ranges; the last three arms are the other published settings.
    """
    bapo = replace(recipe("bapo"), sampler=PlainSampler(samples=SAMPLES))

    def fixed(name: str, low: float, high: float) -> Recipe:
        return replace(bapo, name=name, surrogate=PPOClip(low=low, high=high))

    return {
        "on-policy": fixed("on-policy", 0.2, 0.2),
        "clip": fixed("clip", 0.2, 0.2),
        "clip-higher": fixed("clip-higher", 0.2, 0.28),
        "start": fixed("start", 0.4, 0.2),
        "wide": fixed("wide", 0.4, 2.0),
        "end": fixed("end", 0.1, 2.0),
        "bapo": bapo,
        "bapo-gradient": replace(bapo, name="bapo-gradient", surrogate=recipe("bapo-gradient").surrogate),
        "bapo-readme": replace(bapo, name="bapo-readme", surrogate=PRESETS["readme"]),
        "bapo-released": replace(bapo, name="bapo-released", surrogate=PRESETS["yaml"]),
        "bapo-script": replace(bapo, name="bapo-script", surrogate=PRESETS["script"]),
    }


# ---- training on stale data ----------------------------------------------------------------------------------------


class StaleTrainer(Trainer):
    """Every optimiser step takes the whole rollout batch again, so the data grow stale and groups stay whole."""

    def queue(self, batch: Batch) -> Iterator[Batch]:
        """The same rows, `minibatches` times."""
        for update in range(self.minibatches):
            yield replace(batch, clock=replace(batch.clock, update=update))


@dataclass(frozen=True)
class World:
    """A lab, the policy to start from, its prompts and an exact look at a policy."""

    lab: Lab
    policy: TablePolicy
    prompts: list[int]
    look: Callable[[Tensor], dict[str, float]]


def unequal(seed: int, task: Walk | None = None) -> World:
    """Failures are about twice as long as right answers."""
    task = task or Walk()
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(seed)))
    return World(WalkLab(task), policy, list(range(task.prompts)), lambda table: asdict(look(task, table)))


def equal(seed: int, task: ModSum | None = None) -> World:
    """All answers have the same length."""
    task = task or ModSum()
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(seed)))

    def seen(table: Tensor) -> dict[str, float]:
        return {
            "reward": float(exact_reward(task, table).mean()),
            "entropy": float(exact_entropy(task, table).mean()),
        }

    return World(ModSumLab(task), policy, list(range(task.prompts)), seen)


def train(made: Recipe, world: World, seed: int, rollouts: int, *, updates: int = UPDATES) -> dict[str, Any]:
    """Train on `rollouts` rollout batches with `updates` optimiser steps each: Adam, gradient norm at most 1.

    `seed` decides all sampling, so recipes with the same seed start from the same policy and see the same random numbers.
    Returns what the world's `look` says before the first and after every rollout batch (`looks`), the metrics and the
    norm of the gradient per optimiser step (`updates`), and the hash of the final policy (`final`).
    """
    engine = LogitsEngine(world.lab, world.policy)
    optimizer = torch.optim.Adam(world.policy.parameters(), lr=LR)
    trainer = StaleTrainer(made, engine, optimizer, seed=seed, total=rollouts, minibatches=updates)
    looks: Curves = {name: [value] for name, value in world.look(_table(world)).items()}
    steps: Curves = {}
    for _ in range(rollouts):
        batch = trainer.rollout(world.prompts)
        for mini in trainer.queue(batch):
            optimizer.zero_grad()
            report = trainer.backward(mini)
            norm = nn.utils.clip_grad_norm_(world.policy.parameters(), 1.0)
            seen = {name: float(total / weight) for name, (total, weight) in report.metrics.items()}
            for name, value in (seen | {"norm": float(norm)} | _silenced(engine, mini)).items():
                steps.setdefault(name, []).append(value)
            optimizer.step()
        trainer.steps_done += 1
        for name, value in world.look(_table(world)).items():
            looks[name].append(value)
    return {
        "looks": looks,
        "updates": steps,
        "final": hashlib.sha256(_table(world).numpy().tobytes()).hexdigest(),
    }


def _table(world: World) -> Tensor:
    return world.policy.table.detach().double()


@torch.no_grad()
def _silenced(engine: LogitsEngine, mini: Batch) -> dict[str, float]:
    """Of the positive tokens that [0.8, 1.2] silences, and of all positive ones: how many are improbable, log pi < -H."""
    now = engine.measure(mini, frozenset({Logp("now"), Entropy("now")}))
    logp, positive = now.stats[Logp("now")], mini.mask & (mini.advantage > 0)
    blocked = positive & (logp - mini.old_logp > np.log(1.2))
    improbable = logp < -now.stats[Entropy("now")]
    return {
        "blocked": float(blocked.sum()),
        "blocked-improbable": float((blocked & improbable).sum()),
        "positive": float(positive.sum()),
        "positive-improbable": float((positive & improbable).sum()),
    }


# ---- what is read off ------------------------------------------------------------------------------------------------


def entropy_at(run: Mapping[str, Any], level: float) -> float:
    """Entropy (nats per token) when success first reached `level`, interpolated; NaN if it never did."""
    reward, entropy = np.asarray(run["looks"]["reward"]), np.asarray(run["looks"]["entropy"])
    reached = np.flatnonzero(reward >= level)
    if not reached.size:
        return float("nan")
    k = int(reached[0])
    if k == 0:
        return float(entropy[0])
    part = (level - reward[k - 1]) / (reward[k] - reward[k - 1])
    return float(entropy[k - 1] + part * (entropy[k] - entropy[k - 1]))


def entropy_gap(run: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Entropy of `run` minus that of `other` at equal success: mean over the levels that both reach, NaN if there are none."""
    gaps = np.asarray([entropy_at(run, level) - entropy_at(other, level) for level in LEVELS])
    common = gaps[~np.isnan(gaps)]
    return float(common.mean()) if common.size else float("nan")


def search(
    run: Mapping[str, Any], *, target: float = PRESETS["paper"].target, updates: int = UPDATES
) -> dict[str, float]:
    """What the search of one run did. But for `first-*`, updates at ratio 1 do not count: there no bound matters.

    `rises`, `falls` and `rescued`: parts of the updates in which a bound moved that end with a larger share, with a
    smaller one, with the target reached.
    """
    seen = {name: np.asarray(values) for name, values in run["updates"].items()}
    later = np.arange(len(seen["norm"])) % updates > 0
    before, after = seen["bapo/share_before/mean"], seen["bapo/share_after/mean"]
    moved = later & (seen["bapo/steps/mean"] > 0)
    satisfied = seen["bapo/satisfied/frac"] == 1
    starts = {"low": PRESETS["paper"].low[0], "high": PRESETS["paper"].high[0]}
    above = {side: (seen[f"bapo/{side}/mean"] > start + 1e-9)[later] for side, start in starts.items()}
    change = (after - before)[moved]
    part = {
        name: float(np.mean(of)) if change.size else float("nan")
        for name, of in (
            ("rises", change > 0),
            ("falls", change < 0),
            ("rescued", satisfied[moved]),
        )
    }
    return part | {
        "shortfall": float((after - target)[satisfied].min(initial=1.0)),
        "high-moves": float(above["high"].mean()),
        "low-moves": float(above["low"].mean()),
        "satisfied": float(satisfied[later].mean()),
        "share-before": float(before[later].mean()),
        "share-after": float(after[later].mean()),
        "first-share": float(before[~later].mean()),
        "first-steps": float(seen["bapo/steps/mean"][~later].mean()),
        "mean-low": float(seen["bapo/low/mean"][later].mean()),
        "mean-high": float(seen["bapo/high/mean"][later].mean()),
    }


def largest_difference(run: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest absolute difference of two runs in all looks and gradient norms."""
    pairs = [(run["looks"][name], other["looks"][name]) for name in run["looks"]]
    pairs.append((run["updates"]["norm"], other["updates"]["norm"]))
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)


# ---- the entropy-clip rule -------------------------------------------------------------------------------------------


def clip_rule(seed: int, states: int, *, actions: int = 32) -> dict[str, float]:
    """How often a wider clip moves the entropy as the rule says, on random softmax states with all actions in hand.

    Old logits ~ N(0, 1.5^2), advantages ~ N(0, 1) minus their mean; the policy has moved by half the advantage and as much
    noise. Measured is the change of entropy per step along the exact gradient of the clipped objective (central
    difference). `high`: [0.8, 3] against [0.8, 1.2], share of states where entropy gains; `low`: [0.6, 1.2] against
    [0.8, 1.2], share where it loses. `improbable` counts states in which every action that the wider clip sets free has
    log pi < -H, `mixed` those in which at least one has, `any` all states in which it sets one free; `states` is the part
    of all states that `improbable` counts.
    """
    g = torch.Generator().manual_seed(seed)
    old, advantage, noise = torch.randn(3, states, actions, generator=g, dtype=torch.float64)
    old = 1.5 * old
    advantage = advantage - (old.softmax(-1) * advantage).sum(-1, keepdim=True)
    z = old + 0.5 * advantage + 0.5 * noise
    logp = z.log_softmax(-1)
    ratio, improbable = (logp - old.log_softmax(-1)).exp(), logp < -_entropy(z)[:, None]

    def speed(low: float, high: float) -> Tensor:
        here = z.clone().requires_grad_()
        r = (here.log_softmax(-1) - old.log_softmax(-1)).exp()
        everywhere = torch.ones_like(r, dtype=torch.bool)
        loss = clipped_surrogate(r, old.softmax(-1) * advantage, everywhere, low, high)
        step = -torch.autograd.grad(loss, here)[0] * loss.new_tensor(r.numel())
        return (_entropy(z + 1e-4 * step) - _entropy(z - 1e-4 * step)) / 2e-4

    base = speed(0.8, 1.2)
    freed_high = (advantage > 0) & (ratio > 1.2) & (ratio < 3.0)
    freed_low = (advantage < 0) & (ratio < 0.8) & (ratio > 0.6)
    found: dict[str, float] = {}
    for name, freed, gain in (
        ("high", freed_high, speed(0.8, 3.0) - base),
        ("low", freed_low, base - speed(0.6, 1.2)),
    ):
        some = freed.any(1)
        strict = some & ~(freed & ~improbable).any(1)
        found |= {
            f"{name}/improbable": float((gain > 0)[strict].double().mean()),
            f"{name}/mixed": float((gain > 0)[(freed & improbable).any(1)].double().mean()),
            f"{name}/any": float((gain > 0)[some].double().mean()),
            f"{name}/states": float(strict.double().mean()),
        }
    return found


def _entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# ---- the study -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    seeds: int = 10
    rollouts: int = 40
    equal_seeds: int = 5
    equal_rollouts: int = 20
    rule_seeds: int = 5
    states: int = 4000


QUICK = Size(seeds=2, rollouts=3, equal_seeds=1, equal_rollouts=2, rule_seeds=2, states=200)


def measure(quick: bool, trials: Trials) -> Measurements:
    """Train on both testbeds, then look at the rule."""
    size = QUICK if quick else Size()
    seeds, recipes = tuple(range(size.seeds)), arms()
    control = {name: recipes[name] for name in ("start", "bapo")}
    control["bapo-half"] = replace(recipes["bapo"], name="bapo-half", surrogate=BalancedClip(target=0.5))
    trials.plan(len(recipes) * size.seeds + len(control) * size.equal_seeds + size.rule_seeds)
    runs = {
        arm: [trials.trial(f"unequal {arm} seed {s}", partial(_unequal, made, s, size)) for s in seeds]
        for arm, made in recipes.items()
    }
    estimates = _outcomes(runs, seeds, min(READ, size.rollouts)) | _searches(runs, seeds)
    same = {
        arm: [
            trials.trial(f"equal {arm} seed {s}", partial(_equal, made, s, size))
            for s in range(size.equal_seeds)
        ]
        for arm, made in control.items()
    }
    estimates |= _equal_lengths(same)
    rule = [
        trials.trial(f"rule seed {s}", partial(clip_rule, s, size.states)) for s in range(size.rule_seeds)
    ]
    estimates |= {
        f"rule/{key}": mean_over_seeds([r[key] for r in rule], range(size.rule_seeds)) for key in rule[0]
    }
    details = {
        "looks": {
            arm: {
                name: np.mean([run["looks"][name] for run in several], axis=0).tolist()
                for name in ("reward", "entropy")
            }
            for arm, several in runs.items()
        },
        "bounds": {
            arm: {
                name: np.mean([run["updates"][f"bapo/{name}/mean"] for run in runs[arm]], axis=0).tolist()
                for name in ("low", "high", "share_before", "share_after")
            }
            for arm in ("bapo", "bapo-gradient")
        },
    }
    return Measurements(estimates, details, seeds)


def _unequal(made: Recipe, seed: int, size: Size) -> dict[str, Any]:
    """One update per rollout batch for `on-policy`, and as many batches as the others make updates."""
    if made.name == "on-policy":
        return train(made, unequal(seed), seed, size.rollouts * UPDATES, updates=1)
    return train(made, unequal(seed), seed, size.rollouts)


def _equal(made: Recipe, seed: int, size: Size) -> dict[str, Any]:
    return train(made, equal(seed), seed, size.equal_rollouts)


def _outcomes(
    runs: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int], read: int
) -> dict[str, Estimate]:
    """Success after `read` rollout batches and at the end (the same number of updates), and entropy at equal success."""
    values = {
        arm: {
            "reward": [run["looks"]["reward"][read] for run in several],
            "final-reward": [run["looks"]["reward"][-1] for run in several],
            "final-entropy": [run["looks"]["entropy"][-1] for run in several],
            "norm-max": [max(run["updates"]["norm"]) for run in several],
        }
        for arm, several in runs.items()
    }
    found = {
        f"unequal/{arm}/{name}": mean_over_seeds(column, seeds)
        for arm, row in values.items()
        for name, column in row.items()
    }
    pairs = [(arm, "clip") for arm in runs if arm != "clip"]
    pairs += [
        ("bapo", other) for other in ("on-policy", "clip-higher", "start", "wide", "end", "bapo-gradient")
    ]
    for arm, other in pairs:
        for name in ("reward", "final-reward", "final-entropy", "norm-max"):
            found[f"unequal/{arm}-minus-{other}/{name}"] = paired_difference(
                values[arm][name], values[other][name], seeds
            )
        gaps = [entropy_gap(a, b) for a, b in zip(runs[arm], runs[other], strict=True)]
        found[f"unequal/{arm}-minus-{other}/entropy-at-reward"] = mean_over_seeds(gaps, seeds)
    first = [run["looks"] for run in runs["clip"]]
    found["unequal/initial/length-ratio"] = mean_over_seeds(
        [look["length_wrong"][0] / look["length_right"][0] for look in first], seeds
    )
    shares = {
        kind: [
            sum(run["updates"][f"{kind}-improbable"]) / max(sum(run["updates"][kind]), 1.0)
            for run in runs["clip"]
        ]
        for kind in ("blocked", "positive")
    }
    found |= {f"unequal/clip/{kind}-improbable": mean_over_seeds(s, seeds) for kind, s in shares.items()}
    found["unequal/clip/blocked-minus-positive/improbable"] = paired_difference(
        shares["blocked"], shares["positive"], seeds
    )
    return found


def _searches(runs: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int]) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for arm in ("bapo", "bapo-gradient"):
        each = [search(run) for run in runs[arm]]
        found |= {f"unequal/{arm}/{key}": mean_over_seeds([e[key] for e in each], seeds) for key in each[0]}
        # the smallest over all seeds is not a mean: it has no interval
        found[f"unequal/{arm}/shortfall"] = exact(min(e["shortfall"] for e in each))
    return found


def _equal_lengths(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Estimate]:
    seeds = range(len(runs["start"]))
    found = {}
    for arm in ("bapo", "bapo-half"):
        gaps = [largest_difference(a, b) for a, b in zip(runs[arm], runs["start"], strict=True)]
        found[f"equal/{arm}-minus-start/largest"] = exact(max(gaps))
        same = all(a["final"] == b["final"] for a, b in zip(runs[arm], runs["start"], strict=True))
        found[f"equal/{arm}-minus-start/same-policy"] = exact(float(same))
        moved = [float(np.mean(np.asarray(run["updates"]["bapo/steps/mean"]) > 0)) for run in runs[arm]]
        found[f"equal/{arm}/moves"] = mean_over_seeds(moved, seeds)
    lowest = [min(run["updates"]["bapo/share_before/mean"]) for run in runs["bapo"]]
    found["equal/bapo/lowest-share"] = exact(min(lowest))
    found["equal/start/final-reward"] = mean_over_seeds(
        [r["looks"]["reward"][-1] for r in runs["start"]], seeds
    )
    return found
