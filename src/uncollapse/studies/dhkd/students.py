"""Students of the DHKD study: which losses, on which heads, and how one is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from uncollapse.measure import nc_metrics
from uncollapse.representation.dhkd import (
    DualHeadLoss,
    DualLogits,
    DualLosses,
    GradientAlignment,
    auxiliary_head,
    binary_kl_loss,
    binary_kl_norm_loss,
    gradient_conflict_report,
)
from uncollapse.representation.dhkd.alignment import Scope
from uncollapse.representation.distillation import cross_entropy_loss, kd_loss
from uncollapse.studies.testbeds.distillation import (
    Setting,
    Student,
    Task,
    accuracy,
    fit,
    logits_of,
)

Head: TypeAlias = Literal["single", "linear", "mlp", "detached"]

TAU = 2.0
"""Temperature of the logit-level losses, the paper's."""

LOOK = 10
"""Gradients are compared at every tenth step."""


def squared_error(
    logits: Tensor, teacher_logits: Tensor, tau: float, *, reduction: str, mask: Tensor | None
) -> Tensor:
    """||a - t||^2 / (16 N), half of what both logit-level losses become at a large temperature; options do not apply.

    At their full weight it diverges at a learning rate of 0.05 (seed 1000): its gradient has no bound.
    """
    return (logits - teacher_logits).square().sum() / (16 * len(logits))


@dataclass(frozen=True)
class Arm:
    """A logit-level loss, the head it acts on, the weight of cross-entropy on the main head, and alignment.

    Heads: "single" is the main head; "detached" a linear auxiliary head whose gradient does not reach the backbone.
    """

    loss: Callable[..., Tensor]
    head: Head = "single"
    gamma: float = 1.0
    alignment: Scope | None = None


PLAIN: Mapping[str, Callable[..., Tensor]] = {
    "ce": cross_entropy_loss,
    "kd": partial(kd_loss, temperature=4.0),
}
"""Baselines: losses of student logits, teacher logits and labels. The authors distil with temperature 4."""

ARMS: Mapping[str, Arm] = {
    "binary": Arm(binary_kl_loss, gamma=0.0),
    "norm": Arm(binary_kl_norm_loss, gamma=0.0),
    "single-binary": Arm(binary_kl_loss),
    "single-norm": Arm(binary_kl_norm_loss),
    "single-mse": Arm(squared_error),
    "dual-binary": Arm(binary_kl_loss, "linear"),
    "dual-norm": Arm(binary_kl_norm_loss, "linear"),
    "dual-mse": Arm(squared_error, "linear"),
    "dual-mlp": Arm(binary_kl_norm_loss, "mlp"),
    "aligned-shared": Arm(binary_kl_norm_loss, "linear", alignment="shared"),
    "aligned-all": Arm(binary_kl_norm_loss, "linear", alignment="all"),
    "detached": Arm(binary_kl_norm_loss, "detached"),
}

NAMES = (*PLAIN, *ARMS)

SINGLE = ("single-binary", "single-norm", "single-mse")
DUAL = ("dual-binary", "dual-norm", "dual-mse", "dual-mlp", "aligned-shared", "aligned-all")

WATCHED = (*SINGLE, "dual-binary", "dual-norm")
"""Arms whose two gradients are compared; the curves of the figure leave the squared error out."""

COLLAPSED = ("ce", "single-binary", "single-norm", "dual-norm")
"""Arms whose neural collapse is reported."""

METRICS = ("nc1_quotient", "nc2_etf_weights", "nc3_dist", "nc4")
"""Metrics of neural collapse that are kept."""


@dataclass(frozen=True)
class Size:
    """How much of everything: the full study or a smoke run.

    The student is 64 - 32 - 128 - classes: features are wide enough for a simplex of 100 classes, and the 32 units keep it
    weaker than its teacher.
    """

    setting: Setting = field(
        default_factory=lambda: Setting(
            noise=1.5, train=10_000, validation=20_000, test=20_000, teacher_steps=1_500, student_hidden=(32,), neck=128,
            steps=2_000, lr=0.05, decay=5e-4, batch=128,
        )
    )  # fmt: skip
    seeds: int = 10


