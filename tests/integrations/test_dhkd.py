"""Dual-head distillation in the Transformers Trainer: images and texts, saved, resumed and exported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
import toy

from uncollapse.integrations.distillation import DistillationTrainer, labelled_rows
from uncollapse.representation.dhkd import DualHeadLoss, DualHeadModel, DualLogits


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixels))


def images(rows=16):
    generator = torch.Generator().manual_seed(0)
    return [{"pixels": torch.randn(3, 4, generator=generator), "labels": i % 3} for i in range(rows)]


def texts(rows=8, labels=None):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(rows):
        ids = torch.randint(2, len(toy.VOCABULARY), (9,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        found[-1]["labels"] = ids.clone() if labels is None else i % labels
    return found


def classifier(seed):
    torch.manual_seed(seed)
    sizes = {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 32, "vocab_size": len(toy.VOCABULARY)}
    return DistilBertForSequenceClassification(DistilBertConfig(num_labels=3, **sizes))


def made(path, model, teacher, data, loss, **options):
    chosen = {"max_steps": 3, "save_strategy": "no", "learning_rate": 0.1} | options
    arguments = TrainingArguments(
        output_dir=str(path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, **chosen
    )  # fmt: skip
    return DistillationTrainer(
        model=model, teacher=teacher, loss=loss, args=arguments, train_dataset=data, eval_dataset=data
    )


@pytest.mark.parametrize("aux", ["linear", "mlp"])
@pytest.mark.parametrize("align", [False, True])
def test_images(tmp_path, aux, align):
    torch.manual_seed(0)
    teacher, base = Images(), Images()
    model = DualHeadModel(base, "head", aux)
    loss = DualHeadLoss(align=model.parameters() if align else None)
    trainer = made(tmp_path, model, teacher, images(), loss)
    before = [p.clone() for p in model.parameters()]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    found = trainer.evaluate()["eval_loss"]
    rows = torch.stack([row["pixels"] for row in images()])
    labels = torch.tensor([row["labels"] for row in images()])
    expected = nn.functional.cross_entropy(model.export()(rows), labels)
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert trainer.predict(images()).predictions.shape == (16, 3)


def test_the_first_step_is_the_gradient_of_the_loss(tmp_path):
    torch.manual_seed(0)
    teacher, model = Images(), DualHeadModel(Images(), "head")
    data = images(4)
    rows, labels = torch.stack([r["pixels"] for r in data]), torch.tensor([r["labels"] for r in data])
    loss = DualHeadLoss(align=model.parameters())
    loss(model(rows), teacher(rows).detach(), labels).backward()
    wanted = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    model.zero_grad()
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    made(tmp_path, model, teacher, data, loss, **options).train()
    torch.testing.assert_close([p.detach() for p in model.parameters()], wanted)


def test_hugging_face_classifiers_are_saved_resumed_and_exported(tmp_path):
    base = classifier(0)
    model = DualHeadModel(base, "classifier", "mlp")
    data = texts(labels=3)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = made(tmp_path, model, classifier(1), data, DualHeadLoss(), **options)
    trainer.train()
    again = made(
        tmp_path, DualHeadModel(classifier(2), "classifier", "mlp"), classifier(1), data, DualHeadLoss()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3
    model.export().save_pretrained(tmp_path / "kept")
    kept = DistilBertForSequenceClassification.from_pretrained(tmp_path / "kept").eval()
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(kept(**batch).logits, model.eval()(**batch).logits)
    assert sum(p.numel() for p in kept.parameters()) == sum(p.numel() for p in classifier(3).parameters())


def test_language_models_shift_their_labels_below_a_second_head(tmp_path):
    model = DualHeadModel(toy.llama(0), "lm_head")
    trainer = made(tmp_path, model, toy.llama(1), texts(), DualHeadLoss(reduction="class_mean"))
    assert trainer.causal
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_of_both_heads_are_those_that_count():
    main, other, teacher = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, -100, 1, 2], [-100, 3, -100, 4]])
    found, of_teacher, kept = labelled_rows(DualLogits(main, other), teacher, labels, causal=False)
    assert isinstance(found, DualLogits)
    for a, b in ((found.main, main), (found.auxiliary, other), (of_teacher, teacher)):
        assert torch.equal(a, b[labels != -100])
    assert kept.tolist() == [0, 1, 2, 3, 4]
