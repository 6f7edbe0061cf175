"""Distillation with the Transformers `Trainer`: a teacher and any loss of student logits, teacher logits and labels.

from uncollapse.integrations.distillation import DistillationTrainer
from uncollapse.representation.distillation import KDLoss

trainer = DistillationTrainer(model=student, teacher=teacher, loss=KDLoss(), args=..., train_dataset=...)

It classifies images, texts and tokens, and distils causal language models token by token. Models may be those of
Transformers or any module whose forward takes the columns of the data set by name and returns logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from uncollapse.errors import ConfigError, DataError

LABELS = "labels"
TEACHER_LOGITS = "teacher_logits"
"""Column of the teacher's logits, for whoever computed them before."""

IGNORED = -100
"""Label of a position that does not count, as everywhere in Transformers."""


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is `loss(student_logits, teacher_logits, labels)` over the rows of each batch.

    A row is an example, or a token where the logits are of tokens; for causal language models token t + 1 is the
    label of position t. Rows labelled -100 are left out before the loss sees them. It is the mean per micro-batch, averaged over
    micro-batches and processes. Evaluation reports the same loss as `eval_loss`, and predictions are the student's logits.
    A student with several heads returns a named tuple of their logits, the one to keep first; so does the loss get them.

    Args:
        teacher: gets the same columns as the student, in evaluation mode and without gradient. None: the batches bring
            `teacher_logits` of the student's shape. It is no part of the checkpoints.
        loss: any such function or module; the losses of `uncollapse.representation` are some.
        causal: whether labels are shifted to the token before. None: for models whose class, or one that it derives from, is a
            causal language model of Transformers.
        args: positional and keyword arguments of `Trainer`.

    Raises:
        ConfigError: options of `Trainer` that bring another loss (`compute_loss_func`, `label_smoothing_factor`).
        DataError: a batch without labels or without teacher; logits of teacher and student of different shapes.
    """

    label_names: list[str]
    _signature_columns: list[str]

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None,
        loss: Callable[[Any, Tensor, Tensor], Tensor],
        causal: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ConfigError(
                "DistillationTrainer: compute_loss_func and label_smoothing_factor would be another loss; "
                "give all of it as loss="
            )
        self.model_accepts_loss_kwargs = False  # else Trainer takes the loss for a sum over the whole step
        self.label_names = self.label_names or [LABELS]  # forward of a plain module names none
        self.distillation_loss = loss
        self.causal = _is_causal(_base(self.model)) if causal is None else causal
        self.teacher = teacher
        if teacher is not None:
            self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, and on request the student's logits beside it."""
        if LABELS not in inputs:
            raise DataError(f"distillation: the batch has no {LABELS!r}, only {', '.join(inputs)}")
        given = {name: value for name, value in inputs.items() if name not in (LABELS, TEACHER_LOGITS)}
        output = model(**given)
        student = logits_of(output)
        heads = output if hasattr(output, "_fields") else student
        rows = labelled_rows(heads, self._teach(given, inputs), inputs[LABELS], causal=self.causal)
        loss = (
            self.distillation_loss(*rows) if len(rows[2]) else student[..., :0].sum()
        )  # -inf times 0 is NaN
        return (loss, {"loss": loss, "logits": student}) if return_outputs else loss

    def _teach(self, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        if self.teacher is not None:
            with torch.no_grad():
                return logits_of(self.teacher(**given))
        if TEACHER_LOGITS not in inputs:
            raise DataError(
                f"distillation: no teacher was given and the batch has no {TEACHER_LOGITS!r}, only {', '.join(inputs)}"
            )
        found = inputs[TEACHER_LOGITS]
        assert isinstance(found, Tensor)
        return found

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TEACHER_LOGITS not in self._signature_columns:
            below = inspect.signature(_base(self.model).forward).parameters
            self._signature_columns = [*self._signature_columns, *below, TEACHER_LOGITS]


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, or something with `logits`, or a tuple that begins with them.

    Raises:
        DataError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"distillation: a {type(output).__name__} without logits; return them, or a dict with 'logits'"
        )
    return found


def labelled_rows(
    student: Any, teacher: Tensor, labels: Tensor, *, causal: bool
) -> tuple[Any, Tensor, Tensor]:
    """Logits (row, class) of both and labels (row) of all positions whose label counts.

    `student` is a tensor, or a named tuple of such for several heads. `causal`: the label of position t is that of t + 1, as
    the labels of a causal language model are its own inputs.

    Raises:
        DataError: logits of different shapes, or labels that do not belong to them.
    """
    heads = student if isinstance(student, tuple) else (student,)
    if any(head.shape != teacher.shape for head in heads) or labels.shape != teacher.shape[:-1]:
        raise DataError(
            f"distillation: logits of student and teacher and labels have shapes {tuple(heads[0].shape)}, "
            f"{tuple(teacher.shape)} and {tuple(labels.shape)}; both networks need the same classes, and each row a label"
        )
    if causal:
        heads, teacher, labels = tuple(head[:, :-1] for head in heads), teacher[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    kept = [head[counted] for head in heads]
    return type(student)(*kept) if isinstance(student, tuple) else kept[0], teacher[counted], labels[counted]


def _is_causal(model: nn.Module) -> bool:
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(kind.__name__ in known for kind in type(model).__mro__)


def _base(model: Any) -> nn.Module:
    """The model below adapters and second heads."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    assert isinstance(model, nn.Module)
    return model
