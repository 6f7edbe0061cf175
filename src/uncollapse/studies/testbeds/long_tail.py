"""long tail: a vocabulary whose tail is large, and answers long enough for it to matter; everything is computed exactly.

S prompts; an answer is T tokens out of V. The policy is a low-rank table, z[s, t] = E h[s, t], as in a language model: all
positions share the output embedding E, so what is learnt about the tail at one position is learnt everywhere. Tokens
do not depend on each other. A few key positions of each prompt accept a few random ones of the tokens that are most
probable at the start; all others accept the initial nucleus of mass 0.98. An answer is right if every token is accepted.

A policy that stays as it is gets most positions right but rarely all keys. Entropy inside the accepted sets costs nothing,
entropy outside costs accuracy in every one of T positions: with tail mass e per position accuracy is below (1 - e)^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.studies.testbeds.drawing import Given, draw_prompts

Logits = Float[Tensor, "prompt position vocab"]
TokenSet = Bool[Tensor, "prompt position vocab"]


@dataclass(frozen=True)
class LongTail:
    """The task: prompts, answer length (tokens), vocabulary, rank of the policy; how many key positions each prompt has
    and how many of the `candidates` most probable tokens those accept."""

    prompts: int = 8
    length: int = 20
    vocab: int = 300
    rank: int = 16
    keys: int = 3
    accepted: int = 5
    candidates: int = 10
    nucleus: float = 0.98

    def __post_init__(self) -> None:
        if min(self.prompts, self.length, self.rank) < 1 or not 0 <= self.keys <= self.length:
            raise ConfigError(
                f"{self}: needs at least 1 prompt, token and rank, and 0 to length key positions"
            )
        if not 1 <= self.accepted <= self.candidates <= self.vocab or not 0 < self.nucleus < 1:
            raise ConfigError(f"{self}: needs 1 <= accepted <= candidates <= vocab and a nucleus in (0, 1)")


class LowRankPolicy(nn.Module):
    """h of shape (prompt, position, rank) and E of shape (vocab, rank), both trained."""

    def __init__(self, state: Float[Tensor, "prompt position rank"], embedding: Float[Tensor, "vocab rank"]):
        super().__init__()
        self.state, self.embedding = nn.Parameter(state), nn.Parameter(embedding)

    def forward(self) -> Logits:
        """Logits of all prompts and positions."""
        return self.state @ self.embedding.T


@dataclass(frozen=True)
class World:
    """A task made concrete: which tokens are accepted where, and which were in the nucleus at the start."""

    task: LongTail
    accepted: TokenSet
    nucleus: TokenSet


def make(
    task: LongTail, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[World, LowRankPolicy]:
    """A random policy, h ~ 1.1 N(0, 1) and E ~ N(0, 1), and the world around it; key positions are flatter (h times 0.75)."""
    shape = (task.prompts, task.length)
    state = 1.1 * torch.randn(*shape, task.rank, generator=generator, dtype=dtype)
    embedding = torch.randn(task.vocab, task.rank, generator=generator, dtype=dtype)
    order = torch.rand(shape, generator=generator).argsort(1)
    key = torch.zeros(shape, dtype=torch.bool).scatter_(1, order[:, : task.keys], True)
    policy = LowRankPolicy(torch.where(key[..., None], 0.75 * state, state), embedding)
    with torch.no_grad():
        p, ranking = policy().double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    inside = p.cumsum(-1) - p < task.nucleus
    nucleus = torch.zeros(*shape, task.vocab, dtype=torch.bool).scatter_(-1, ranking, inside)
    pick = torch.rand(*shape, task.candidates, generator=generator).argsort(-1)[..., : task.accepted]
    chosen = torch.zeros_like(nucleus).scatter_(-1, ranking.gather(-1, pick), True)
    return World(task, torch.where(key[..., None], chosen, nucleus), nucleus), policy


@dataclass(frozen=True)
class Exam:
    """What a policy is worth, exactly, as means over prompts and positions; entropies in nats per token.

    `right_entropy` is the entropy of the policy's right answers, per token: diversity that counts. `tail` is the
    mass outside the initial nucleus.
    """

    accuracy: float
    entropy: float
    right_entropy: float
    tail: float


@torch.no_grad()
def examine(world: World, policy: LowRankPolicy) -> Exam:
    """All expectations in closed form, in float64."""
    logp = policy().double().log_softmax(-1)
    p = logp.exp()
    accepted = torch.where(world.accepted, p, 0)
    mass = accepted.sum(-1)
    right = accepted / mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    return Exam(
        accuracy=float(mass.prod(-1).mean()),
        entropy=float(-(p * logp).sum(-1).mean()),
        right_entropy=float(torch.special.entr(right).sum(-1).mean()),
        tail=float(torch.where(world.nucleus, 0, p).sum(-1).mean()),
    )


@dataclass(frozen=True)
class LongTailLab:
    """The world for an engine: prompts are their numbers, the policy a `LowRankPolicy`, the reward 1 or 0."""

    world: World

    @property
    def token_limit(self) -> int:
        """The length of every answer."""
        return self.world.task.length

    def sample(
        self,
        policy: Any,
        prompts: Sequence[int],
        *,
        temperature: float,
        seed: int,
        given: Given | None = None,
    ) -> tuple[Int[Tensor, "row time"], Bool[Tensor, "row time"]]:
        """Ids and mask (all true) of one answer per prompt, by inverting the cumulative distribution."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), self.token_limit, generator=generator, dtype=torch.float64)
        cumulative = (policy() / temperature).double().softmax(-1).cumsum(-1)[torch.tensor(prompts)]
        ids = torch.searchsorted(cumulative, uniform[..., None], right=True)[..., 0]
        ids = ids.clamp(max=self.world.task.vocab - 1)  # rounding may leave the last sum below 1
        if given is not None:
            start, there = given
            ids[:, : start.shape[1]] = torch.where(there, start, ids[:, : start.shape[1]])
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def fresh_prompts(self, count: int, *, seed: int) -> list[int]:
        """Prompts drawn with replacement."""
        return draw_prompts(self.world.task.prompts, count, seed)

    def logits(
        self, policy: Any, prompts: Sequence[int], ids: Int[Tensor, "row time"]
    ) -> Float[Tensor, "row time vocab"]:
        """Logits that each token was drawn from; the tokens before it do not matter."""
        table: Logits = policy()[:, : ids.shape[1]]
        return table[torch.tensor(prompts)]

    def reward(
        self, prompts: Sequence[int], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 if every token is accepted, else 0."""
        accepted = self.world.accepted[torch.tensor(prompts)].gather(-1, ids[..., None])[..., 0]
        return accepted.all(1).float()
