"""Distillation in the Transformers Trainer: which rows the loss sees, and that images and text both train."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
import toy

from uncollapse.errors import ConfigError, DataError
from uncollapse.integrations.distillation import DistillationTrainer, labelled_rows, logits_of
from uncollapse.representation.distillation import KDLoss, cross_entropy_loss


class Images(nn.Module):
    """Any module that returns logits."""

    def __init__(self, classes=3, wrap=None):
        super().__init__()
        self.layers, self.wrap = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, classes)), wrap

    def forward(self, pixels):
        logits = self.layers(pixels)
        return logits if self.wrap is None else self.wrap(logits)


def images(rows=8, classes=3):
    generator = torch.Generator().manual_seed(0)
    return [{"pixels": torch.randn(3, 4, generator=generator), "labels": i % classes} for i in range(rows)]


def texts(rows=6):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(rows):
        ids = torch.randint(2, len(toy.VOCABULARY), (9,), generator=generator)
        labels = ids.clone()
        labels[:3] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def arguments(path, **options):
    chosen = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1} | options
    return TrainingArguments(
        output_dir=str(path), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **chosen
    )


def made(path, model, data, teacher=None, loss=None, causal=None, **options):
    return DistillationTrainer(
        model=model, teacher=teacher, loss=loss or KDLoss(), args=arguments(path, **options), train_dataset=data,
        eval_dataset=data, causal=causal,
    )  # fmt: skip


def test_images_train_on_the_loss_of_student_and_teacher(tmp_path):
    torch.manual_seed(0)
    student, teacher = Images(), Images(wrap=lambda logits: {"logits": logits})
    trainer = made(tmp_path, student, images(), teacher)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in images()]) for name in images()[0]}
    student.eval()
    found, seen = trainer.compute_loss(student, dict(batch), return_outputs=True)
    expected = KDLoss()(student(batch["pixels"]), teacher.eval()(batch["pixels"])["logits"], batch["labels"])
    torch.testing.assert_close(found, expected)
    assert torch.equal(seen["logits"], student(batch["pixels"]))
    before, kept = student.layers[-1].weight.clone(), teacher.layers[-1].weight.clone()
    trainer.train()
    assert not teacher.training
    assert not torch.equal(before, student.layers[-1].weight)
    assert torch.equal(kept, teacher.layers[-1].weight)
    assert teacher.layers[-1].weight.grad is None
    prediction = trainer.predict(images())
    assert prediction.predictions.shape == (8, 3)
    assert prediction.label_ids.tolist() == [i % 3 for i in range(8)]
    assert trainer.evaluate()["eval_loss"] > 0


def test_language_models_are_distilled_at_the_tokens_that_count(tmp_path):
    seen = []

    def loss(student, teacher, labels):
        seen.append((student, teacher, labels))
        return KDLoss()(student, teacher, labels)

    student, teacher, data = toy.llama(0), toy.llama(1), texts()
    trainer = made(tmp_path, student, data, teacher, loss)
    assert trainer.causal
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    trainer.compute_loss(student, dict(batch))
    (of_student, of_teacher, labels), ids = seen[0], batch["input_ids"]
    assert torch.equal(labels, ids[:, 3:].reshape(-1))
    for model, found in ((student, of_student), (teacher, of_teacher)):
        torch.testing.assert_close(found, model(ids).logits[:, 2:-1].reshape(-1, len(toy.VOCABULARY)))
    trainer.train()
    assert len(trainer.state.log_history) > 0


def test_language_models_of_a_derived_class_shift_their_labels_too(tmp_path):
    class Mine(LlamaForCausalLM):
        pass

    mine, data = Mine(toy.llama().config), texts()
    assert made(tmp_path, mine, data, toy.llama(1)).causal
    assert not made(tmp_path, mine, data, toy.llama(1), causal=False).causal
    assert not made(tmp_path, Images(), images(), Images()).causal
    assert made(tmp_path, Images(), images(), Images(), causal=True).causal


def test_accumulated_micro_batches_are_a_mean(tmp_path):
    steps = {}
    for pieces in (1, 2):
        student = toy.llama(0)
        options = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces}
        # one step of plain descent: the weight after it shows the gradient
        trainer = made(
            tmp_path, student, texts(4), toy.llama(1), max_steps=1, optim="sgd", max_grad_norm=0.0, **options
        )
        trainer.train()
        steps[pieces] = student.lm_head.weight.detach().clone()
    assert not torch.equal(steps[1], toy.llama(0).lm_head.weight)
    torch.testing.assert_close(steps[1], steps[2])


def test_logits_computed_before_need_no_teacher(tmp_path):
    from datasets import Dataset

    teacher = Images().eval()
    rows = images()
    logits = [teacher(row["pixels"][None])[0].tolist() for row in rows]
    data = Dataset.from_list(
        [
            {"pixels": r["pixels"].tolist(), "labels": r["labels"], "teacher_logits": t, "unused": 1}
            for r, t in zip(rows, logits, strict=True)
        ]
    )
    trainer = made(tmp_path, Images(), data)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(DataError, match="no teacher was given"):
        made(tmp_path, Images(), rows).train()


def test_a_batch_without_a_label_that_counts_has_loss_0(tmp_path):
    rows = [row | {"labels": torch.full((9,), -100)} for row in texts(2)]
    trainer = made(tmp_path, toy.llama(), rows, toy.llama(1))
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert float(trainer.compute_loss(trainer.model, batch).detach()) == 0


def test_a_batch_without_a_label_has_loss_0_where_classes_are_excluded(tmp_path):
    excluded = torch.tensor([False, True, False])
    student = Images(wrap=lambda logits: logits.masked_fill(excluded, -torch.inf))
    trainer = made(tmp_path, student, images(), Images())
    batch = {"pixels": torch.randn(2, 3, 4), "labels": torch.full((2,), -100)}
    loss = trainer.compute_loss(student, batch)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("option", ["compute_loss_func", "label_smoothing_factor"])
def test_another_loss_is_refused(tmp_path, option):
    smoothing = {"label_smoothing_factor": 0.1} if option == "label_smoothing_factor" else {}
    other = {"compute_loss_func": lambda *_: 0} if option == "compute_loss_func" else {}
    with pytest.raises(ConfigError, match="would be another loss"):
        DistillationTrainer(
            model=toy.llama(),
            teacher=None,
            loss=cross_entropy_loss,
            args=arguments(tmp_path, **smoothing),
            **other,
        )


def test_refusals(tmp_path):
    trainer = made(tmp_path, Images(), images(), Images(classes=4))
    with pytest.raises(DataError, match=r"shapes \(4, 3\), \(4, 4\)"):
        trainer.train()
    with pytest.raises(DataError, match="no 'labels', only pixels"):
        trainer.compute_loss(trainer.model, {"pixels": torch.zeros(1, 3, 4)})
    with pytest.raises(DataError, match="a int without logits"):
        logits_of(3)
    assert torch.equal(logits_of((torch.ones(1), 2)), torch.ones(1))
    with pytest.raises(DataError, match="each row a label"):
        labelled_rows(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1), causal=False)
