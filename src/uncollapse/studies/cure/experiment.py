"""The experiments of the cure study on tables: branching against DAPO, what explains it, and two stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.cure import CureSampler, FamilyAdvantage, TwoStageSampler, effective_samples
from uncollapse.policy.protocols import Engine, Sampler
from uncollapse.policy.recipe import Recipe
from uncollapse.policy.registry import recipe
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stats import Entropy
from uncollapse.studies.cure.language import MODELS, branch_a_model
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, TablePolicy, exact_entropy, exact_reward
from uncollapse.studies.testbeds.opening import OpeningLab, opening_reward, state_values
from uncollapse.studies.testbeds.training import MINIBATCHES

K = 2
"""Of the five positions that can be cut. The paper's 20 of about a thousand tokens is a smaller share."""
SAME_TOKENS = 11
"""Independent answers per prompt that take as many tokens as CURE's group of 16 (calibrated, see the study)."""
SAME_REWARD = 0.9
"""Where entropies are compared at the same reward: keeping entropy by learning more slowly is no art."""
EVERY = 5
"""Steps between two looks at the policy."""
_EXAMINATION = 1_000_000
"""Offset of the seeds of evaluation samples, so that none is a training seed."""


class MaskedPrefixSampler(CureSampler):
    """Control: as many tokens without gradient as CURE has, but no branch: all answers are independent.

    Those that would be branches are masked before the position where CURE would cut them.
    """

    def __call__(self, engine: Engine, prompts: Sequence[Any], clock: Clock) -> Batch:
        """Scored rows of independent answers; `cut` tokens of each are masked."""
        batch = CureSampler(self.samples, branches=0, temperature=self.temperature)(engine, prompts, clock)
        cut = self.cuts(engine.measure(batch, frozenset({Entropy("old")})))
        cut = torch.where(batch.uid % self.samples >= self.originals, cut, 0)
        kept = torch.arange(batch.mask.shape[1], device=cut.device) >= cut[:, None]
        return replace(batch, mask=batch.mask & kept).with_columns(cut=cut)


def arms() -> dict[str, Recipe]:
    """The recipes on modsum. They differ in the sampler alone, but for the last, which has another baseline as well.

    No penalty for overlong answers: all have six tokens.
    """
    base = replace(recipe("cure"), rewards=())
    cure = CureSampler(samples=16, branches=3, k=K)
    samplers: dict[str, Sampler] = {
        "cure": cure,
        "dapo": PlainSampler(samples=16),
        "random": replace(cure, mode="random"),
        "mask-only": MaskedPrefixSampler(samples=16, branches=3, k=K),
        "dapo-same-tokens": PlainSampler(samples=SAME_TOKENS),
        "dapo-originals": PlainSampler(samples=cure.originals),
    }
    found = {name: replace(base, name=name, sampler=sampler) for name, sampler in samplers.items()}
    family = replace(base, name="family-baseline", sampler=cure, advantage=(FamilyAdvantage(),))
    return found | {"family-baseline": family}


def two_stages(switch_step: int) -> Recipe:
    """CURE for `switch_step` steps, then DAPO."""
    sampler = TwoStageSampler(samples=16, branches=3, k=K, switch_step=switch_step)
    return replace(arms()["cure"], name="two-stage", sampler=sampler)


@dataclass(frozen=True)
class World:
    """A lab on the table of modsum, and its exact reward."""

    lab: ModSumLab
    reward: Callable[[ModSum, Tensor], Float[Tensor, " prompt"]]


def world(name: str, task: ModSum) -> World:
    """`modsum` or `opening`."""
    if name == "opening":
        return World(OpeningLab(task), opening_reward)
    return World(ModSumLab(task), exact_reward)


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    seeds: int = 6
    first: int = 150
    second: int = 75
    prompts: int = 12
    tokens: int = 40
    task: ModSum = field(default_factory=ModSum)
    model: str = "smollm2-135m"
    shortest: int = 2  # characters of a critical token; the packaged model's tokens have one


