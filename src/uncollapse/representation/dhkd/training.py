"""The two losses of dual-head distillation, and a plain loop that trains with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.dhkd.alignment import Scope, aligned_loss
from uncollapse.representation.dhkd.heads import DualLogits
from uncollapse.representation.dhkd.losses import Reduction, binary_kl_norm_loss

LogitLoss = Callable[..., Tensor]
"""Takes logits, teacher logits and, by name, `reduction` and `mask`."""


IGNORED = -100
"""Label of a position that does not count, as everywhere in PyTorch and Transformers."""


class DualLosses(NamedTuple):
    """The weighted losses of the two heads."""

    main: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """What a trainer without alignment minimises."""
        return self.main + self.auxiliary


class DualHeadLoss(nn.Module):
    """gamma CE(main logits, labels) + alpha B(auxiliary logits, teacher logits).

    Labels of -100 do not count, in either loss. Logits and labels may have any number of position axes; for a language model
    take `reduction="class_mean"`, else alpha weighs a sum over the vocabulary. Main logits alone, as a model has in
    evaluation, give gamma CE.

    Args:
        gamma: weight of cross-entropy, at least 0 (default 1).
        alpha: weight of the logit-level loss, at least 0 (default 1; the authors take 0.1 on ImageNet).
        tau: temperature of the logit-level loss, above 0 (default 2).
        loss: `binary_kl_norm_loss`, `binary_kl_loss`, or another of that signature.
        reduction: of the logit-level loss, "batch_mean" or "class_mean".
        align: parameters on which the gradients of both losses are aligned, usually `model.parameters()`; for trainers that
            take one loss (see `aligned_loss`). All others get the plain sum. None: no alignment.
        scope: of the alignment.

    Raises:
        ConfigError: an option outside its range.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        alpha: float = 1.0,
        tau: float = 2.0,
        *,
        loss: LogitLoss = binary_kl_norm_loss,
        reduction: Reduction = "batch_mean",
        align: Iterable[Tensor] | None = None,
        scope: Scope = "shared",
    ) -> None:
        super().__init__()
        if reduction not in ("batch_mean", "class_mean"):
            raise ConfigError(f"DualHeadLoss: reduction is {reduction!r}; give 'batch_mean' or 'class_mean'")
        if not (0 <= gamma < math.inf and 0 <= alpha < math.inf):
            raise ConfigError(
                f"DualHeadLoss: gamma is {gamma:g} and alpha {alpha:g}; give weights of at least 0"
            )
        if not 0 < tau < math.inf:
            raise ConfigError(f"DualHeadLoss: tau is {tau:g}; give a temperature above 0")
        self.gamma, self.alpha, self.tau = gamma, alpha, tau
        self.loss, self.reduction = loss, reduction
        self.align, self.scope = None if align is None else list(align), scope

    def forward(
        self,
        logits: DualLogits | Float[Tensor, "*position class"],
        teacher_logits: Float[Tensor, "*position class"],
        labels: Int[Tensor, "*position"],
    ) -> Float[Tensor, ""]:
        """The sum of both losses, whose `backward()` aligns their gradients where that was asked for.

        Raises:
            DataError: NaN or inf, which one row is enough for: a step would make all weights NaN. `parts` gives it back.
        """
        if isinstance(logits, Tensor):
            return _refuse_values(self.gamma * _cross_entropy(logits, labels))
        losses = self.parts(logits, teacher_logits, labels)
        _refuse_values(losses.total)
        return self.join(losses)

    def parts(
        self,
        logits: DualLogits,
        teacher_logits: Float[Tensor, "*position class"],
        labels: Int[Tensor, "*position"],
    ) -> DualLosses:
        """Both losses, weighted, each with its own graph to the shared parameters."""
        auxiliary = self.loss(
            logits.auxiliary, teacher_logits, self.tau, reduction=self.reduction, mask=labels != IGNORED
        )
        return DualLosses(self.gamma * _cross_entropy(logits.main, labels), self.alpha * auxiliary)

    def join(self, losses: DualLosses) -> Float[Tensor, ""]:
        """Their sum, with aligned gradients where that was asked for."""
        if self.align is None or not torch.is_grad_enabled():
            return losses.total
        return aligned_loss(losses, self.align, scope=self.scope)


def _refuse_values(loss: Tensor) -> Tensor:
    if not bool(loss.isfinite()):
        raise DataError(
            f"DualHeadLoss: the loss is {float(loss.detach())}, from logits with NaN or inf; leave such rows out (label -100), or lower "
            "the learning rate if it is the student that diverges"
        )
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count; 0 if none does."""
    total = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss: DualHeadLoss | None = None,
    *,
    auxiliary_steps: int | None = None,
) -> Float[Tensor, "step loss"]:
    """Train a dual-headed student on (inputs, labels) batches, one optimiser step each; returns both losses of every step.

    The teacher runs in evaluation mode without gradient; the student is left in training mode.

    Args:
        student: returns `DualLogits` in training, such as a `DualHeadModel`.
        teacher: returns a tensor of logits.
        batches: as long as they last.
        optimizer: over the student's parameters.
        loss: weights, temperature and alignment; default `DualHeadLoss()`.
        auxiliary_steps: from this step on alpha counts as 0 (released ImageNet code: epoch 50 of 100); None never.

    Raises:
        DataError: a loss that is NaN or inf.
    """
    criterion = DualHeadLoss() if loss is None else loss
    student.train()
    teacher.eval()
    history = []
    for step, (inputs, labels) in enumerate(batches):
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        losses = criterion.parts(student(inputs), teacher_logits, labels)
        if auxiliary_steps is not None and step >= auxiliary_steps:
            losses = losses._replace(auxiliary=losses.auxiliary * 0)
        _refuse_values(losses.total)
        optimizer.zero_grad(set_to_none=True)
        criterion.join(losses).backward()
        optimizer.step()
        history.append(torch.stack(losses).detach())
    return torch.stack(history) if history else torch.zeros(0, 2)
