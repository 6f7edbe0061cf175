"""Bandits with many right answers, exact or sampled: where the tempered term decides the entropy and where GRPO does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uncollapse.policy.aepo_arbitrary import (
    auxiliary_temperature,
    expected_aux_gradient,
    group_advantage_gain,
)
from uncollapse.policy.aepo_arbitrary.formulas import Mode
from uncollapse.studies.testbeds.training import Curves

ANSWERS, RIGHT = 50, 20
TAIL = 500
"""Steps at the end that entropy and success are averaged over."""


@dataclass(frozen=True)
class Setting:
    """Arms, each a target entropy (nats) and its alpha; alpha 0 is GRPO alone.

    `samples` answers of the policy and as many tempered ones per step, or exact expectations (None). Advantages are
    centred, and divided by the deviation if `divide`, within groups of `group` answers: the whole batch if None; with
    exact expectations and a group, the expected update of such groups.
    """

    arms: tuple[tuple[float, float], ...]
    divide: bool = False
    group: int | None = None
    samples: int | None = None
    mode: Mode = "bang"
    steps: int = 4000
    lr: float = 1.0


def right_answers() -> Tensor:
    """Reward of each answer: the first `RIGHT` of `ANSWERS` are right."""
    return (torch.arange(ANSWERS) < RIGHT).double()


def initial_logits(problem: int = 0) -> Tensor:
    """The policy before training: logits ~ N(0, 1); claims are judged on problem 0."""
    return torch.randn(ANSWERS, generator=torch.Generator().manual_seed(problem), dtype=torch.float64)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def run(setting: Setting, seed: int) -> Curves:
    """Train every arm; per arm the `entropy` and `success` of the last steps and a thinned `curve` of the entropy."""
    logits = initial_logits().expand(len(setting.arms), -1).clone()
    return _summary(setting, _train(setting, logits, seed))


def run_problems(setting: Setting, problems: range) -> Curves:
    """Train every arm on each of these problems; the `entropy` of the last steps, one list per problem."""
    each = torch.stack([initial_logits(problem) for problem in problems])
    tiled = replace(setting, arms=setting.arms * len(problems))
    entropy, _, _ = _train(tiled, each.repeat_interleave(len(setting.arms), 0), 0)
    rows = entropy[-TAIL:].mean(0).view(len(problems), -1)
    return {str(problem): row.tolist() for problem, row in zip(problems, rows, strict=True)}


def run_divided_after_control(setting: Setting, seed: int) -> Curves:
    """Train with centred advantages, then as long with divided ones: does control survive once it is there?"""
    logits = initial_logits().expand(len(setting.arms), -1).clone()
    held, _, logits = _train(replace(setting, divide=False), logits, seed)
    after = _summary(setting, _train(replace(setting, divide=True), logits, seed))
    return after | {"before": held[-TAIL:].mean(0).tolist()}


def _summary(setting: Setting, trained: tuple[Tensor, Tensor, Tensor]) -> Curves:
    entropy, success, _ = trained
    every = max(1, setting.steps // 100)
    found = {"entropy": entropy[-TAIL:].mean(0).tolist(), "success": success[-TAIL:].mean(0).tolist()}
    return found | {f"curve/{arm}": entropy[::every, arm].tolist() for arm in range(len(setting.arms))}


def _train(setting: Setting, logits: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator, right = torch.Generator().manual_seed(seed), right_answers()
    alpha = torch.tensor([[alpha] for _, alpha in setting.arms], dtype=torch.float64)
    entropies, successes = [], []
    for _ in range(setting.steps):
        law = logits.softmax(-1)
        entropy, success = entropy_of(logits), (law * right).sum(-1, keepdim=True)
        entropies.append(entropy)
        successes.append(success[:, 0])
        t = _temperatures(entropy, setting)
        if setting.samples is None:
            policy = _exact_gain(success, setting) * expected_aux_gradient(logits, right, 1.0)
            tempered = expected_aux_gradient(logits, right, t)
        else:
            policy = _sampled_grpo(law, right, setting.samples, setting, generator)
            tempered = _sampled_positives(logits, t, right, setting.samples, generator)
        logits = logits + setting.lr * (policy + alpha * tempered)
    return torch.stack(entropies), torch.stack(successes), logits


def _temperatures(entropy: Tensor, setting: Setting) -> Tensor:
    found = [
        auxiliary_temperature(h, target, setting.mode)
        for h, (target, _) in zip(entropy.tolist(), setting.arms, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)[:, None]


def _exact_gain(success: Tensor, setting: Setting) -> Tensor:
    if not setting.divide:
        return torch.ones_like(success)
    if setting.group is None:
        return 1 / (success * (1 - success)).sqrt().clamp(min=1e-150)
    gains = [
        group_advantage_gain(min(mu, 1 - 1e-15), setting.group, std=True) for mu in success[:, 0].tolist()
    ]
    return torch.tensor(gains, dtype=torch.float64)[:, None]


def _sampled_grpo(
    law: Tensor, right: Tensor, samples: int, setting: Setting, generator: torch.Generator
) -> Tensor:
    drawn = torch.multinomial(law, samples, replacement=True, generator=generator)
    reward = right[drawn].view(len(law), -1, setting.group or samples)
    advantage = reward - reward.mean(-1, keepdim=True)
    if setting.divide:
        std = reward.std(-1, keepdim=True)
        advantage = torch.where(std > 0, advantage / std.clamp(min=1e-12), 0.0)
    return _score(law, drawn, advantage.view(len(law), samples) / samples)


def _sampled_positives(
    logits: Tensor, t: Tensor, right: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    drawn = torch.multinomial((logits / t).softmax(-1), samples, replacement=True, generator=generator)
    return _score(logits.softmax(-1), drawn, right[drawn] / samples)


def _score(law: Tensor, drawn: Tensor, weight: Tensor) -> Tensor:
    """Sum over draws of weight times the gradient of the log-probability by the logits."""
    total = torch.zeros_like(law).scatter_add(1, drawn, weight)
    return total - total.sum(-1, keepdim=True) * law


def worst_offset(found: Curves, setting: Setting, arms: int | None = None) -> float:
    """Largest |reached - asked| over the first `arms` arms (all if None), in nats."""
    pairs = list(zip(found["entropy"], setting.arms, strict=True))[:arms]
    return max(abs(h - target) for h, (target, _) in pairs)
