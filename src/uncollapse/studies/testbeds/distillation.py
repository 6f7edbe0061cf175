"""Distillation on a hierarchy of Gaussian clouds: a wide teacher, a student with a narrow neck, one loop for both.

Teacher and student learn from the same labelled rows, and the teacher's logits on them are computed once. `train_teacher` gives a
JSON value, so that a study trains a teacher once per seed and remembers it as a trial; `taught_task` reads it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from uncollapse.studies.testbeds.hierarchy import Hierarchy

Backward: TypeAlias = Callable[[Tensor, Tensor, Tensor], object]
"""features, teacher logits, labels of a batch -> nothing; leaves the gradient in the parameters."""


@dataclass(frozen=True)
class Setting:
    """The world, both networks and how long they learn. Rows, steps and sizes are counts.

    Calibrated on seeds from 100 on, with cross-entropy alone: noise and student so that the teacher has the better by 5 points and
    more (Bayes 0.78, teacher 0.72, students 0.34 and 0.63); learning rates and decay by accuracy on the validation rows.
    """

    branching: tuple[int, ...] = (5, 5, 4)
    scales: tuple[float, ...] = (1.0, 0.7, 0.5)
    noise: float = 2.0
    features: int = 64
    train: int = 20_000
    validation: int = 10_000
    test: int = 50_000
    teacher_hidden: tuple[int, ...] = (512, 512)
    teacher_steps: int = 500
    teacher_lr: float = 1e-3
    teacher_decay: float = 0.1
    student_hidden: tuple[int, ...] = ()
    neck: int = 8
    steps: int = 1_000
    lr: float = 3e-2
    decay: float = 0.0
    batch: int = 256


LINEAR = Setting()
"""A linear student with a neck of 8, which cannot separate the classes: what the teacher knows has to be given up somewhere."""

MLP = Setting(student_hidden=(128,), neck=16, decay=0.1)
"""A student that could nearly do it but overfits."""


@dataclass(frozen=True)
class Rows:
    """Features, labels and, once there is a teacher, its logits."""

    features: Float[Tensor, "row feature"]
    labels: Int[Tensor, " row"]
    teacher: Float[Tensor, "row class"]


@dataclass(frozen=True)
class Task:
    """Rows of one world: to train on, to choose on, to judge on."""

    train: Rows
    validation: Rows
    test: Rows
    classes: int

    @classmethod
    def make(cls, setting: Setting, seed: int) -> Task:
        """World and rows by `seed`; the teacher's logits are still zeros."""
        world = Hierarchy.make(
            seed,
            branching=setting.branching,
            scales=setting.scales,
            features=setting.features,
            noise=setting.noise,
        )
        generator = torch.Generator().manual_seed(seed + 1_000_000)

        def draw(count: int) -> Rows:
            features, labels = world.draw(count, generator)
            return Rows(features, labels, torch.zeros(count, world.classes))

        return cls(draw(setting.train), draw(setting.validation), draw(setting.test), world.classes)

    def taught_by(self, teacher: nn.Module) -> Task:
        """The same rows with the teacher's logits."""

        def look(rows: Rows) -> Rows:
            return Rows(rows.features, rows.labels, logits_of(teacher, rows.features))

        return Task(look(self.train), look(self.validation), look(self.test), self.classes)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, none at the end."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Student(nn.Module):
    """A `backbone` down to the neck and a linear `head`."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.backbone(features))


def make_student(setting: Setting, classes: int, seed: int) -> Student:
    """A fresh student; the same seed gives the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = mlp((setting.features, *setting.student_hidden, setting.neck))
        return Student(backbone, nn.Linear(setting.neck, classes))


def make_teacher(setting: Setting, classes: int, seed: int) -> nn.Sequential:
    """A fresh teacher; the same seed gives the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2_000_000)
        return mlp((setting.features, *setting.teacher_hidden, classes))


def fit(
    optimizer: torch.optim.Optimizer,
    backward: Backward,
    rows: Rows,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Descend for `steps` batches; the learning rate falls to 0 along a cosine.

    Batches are consecutive parts of a shuffle of all rows, shuffled anew in every epoch; `seed` decides them, so that two
    arms with one seed see the same rows in the same order.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = _batches(len(rows.labels), batch, torch.Generator().manual_seed(seed + 3_000_000))
    for _, index in zip(range(steps), batches, strict=False):
        optimizer.zero_grad(set_to_none=True)
        backward(rows.features[index], rows.teacher[index], rows.labels[index])
        optimizer.step()
        schedule.step()


def _batches(rows: int, batch: int, generator: torch.Generator) -> Iterable[Tensor]:
    batch = min(batch, rows)
    while True:
        yield from torch.randperm(rows, generator=generator)[: rows // batch * batch].split(batch)


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW as the studies use it."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)


@torch.no_grad()
def logits_of(model: nn.Module, features: Float[Tensor, "row feature"]) -> Float[Tensor, "row class"]:
    """Logits in evaluation mode, a block of rows at a time; the mode is put back."""
    training = model.training
    model.eval()
    found = torch.cat([model(part) for part in features.split(10_000)])
    model.train(training)
    return found


def accuracy(logits: Float[Tensor, "row class"], labels: Int[Tensor, " row"]) -> float:
    """Share of rows whose largest logit is that of the label."""
    return float((logits.argmax(-1) == labels).double().mean())


def train_teacher(setting: Setting, seed: int) -> dict[str, Any]:
    """Train a teacher with cross-entropy; a JSON value for `unpack_teacher`, with its accuracies."""
    task = Task.make(setting, seed)
    teacher = make_teacher(setting, task.classes, seed)

    def backward(features: Tensor, _: Tensor, labels: Tensor) -> None:
        F.cross_entropy(teacher(features), labels).backward()

    optimizer = adamw(teacher.parameters(), lr=setting.teacher_lr, decay=setting.teacher_decay)
    fit(optimizer, backward, task.train, steps=setting.teacher_steps, batch=setting.batch, seed=seed)
    scores = {
        name: accuracy(logits_of(teacher, rows.features), rows.labels)
        for name, rows in (("train", task.train), ("validation", task.validation), ("test", task.test))
    }
    return scores | {"weights": base64.b64encode(safetensors.torch.save(teacher.state_dict())).decode()}


def unpack_teacher(setting: Setting, classes: int, kept: Mapping[str, Any]) -> nn.Sequential:
    """The teacher that `train_teacher` made."""
    teacher = make_teacher(setting, classes, 0)
    teacher.load_state_dict(safetensors.torch.load(base64.b64decode(kept["weights"])))
    return teacher


def taught_task(setting: Setting, seed: int, kept: Mapping[str, Any]) -> Task:
    """The task of a seed with the logits of its teacher."""
    task = Task.make(setting, seed)
    return task.taught_by(unpack_teacher(setting, task.classes, kept))