QUICK = Size(seeds=2, first=10, second=5, prompts=3, tokens=6, task=ModSum(4, 4, 4), model="tiny", shortest=1)


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    method: Recipe, name: str, seed: int, marks: tuple[int, ...], task: ModSum, lr: float = 0.05
) -> dict[str, Any]:
    """Train on a world with the settings that the studies on modsum share, to the last of `marks` (steps).

    Returns the exact `entropy` (nats per token) and `reward` at every fifth step and, in `ends`, for each mark: both, the
    `distinct` right answers among 32 per prompt, the `bias` of values at the cuts; and of the steps so far, per step:
    tokens `generated`, rows that were `useful` (trained on), tokens `trained`, variance `within` and `between` families.
    """
    place = world(name, task)
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(seed)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    engine = LogitsEngine(place.lab, policy)
    trainer = Trainer(method, engine, optimizer, seed=seed, total=marks[-1], minibatches=MINIBATCHES)
    curves: dict[str, Any] = {"entropy": [], "reward": []}
    ends: dict[str, Any] = {}
    sums = dict.fromkeys(("generated", "useful", "trained", "within", "between"), 0.0)
    for step in range(marks[-1] + 1):
        if step % EVERY == 0 or step in marks:
            table = policy.table.detach().double()
            entropy = float(exact_entropy(task, table).mean())
            reward = float(place.reward(task, table).mean())
        if step % EVERY == 0:
            curves["entropy"].append(entropy)
            curves["reward"].append(reward)
        if step in marks:
            ends[str(step)] = {
                "entropy": entropy,
                "reward": reward,
                "distinct": distinct_right(place.lab, policy, task, seed + _EXAMINATION),
                **{key: value / max(step, 1) for key, value in sums.items()},
            }
            if name == "modsum":
                ends[str(step)]["bias"] = selection_bias(task, table, seed + _EXAMINATION)
        if step < marks[-1]:
            batch, _ = trainer.step(list(range(task.prompts)))
            _add(sums, batch)
    return curves | {"ends": ends}


def _add(sums: dict[str, float], batch: Batch) -> None:
    sums["generated"] += float(batch.columns["length"].sum())
    sums["useful"] += float(batch.mask.any(1).sum())
    sums["trained"] += float(batch.mask.sum())
    for key, column in (("within", "within_family"), ("between", "between_families")):
        if column in batch.columns:
            sums[key] += float(batch.columns[column].mean())


@torch.no_grad()
def distinct_right(lab: ModSumLab, policy: TablePolicy, task: ModSum, seed: int, samples: int = 32) -> float:
    """Different right answers among `samples` per prompt, mean over prompts."""
    prompts = [prompt for prompt in range(task.prompts) for _ in range(samples)]
    ids, mask = lab.sample(policy, prompts, temperature=1.0, seed=seed)
    right = lab.reward(prompts, ids, mask) > 0
    answers = torch.cat([torch.tensor(prompts)[:, None], ids], 1)[right]
    return len(answers.unique(dim=0)) / task.prompts


def entropy_at(run: Mapping[str, Sequence[float]], reward: float) -> float:
    """Entropy when the reward first reaches `reward`, interpolated between looks; NaN if it never does."""
    past = next((i for i, value in enumerate(run["reward"]) if value >= reward), 0)
    if past == 0:
        return math.nan
    share = (reward - run["reward"][past - 1]) / (run["reward"][past] - run["reward"][past - 1])
    return run["entropy"][past - 1] + share * (run["entropy"][past] - run["entropy"][past - 1])


@torch.no_grad()
def selection_bias(task: ModSum, table: Tensor, seed: int, samples: int = 1024) -> float:
    """Mean value of the prefixes that CURE cuts, minus the value of the prompt; values are exact (modsum's).

    0 for a cut that does not look at what comes after it.
    """
    policy = TablePolicy(table)
    engine = LogitsEngine(ModSumLab(task), policy)
    prompts = [prompt for prompt in range(task.prompts) for _ in range(samples)]
    batch = engine.generate(prompts, temperature=1.0, clock=Clock(seed=seed))
    cut = CureSampler(k=K).cuts(engine.measure(batch, frozenset({Entropy("old")})))
    row = torch.tensor(prompts)
    state = (batch.ids.cumsum(1) - batch.ids).gather(1, cut[:, None])[:, 0] % task.vocab
    values = state_values(task, table)
    return float((values[row, cut, state] - values[row, 0, 0]).mean())


# ---- the study -------------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """Run E1 to E4."""
    size = QUICK if quick else Size()
    seeds = tuple(range(size.seeds))
    last = size.first + size.second
    middle = size.first // 3
    plan: list[tuple[str, str, Recipe, tuple[int, ...]]] = []
    for name, method in arms().items():
        whole = name == "dapo"  # E3 needs DAPO for longer; its first steps are E1's
        marks = (0, middle, size.first, last) if whole else (0, middle, size.first)
        if name != "cure":
            plan.append(("modsum", name, method, marks))
    plan.append(("modsum", "two-stage", two_stages(size.first), (0, middle, size.first, last)))
    for name, method in (("dapo", arms()["dapo"]), ("two-stage", two_stages(size.first))):
        plan.append(("opening", name, method, (0, size.first, last)))
    trials.plan(len(plan) * size.seeds + 1)
    runs = {
        f"{place}/{name}": [
            trials.trial(f"{place} {name} seed {seed}", partial(train, method, place, seed, marks, size.task))
            for seed in seeds
        ]
        for place, name, method, marks in plan
    }
    estimates = _branching(runs, seeds, middle, size.first) | _stages(runs, seeds, last)
    estimates["modsum/optimum/entropy"] = exact(size.task.max_entropy_optimum)
    language = trials.trial(
        f"E4 {size.model}",
        partial(branch_a_model, size.model, size.prompts, size.tokens, shortest=size.shortest),
    )
    estimates |= _language(language)
    details = {
        "curves": {
            key: [{c: run[c] for c in ("entropy", "reward")} for run in several]
            for key, several in runs.items()
        },
        "ends": {key: [run["ends"] for run in several] for key, several in runs.items()},
        "language": language,
        "models": MODELS,
        "every": EVERY,
        "first": size.first,
    }
    return Measurements(estimates, details, seeds)


