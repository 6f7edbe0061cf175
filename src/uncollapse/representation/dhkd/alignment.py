"""Gradient alignment: where two losses disagree on shared parameters, the second one gives way.

With g1 the gradient of the loss that has priority and g2 that of the other:

    g2' = g2 - min(0, <g2, g1>) / ||g1||^2  g1,      step along g1 + g2'.

`scope="shared"` takes inner product and norm over the parameters that both losses reach: then <g2', g1> >= 0
exactly, and heads of one loss keep its plain gradient. `scope="all"` is the released code: the norm runs over everything
that g1 reaches, so the conflict is only partly removed and the main head's gradient grows by -<g2, g1> / ||g1||^2 of itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.gradient_conflict import inner_product

Scope: TypeAlias = Literal["shared", "all"]
Gradients: TypeAlias = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class AlignedGradients:
    """What `project_conflicting_gradients` found; parameters that a loss does not reach have None.

    Attributes:
        parts: for each loss its gradient after projection, one entry per parameter.
        dots: for each loss the inner product of its gradient with that of the priority, before projection; below 0
            means conflict. For the priority itself it is the squared norm.
    """

    parts: tuple[Gradients, ...]
    dots: Float[Tensor, " loss"]

    @property
    def total(self) -> Gradients:
        """Sum over the losses, for each parameter."""
        return tuple(_sum([g for g in of if g is not None]) for of in zip(*self.parts, strict=True))


def project_conflicting_gradients(
    losses: Sequence[Float[Tensor, ""]],
    params: Iterable[Tensor],
    priority: int = 0,
    scope: Scope = "shared",
    *,
    retain_graph: bool = False,
) -> AlignedGradients:
    """Gradients of the losses, each made orthogonal to that of the priority where it opposes it.

    Unlike PCGrad, the loss with priority keeps its gradient, so nothing depends on an order. One backward
    pass per loss; no `.grad` is touched, and only tensors that a loss reaches get a gradient.

    Args:
        losses: scalars with their weights, such as (gamma CE, alpha BinaryKL-Norm).
        params: every trainable parameter; which of them are shared follows from the graph.
        priority: index of the loss that wins.
        scope: "shared", or "all" for parity with the released code.
        retain_graph: keep the graph for another pass.

    Raises:
        ConfigError: no such priority or scope.
        DataError: a loss without a graph.
    """
    _check(losses, priority, scope)
    tensors = [p for p in params if p.requires_grad]
    return _aligned(_gradients(losses, tensors, retain_graph), losses[0], priority, scope)


def aligned_loss(
    losses: Sequence[Float[Tensor, ""]],
    params: Iterable[Tensor],
    priority: int = 0,
    scope: Scope = "shared",
) -> Float[Tensor, ""]:
    """The sum of the losses, whose `backward()` hands out the aligned gradients: for trainers that take one loss.

    What the losses reach beside `params` gets the plain sum of their gradients. The backward passes happen here, at full
    precision of the graph, so a loss scale applied later protects no half-precision gradient from underflow. With
    accumulation or several processes every part aligns its own gradients.

    Args:
        losses, priority, scope: as in `project_conflicting_gradients`.
        params: parameters on which the gradients are aligned, all or some.

    Raises:
        ConfigError, DataError: as `project_conflicting_gradients`.
    """
    _check(losses, priority, scope)
    aligned = [p for p in params if p.requires_grad]
    plain = _leaves_beside(aligned, losses)
    found = _gradients(losses, [*aligned, *plain], retain_graph=False)
    here = len(aligned)
    total = _aligned([gradients[:here] for gradients in found], losses[0], priority, scope).total
    rest = tuple(
        _sum([g for g in of if g is not None])
        for of in zip(*(gradients[here:] for gradients in found), strict=True)
    )
    value = torch.stack([loss.detach() for loss in losses]).sum()
    out: Tensor = _WithGradients.apply(value, (*total, *rest), *aligned, *plain)
    return out


class GradientAlignment:
    """An optimiser with aligned gradients: `zero_grad()`, `backward(losses)`, `step()`.

    `backward` adds to `.grad` as autograd does, so gradient clipping and weight decay come afterwards as usual. `dots`
    holds the inner products of the last call (see `AlignedGradients`), on the device.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, scope: Scope = "shared", priority: int = 0
    ) -> None:
        self.optimizer, self.scope, self.priority = optimizer, scope, priority
        self.dots: Float[Tensor, " loss"] | None = None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def backward(self, losses: Sequence[Float[Tensor, ""]]) -> None:
        """Add the aligned gradients of the losses to the parameters' `.grad`."""
        tensors = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        aligned = project_conflicting_gradients(losses, tensors, self.priority, self.scope)
        self.dots = aligned.dots
        for parameter, gradient in zip(tensors, aligned.total, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                # autograd may give several parameters one tensor, or an expanded one, and clipping works in place
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                parameter.grad = parameter.grad + gradient

    def step(self) -> None:
        """Update the parameters."""
        self.optimizer.step()


def _check(losses: Sequence[Tensor], priority: int, scope: str) -> None:
    if scope not in ("shared", "all"):
        raise ConfigError(f"gradient alignment: scope is {scope!r}; give 'shared' or 'all'")
    if not 0 <= priority < len(losses):
        raise ConfigError(f"gradient alignment: priority is {priority}, there are {len(losses)} losses")
    if not all(loss.requires_grad for loss in losses):
        raise DataError("gradient alignment: a loss has no graph; compute all with gradients enabled")


def _gradients(losses: Sequence[Tensor], tensors: Sequence[Tensor], retain_graph: bool) -> list[Gradients]:
    """Of each loss, one entry per tensor."""
    return [
        torch.autograd.grad(
            loss, tensors, retain_graph=retain_graph or k + 1 < len(losses), allow_unused=True
        )
        for k, loss in enumerate(losses)
    ]


def _aligned(found: Sequence[Gradients], like: Tensor, priority: int, scope: Scope) -> AlignedGradients:
    first = found[priority]
    parts, dots = [], []
    for k, gradients in enumerate(found):
        dots.append(inner_product(gradients, first, like))
        parts.append(gradients if k == priority else _projected(gradients, first, dots[-1], scope))
    return AlignedGradients(tuple(parts), torch.stack(dots))


def _leaves_beside(tensors: Sequence[Tensor], losses: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of the graphs of the losses that are not among `tensors`, in the order in which they are met."""
    known = {id(tensor) for tensor in tensors}
    found: list[Tensor] = []
    waiting = [loss.grad_fn for loss in losses]
    visited = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)  # of the nodes that add to .grad
        if isinstance(leaf, Tensor) and leaf.is_leaf and id(leaf) not in known:
            known.add(id(leaf))
            found.append(leaf)
        for following, _ in () if node is None else node.next_functions:
            if following not in visited:
                visited.add(following)
                waiting.append(following)
    return found


def _projected(gradients: Gradients, first: Gradients, dot: Tensor, scope: Scope) -> Gradients:
    reached = [g if scope == "all" or h is not None else None for g, h in zip(first, gradients, strict=True)]
    power = inner_product(reached, reached, dot)
    # Without a conflict the coefficient is 0; a priority of zero gradient conflicts with nothing.
    coefficient = dot.clamp(max=0) / torch.where(power > 0, power, 1)
    return tuple(
        g if r is None else _sum([*([] if g is None else [g]), -coefficient.to(r.dtype) * r])
        for g, r in zip(gradients, reached, strict=True)
    )


def _sum(tensors: Sequence[Tensor]) -> Tensor | None:
    total = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return total


class _WithGradients(torch.autograd.Function):
    """A value whose gradient with respect to `parameters` is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        return (None, None, *(None if g is None else g * scale.to(g.dtype) for g in ctx.gradients))
