"""Tagged answers: a small language model that thinks and answers between tags, and often gets either wrong.

The prompt is a row of digits, `3172=`. A response writes the running sums modulo 10 between reasoning tags, once or
twice over, then the last of them between answer tags, and stops: `<r>3413</r><a>3</a>` and the end. The characters are
those of the character-LM lab, whose model is used: `?` and `;` open and close the reasoning, `+` and `!` the answer, `$` ends
the text. The reward is 10 for the format and 10 for the answer, whatever the format of the rest.

The supervised traces drop a tag now and then and miscalculate, so that the warmed-up model keeps the format about
85 times in 100 and is right in about 40. Lengths differ within a group of answers to one prompt.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from uncollapse.studies.testbeds.charlm import (
    PAD,
    CharacterLab,
    CharLM,
    decode,
    encode,
    logits_of,
    pad_right,
)

TAGS = encode("?;+!")
"""Ids of the tags, in the order in which they belong."""

DROP_RATE = 0.04
SLIP_RATE = 0.15
WARM_UP_STEPS = 400
FORMAT_REWARD = ANSWER_REWARD = 10.0

_FORMAT = re.compile(r"\?[0-9]+;\+[0-9]!\$")
_ANSWER = re.compile(r"\+([0-9])!\$$")


def make_prompts(generator: torch.Generator, count: int, *, digits: int = 4) -> list[tuple[int, ...]]:
    """Prompts of that many random digits and `=`, as token ids."""
    values = torch.randint(0, 10, (count, digits), generator=generator).tolist()
    return [encode("".join(map(str, row)) + "=") for row in values]


def running_sums(prompt: Sequence[int]) -> list[int]:
    """The sums modulo 10 of the prompt's first digits; the last is the answer."""
    sums, total = [], 0
    for digit in prompt[:-1]:
        total = (total + digit) % 10
        sums.append(total)
    return sums


def make_rows(
    seed: int, count: int, *, drop_rate: float = DROP_RATE, slip_rate: float = SLIP_RATE
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Supervised rows (prompt, response) as token ids.

    Every running sum is replaced by a random digit with probability `slip_rate`, and later ones build on it; the
    sums are written once or twice (the second time without new slips). Every tag is left out with
    probability `drop_rate`.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = make_prompts(generator, count)
    most = len(prompts[0]) - 1
    slips = (torch.rand(count, most, generator=generator) < slip_rate).tolist()
    wrong = torch.randint(0, 10, (count, most), generator=generator).tolist()
    blocks = torch.randint(1, 3, (count,), generator=generator).tolist()
    drops = (torch.rand(count, len(TAGS), generator=generator) < drop_rate).tolist()
    rows = []
    for prompt, slip, value, repeats, drop in zip(prompts, slips, wrong, blocks, drops, strict=True):
        total, body = 0, ""
        for index, digit in enumerate(prompt[:-1]):
            total = value[index] if slip[index] else (total + digit) % 10
            body += str(total)
        opened, closed, asked, told = (
            "" if gone else tag for tag, gone in zip(decode(TAGS), drop, strict=True)
        )
        rows.append((prompt, encode(f"{opened}{body * repeats}{closed}{asked}{total}{told}$")))
    return rows


def reference(prompt: Sequence[int]) -> tuple[int, ...]:
    """The shortest right response in the right format."""
    sums = running_sums(prompt)
    return encode("?" + "".join(map(str, sums)) + f";+{sums[-1]}!$")


def score(
    prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"]
) -> tuple[Bool[Tensor, " row"], Bool[Tensor, " row"]]:
    """Whether each response keeps the format, and whether the answer at its end is the sum modulo 10."""
    texts = [decode(row) for row in ids.tolist()]
    found = [_ANSWER.search(text) for text in texts]
    right = [
        match is not None and int(match[1]) == running_sums(prompt)[-1]
        for match, prompt in zip(found, prompts, strict=True)
    ]
    return torch.tensor([bool(_FORMAT.fullmatch(text)) for text in texts]), torch.tensor(right)


def warm_up(seed: int, *, steps: int = WARM_UP_STEPS, batch: int = 64, lr: float = 2e-3) -> CharLM:
    """A model trained on supervised rows from scratch; the same for the same arguments, kept in memory."""
    return copy.deepcopy(_warm_up(seed, steps, batch, lr))


@lru_cache(maxsize=16)
def _warm_up(seed: int, steps: int, batch: int, lr: float) -> CharLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharLM()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    rows = make_rows(seed, steps * batch)
    for step in range(steps):
        prompts, responses = zip(*rows[step * batch : (step + 1) * batch], strict=True)
        ids = pad_right(responses)
        loss = F.cross_entropy(logits_of(model, prompts, ids).transpose(1, 2), ids, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@dataclass(frozen=True)
class TagsLab(CharacterLab):
    """The lab for an engine; the reward is 0, 10 or 20."""

    token_limit: int = 20

    def fresh_prompts(self, count: int, *, seed: int) -> list[tuple[int, ...]]:
        """Random prompts."""
        return make_prompts(torch.Generator().manual_seed(seed), count)

    def reward(
        self, prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """10 for the format plus 10 for the answer."""
        tidy, right = score(prompts, ids)
        return FORMAT_REWARD * tidy.float() + ANSWER_REWARD * right.float()


@dataclass(frozen=True)
class Examination:
    """How a model does on fresh prompts at temperature 1.

    Shares of responses that keep the `format` and that are right (`accuracy`), `entropy` per token (nats), `length`
    (tokens), and `tags`: the mean probability of the four tags where the reference response has them.
    """

    format: float
    accuracy: float
    entropy: float
    length: float
    tags: float

    @property
    def reward(self) -> float:
        """Mean reward as a share of the largest."""
        largest = FORMAT_REWARD + ANSWER_REWARD
        return (FORMAT_REWARD * self.format + ANSWER_REWARD * self.accuracy) / largest


@torch.no_grad()
def examine(model: CharLM, seed: int, *, count: int = 512) -> Examination:
    """Sample `count` fresh prompts and look."""
    lab = TagsLab()
    prompts = lab.fresh_prompts(count, seed=seed)
    ids, mask = lab.sample(model, prompts, temperature=1.0, seed=seed)
    logp = logits_of(model, prompts, ids).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    tidy, right = score(prompts, ids)
    best = torch.tensor([reference(prompt) for prompt in prompts])
    of_best = logits_of(model, prompts, best).softmax(-1).gather(2, best[..., None])[..., 0]
    return Examination(
        format=float(tidy.double().mean()),
        accuracy=float(right.double().mean()),
        entropy=float(entropy[mask].double().mean()),
        length=float(mask.sum(1).double().mean()),
        tags=float(of_best[torch.isin(best, torch.tensor(TAGS))].double().mean()),
    )
