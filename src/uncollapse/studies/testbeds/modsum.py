"""modsum: the smallest testbed in which entropy collapse is a choice, with exact rewards and entropies.

S prompts; an answer is T tokens out of V; it is right if the sum of its tokens modulo V equals the prompt's target. The
policy is a table of logits z[prompt, position, running sum, token]. Any first T - 1 tokens can be completed, so the
largest entropy that still answers everything right is (T-1)/T log V per token: all entropy lost below that is
collapse, not necessity. Reward and entropy of a policy are computed by dynamic programming over the running sum,
without sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.studies.testbeds.drawing import Given, draw_prompts, draw_token

Table = Float[Tensor, "prompt position state vocab"]


@dataclass(frozen=True)
class ModSum:
    """The task: number of prompts, answer length (tokens) and vocabulary; prompt i wants the sum i modulo `vocab`."""

    prompts: int = 16
    length: int = 6
    vocab: int = 16

    def __post_init__(self) -> None:
        if min(self.prompts, self.length) < 1 or self.vocab < 2:
            raise ConfigError(f"{self}: needs at least 1 prompt, 1 token and a vocabulary of 2")

    @property
    def max_entropy_optimum(self) -> float:
        """Largest entropy per token (nats) of a policy whose reward is 1: (T-1)/T log V."""
        return (self.length - 1) / self.length * math.log(self.vocab)

    def targets(self, prompt: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The sum modulo `vocab` that each prompt asks for."""
        return prompt % self.vocab

    def initial_logits(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Table:
        """A random policy: logits ~ N(0, 1)."""
        shape = (self.prompts, self.length, self.vocab, self.vocab)
        return torch.randn(shape, generator=generator, dtype=dtype)


def running_sums(task: ModSum, ids: Int[Tensor, "row time"]) -> Int[Tensor, "row time"]:
    """The state before each token: sum of the tokens so far modulo V."""
    return (ids.cumsum(1) - ids) % task.vocab


def logits_of(
    task: ModSum, table: Table, prompt: Int[Tensor, " row"], ids: Int[Tensor, "row time"]
) -> Float[Tensor, "row time vocab"]:
    """Logits of the policy at every position of the given answers; differentiable in `table`."""
    position = torch.arange(ids.shape[1], device=ids.device)
    return table[prompt[:, None], position, running_sums(task, ids)]


@torch.no_grad()
def sample(
    task: ModSum,
    table: Table,
    prompt: Int[Tensor, " row"],
    uniform: Float[Tensor, "row time"],
    *,
    temperature: float = 1.0,
    given: Given | None = None,
) -> Int[Tensor, "row time"]:
    """One answer per row by inverting the cumulative distribution at `uniform`, numbers in [0, 1) that belong to the row.

    Where tokens are `given` (ids, mask), they stand instead of drawn ones. The same numbers give the same answer whatever the row order and the number of rows.
    """
    state = torch.zeros_like(prompt)
    ids = torch.empty(uniform.shape, dtype=torch.long, device=prompt.device)
    for position in range(task.length):
        cumulative = (table[prompt, position, state] / temperature).softmax(-1).cumsum(-1)
        token = draw_token(cumulative, uniform[:, position], position, given)
        ids[:, position] = token
        state = (state + token) % task.vocab
    return ids


def correct(task: ModSum, prompt: Int[Tensor, " row"], ids: Int[Tensor, "row time"]) -> Bool[Tensor, " row"]:
    """Whether each answer's sum is the one its prompt asks for."""
    return ids.sum(1) % task.vocab == task.targets(prompt)


def state_distribution(task: ModSum, table: Table) -> Float[Tensor, "prompt position1 state"]:
    """Probability of each running sum before position 0, ..., T (the last one: the sum of the whole answer)."""
    here = torch.arange(task.vocab, device=table.device)
    token = (
        here[None, :] - here[:, None]
    ) % task.vocab  # token that leads from one sum (row) to another (column)
    move = table.softmax(-1).gather(-1, token.expand_as(table))
    occupied = torch.zeros_like(table[:, 0, 0])
    occupied[:, 0] = 1.0
    steps = [occupied]
    for position in range(task.length):
        steps.append(torch.einsum("ps,pst->pt", steps[-1], move[:, position]))
    return torch.stack(steps, 1)


def exact_reward(task: ModSum, table: Table) -> Float[Tensor, " prompt"]:
    """Probability of a right answer per prompt; differentiable."""
    prompt = torch.arange(task.prompts, device=table.device)
    return state_distribution(task, table)[prompt, -1, task.targets(prompt)]


def exact_entropy(task: ModSum, table: Table, *, visited_by: Table | None = None) -> Float[Tensor, " prompt"]:
    """Entropy per token (nats) of the policy per prompt, averaged over its own answers; differentiable.

    `visited_by`: average over the states that another policy visits instead. The entropy lemma speaks of fixed
    states; the difference between the two is the change of which states are visited.
    """
    logp = table.log_softmax(-1)
    per_state = -(logp.exp() * logp).sum(-1)
    visits = state_distribution(task, table if visited_by is None else visited_by)[:, :-1]
    return (visits * per_state).sum((1, 2)) / task.length


@torch.no_grad()
def distinct_correct(
    task: ModSum, table: Table, generator: torch.Generator, samples: int = 32
) -> Int[Tensor, " prompt"]:
    """Number of different right answers among `samples` drawn per prompt, in [0, samples]."""
    prompt = torch.arange(task.prompts, device=table.device).repeat_interleave(samples)
    draws = torch.rand(
        len(prompt), task.length, generator=generator, device=generator.device, dtype=torch.float64
    )
    ids = sample(task, table, prompt, draws.to(table.device))
    right = correct(task, prompt, ids)
    answers: Tensor = torch.cat([prompt[:, None], ids], 1)[right].unique(dim=0)
    return torch.bincount(answers[:, 0], minlength=task.prompts)


class TablePolicy(nn.Module):
    """The table of logits as a module that an engine can train."""

    def __init__(self, table: Float[Tensor, "..."]) -> None:
        super().__init__()
        self.table = nn.Parameter(table)


@dataclass(frozen=True)
class ModSumLab:
    """The task for an engine: prompts are their numbers, the policy a `TablePolicy`, the reward 1 or 0."""

    task: ModSum = field(default_factory=ModSum)

    @property
    def token_limit(self) -> int:
        """The length of every answer."""
        return self.task.length

    def sample(
        self,
        policy: Any,
        prompts: Sequence[int],
        *,
        temperature: float,
        seed: int,
        given: Given | None = None,
    ) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"]]:
        """Ids and mask (all true) of one answer per prompt."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), self.task.length, generator=generator, dtype=torch.float64)
        row = torch.tensor(prompts)
        ids = sample(self.task, policy.table, row, uniform, temperature=temperature, given=given)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def fresh_prompts(self, count: int, *, seed: int) -> list[int]:
        """Prompts drawn with replacement; the task has no more than its table."""
        return draw_prompts(self.task.prompts, count, seed)

    def logits(
        self, policy: Any, prompts: Sequence[int], ids: Int[Tensor, "row time"]
    ) -> Float[Tensor, "row time vocab"]:
        """Logits that each token was drawn from."""
        return logits_of(self.task, policy.table, torch.tensor(prompts), ids)

    def reward(
        self, prompts: Sequence[int], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 for a right answer, else 0."""
        return correct(self.task, torch.tensor(prompts), ids).float()
