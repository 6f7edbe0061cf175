"""Cross-entropy with a deep linear head: the problem over logits alone, and logits that beat the simplex ETF.

Over all factors with given logits the penalty is least at ((M+1)/2) (prod lam)^(1/(M+1)) sum_i s_i^(2/(M+1)), s the singular
values of the (sample, class) logits: a Schatten quasi-norm that prefers low rank the more the deeper the head. So a simplex
ETF, of rank K - 1, is no global minimum for K >= 4 and M >= 3, nor for K >= 6 and M = 2, whatever the penalty.

Source: Garrod and Keating, "The Persistence of Neural Collapse Despite Low-Rank Bias" (2025), for the warning; the
families here and their objectives are our own check of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from uncollapse.errors import ConfigError

_SCALES = torch.logspace(-3, 3, 241, dtype=torch.float64)


def schatten_penalty(
    logits: Float[Tensor, "class class"], n: int, depth: int, lam: SupportsFloat | Sequence[SupportsFloat]
) -> Float[Tensor, ""]:
    """((M+1)/2) (n prod lam)^(1/(M+1)) sum_i s_i^(2/(M+1)) of class-mean logits, n samples each.

    `lam`: one penalty for all M + 1 factors, or one for each.

    Raises:
        ConfigError: another number of penalties, or one that is not above 0.
    """
    power = 2 / (depth + 1)
    return _penalty_factor(n, depth, lam) * torch.linalg.svdvals(logits).pow(power).sum()


def schatten_objective(
    logits: Float[Tensor, "class class"], n: int, depth: int, lam: SupportsFloat | Sequence[SupportsFloat]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of class-mean logits (row k: what class k gets) plus `schatten_penalty`; nats.

    The least objective over all factors that give these logits; `balanced_factors` has them.
    """
    return (logits.logsumexp(1) - logits.diagonal()).mean() + schatten_penalty(logits, n, depth, lam)


def etf_logits(classes: int) -> Float[Tensor, "class class"]:
    """I - 11^T/K: rank K - 1, all singular values 1."""
    return torch.eye(classes, dtype=torch.float64) - 1 / classes


def paired_logits(classes: int) -> Float[Tensor, "class class"]:
    """Blocks [[1, -1], [-1, 1]] for pairs of classes: rank K/2; every class is opposite to one and orthogonal to the rest.

    Raises:
        ConfigError: an odd number of classes.
    """
    if classes % 2:
        raise ConfigError(f"paired_logits: {classes} classes do not pair; give an even number")
    pair = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return torch.kron(torch.eye(classes // 2, dtype=torch.float64), pair)


def circulant_logits(classes: int) -> Float[Tensor, "class class"]:
    """cos(2 pi (i - j)/K): rank 2, Gram matrix of K points evenly on a circle."""
    angle = 2 * math.pi * torch.arange(classes, dtype=torch.float64) / classes
    return torch.cos(angle[:, None] - angle)


@dataclass(frozen=True)
class ScaledLogits:
    """Best multiple of a pattern: `scale` (0: none is better than no logits at all), its logits and objective."""

    scale: float
    objective: float
    logits: Float[Tensor, "class class"]


def best_scale(
    pattern: Float[Tensor, "class class"], n: int, depth: int, lam: SupportsFloat | Sequence[SupportsFloat]
) -> ScaledLogits:
    """Least `schatten_objective` over the multiples a >= 0 of a pattern, to about 1e-12.

    For M >= 2 it has several local minima, a = 0 among them: a grid from 1e-3 to 1e3 finds the right one first.
    """
    power = 2 / (depth + 1)
    charge = float(_penalty_factor(n, depth, lam) * torch.linalg.svdvals(pattern).pow(power).sum())

    def objective(scales: Tensor) -> Tensor:
        z = scales[:, None, None] * pattern
        loss = (z.logsumexp(2) - z.diagonal(dim1=1, dim2=2)).mean(1)
        return loss + charge * scales.pow(power)

    coarse = int(objective(_SCALES).argmin())
    near = _SCALES.log()[[max(0, coarse - 1), min(len(_SCALES) - 1, coarse + 1)]].tolist()
    found = minimize_scalar(
        lambda log_scale: float(objective(torch.tensor([math.exp(log_scale)], dtype=torch.float64))[0]),
        bounds=near,
        method="bounded",
        options={"xatol": 1e-11},
    )
    nothing = math.log(len(pattern))
    scale, minimum = (math.exp(found.x), float(found.fun)) if found.fun < nothing else (0.0, nothing)
    return ScaledLogits(scale, minimum, scale * pattern)


def _penalty_factor(n: int, depth: int, lam: SupportsFloat | Sequence[SupportsFloat]) -> float:
    lams = tuple(map(float, lam)) if isinstance(lam, Iterable) else (float(lam),) * (depth + 1)
    if len(lams) != depth + 1 or not all(value > 0 for value in lams):
        raise ConfigError(
            f"schatten_penalty: penalties {lams} for {depth + 1} factors; give one each, above 0"
        )
    return (depth + 1) / 2 * (n * math.prod(lams)) ** (1 / (depth + 1))
