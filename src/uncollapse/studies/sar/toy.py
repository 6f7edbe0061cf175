"""Two classes, one bias, no randomness: how a few outliers carry Tent away, and how a filter stops that.

A sample is a number x, its logits are (x + b, 0), and b is adapted. Classes are symmetric about 0, so by itself nothing moves b
for good. The gradient of the entropy in b is -z p (1 - p), z = x + b: it is largest at |z| = 1.54, where the entropy
is 67 % of ln 2, and small for sure samples. A few samples there, all on one side, push without anything to balance them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uncollapse.representation.sar import SAR, Tent

SURE, UNSURE, OUTLIER = 4.0, 1.6, 1.5
"""Logits of the sure and the unsure samples of each class, and of the outliers, all of which lie on one side."""
START = 0.3


class Bias(nn.Module):
    """Logits (x + b, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor([START], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of two classes."""
        return torch.stack([x + self.b, torch.zeros_like(x)], -1)


def samples(*, outliers: bool) -> Tensor:
    """200 samples: 20 % sure and 75 % unsure ones, half of each class, and 5 % outliers, or unsure ones in their place."""
    sides = [SURE] * 20 + [UNSURE] * (75 if outliers else 80)
    both = torch.tensor([*sides, *(-x for x in sides)], dtype=torch.float64)
    return torch.cat([both, torch.full((10 if outliers else 0,), OUTLIER, dtype=torch.float64)])


def biases(arm: str, *, outliers: bool, steps: int = 300, lr: float = 0.1) -> list[float]:
    """b before each step and at the end, whole batches, SGD with momentum 0.9; `arm` is "tent" or "sar"."""
    model, x = Bias(), samples(outliers=outliers)
    optimizer = torch.optim.SGD([model.b], lr=lr, momentum=0.9)
    adapted = {"tent": Tent, "sar": SAR}[arm](model, optimizer)
    seen = [float(model.b.detach())]
    for _ in range(steps):
        adapted(x)
        seen.append(float(model.b.detach()))
    return seen
