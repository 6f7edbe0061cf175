"""What every engine says of a response besides its tokens and its reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def response_columns(
    ids: Int[Tensor, "row time"], length: Int[Tensor, " row"], *, ends: Sequence[int], limit: int
) -> dict[str, Tensor]:
    """The columns `length` (tokens), `finished` (its last token is one of `ends`) and `token_limit`."""
    last = ids.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
    finished = torch.isin(last, torch.tensor(list(ends), device=ids.device)) & (length > 0)
    return {
        "length": length,
        "finished": finished,
        "token_limit": torch.tensor(float(limit), device=ids.device),
    }
