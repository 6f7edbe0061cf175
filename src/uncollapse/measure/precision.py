"""The precision that instruments work in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers, half precision as float32: it neither sums many terms nor holds masked logits. No copy of wider ones."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
