"""The distillation testbed: rows, teachers and batches by seed, and a loop that learns."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from uncollapse.studies.testbeds.distillation import (
    Setting,
    Task,
    accuracy,
    adamw,
    fit,
    logits_of,
    make_student,
    taught_task,
    train_teacher,
    unpack_teacher,
)

SMALL = Setting(
    branching=(2, 2), scales=(2.0, 1.0), noise=0.7, features=6, train=200, validation=50, test=400,
    teacher_hidden=(16,), teacher_steps=60, teacher_lr=3e-2, neck=3, steps=40, batch=32,
)  # fmt: skip


def test_rows_come_from_the_seed_and_do_not_overlap():
    one, same, other = Task.make(SMALL, 0), Task.make(SMALL, 0), Task.make(SMALL, 1)
    assert torch.equal(one.test.features, same.test.features)
    assert not torch.equal(one.test.features, other.test.features)
    assert not (one.train.features[:50, None] == one.validation.features[None]).all(-1).any()
    assert one.classes == 4
    assert one.train.teacher.shape == (200, 4)


def test_a_teacher_survives_json_and_teaches_every_row():
    kept = json.loads(json.dumps(train_teacher(SMALL, 3)))
    task, teacher = taught_task(SMALL, 3, kept), unpack_teacher(SMALL, 4, kept)
    assert torch.equal(task.train.teacher, logits_of(teacher, task.train.features))
    assert accuracy(task.test.teacher, task.test.labels) == kept["test"] > 0.6
    assert not task.test.teacher.requires_grad


def test_the_loop_learns_and_arms_of_a_seed_see_the_same_batches():
    task = Task.make(SMALL, 0)
    seen = []

    def train(seed):
        student = make_student(SMALL, task.classes, seed)
        rows = []

        def backward(features, teacher, labels):
            rows.append(features)
            F.cross_entropy(student(features), labels).backward()

        optimizer = adamw(student.parameters(), lr=SMALL.lr, decay=SMALL.decay)
        fit(optimizer, backward, task.train, steps=SMALL.steps, batch=SMALL.batch, seed=seed)
        seen.append(torch.cat(rows))
        return logits_of(student, task.test.features)

    first, again = train(0), train(0)
    train(1)
    assert torch.equal(first, again)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert accuracy(first, task.test.labels) > 0.6
    epoch = seen[0][: 200 // 32 * 32]
    assert len(epoch.unique(dim=0)) == len(epoch)


def test_fewer_rows_than_a_batch_are_one_batch():
    task = Task.make(SMALL, 0)
    student, sizes = make_student(SMALL, 4, 0), []

    def backward(features, teacher, labels):
        sizes.append(len(labels))
        F.cross_entropy(student(features), labels).backward()

    fit(adamw(student.parameters(), lr=0.1, decay=0.0), backward, task.train, steps=2, batch=1000, seed=0)
    assert sizes == [200, 200]


def test_evaluation_puts_the_mode_back():
    student = make_student(SMALL, 4, 0)
    logits_of(student.train(), torch.zeros(3, 6))
    assert student.training
