"""The experiments of the SIREN study: entropy bonuses on a long-tailed vocabulary, and their gradient in a real model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from uncollapse.measure import statistics
from uncollapse.measure.statistics import Rows
from uncollapse.policy.protocols import Term
from uncollapse.policy.recipe import Recipe, Weighted
from uncollapse.policy.reduction import Mean
from uncollapse.policy.registry import recipe
from uncollapse.policy.siren import (
    LagrangianEntropy,
    PeakEntropyBonus,
    Siren,
    nucleus_entropy,
    peak_entropy_mask,
    peak_entropy_mean,
)
from uncollapse.policy.stages.regularizers import EntropyBonus
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stages.surrogates import Unclipped
from uncollapse.studies.statistics import Estimate, exact, mean_over_seeds, paired_difference
from uncollapse.studies.study import Measurements, Trials
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.long_tail import LongTail, LongTailLab, LowRankPolicy, examine, make

Curves = dict[str, list[float]]

GROWTH = 1.4
"""How many times the entropy of no bonus SIREN has to end with."""


def arms() -> dict[str, Recipe]:
    """Recipes that differ in the entropy term alone: 16 samples, one update per rollout, so no clipping."""
    base = replace(recipe("grpo"), name="none", sampler=PlainSampler(samples=16), surrogate=Unclipped())

    def arm(name: str, term: Term, coef: float) -> Recipe:
        mean = getattr(term, "mean", Mean())
        return replace(base, name=name, regularizers=(Weighted(term, coef=coef, mean=mean),))

    made = [base]
    made += [arm(f"naive-{c:g}", EntropyBonus(), c) for c in (0.005, 0.02, 0.1)]
    made += [arm(f"siren-{c:g}", Siren(), c) for c in (0.05, 0.5, 5.0)]
    made += [arm(f"no-anchor-{c:g}", PeakEntropyBonus(), c) for c in (0.1, 0.5)]
    made += [
        arm("no-top-p-0.5", Siren(p=1.0), 0.5),
        arm("no-peaks-0.5", Siren(quantile=None), 0.5),
        arm("released-0.5", Siren(nucleus="released"), 0.5),
        arm("lagrangian", LagrangianEntropy(), 1.0),
    ]
    return {one.name: one for one in made}


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run."""

    task: LongTail = field(default_factory=LongTail)
    seeds: int = 5
    steps: int = 100
    rows: int = 16
    tokens: int = 64


QUICK = Size(LongTail(prompts=3, length=6, vocab=60, rank=4), seeds=2, steps=10, rows=1, tokens=4)


# ---- long tail ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def peak_entropy(policy: LowRankPolicy) -> float:
    """The mean that SIREN holds, from the tables."""
    entropy = nucleus_entropy(policy().double())
    every = torch.ones_like(entropy, dtype=torch.bool)
    return float(peak_entropy_mean(entropy, peak_entropy_mask(entropy, every), every))


