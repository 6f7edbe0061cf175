"""Losses that papers on distillation compare with: label smoothing, KD, DIST and the squared error of the logits.

All have one interface, `loss(student_logits, teacher_logits, labels) -> scalar`, in nats unless said otherwise, so that a training
loop need not know which one it has. Each includes its own cross-entropy. The teacher is a constant: no gradient reaches it. Half
precision is worked on in float32. Rows labelled -100 do not count in any part; without any row the loss is 0.
The functions have options; `DistillationLoss` and its kin fix them and are modules, for whoever builds from modules.

Differs from the papers / the official code:
- KD is `alpha` cross-entropy plus `1 - alpha` divergence, times temperature squared, as Hinton et al. advise. Others write the weights
  the other way round or put no weight on the cross-entropy; translate before comparing numbers.
- DIST takes the correlations of probabilities, as its paper does. Where one side is constant (a batch of one row, a head that starts
  at zero) there is no correlation: it counts as 0 and gives no gradient. The code adds 1e-8 to the product of the norms, which
  gives gradients of 1e8 there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.precision import at_least_float32
from uncollapse.representation.plackett_luce import refuse_values

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""student logits (row, class), teacher logits (row, class), labels (row) -> scalar."""

Logits: TypeAlias = Float[Tensor, "row class"]
Labels: TypeAlias = Int[Tensor, " row"]
Scalar: TypeAlias = Float[Tensor, ""]

IGNORED = -100
"""Label of a row that does not count, as everywhere in PyTorch."""

_CONSTANT = 1e-8
"""Norm about the mean below which values count as constant."""


def cross_entropy_loss(student_logits: Logits, teacher_logits: Logits, labels: Labels) -> Scalar:
    """-log softmax(s)_y, mean over rows: the student on its own. The teacher is not looked at."""
    return _cross_entropy(at_least_float32(student_logits), labels)


def label_smoothing_loss(
    student_logits: Logits, teacher_logits: Logits, labels: Labels, *, smoothing: float = 0.1
) -> Scalar:
    """Cross-entropy against (1 - smoothing) one_hot(y) + smoothing / C, mean over rows. The teacher is not looked at.

    Source: Szegedy et al. (2016), arXiv 1512.00567.

    Raises:
        ConfigError: smoothing outside [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"label smoothing: smoothing is {smoothing:g}; give a share in [0, 1]")
    return _cross_entropy(at_least_float32(student_logits), labels, smoothing)


def kd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    alpha: float = 0.1,
    temperature: float = 2.0,
) -> Scalar:
    """alpha CE(s, y) + (1 - alpha) tau^2 KL(softmax(t / tau) || softmax(s / tau)), mean over rows.

    Args:
        alpha: weight of the cross-entropy, in [0, 1]; 1 is the student on its own.
        temperature: tau > 0 of both networks inside the divergence. tau^2 keeps the size of the gradient.

    Source: Hinton, Vinyals, Dean (2015), arXiv 1503.02531.

    Raises:
        ConfigError: alpha outside [0, 1] or a temperature that is not above 0.
        DataError: logits of different shapes, with NaN or +inf, or -inf in the student where the teacher gives weight.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"kd: alpha is {alpha:g}; give the weight of the cross-entropy, in [0, 1]")
    s, t, y = _checked(student_logits, teacher_logits, labels, temperature, "kd")
    if bool(((s == -torch.inf) & (t != -torch.inf)).any()):
        raise DataError(
            "kd: the student excludes (logit -inf) a class that the teacher gives weight; exclude it from both"
        )
    teacher = F.log_softmax(t / temperature, dim=-1)
    student = F.log_softmax(s / temperature, dim=-1)
    # what the teacher excludes has weight 0, and 0 times inf would be NaN
    terms = torch.where(t == -torch.inf, 0, teacher.exp() * (teacher - student))
    divergence = terms.sum() / max(1, len(y))
    return alpha * _cross_entropy(s, y) + (1 - alpha) * temperature**2 * divergence


