"""The two losses of dual-head distillation, and a plain loop that trains with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from uncollapse.errors import ConfigError
from uncollapse.representation.dhkd.alignment import GradientAlignment, Scope
from uncollapse.representation.dhkd.heads import DualLogits
from uncollapse.representation.dhkd.losses import Reduction, binary_kl_norm_loss

LogitLoss = Callable[..., Tensor]
"""Takes logits, teacher logits and, by name, `reduction` and `mask`."""


class DualLosses(NamedTuple):
    """The weighted losses of the two heads."""

    main: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """What a trainer without alignment minimises."""
        return self.main + self.auxiliary


class DualHeadLoss(nn.Module):
    """gamma CE(main logits, labels) + alpha B(auxiliary logits, teacher logits), kept apart for gradient alignment.

    Labels of -100 do not count, in either loss. Logits and labels may have any number of position axes; for a language model
    take `reduction="class_mean"`, else alpha weighs a sum over the vocabulary.

    Args:
        gamma: weight of cross-entropy (default 1).
        alpha: weight of the logit-level loss (default 1; the authors take 0.1 on ImageNet).
        tau: temperature of the logit-level loss (default 2).
        loss: `binary_kl_norm_loss`, `binary_kl_loss`, or another of that signature.
        reduction: of the logit-level loss, "batch_mean" or "class_mean".
    """

    def __init__(
        self,
        gamma: float = 1.0,
        alpha: float = 1.0,
        tau: float = 2.0,
        *,
        loss: LogitLoss = binary_kl_norm_loss,
        reduction: Reduction = "batch_mean",
    ) -> None:
        super().__init__()
        if reduction not in ("batch_mean", "class_mean"):
            raise ConfigError(f"DualHeadLoss: reduction is {reduction!r}; give 'batch_mean' or 'class_mean'")
        self.gamma, self.alpha, self.tau = gamma, alpha, tau
        self.loss, self.reduction = loss, reduction

    def forward(
        self,
        logits: DualLogits,
        teacher_logits: Float[Tensor, "*position class"],
        labels: Int[Tensor, "*position"],
    ) -> DualLosses:
        """Both losses, weighted."""
        classes = logits.main.shape[-1]
        main = cross_entropy(logits.main.reshape(-1, classes), labels.flatten(), ignore_index=-100)
        auxiliary = self.loss(
            logits.auxiliary, teacher_logits, self.tau, reduction=self.reduction, mask=labels != -100
        )
        return DualLosses(self.gamma * main, self.alpha * auxiliary)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss: DualHeadLoss | None = None,
    *,
    alignment: Scope | None = None,
    auxiliary_steps: int | None = None,
) -> Float[Tensor, "step loss"]:
    """Train a dual-headed student on (inputs, labels) batches, one optimiser step each; returns both losses of every step.

    The teacher runs in evaluation mode without gradient; the student is left in training mode.

    Args:
        student: returns `DualLogits` in training, such as a `DualHeadModel`.
        teacher: returns a tensor of logits.
        batches: as long as they last.
        optimizer: over the student's parameters.
        loss: default `DualHeadLoss()`.
        alignment: align the gradients on this scope; None adds them as they are.
        auxiliary_steps: from this step on alpha counts as 0 (released ImageNet code: epoch 50 of 100); None never.
    """
    criterion = DualHeadLoss() if loss is None else loss
    aligned = None if alignment is None else GradientAlignment(optimizer, scope=alignment)
    student.train()
    teacher.eval()
    history = []
    for step, (inputs, labels) in enumerate(batches):
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        losses = criterion(student(inputs), teacher_logits, labels)
        if auxiliary_steps is not None and step >= auxiliary_steps:
            losses = losses._replace(auxiliary=losses.auxiliary * 0)
        optimizer.zero_grad(set_to_none=True)
        if aligned is None:
            losses.total.backward()
        else:
            aligned.backward(losses)
        optimizer.step()
        history.append(torch.stack(losses).detach())
    return torch.stack(history) if history else torch.zeros(0, 2)
