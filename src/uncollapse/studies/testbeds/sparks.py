"""A character LM with a spark: a rare token that at first mostly leads to failure and, once its branch is learnt, to success.

The task is the running maximum of `charlm`. A response writes the running maxima `s;s;` and answers `!s$`, or writes the
re-check token `?` in between and does it all again: `s;s;?s;s;!s$`. An answer that was checked is accepted if it is right. One
that was not is accepted, if right, with probability `LUCK` only: thinking once is enough more often than not. The supervised
traces check rarely (`CHECKED`), and what they write after the check is mostly wrong (`GARBLED` of its steps are random
digits), so at the start the spark is punished: its branch has to be learnt before it pays, and then it pays always.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.policy.batch import Clock
from uncollapse.studies.testbeds.charlm import RECHECK, CharLM, CharLMLab, encode, make_prompts, score, taught

DIGITS = 3
LUCK = 0.6
CHECKED = 0.05
SLIP = 0.04
GARBLED = 0.7
TEACHING = 14_000


def make_rows(seed: int, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Supervised rows (prompt, response) as token ids.

    A step is a random digit with probability `SLIP` in the first block, `GARBLED` in the second, which a share `CHECKED` of
    the rows has; later steps of a block build on it.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = make_prompts(generator, count, digits=(DIGITS, DIGITS))
    checked = (torch.rand(count, generator=generator) < CHECKED).tolist()
    chance = torch.tensor([SLIP] * (DIGITS - 1) + [GARBLED] * (DIGITS - 1))
    slips = (torch.rand(count, len(chance), generator=generator) < chance).tolist()
    wrong = torch.randint(0, 10, (count, len(chance)), generator=generator).tolist()
    rows = []
    for prompt, check, slip, value in zip(prompts, checked, slips, wrong, strict=True):
        numbers, text, best = prompt[0::2], "", 0
        for block in range(1 + check):
            best, text = numbers[0], text + "?" * block
            for step, number in enumerate(numbers[1:], start=block * (DIGITS - 1)):
                best = value[step] if slip[step] else max(best, number)
                text += f"{best};"
        rows.append((prompt, encode(f"{text}!{best}$")))
    return rows


def warm_up(seed: int, *, rows: int = TEACHING) -> CharLM:
    """A model trained on supervised rows from scratch; the same for the same arguments, kept in memory."""
    return copy.deepcopy(_warm_up(seed, rows))


@lru_cache(maxsize=4)
def _warm_up(seed: int, rows: int) -> CharLM:
    return taught(seed, make_rows(seed, rows))


@dataclass(frozen=True)
class SparkLab(CharLMLab):
    """The lab for an engine; the reward is 1 for an accepted answer, else 0."""

    token_limit: int = 16
    digits: tuple[int, int] = (DIGITS, DIGITS)

    def reward(
        self, prompts: Sequence[Sequence[int]], ids: Int[Tensor, "row time"], mask: Bool[Tensor, "row time"]
    ) -> Float[Tensor, " row"]:
        """1 for a right answer that was checked or lucky. Luck is a hash of the prompt and the row's place."""
        label = torch.tensor([int("".join(map(str, prompt[0::2]))) for prompt in prompts])
        uid = label * 1_000_003 + torch.arange(len(label))
        lucky = Clock().uniform(uid, 1, "luck")[:, 0] < LUCK
        return (score(prompts, ids) & ((ids == RECHECK).any(1) | lucky.to(ids.device))).float()


@dataclass(frozen=True)
class Sight:
    """A policy on fresh prompts: accepted answers, share of responses that check, their acceptance, entropy (nats per token).

    `spark` is the probability of the re-check token where the first block ends, averaged over prompts.
    """

    success: float
    checked: float
    checked_success: float
    spark: float
    entropy: float


@torch.no_grad()
def look(model: Any, seed: int, *, count: int = 512) -> Sight:
    """Sample `count` fresh prompts at temperature 1 and look."""
    lab = SparkLab()
    prompts = lab.fresh_prompts(count, seed=seed)
    ids, mask = lab.sample(model, prompts, temperature=1.0, seed=seed)
    logp = lab.logits(model, prompts, ids).log_softmax(-1)
    reward, checks = lab.reward(prompts, ids, mask).double(), (ids == RECHECK).any(1)
    decision = 2 * (DIGITS - 1)  # after `s;s;`, if the response has that form
    entropy = -(logp.exp() * logp).sum(-1)
    return Sight(
        success=float(reward.mean()),
        checked=float(checks.double().mean()),
        checked_success=float(reward[checks].mean()) if bool(checks.any()) else 0.0,
        spark=float(logp[:, decision, RECHECK].exp().double().mean()),
        entropy=float(entropy[mask].double().mean()),
    )
