"""Do two losses pull the same parameters apart? Inner product and cosine of their gradients, group by group.

A negative cosine says that a small step along one gradient makes the other loss larger, to first order.

Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (2020), definition 1, for the word; the arithmetic is elementary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import DataError


@dataclass(frozen=True)
class GradientConflict:
    """Two gradients on one group of tensors: inner product and Euclidean norms, in units of loss per parameter."""

    dot: Float[Tensor, ""]
    norm_a: Float[Tensor, ""]
    norm_b: Float[Tensor, ""]

    @property
    def cosine(self) -> Float[Tensor, ""]:
        """Cosine in [-1, 1]; NaN where one of the gradients is zero, as where a loss does not reach the group."""
        return (self.dot / (self.norm_a * self.norm_b)).clamp(-1, 1)

    @property
    def conflicting(self) -> Bool[Tensor, ""]:
        """Whether the inner product is negative."""
        return self.dot < 0


def gradient_conflict_report(
    loss_a: Float[Tensor, ""], loss_b: Float[Tensor, ""], groups: Mapping[str, Iterable[Tensor]]
) -> dict[str, GradientConflict]:
    """How the gradients of two losses stand to each other on each group of parameters (or features).

    Costs one backward pass per loss down to the tensors of the groups; the graph is kept and no `.grad` is touched, so
    training goes on as if nobody had looked. The values stay on the device.

    Raises:
        DataError: a group without a tensor that requires a gradient, or a loss without a graph.
    """
    listed = {name: list(tensors) for name, tensors in groups.items()}
    for name, tensors in listed.items():
        if not any(tensor.requires_grad for tensor in tensors):
            raise DataError(f"gradient_conflict_report: nothing in group {name!r} requires a gradient")
    of_a, of_b = _gradients(loss_a, listed), _gradients(loss_b, listed)
    return {name: _conflict(of_a[name], of_b[name], loss_a) for name in listed}


def inner_product(
    left: Sequence[Tensor | None], right: Sequence[Tensor | None], like: Tensor
) -> Float[Tensor, ""]:
    """Sum of the products of all entries of two lists of tensors, float32 or better; None counts as zeros."""
    total = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    for a, b in zip(left, right, strict=True):
        if a is not None and b is not None:
            total = total + torch.dot(a.flatten().to(total.dtype), b.flatten().to(total.dtype))
    return total


def _gradients(loss: Tensor, groups: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor | None]]:
    if not loss.requires_grad:
        raise DataError("gradient_conflict_report: a loss has no graph; compute both with gradients enabled")
    wanted = {id(t): t for tensors in groups.values() for t in tensors if t.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
    of = dict(zip(wanted, found, strict=True))
    return {name: [of.get(id(t)) for t in tensors] for name, tensors in groups.items()}


def _conflict(a: list[Tensor | None], b: list[Tensor | None], like: Tensor) -> GradientConflict:
    return GradientConflict(
        inner_product(a, b, like), inner_product(a, a, like).sqrt(), inner_product(b, b, like).sqrt()
    )
