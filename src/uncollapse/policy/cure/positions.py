"""Where an answer is cut, and what is kept of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError

Mode: TypeAlias = Literal["entropy", "random"]
Keep: TypeAlias = Literal["reject", "head"]
Rows: TypeAlias = Sequence[Sequence[int]]
"""Token ids of several rows, without padding."""

SHORTEST = 2
"""Fewest characters of a critical token's text, without blanks around it, in the official code."""


def critical_tokens(
    decoded: Sequence[str], special: Iterable[int] = (), shortest: int = SHORTEST
) -> Bool[Tensor, " vocab"]:
    """Which tokens of a vocabulary may be critical: not special, and of `shortest` or more characters when stripped.

    `decoded` holds the text of every token id; `special` the ids of end of text, padding and the like. With 2, as in the
    official code, punctuation, single digits and letters, and blanks are out. A vocabulary of single characters has no
    critical token then: give 1 (only blanks and special tokens are out) or 0 (only special tokens). Warns where no
    token is critical, since every branch is a whole new answer then. Special ids beyond the table change nothing: no
    token outside it is critical. Raises `DataError` for a negative one.

    Source: official `dapo_ray_trainer.py`, which asks this token by token.
    """
    table = torch.tensor([len(text.strip()) >= shortest for text in decoded], dtype=torch.bool)
    ids = sorted(special)
    if ids and ids[0] < 0:
        raise DataError(f"critical_tokens: {ids[0]} is no token id; give special ids from 0 on")
    table[torch.tensor([token for token in ids if token < len(table)], dtype=torch.long)] = False
    if not bool(table.any()):
        warnings.warn(
            f"cure: none of {len(table)} tokens has {shortest} characters, so no token is critical and every branch is a "
            "whole new answer; for a tokenizer of single characters set shortest to 1",
            stacklevel=2,
        )
    return table


@torch.no_grad()
def critical_positions(
    entropy: Float[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    token_ok: Bool[Tensor, "row time"] | None = None,
    k: int = 20,
    mode: Mode = "entropy",
    max_pos: int | Int[Tensor, " row"] | None = None,
    *,
    uniform: Float[Tensor, " row"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " row"]:
    """Where each row is cut: one position, drawn uniformly from the `k` candidates with the highest entropy (nats).

    Candidates are positions of `mask` with `token_ok`, at most `max_pos`, and not the row's first, since a cut there
    keeps nothing. Ties go to the earlier position. A row with fewer than `k` candidates draws from all it has; one
    with none gives its first position (0 if the mask starts there). `mode="random"` draws from all candidates.

    Give exactly one of `uniform`, one number in [0, 1) per row that belongs to the row, and `generator`. Raises
    `ConfigError` for neither or both, k below 1 and an unknown mode. Cost: one sort per row.

    Source: arXiv 2508.11016, section 3.2; official `dapo_ray_trainer.py`.
    """
    if (uniform is None) == (generator is None):
        raise ConfigError("critical_positions: give either uniform (a number per row) or generator, not both")
    if k < 1 or mode not in ("entropy", "random"):
        raise ConfigError(f"critical_positions: needs k >= 1 and mode entropy or random; got {k}, {mode!r}")
    if uniform is None:
        assert generator is not None
        uniform = torch.rand(len(mask), generator=generator, dtype=torch.float64, device=generator.device)
    if not mask.numel():
        return torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    place = torch.arange(mask.shape[1], device=mask.device)
    first = mask.int().argmax(1)
    candidate = mask & (place > first[:, None]) & ~entropy.isnan()
    if token_ok is not None:
        candidate = candidate & token_ok
    if max_pos is not None:
        candidate = candidate & (place <= torch.as_tensor(max_pos, device=mask.device).reshape(-1, 1))
    # In random mode all candidates tie, and all of them are drawn from.
    count = candidate.sum(1)
    score = entropy
    if mode == "entropy":
        count = count.clamp(max=k)
    else:
        score = torch.zeros_like(entropy)
    order = torch.where(candidate, -score, torch.inf).argsort(dim=1, stable=True)
    drawn = (uniform.to(mask.device).double() * count).long().clamp(min=0)
    drawn = torch.minimum(drawn, (count - 1).clamp(min=0))
    return torch.where(count > 0, order.gather(1, drawn[:, None])[:, 0], first)


def branch_prompts(
    prompt_ids: Rows,
    responses: Rows,
    positions: Int[Tensor, " row"],
    max_prompt_len: int | None = None,
    keep: Keep = "reject",
) -> list[list[int]]:
    """What the branches continue: prompt followed by response[:position]; the critical token itself is left out.

    Longer than `max_prompt_len` tokens, `keep="head"` keeps the first ones, as the released code does: the cut then
    moves earlier, without notice. `keep="reject"` raises `DataError`; choose positions with
    `max_pos = max_prompt_len - prompt length` and it never does.
    """
    cuts = positions.tolist()
    starts = [
        [*prompt, *response[:cut]] for prompt, response, cut in zip(prompt_ids, responses, cuts, strict=True)
    ]
    if max_prompt_len is None:
        return starts
    if keep == "head":
        return [start[:max_prompt_len] for start in starts]
    for row, start in enumerate(starts):
        if len(start) > max_prompt_len:
            raise DataError(
                f"row {row}: prompt and prefix have {len(start)} tokens, the limit is {max_prompt_len}; "
                "choose positions with max_pos = limit - prompt length, or shorten the prompt"
            )
    return starts


def left_pad(
    rows: Rows, pad_id: int = 0, length: int | None = None
) -> tuple[Int[Tensor, "row time"], Int[Tensor, "row time"], Int[Tensor, "row time"]]:
    """Ids padded on the left, attention mask (0...01...1) and position ids (cumulative mask - 1, at least 0).

    `length` defaults to the longest row. Raises `DataError` if it is below that, and for no rows at all.
    """
    if not rows:
        raise DataError("left_pad: there are no rows; give at least one")
    widths = torch.tensor([len(row) for row in rows])
    longest = int(widths.max())
    length = longest if length is None else length
    if length < longest:
        raise DataError(
            f"left_pad: the longest row has {longest} tokens, more than length={length}; raise it"
        )
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows], dtype=torch.long)
    attention = (torch.arange(length) >= length - widths[:, None]).long()
    return ids, attention, (attention.cumsum(1) - 1).clamp(min=0)


def expected_tokens(originals: int, branches: int, length: float | int, cut: float | int) -> float:
    """Tokens generated for one group: originals x length + originals x branches x (length - mean cut)."""
    return originals * length + originals * branches * (length - cut)
