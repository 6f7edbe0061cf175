"""PLD, Plackett-Luce distillation: the student learns the teacher's ranking of the classes, with the true label on top.

exp(logit) is read as the worth of a class, and a ranking as a series of choices, each among the classes that are left. The target
ranking is the true label, then the other classes by falling teacher logit. The loss is the negative log-likelihood of
that ranking under the student, each choice weighted by the teacher's probability of the class chosen there. The first choice
is cross-entropy, so no further term and no mixing weight is needed.

Paper: Bassam, Zhu, Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", NeurIPS 2025, arXiv 2506.12542. Its
appendix C lists reference code; no repository of the authors is known.

Differs from the paper / its listing:
- The gradient is in closed form, O(C) once the classes are ranked, and computed together with the value a few rows at a time: one tensor of the
  logits' size is kept, where the listing keeps one for each of its steps.
- The default temperature is 1, the best of the paper's ablation; its CIFAR-100 section names 4. It is that of the teacher's weights.
- Equal teacher logits are ranked by class index. In the listing the sort decides.
- `weights="exp2"` are the decreasing weights 2^(C-k) - 1 of p-ListMLE, divided by their sum, and 2^-k beyond 50 classes. The paper's
  row of that name may stand for something else: it says "q over its sum", which is q.
- Ours: `top_k` (the likelihood of the first k choices, exactly), `mask`, and `label_weight="max"`. Where the teacher is sure of a wrong
  class, the label's choice weighs next to nothing, and a student whose logits are held small ranks that class above the label; "max"
  gives the label at least the largest weight.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.distillation import DistillationLoss
from uncollapse.representation.plackett_luce import (
    argsort_descending,
    plackett_luce_log_prob,
    refuse_values,
    weighted_ranking_loss,
)

__all__ = [
    "ListMLELoss",
    "PLDLoss",
    "listmle_loss",
    "plackett_luce_distillation_loss",
    "plackett_luce_log_prob",
    "teacher_optimal_permutation",
]

Weights: TypeAlias = Literal["teacher", "uniform", "exp2"] | Tensor
Reduction: TypeAlias = Literal["mean", "sum", "none"]


def plackett_luce_distillation_loss(
    student_logits: Float[Tensor, "*position class"],
    teacher_logits: Float[Tensor, "*position class"],
    labels: Int[Tensor, "*position"],
    *,
    temperature: float = 1.0,
    weights: Weights = "teacher",
    top_k: int | None = None,
    mask: Bool[Tensor, "*position"] | None = None,
    label_weight: Literal["teacher", "max"] = "teacher",
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "..."]:
    """L = sum_k alpha_k (logsumexp_{l >= k} s_{pi_l} - s_{pi_k}), pi = `teacher_optimal_permutation`; nats, at least 0.

    alpha_k = softmax(t / temperature)_{pi_k}. Convex in s; unchanged by a constant added to a row of s or of t. It is the whole
    training loss, with no cross-entropy beside it. Differentiable (once) with respect to the student's logits; the teacher is a
    constant. dL/ds_i = exp(s_i) sum_{k <= r(i)} alpha_k exp(-lse_k) - alpha_{r(i)}, with r(i) the rank of class i.

    Args:
        student_logits: any floating dtype; half precision is worked on in float32. -inf excludes a class, which then must have no
            weight: give the teacher -inf too, or look at `top_k` choices that it is not among.
        teacher_logits: -inf where the teacher excludes a class; never NaN or +inf.
        labels: true classes; outside `mask` they may be anything (-100, for instance).
        temperature: tau > 0 of the teacher's weights. The student is never tempered.
        weights: alpha: "teacher"; "uniform", 1/C each: ListMLE up to the factor; "exp2": (2^(C-k) - 1) / (2^C - 1 - C), beyond 50
            classes 2^-k; or a tensor (class) or (*position, class) of weights by rank, at least 0, not renormalised.
        top_k: look at the first so many choices; the other classes stand in their denominators. With vocabularies 50 or 100 save the
            sort and lose the weight of the rest. None or the number of classes: all.
        mask: True where a position counts. Elsewhere the loss and its gradient are 0, and NaN does no harm.
        label_weight: "teacher": alpha_1 as it is. "max": at least the largest weight of the row.
        reduction: "mean" over the positions that count (0 if there is none), "sum", or "none": shape (*position).
        chunk: logits worked on at once; None takes a size that suits the device. No influence on results beyond rounding.

    Source: arXiv 2506.12542, section 4 and appendix C.

    Raises:
        ConfigError: an option outside its range.
        DataError: logits or labels of shapes that do not belong together, a label that is no class, NaN or +inf, a class that the student
            excludes and the ranking wants.

    Cost: a sort of the classes (a search with `top_k`), then O(C). Memory: a dozen times `chunk`, and the gradient in
    float32 or better.
    """
    if not temperature > 0:
        raise ConfigError(f"pld: temperature is {temperature}; give a number above 0")
    if label_weight not in ("teacher", "max"):
        raise ConfigError(f"pld: label_weight is {label_weight!r}; give 'teacher' or 'max'")
    classes = student_logits.shape[-1]
    steps = _steps(top_k, classes)
    given = _checked_weights(weights, labels.shape, classes)
    rows, s, t, y = _flat(student_logits, teacher_logits, labels, mask)

    def choose(part: Tensor, s_part: Tensor) -> tuple[Tensor, Tensor]:
        t_part, y_part = t[part].to(s_part.dtype), y[part]
        refuse_values(t_part.amax(-1), "teacher")
        dropped = _dropped(s_part, t_part)
        order = _order(t_part, y_part, steps, dropped)
        if isinstance(weights, Tensor):
            every = given if given.ndim == 1 else given[part]
            every = every.to(s_part).expand(len(part), -1)
            alpha = every[:, :steps]
        elif weights == "teacher":
            every = (t_part / temperature).softmax(-1)
            alpha = every.gather(1, order)
        else:
            alpha = every = _fixed_weights(weights, (~dropped).sum(-1, keepdim=True), steps, s_part.dtype)
        if label_weight == "max":
            top = torch.maximum(alpha[:, 0], every.amax(-1))
            alpha = torch.cat([top[:, None], alpha[:, 1:]], -1)
        return order, alpha

    return _reduce(weighted_ranking_loss(s, rows, choose, chunk), rows, labels.shape, reduction)


def listmle_loss(
    student_logits: Float[Tensor, "*position class"],
    teacher_logits: Float[Tensor, "*position class"],
    labels: Int[Tensor, "*position"],
    *,
    top_k: int | None = None,
    mask: Bool[Tensor, "*position"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "..."]:
    """-log P(pi), the negative log-likelihood of the teacher-optimal ranking: every choice has weight 1. In nats, at least 0.

    Arguments, errors and cost as in `plackett_luce_distillation_loss`, which with weights="uniform" is this over C.

    Source: Xia et al. (2008), "Listwise Approach to Learning to Rank", ICML.
    """
    steps = _steps(top_k, student_logits.shape[-1])
    rows, s, t, y = _flat(student_logits, teacher_logits, labels, mask)

    def choose(part: Tensor, s_part: Tensor) -> tuple[Tensor, Tensor]:
        t_part = t[part].to(s_part.dtype)
        refuse_values(t_part.amax(-1), "teacher")
        dropped = _dropped(s_part, t_part)
        order = _order(t_part, y[part], steps, dropped)
        return order, (~dropped.gather(1, order)).to(s_part)

    return _reduce(weighted_ranking_loss(s, rows, choose, chunk), rows, labels.shape, reduction)


def teacher_optimal_permutation(
    teacher_logits: Float[Tensor, "*position class"],
    labels: Int[Tensor, "*position"],
    *,
    top_k: int | None = None,
) -> Int[Tensor, "*position step"]:
    """The label, then the other classes by falling teacher logit, equal ones by class index; the first `top_k` of them.

    Raises:
        ConfigError: `top_k` outside 1 to the number of classes.
        DataError: a label that is no class, shapes that do not belong together, NaN or +inf.
    """
    steps = _steps(top_k, teacher_logits.shape[-1])
    _, _, t, y = _flat(teacher_logits, teacher_logits, labels, None)
    refuse_values(t.amax(-1), "teacher")
    return _order(t, y, steps, torch.zeros_like(t, dtype=torch.bool)).reshape(*labels.shape, steps)


class PLDLoss(DistillationLoss):
    """`plackett_luce_distillation_loss` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        weights: Weights = "teacher",
        top_k: int | None = None,
        label_weight: Literal["teacher", "max"] = "teacher",
    ) -> None:
        super().__init__(
            plackett_luce_distillation_loss,
            temperature=temperature,
            weights=weights,
            top_k=top_k,
            label_weight=label_weight,
        )