def _branching(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], middle: int, end: int
) -> dict[str, Estimate]:
    """E1 and E2. The first steps of the two-stage run are CURE's."""
    several = {name: runs[f"modsum/{'two-stage' if name == 'cure' else name}"] for name in arms()}
    estimates: dict[str, Estimate] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for name, arm in several.items():
        found[name] = {key: [run["ends"][str(end)][key] for run in arm] for key in _END}
        found[name]["early-reward"] = [run["ends"][str(middle)]["reward"] for run in arm]
        found[name]["early-entropy"] = [run["ends"][str(middle)]["entropy"] for run in arm]
        found[name]["entropy-at-same-reward"] = [entropy_at(run, SAME_REWARD) for run in arm]
        for key, values in found[name].items():
            estimates[f"modsum/{name}/{key}"] = mean_over_seeds(values, seeds)
    pairs = [(name, "dapo") for name in several if name != "dapo"]
    pairs += [("cure", name) for name in several if name not in ("cure", "dapo")]
    for treated, control in pairs:
        for key in found[treated]:
            estimates[f"modsum/{treated}-minus-{control}/{key}"] = paired_difference(
                found[treated][key], found[control][key], seeds
            )
    for when in (0, middle, end):
        bias = [run["ends"][str(when)]["bias"] for run in several["cure"]]
        estimates[f"modsum/cure/bias/{when}"] = mean_over_seeds(bias, seeds)
    return estimates | _costs(several, seeds, end)


_END = ("entropy", "reward", "distinct")


def _costs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], end: int
) -> dict[str, Estimate]:
    """Tokens generated and trained on, and what families do to the reward."""
    estimates: dict[str, Estimate] = {}
    for name, several in runs.items():
        spent = [run["ends"][str(end)] for run in several]
        measures = {
            "tokens-per-step": [at["generated"] for at in spent],
            "tokens-per-useful": [at["generated"] / max(at["useful"], 1e-9) for at in spent],
            "trained-tokens": [at["trained"] for at in spent],
        }
        if name in ("cure", "random"):
            measures["within"] = [at["within"] for at in spent]
            measures["between"] = [at["between"] for at in spent]
            measures["effective-samples"] = [
                effective_samples(at["within"], at["between"], 4, 4) for at in spent
            ]
        for key, values in measures.items():
            estimates[f"modsum/{name}/{key}"] = mean_over_seeds(values, seeds)
    return estimates


def _stages(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], last: int
) -> dict[str, Estimate]:
    """E3."""
    estimates: dict[str, Estimate] = {}
    for place in ("modsum", "opening"):
        ends = {
            name: {key: [run["ends"][str(last)][key] for run in runs[f"{place}/{name}"]] for key in _END}
            for name in ("two-stage", "dapo")
        }
        for key in _END:
            for name in ends:
                estimates[f"stages/{place}/{name}/{key}"] = mean_over_seeds(ends[name][key], seeds)
            estimates[f"stages/{place}/two-stage-minus-dapo/{key}"] = paired_difference(
                ends["two-stage"][key], ends["dapo"][key], seeds
            )
    return estimates


def _language(found: Mapping[str, Any]) -> dict[str, Estimate]:
    """E4; nothing where the model is not there. Its repetitions are prompts."""
    prompts = range(len(found.get("prompts", ())))
    if not prompts:
        return {}
    table = {key: np.array([row[key] for row in found["prompts"]]) for key in found["prompts"][0]}
    ratio = mean_over_seeds((table["critical-entropy"] / table["mean-entropy"]).tolist(), prompts)
    estimates = {f"language/{key}": mean_over_seeds(value.tolist(), prompts) for key, value in table.items()}
    return estimates | {
        "language/entropy-ratio": ratio,
        "language/distinct-critical-minus-random": paired_difference(
            table["critical-distinct"].tolist(), table["random-distinct"].tolist(), prompts
        ),
    }