def train(chosen: Recipe, seed: int, steps: int, task: LongTail, *, every: int = 5) -> Curves:
    """Train on all prompts every step with Adam, learning rate 0.02, gradients not clipped.

    `seed` decides world, policy and sampling, so arms with the same seed start alike. Returns the exact `accuracy`,
    `entropy`, `right_entropy` and `tail` after every `every` steps and at the end, and `gap`: how far the mean peak
    entropy is from its initial value (nats).
    """
    world, policy = make(task, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    engine = LogitsEngine(LongTailLab(world), policy)
    trainer = Trainer(copy.deepcopy(chosen), engine, optimizer, seed=seed, total=steps, max_grad_norm=None)
    start = peak_entropy(policy)
    curves: Curves = {}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            looks = {
                **asdict(examine(world, policy)),
                "gap": peak_entropy(policy) - start,
                "step": float(step),
            }
            for name, value in looks.items():
                curves.setdefault(name, []).append(value)
        if step < steps:
            trainer.step(list(range(task.prompts)))
    return curves


def _measure_arms(runs: Mapping[str, Sequence[Curves]], seeds: Sequence[int]) -> dict[str, Estimate]:
    ends = {
        arm: {
            name: [run[name][-1] for run in several]
            for name in ("accuracy", "entropy", "right_entropy", "tail", "gap")
        }
        for arm, several in runs.items()
    }
    none = ends["none"]
    estimates: dict[str, Estimate] = {}
    for arm, end in ends.items():
        distance = [abs(gap) for gap in end["gap"]]
        estimates |= {f"{arm}/{name}": mean_over_seeds(values, seeds) for name, values in end.items()}
        estimates[f"{arm}/distance"] = mean_over_seeds(distance, seeds)
        if arm == "none":
            continue
        for name in ("accuracy", "entropy", "right_entropy", "tail"):
            estimates[f"{arm}-minus-none/{name}"] = paired_difference(end[name], none[name], seeds)
        wanted = [GROWTH * entropy for entropy in none["entropy"]]
        estimates[f"{arm}-minus-{GROWTH}-times-none/entropy"] = paired_difference(
            end["entropy"], wanted, seeds
        )
    pairs = [("siren-0.05", "siren-0.5"), ("siren-0.5", "siren-5")]
    for weak, strong in pairs:
        near, far = ([abs(gap) for gap in ends[arm]["gap"]] for arm in (strong, weak))
        estimates[f"{weak}-minus-{strong}/distance"] = paired_difference(far, near, seeds)
    for arm in ("no-top-p-0.5", "no-peaks-0.5", "no-anchor-0.5", "released-0.5"):
        for name in ("accuracy", "entropy", "right_entropy", "tail"):
            estimates[f"{arm}-minus-siren-0.5/{name}"] = paired_difference(
                ends[arm][name], ends["siren-0.5"][name], seeds
            )
    begin = {name: [run[name][0] for run in runs["none"]] for name in ("accuracy", "entropy", "tail")}
    return estimates | {f"start/{name}": mean_over_seeds(values, seeds) for name, values in begin.items()}


# ---- a real model ------------------------------------------------------------------------------------------------


def upward_push(logits: torch.Tensor, p: float = 0.8) -> dict[str, float]:
    """How much of what an entropy bonus lifts is outside the nucleus: sums over all positions (rows of `logits`).

    `naive`, `siren`: the share of the positive part of the entropy's gradient with respect to the logits that falls on
    tokens outside; `tail_mass`: the mean probability of those tokens; `nucleus_size`: the mean number of tokens inside.
    """
    rows = Rows(logits.double().log_softmax(-1), torch.zeros(len(logits), dtype=torch.long))
    inside = statistics.NucleusMass(p).members(rows)
    found = {}
    for name, statistic in (("naive", statistics.Entropy()), ("siren", statistics.NucleusEntropy(p))):
        lifted = statistic.gradient(rows).clamp(min=0)
        found[name] = float(torch.where(inside, 0, lifted).sum() / lifted.sum())
    found["tail_mass"] = float(torch.where(inside, 0, rows.p).sum(-1).mean())
    found["nucleus_size"] = float(inside.sum(-1).double().mean())
    return found


PROMPTS = (
    "Question: A train leaves at 9:40 and arrives at 12:05. How long is the journey? Let us think step by step.",
    "Question: What is the sum of the first ten odd numbers? Let us think step by step.",
    "Question: A shirt costs 24 dollars after a discount of 20 percent. What did it cost? Let us think step by step.",
    "Question: How many prime numbers are there between 20 and 50? Let us think step by step.",
)


def real_model(rows: int, tokens: int) -> dict[str, Any]:
    """`upward_push` over `rows` answers of `tokens` tokens that SmolLM2-135M samples at temperature 1.

    `note` says why there is nothing to report where the weights are not installed.
    """
    from uncollapse.errors import UncollapseError
    from uncollapse.models import load

    try:
        model, tokenizer = load("smollm2-135m")
    except UncollapseError as error:
        return {"note": f"not measured: {error}"}
    texts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    asked = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = model.generate(
            **asked,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        attended = torch.cat([asked["attention_mask"], torch.ones(rows, tokens, dtype=torch.long)], 1)
        logits = model(input_ids=ids, attention_mask=attended, logits_to_keep=tokens + 1).logits[:, :-1]
        pieces = [upward_push(row) for row in logits]
    return {
        "note": "",
        "positions": rows * tokens,
        **{key: sum(piece[key] for piece in pieces) / rows for key in pieces[0]},
    }


# ---- the study ---------------------------------------------------------------------------------------------------


def measure(quick: bool, trials: Trials) -> Measurements:
    """All arms on the long tail, and the real model."""
    size = QUICK if quick else Size()
    seeds, recipes = tuple(range(size.seeds)), arms()
    trials.plan(len(recipes) * size.seeds + 1)
    runs = {
        arm: [
            trials.trial(f"{arm} seed {seed}", partial(train, chosen, seed, size.steps, size.task))
            for seed in seeds
        ]
        for arm, chosen in recipes.items()
    }
    estimates = _measure_arms(runs, seeds)
    seen = trials.trial("real model", partial(real_model, size.rows, size.tokens))
    if not seen["note"]:
        estimates |= {
            f"smollm2-135m/{key}": exact(seen[key]) for key in ("naive", "siren", "tail_mass", "nucleus_size")
        }
    return Measurements(estimates, {"long_tail": runs, "real_model": seen}, seeds)