class ListMLELoss(DistillationLoss):
    """`listmle_loss` as a module."""

    def __init__(self, *, top_k: int | None = None) -> None:
        super().__init__(listmle_loss, top_k=top_k)


# ---- ranking and weights --------------------------------------------------------------------------------------------


def _dropped(s: Tensor, t: Tensor) -> Tensor:
    """Classes that both networks exclude: they are in no ranking."""
    return (s == -torch.inf) & (t == -torch.inf)


def _order(t: Tensor, y: Tensor, steps: int, dropped: Tensor) -> Tensor:
    """The first `steps` of the teacher-optimal ranking (row, step); dropped classes come last."""
    key = t.clamp(min=torch.finfo(t.dtype).min).masked_fill_(dropped, -torch.inf)
    key.scatter_(1, y[:, None], torch.inf)
    if steps == key.shape[1]:
        return argsort_descending(key)
    values, found = key.topk(steps, -1)
    least = values[:, -1:]
    if bool(
        ((key >= least).sum(-1) > steps).any()
    ):  # of keys equal to the least topk takes any; the first by index count
        above, equal = key > least, key == least
        members = above | (equal & (equal.cumsum(-1) <= steps - above.sum(-1, keepdim=True)))
        found = members.nonzero()[:, 1].reshape(-1, steps)
    found = found.sort(-1).values
    return found.gather(1, argsort_descending(key.gather(1, found)))