def dist_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Scalar:
    """CE(s, y) + tau^2 (beta (1 - r_rows) + gamma (1 - r_columns)), with mean Pearson correlations of probabilities.

    r_rows correlates softmax(s / tau) with softmax(t / tau) over the classes of each row (inter-class), r_columns over the rows of
    the batch for each class (intra-class), so the loss depends on who shares a batch. The correlation terms have no unit. A class that both
    exclude (-inf) everywhere is constant: it adds 1 / C to the second term and no gradient.

    Args:
        beta, gamma: weights of the inter-class and the intra-class term, at least 0.
        temperature: tau > 0 of both networks.

    Source: Huang et al. (2022), arXiv 2205.10536, with the defaults of its code.

    Raises:
        ConfigError: a negative weight or a temperature that is not above 0.
        DataError: logits of different shapes, with NaN or +inf.
    """
    if beta < 0 or gamma < 0:
        raise ConfigError(f"dist: beta is {beta:g} and gamma {gamma:g}; give weights of at least 0")
    s, t, y = _checked(student_logits, teacher_logits, labels, temperature, "dist")
    if not len(y):
        return _cross_entropy(s, y)
    student, teacher = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    inter = 1 - pearson_correlation(student, teacher).mean()
    intra = 1 - pearson_correlation(student.mT, teacher.mT).mean()
    return _cross_entropy(s, y) + temperature**2 * (beta * inter + gamma * intra)


def pearson_correlation(
    a: Float[Tensor, "*batch value"], b: Float[Tensor, "*batch value"]
) -> Float[Tensor, "*batch"]:
    """Pearson's correlation along the last dimension, in [-1, 1]; 0 without gradient where either side is constant."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=-1) for x in (a, b))
    constant = (norm_a <= _CONSTANT) | (norm_b <= _CONSTANT)  # NaN is not constant
    return torch.where(constant, 0.0, (a * b).sum(-1) / torch.where(constant, 1.0, norm_a * norm_b))


def logit_mse_loss(
    student_logits: Logits, teacher_logits: Logits, labels: Labels, *, weight: float = 1.0
) -> Scalar:
    """CE(s, y) + weight times the mean of (s - t)^2 over rows and classes (nats squared), less those that both exclude (-inf).

    Not invariant to a constant added to the logits of a row: it transfers their absolute values. Source: Ba, Caruana
    (2014), arXiv 1312.6184, who left the cross-entropy out.

    Raises:
        ConfigError: a negative weight.
        DataError: logits of different shapes, with NaN or +inf, or -inf in one of them only.
    """
    if weight < 0:
        raise ConfigError(f"logit mse: weight is {weight:g}; give at least 0")
    s, t, y = _checked(student_logits, teacher_logits, labels, 1.0, "logit mse")
    excluded = s == -torch.inf
    if bool((excluded != (t == -torch.inf)).any()):
        raise DataError(
            "logit mse: one network excludes (logit -inf) a class that the other does not; exclude it from both"
        )
    if not len(y):
        return _cross_entropy(s, y)
    error = F.mse_loss(s.masked_fill(excluded, 0), t.masked_fill(excluded, 0))
    return _cross_entropy(s, y) + weight * error * (s.numel() / (~excluded).sum())


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the rows that count, 0 without any."""
    if not len(labels) or bool((labels == IGNORED).all()):
        return logits[:, :0].sum()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def _checked(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits and the labels of the rows that count, logits in float32 or better and the teacher's without graph."""
    if not temperature > 0:
        raise ConfigError(f"{name}: temperature is {temperature}; give a number above 0")
    if student_logits.shape != teacher_logits.shape:
        raise DataError(
            f"{name}: logits of student and teacher have shapes {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; both need the same rows and the same classes in the same order"
        )
    s, t = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    counted = labels != IGNORED
    if not bool(counted.all()):
        s, t, labels = s[counted], t[counted], labels[counted]
    for logits, whose in ((s, "student"), (t, "teacher")):
        refuse_values(logits.amax(-1), whose, "label -100")
    return s, t, labels


# ---- modules -------------------------------------------------------------------------------------------------------


class DistillationLoss(nn.Module):
    """One of these functions, or your own of the same interface, with its options fixed.

    Raises:
        ConfigError: an option that the function does not have.
    """

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        known = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"{function.__name__} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
            )
        self.function, self.options = function, options

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.function(student_logits, teacher_logits, labels, **self.options)

    def extra_repr(self) -> str:
        """Function and options."""
        return ", ".join(
            [self.function.__name__, *(f"{name}={value}" for name, value in self.options.items())]
        )


class LabelSmoothingLoss(DistillationLoss):
    """`label_smoothing_loss` as a module."""

    def __init__(self, *, smoothing: float = 0.1) -> None:
        super().__init__(label_smoothing_loss, smoothing=smoothing)


class KDLoss(DistillationLoss):
    """`kd_loss` as a module."""

    def __init__(self, *, alpha: float = 0.1, temperature: float = 2.0) -> None:
        super().__init__(kd_loss, alpha=alpha, temperature=temperature)


class DISTLoss(DistillationLoss):
    """`dist_loss` as a module."""

    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(dist_loss, beta=beta, gamma=gamma, temperature=temperature)


class LogitMSELoss(DistillationLoss):
    """`logit_mse_loss` as a module."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(logit_mse_loss, weight=weight)
