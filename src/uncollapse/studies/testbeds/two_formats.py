"""Two formats: a task with two equally right ways to answer, so that the reward leaves open which one is learnt.

An answer is two tokens: a format and a digit. Tokens 0 and 1 are the two right formats, and in format f the digit
has to be (prompt + f) modulo V, so that what is learnt in one format does not serve in the other. The policy is a table:
the logits of the format are shared by all prompts, as a habit of a language model would be; those of the digit
belong to prompt and format. A bonus on format 0 breaks the tie. Reward and share are computed exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError
from uncollapse.studies.testbeds.drawing import Given, draw_prompts, draw_token


@dataclass(frozen=True)
class TwoFormats:
    """The task: number of prompts, vocabulary, and the bonus (reward) for a right answer in format 0."""

    prompts: int = 8
    vocab: int = 6
    bonus: float = 0.0

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.vocab < 2:
            raise ConfigError(f"{self}: needs at least 1 prompt and a vocabulary of 2")

    def correct(self, prompt: Int[Tensor, " row"], ids: Int[Tensor, "row time"]) -> Bool[Tensor, " row"]:
        """Whether each answer is right in one of the two formats."""
        return (ids[:, 0] < 2) & (ids[:, 1] == (prompt + ids[:, 0]) % self.vocab)


class FormatPolicy(nn.Module):
    """Logits of the format, shared by all prompts, and of the digit after each format; drawn from N(0, `spread`^2)."""

    def __init__(self, task: TwoFormats, seed: int, spread: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (task.prompts, task.vocab, task.vocab)
        self.format = nn.Parameter(spread * torch.randn(task.vocab, generator=generator))
        self.digit = nn.Parameter(spread * torch.randn(shape, generator=generator))

    def right(self, task: TwoFormats) -> Float[Tensor, "prompt format"]:
        """Probability of the right answer in each of the two formats."""
        prompt, style = torch.arange(task.prompts)[:, None], torch.arange(2)
        digit = self.digit.double().softmax(-1)[prompt, style, (prompt + style) % task.vocab]
        return self.format.double().softmax(-1)[:2] * digit


def exact_accuracy(task: TwoFormats, policy: FormatPolicy) -> float:
    """Probability of a right answer, mean over prompts."""
    return float(policy.right(task).sum(1).mean())


def exact_share(task: TwoFormats, policy: FormatPolicy) -> float:
    """Share of format 0 among the right answers, over all prompts."""
    right = policy.right(task).sum(0)
    return float(right[0] / right.sum())


@dataclass(frozen=True)
class TwoFormatsLab:
    """The task for an engine: prompts are their numbers, the policy a `FormatPolicy`."""

    task: TwoFormats = field(default_factory=TwoFormats)

    @property
    def token_limit(self) -> int:
        """The length of every answer."""
        return 2

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
        uniform = torch.rand(len(prompts), 2, generator=generator, dtype=torch.float64)
        ids = torch.zeros(len(prompts), 2, dtype=torch.long)
        for time in range(2):
            logits = self.logits(policy, prompts, ids)[:, time]
            cumulative = (logits / temperature).softmax(-1).cumsum(-1)
            ids[:, time] = draw_token(cumulative, uniform[:, time], time, given)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def fresh_prompts(self, count: int, *, seed: int) -> list[int]:
        """Prompts drawn with replacement; the task has no more than its table."""
        return draw_prompts(self.task.prompts, count, seed)

    def logits(
        self, policy: Any, prompts: Sequence[int], ids: Int[Tensor, "row time"]
    ) -> Float[Tensor, "row time vocab"]:
        """Logits that each token was drawn from."""
        style = policy.format.expand(len(prompts), -1)
        return torch.stack([style, policy.digit[torch.tensor(prompts), ids[:, 0]]], 1)

    def reward(
        self, prompts: Sequence[int], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 for a right answer, and the bonus on top in format 0; else 0."""
        right = self.task.correct(torch.tensor(prompts), ids)
        return torch.where(right, 1.0 + self.task.bonus * (ids[:, 0] == 0), 0.0)
