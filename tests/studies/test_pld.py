from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from uncollapse.studies import pld
from uncollapse.studies.pld import KD, QUICK, STUDY, arms, estimates_of, shuffled, train, tuned
from uncollapse.studies.testbeds.distillation import Rows, taught_task, train_teacher

SMALL = replace(QUICK.linear, steps=3, teacher_steps=3)


def test_every_arm_trains_the_same_student_on_its_own_loss() -> None:
    task = taught_task(SMALL, 0, train_teacher(SMALL, 0))
    still = replace(SMALL, steps=0)
    starts = [train(still, task, arm, 0) for arm in ("ce", "pld-1", "shuffled")]
    assert starts[0] == starts[1] == starts[2]
    assert train(SMALL, task, "pld-1", 0) == train(SMALL, task, "pld-1", 0)
    losses = {
        name: float(loss(task.train.teacher / 2, task.train.teacher, task.train.labels))
        for name, loss in arms().items()
    }
    assert losses.pop("shuffled") == losses["pld-1"]
    assert len({round(value, 6) for value in losses.values()}) == len(losses)


def test_shuffling_keeps_weights_and_the_first_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = Rows(
        torch.zeros(50, 3),
        torch.randint(9, (50,), generator=generator),
        torch.randn(50, 9, generator=generator),
    )
    mixed = shuffled(rows, 0)
    y = rows.labels[:, None]
    assert torch.equal(mixed.teacher.gather(1, y), rows.teacher.gather(1, y))
    assert torch.equal(mixed.teacher.sort(-1).values, rows.teacher.sort(-1).values)
    without = [x.scatter(1, y, -torch.inf).argmax(-1) for x in (rows.teacher, mixed.teacher)]
    assert (without[0] == without[1]).double().mean() < 0.4
    assert torch.equal(shuffled(rows, 0).teacher, mixed.teacher)


def test_tuning_looks_at_the_validation_rows_alone() -> None:
    scores = {
        "a": {"validation": [0.5, 0.2], "test": [0.1, 0.9]},
        "b": {"validation": [0.4, 0.3], "test": [0.8, 0.2]},
    }
    assert tuned(scores, ("a", "b")) == [0.1, 0.2]


def test_the_best_temperature_is_the_best_on_average() -> None:
    scores = {name: {"validation": [0.5, 0.5], "test": [0.5, 0.5]} for name in arms()}
    scores["pld-2"]["test"] = [0.7, 0.6]
    found = estimates_of("mlp", scores, [0.9, 0.9], (0, 1))
    assert found["mlp/pld-1-minus-best-tau"].value == pytest.approx(-0.15)
    assert found["mlp/pld-1-minus-ce"].value == 0
    assert found["mlp/teacher-minus-ce"].value == pytest.approx(0.4)


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"steps": 1, "teacher_steps": 1}
    monkeypatch.setattr(
        pld, "QUICK", replace(QUICK, linear=replace(QUICK.linear, **small), mlp=replace(QUICK.mlp, **small))
    )
    outcome, _ = smoke(STUDY)
    assert set(outcome.record["details"]["kd_mean_test_accuracy"]["mlp"]) == set(KD)
