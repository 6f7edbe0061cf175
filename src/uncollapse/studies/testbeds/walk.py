"""walk: a testbed whose answers differ in length and whose failures are the longer ones, with exact rewards.

A response walks on a ring of N places from place 0: each token but the last is a step of 0 to N-1 places, the last one
is `stop`. It is right if it stops at the place that its prompt asks for within the token limit. The policy is a table of
logits z[prompt, place, token]. It begins as one that roams: it hardly ever stops where it should not, sometimes where it
should, and what never finds its place runs into the limit. So a failed response is about twice as long as a right one, as
it is with language models that reason, and getting better means getting shorter.

Reward, entropy and lengths of a policy are computed by dynamic programming over the places, without sampling noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.studies.testbeds.drawing import Given, draw_prompts, draw_token

Table = Float[Tensor, "prompt place token"]


@dataclass(frozen=True)
class Walk:
    """The task: number of prompts, places on the ring, and the token limit; prompt i wants place 1 + i modulo N - 1.

    The initial logits are N(m, 1): m is 0 for steps, for `stop` `stop_there` at the place that is asked for and `stop_elsewhere` at others.
    """

    prompts: int = 16
    places: int = 16
    limit: int = 32
    stop_there: float = 0.0
    stop_elsewhere: float = -4.0

    def __post_init__(self) -> None:
        if min(self.prompts, self.limit) < 1 or self.places < 2:
            raise ConfigError(f"{self}: needs at least 1 prompt, 1 token and 2 places")

    @property
    def stop(self) -> int:
        """The token that ends a response; tokens below it are steps."""
        return self.places

    def targets(self, prompt: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The place that each prompt asks for; never the one where the walk begins."""
        return 1 + prompt % (self.places - 1)

    def initial_logits(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Table:
        """The policy that roams."""
        shape = (self.prompts, self.places, self.places + 1)
        table = torch.randn(shape, generator=generator, dtype=dtype)
        prompt = torch.arange(self.prompts)
        table[:, :, self.stop] += self.stop_elsewhere
        table[prompt, self.targets(prompt), self.stop] += self.stop_there - self.stop_elsewhere
        return table


def places_of(task: Walk, ids: Int[Tensor, "row time"]) -> Int[Tensor, "row time"]:
    """The place before each token."""
    steps = torch.where(ids == task.stop, 0, ids)
    return (steps.cumsum(1) - steps) % task.places


@torch.no_grad()
def sample(
    task: Walk,
    table: Table,
    prompt: Int[Tensor, " row"],
    uniform: Float[Tensor, "row limit"],
    *,
    temperature: float = 1.0,
    given: Given | None = None,
) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"]]:
    """One response per row and its mask, by inverting the cumulative distribution at numbers that belong to the row.

    Where tokens are `given` (ids, mask), they stand instead of drawn ones. `time` is the longest response.
    """
    cumulative = (table / temperature).softmax(-1).cumsum(-1)
    place, alive = torch.zeros_like(prompt), torch.ones_like(prompt, dtype=torch.bool)
    columns: list[tuple[Tensor, Tensor]] = []
    for position, number in enumerate(uniform.unbind(1)):
        token = draw_token(cumulative[prompt, place], number, position, given)
        columns.append((torch.where(alive, token, 0), alive))
        place = (place + torch.where(token == task.stop, 0, token)) % task.places
        alive = alive & (token != task.stop)
        if not bool(alive.any()):
            break
    ids, mask = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return ids, mask


def correct(
    task: Walk, prompt: Int[Tensor, " row"], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
) -> Bool[Tensor, " row"]:
    """Whether each response stops, and at the place that its prompt asks for."""
    stops = (ids == task.stop) & mask
    there = places_of(task, ids) == task.targets(prompt)[:, None]
    return (stops & there).any(1)


@dataclass(frozen=True)
class Look:
    """A policy, exactly: mean over prompts of success, entropy (nats per token) and length (tokens) by outcome."""

    reward: float
    entropy: float
    length: float
    length_right: float
    length_wrong: float


@torch.no_grad()
def look(task: Walk, table: Table) -> Look:
    """Follow the distribution over places token by token. A policy that is always right has length 0 for wrong ones."""
    prompt = torch.arange(task.prompts, device=table.device)
    logp = table.log_softmax(-1)
    p = logp.exp()
    per_place = -(p * logp).sum(-1)
    here = torch.arange(task.places, device=table.device)
    step = (
        here[None, :] - here[:, None]
    ) % task.places  # step that leads from one place (row) to another (column)
    move = p[:, here[:, None], step]
    alive = torch.zeros_like(per_place)
    alive[:, 0] = 1.0
    right, nats, tokens, right_tokens = (torch.zeros_like(alive[:, 0]) for _ in range(4))
    for position in range(task.limit):
        stopped = alive[prompt, task.targets(prompt)] * p[prompt, task.targets(prompt), task.stop]
        nats, tokens = nats + (alive * per_place).sum(1), tokens + alive.sum(1)
        right, right_tokens = right + stopped, right_tokens + (position + 1) * stopped
        alive = torch.einsum("ps,pst->pt", alive, move)
    wrong, wrong_tokens = (1 - right).mean(), (tokens - right_tokens).mean()
    return Look(
        reward=float(right.mean()),
        entropy=float(nats.mean() / tokens.mean()),
        length=float(tokens.mean()),
        length_right=float(right_tokens.mean() / right.mean().clamp(min=1e-12)),
        length_wrong=float(wrong_tokens / wrong) if wrong > 1e-9 else 0.0,
    )


@dataclass(frozen=True)
class WalkLab:
    """The task for an engine: prompts are their numbers, the policy a `TablePolicy`, the reward 1 or 0."""

    task: Walk = field(default_factory=Walk)

    @property
    def token_limit(self) -> int:
        """The longest response."""
        return self.task.limit

    def sample(
        self,
        policy: Any,
        prompts: Sequence[int],
        *,
        temperature: float,
        seed: int,
        given: Given | None = None,
    ) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"]]:
        """Ids and mask of one response per prompt."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), self.task.limit, generator=generator, dtype=torch.float64)
        prompt = torch.tensor(prompts)
        return sample(self.task, policy.table, prompt, uniform, temperature=temperature, given=given)

    def fresh_prompts(self, count: int, *, seed: int) -> list[int]:
        """Prompts drawn with replacement; the task has no more than its table."""
        return draw_prompts(self.task.prompts, count, seed)

    def logits(
        self, policy: Any, prompts: Sequence[int], ids: Int[Tensor, "row time"]
    ) -> Float[Tensor, "row time token"]:
        """Logits that each token was drawn from."""
        found: Tensor = policy.table[torch.tensor(prompts)[:, None], places_of(self.task, ids)]
        return found

    def reward(
        self, prompts: Sequence[int], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 for a right response, else 0."""
        return correct(self.task, torch.tensor(prompts), ids, mask).float()
