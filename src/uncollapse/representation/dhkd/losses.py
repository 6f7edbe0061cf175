"""Logit-level losses: match the teacher's logits class by class, each class a coin of its own.

With u = a / tau and v = t / tau, sigma the logistic function, N positions and C classes:

    BinaryKL       tau^2 / N  sum_{n,c}  KL( Bern(sigma(v)) || Bern(sigma(u)) )
    BinaryKL-Norm  tau^2 / N  sum_{n,c}  KL( Bern(1/2) || Bern(sigma(u - v)) )  =  tau^2 / N  sum ln cosh((a - t) / (2 tau))

Both tend to ||a - t||^2 / (8 N) for large tau. The teacher is a constant: it gets no gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from uncollapse.errors import ConfigError, DataError

Reduction: TypeAlias = Literal["batch_mean", "class_mean", "sum", "none"]


def binary_kl_loss(
    logits: Float[Tensor, "*position class"],
    teacher_logits: Float[Tensor, "*position teacher_class"],
    tau: float = 2.0,
    reduction: Reduction = "batch_mean",
    *,
    mask: Bool[Tensor, "*position"] | None = None,
    clamp: float | None = None,
) -> Float[Tensor, "..."]:
    """BinaryKL, tau^2 KL(Bern(sigma(t / tau)) || Bern(sigma(a / tau))) summed over classes; >= 0, in nats.

    Gradient per class and position: tau (sigma(a / tau) - sigma(t / tau)) / N; it vanishes where both are saturated, so a
    class with a large teacher logit is learnt slowly. Half precision is computed in float32.

    Args:
        logits: of the student (its auxiliary head).
        teacher_logits: of the same shape.
        tau: temperature > 0 of both.
        reduction: "batch_mean", the paper's: sum over classes, mean over positions. "class_mean": mean over
            both, so that its weight does not grow with C (a vocabulary). "sum": over both. "none": one value per position.
        mask: positions that count; elsewhere NaN does no harm. With none at all the loss is 0.
        clamp: keep the sigmoids this far from 0 and 1, which kills gradients there (the released code: 1e-8); None: exact.

    Raises:
        ConfigError: tau, clamp or reduction out of range.
        DataError: logits of different shapes, or a mask that is not one of bool per position.

    NaN gives NaN, which `DualHeadLoss` and `distill` refuse.

    Source: arXiv 2411.08937; official `distiller_zoo/BinaryKL.py`.
    """
    a, t = _operands(logits, teacher_logits, tau, clamp, mask)
    u, v = a / tau, t / tau
    if clamp is None:
        # The divergence stays what it is when heads and tails change names; with the teacher's
        # rarer side first, large logits cancel nowhere.
        u, v = torch.where(v > 0, -u, u), -v.abs()
        each = logsigmoid(-v) - logsigmoid(-u) - v.sigmoid() * (u - v)
    else:
        p, q = (x.sigmoid().clamp(clamp, 1 - clamp) for x in (u, v))
        each = torch.special.xlogy(q, q / p) + torch.special.xlogy(1 - q, (1 - q) / (1 - p))
    return _reduced(each * tau**2, reduction, mask)


def binary_kl_norm_loss(
    logits: Float[Tensor, "*position class"],
    teacher_logits: Float[Tensor, "*position teacher_class"],
    tau: float = 2.0,
    reduction: Reduction = "batch_mean",
    *,
    mask: Bool[Tensor, "*position"] | None = None,
    clamp: float | None = None,
) -> Float[Tensor, "..."]:
    """BinaryKL-Norm, tau^2 ln cosh((a - t) / (2 tau)) summed over classes: a pseudo-Huber loss on logits; >= 0, in nats.

    Gradient per class and position: tau tanh((a - t) / (2 tau)) / (2 N), at most tau / (2 N), alive wherever a differs from t.
    Exact for differences of any size. A constant added to both logits changes nothing, to one of them it does.

    Arguments, reductions and errors as in `binary_kl_loss`. Source: arXiv 2411.08937; official
    `distiller_zoo/BinaryKLNorm.py`.
    """
    a, t = _operands(logits, teacher_logits, tau, clamp, mask)
    if clamp is None:
        each: Tensor = _LogCosh.apply((a - t) / (2 * tau))
    else:
        p = ((a - t) / tau).sigmoid().clamp(clamp, 1 - clamp)
        each = -(p.log() + (1 - p).log()) / 2 - math.log(2)
    return _reduced(each * tau**2, reduction, mask)


class _LogCosh(torch.autograd.Function):
    """ln cosh x with relative error of a few roundings for every x, and its gradient tanh x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        size = x.abs()
        near = torch.log1p(size.clamp(max=0.5).sinh().square()) / 2
        far = size + torch.log1p(torch.expm1(-2 * size) / 2)
        return torch.where(size < 0.5, near, far)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * x.tanh()


def _operands(
    logits: Tensor, teacher_logits: Tensor, tau: float, clamp: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if logits.shape != teacher_logits.shape:
        raise DataError(
            f"logit-level loss: student {tuple(logits.shape)} but teacher {tuple(teacher_logits.shape)}; both need the same "
            "positions and classes"
        )
    if mask is not None and (mask.shape != logits.shape[:-1] or mask.dtype != torch.bool):
        raise DataError(
            f"logit-level loss: mask of {mask.dtype} {tuple(mask.shape)} for logits {tuple(logits.shape)}; give one bool per "
            "position"
        )
    if not tau > 0:
        raise ConfigError(f"logit-level loss: tau is {tau:g}; give a temperature above 0")
    if clamp is not None and not 0 < clamp < 0.5:
        raise ConfigError(f"logit-level loss: clamp is {clamp:g}; give a number between 0 and 0.5, or None")
    kind = torch.promote_types(logits.dtype, torch.float32)
    a, t = logits.to(kind), teacher_logits.detach().to(kind)
    if mask is not None:
        a, t = torch.where(mask[..., None], a, 0), torch.where(mask[..., None], t, 0)
    return a, t


def _reduced(each: Tensor, reduction: Reduction, mask: Tensor | None) -> Tensor:
    """Masked positions are zeros here already (their logits were made equal)."""
    if reduction == "none":
        return each.sum(-1)
    if reduction == "sum":
        return each.sum()
    if reduction not in ("batch_mean", "class_mean"):
        raise ConfigError(
            f"logit-level loss: reduction is {reduction!r}; give 'batch_mean', 'class_mean', 'sum' or 'none'"
        )
    classes = each.shape[-1] if reduction == "class_mean" else 1
    positions = each[..., 0].numel() if mask is None else mask.sum().clamp(min=1)
    return each.sum() / (classes * positions)
