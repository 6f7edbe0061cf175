"""A small table-driven lab for tests: ragged responses, several prompts, full logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.stats import Entropy, Logp
from uncollapse.studies.testbeds.engine import LogitsEngine

SHARPNESS = {"gtpo-released": 4.0}
"""Recipes that learn nothing from a policy as uncertain as a random table, here 1.5 nats per token."""


class Table(nn.Module):
    """Logits per (prompt, previous token)."""

    def __init__(self, prompts=5, vocab=7, seed=0, sharpness=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(
            sharpness * torch.randn(prompts, vocab + 1, vocab, generator=generator, dtype=torch.float64)
        )


@dataclass
class TableLab:
    token_limit: int = 6

    def sample(self, policy, prompts, *, temperature, seed, given=None):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(len(prompts), 0, dtype=torch.long)
        for place in range(self.token_limit):
            padded = torch.cat([ids, torch.zeros(len(prompts), 1, dtype=torch.long)], dim=1)
            last = self.logits(policy, prompts, padded)[:, -1] / temperature
            token = torch.multinomial(last.softmax(-1), 1, generator=generator)
            if given is not None and place < given[0].shape[1]:
                start, there = (part[:, place, None] for part in given)
                token = torch.where(there, start, token)
            ids = torch.cat([ids, token], dim=1)
        ended = (ids == 0).cumsum(dim=1)
        mask = (ended == 0) | ((ended == 1) & (ids == 0))
        return torch.where(mask, ids, 0), mask

    def fresh_prompts(self, count, *, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 5, (count,), generator=generator).tolist()

    def logits(self, policy, prompts, ids):
        previous = torch.cat([torch.full_like(ids[:, :1], policy.table.shape[1] - 1), ids[:, :-1]], dim=1)
        return policy.table[torch.tensor(list(prompts))[:, None], previous]

    def reward(self, prompts, ids, mask):
        return ((ids * mask).sum(dim=1) % 3 == torch.tensor(list(prompts)) % 3).double()


def moved_on(policy, size=0.5, seed=9):
    """Shift the policy, so that ratios differ from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.table += size * torch.randn(policy.table.shape, generator=generator, dtype=torch.float64)


def prepared(recipe, *, policy=None, prompts=5, seed=0):
    """An engine and a prepared rollout batch of a recipe in the table lab."""
    policy = policy or Table(prompts=prompts, sharpness=SHARPNESS.get(recipe.name, 1.0))
    engine = LogitsEngine(TableLab(), policy, reference=Table(prompts=prompts, seed=1))
    engine.remember()
    batch = recipe.sampler(engine, list(range(prompts)), Clock(step=2, total=10, seed=seed))
    batch = engine.measure(batch, recipe.stats("rollout") | {Entropy("old"), Logp("old")})
    return engine, recipe.prepare(batch)


def loss_and_gradient(engine, recipe, batch: Batch, splits):
    """Loss and gradient of one optimiser step, its rows split into these pieces."""
    engine.policy.zero_grad()
    plan = engine.measure(batch, recipe.stats("plan")) if recipe.has("minibatch") else batch
    plan = recipe.plan(plan)
    total = 0.0
    for rows in splits:
        report = recipe.loss(engine.measure(plan[rows], recipe.stats("loss"), grad=True))
        report.loss.backward()
        total += float(report.loss.detach())
    gradient = engine.policy.table.grad
    return total, torch.zeros_like(engine.policy.table) if gradient is None else gradient.clone()