def _fixed_weights(kind: str, count: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Weights by rank (row, step) where `count` (row, 1) classes are ranked; 0 beyond them."""
    n, k = count.to(dtype), torch.arange(1, steps + 1, device=count.device, dtype=dtype)
    if kind == "uniform":
        alpha = (1 / n).expand(-1, steps)
    else:
        few = n.clamp(2, 50)  # 2^50 is exact in float64, and the sum is finite in float32
        exact = (torch.exp2(few - k) - 1) / (torch.exp2(few) - 1 - few)
        alpha = torch.where(n <= 50, exact, torch.exp2(-k))
    return torch.where(k <= n, alpha, 0.0)


# ---- input ---------------------------------------------------------------------------------------------------------


def _steps(top_k: int | None, classes: int) -> int:
    if classes < 2:
        raise DataError(f"pld: {classes} classes; a ranking needs at least 2")
    if top_k is not None and not 1 <= top_k <= classes:
        raise ConfigError(
            f"pld: top_k is {top_k}; give 1 to {classes} (the number of classes), or None for all"
        )
    return classes if top_k is None else top_k


def _checked_weights(weights: str | Tensor, positions: torch.Size, classes: int) -> Tensor:
    """Given weights (class) or (row, class); nothing for those that have a name."""
    if not isinstance(weights, Tensor):
        if weights not in ("teacher", "uniform", "exp2"):
            raise ConfigError(f"pld: weights is {weights!r}; give 'teacher', 'uniform', 'exp2' or a tensor")
        return torch.empty(0)
    if weights.shape not in ((classes,), (*positions, classes)):
        raise DataError(
            f"pld: weights have shape {tuple(weights.shape)}; give ({classes},), one per rank, or one such row per position"
        )
    if not bool(((weights >= 0) & (weights < torch.inf)).all()):
        raise DataError("pld: weights must be finite and at least 0")
    return weights.detach() if weights.ndim == 1 else weights.detach().reshape(-1, classes)


def _flat(s: Tensor, t: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of the rows that count, and everything with one row per position."""
    if s.shape != t.shape or y.shape != s.shape[:-1] or (mask is not None and mask.shape != y.shape):
        shapes = f"{tuple(s.shape)}, {tuple(t.shape)} and {tuple(y.shape)}"
        raise DataError(
            f"pld: logits of student and teacher and labels have shapes {shapes}"
            + ("" if mask is None else f", the mask {tuple(mask.shape)}")
            + "; both networks need the same classes, and each position one label"
        )
    label, classes = y.reshape(-1).long(), s.shape[-1]
    rows = torch.arange(len(label), device=s.device) if mask is None else mask.reshape(-1).nonzero()[:, 0]
    if len(rows):
        low, high = torch.stack(label[rows].aminmax()).tolist()
        if low < 0 or high >= classes:
            raise DataError(
                f"pld: labels run from {low} to {high}, classes from 0 to {classes - 1}; leave padding out with mask="
            )
    return rows, s.reshape(-1, classes), t.detach().reshape(-1, classes), label


def _reduce(loss: Tensor, rows: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"pld: reduction is {reduction!r}; give 'mean', 'sum' or 'none'")
    if reduction == "none":
        return loss.reshape(shape)
    return loss.sum() / max(1, len(rows)) if reduction == "mean" else loss.sum()