QUICK = Size(
    Setting(
        branching=(3, 2), scales=(1.0, 0.7), features=8, train=200, validation=50, test=200, teacher_hidden=(16,),
        teacher_steps=30, student_hidden=(6,), neck=10, steps=20, lr=0.05, decay=5e-4, batch=32,
    ),
    seeds=2,
)  # fmt: skip


def make_student(setting: Setting, classes: int, seed: int) -> Student:
    """Linear layers, each with batch normalisation and a ReLU, and a linear head; the same seed gives the same."""
    widths = (setting.features, *setting.student_hidden, setting.neck)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        return Student(nn.Sequential(*layers), nn.Linear(setting.neck, classes))


def train(name: str, task: Task, setting: Setting, seed: int) -> dict[str, Any]:
    """Train one arm with SGD, momentum 0.9; `seed` decides the student, its auxiliary head and the batches.

    Returns `accuracy` (test), `validation` and `train` accuracy, neural-collapse metrics of the main head on the training rows, and the
    cosines of the two gradients at every tenth step of a watched arm: on the `head` (one head only) and on the `backbone`.
    """
    student = make_student(setting, task.classes, seed)
    auxiliary = _auxiliary(ARMS.get(name), setting.neck, task.classes, seed)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *auxiliary.parameters()],
        lr=setting.lr,
        momentum=0.9,
        weight_decay=setting.decay,
        fused=True,  # the same steps in another order of rounding, 7 % faster
    )
    cosines: dict[str, list[Tensor]] = {}
    steps = 0

    def baseline(features: Tensor, teacher: Tensor, labels: Tensor) -> None:
        PLAIN[name](student(features), teacher, labels).backward()

    def two_losses(features: Tensor, teacher: Tensor, labels: Tensor) -> None:
        nonlocal steps
        steps += 1
        arm = ARMS[name]
        losses = _losses(arm, student, auxiliary, features, teacher, labels)
        if name in WATCHED and steps % LOOK == 0:
            _look(arm, student, losses, cosines)
        if arm.alignment is None:
            losses.total.backward()
        else:
            GradientAlignment(optimizer, scope=arm.alignment).backward(losses)

    backward = baseline if name in PLAIN else two_losses
    fit(optimizer, backward, task.train, steps=setting.steps, batch=setting.batch, seed=seed)
    return {
        "accuracy": accuracy(logits_of(student, task.test.features), task.test.labels),
        "validation": accuracy(logits_of(student, task.validation.features), task.validation.labels),
        "train": accuracy(logits_of(student, task.train.features), task.train.labels),
        "collapse": _collapse(student, task),
        "cosines": {group: torch.stack(values).tolist() for group, values in cosines.items()},
    }


def _auxiliary(arm: Arm | None, features: int, classes: int, seed: int) -> nn.Module:
    if arm is None or arm.head == "single":
        return nn.Identity()
    return auxiliary_head(features, classes, "mlp" if arm.head == "mlp" else "linear", seed=seed)


def _losses(
    arm: Arm, student: Student, auxiliary: nn.Module, rows: Tensor, teacher: Tensor, labels: Tensor
) -> DualLosses:
    features = student.backbone(rows)
    main = student.head(features)
    if arm.head == "single":
        other = main
    else:
        other = auxiliary(features.detach() if arm.head == "detached" else features)
    return DualHeadLoss(arm.gamma, tau=TAU, loss=arm.loss).parts(DualLogits(main, other), teacher, labels)


def _look(arm: Arm, student: Student, losses: DualLosses, cosines: dict[str, list[Tensor]]) -> None:
    groups = {"backbone": student.backbone.parameters()}
    if arm.head == "single":
        groups["head"] = student.head.parameters()
    for group, conflict in gradient_conflict_report(losses.main, losses.auxiliary, groups).items():
        cosines.setdefault(group, []).append(conflict.cosine.detach())


def _collapse(student: Student, task: Task) -> dict[str, float]:
    features = logits_of(student.backbone, task.train.features)
    if not bool(features.isfinite().all()):  # diverged: a result too
        return dict.fromkeys(METRICS, math.nan)
    report = nc_metrics(features, task.train.labels, student.head.weight, student.head.bias)
    return {name: value for name, value in report.metrics().items() if name in METRICS}
