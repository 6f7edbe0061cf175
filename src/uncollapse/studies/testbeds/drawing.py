"""Draw tokens and prompts from numbers that belong to their rows: the same whatever the order and number of rows."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Given: TypeAlias = tuple[Int[Tensor, "row start"], Bool[Tensor, "row start"]]
"""Tokens that stand at the start of each row instead of drawn ones: ids, and where they are."""


def draw_token(
    cumulative: Float[Tensor, "row vocab"], number: Float[Tensor, " row"], place: int, given: Given | None
) -> Int[Tensor, " row"]:
    """The token at `place` of each row: the one given, else the inverse of the cumulative distribution at a number in [0, 1)."""
    # rounding may leave the last sum below 1, hence the clamp
    token = (cumulative <= number[:, None]).sum(-1).clamp(max=cumulative.shape[-1] - 1)
    if given is not None and place < given[0].shape[1]:
        token = torch.where(given[1][:, place], given[0][:, place], token)
    return token


def draw_prompts(prompts: int, count: int, seed: int) -> list[int]:
    """Numbers of `count` prompts out of 0, ..., prompts - 1, with replacement."""
    drawn: list[int] = torch.randint(
        prompts, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return drawn
