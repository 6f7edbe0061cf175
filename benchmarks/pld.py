"""Plackett-Luce distillation over a vocabulary, value and gradient, against autograd through the reference formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Goal
from uncollapse.representation.plackett_luce import weighted_ranking_loss
from uncollapse.representation.pld import plackett_luce_distillation_loss, teacher_optimal_permutation

SUMMARY = (
    "`plackett_luce_distillation_loss` and its gradient with respect to the student's logits. *autograd* is the reference: a "
    "stable sort, gather, flip, `logcumsumexp`, flip, weighted sum, and whatever autograd makes of them. *ranked* starts from a ranking "
    "in hand, so that no sort hides the cost of value and gradient; at a quarter of the classes it should take a quarter of the time. "
    "*top 50* keeps the first 50 choices."
)
N, C, TOP = 256, 50_000, 50
AUTOGRAD, TOP_K = "autograd", "ours, top 50"
RANKED, QUARTER, AUTOGRAD_RANKED = (
    "ours, ranked",
    "ours, ranked, a quarter of the classes",
    "autograd, ranked",
)
Problem = tuple[Tensor, Tensor, Tensor]


def problem(rows: int, classes: int) -> Problem:
    """Logits of a student and of a teacher that knows more, and labels drawn from the teacher."""
    g = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, classes, generator=g)
    student = 0.5 * teacher + torch.randn(rows, classes, generator=g)
    return student, teacher, torch.multinomial(teacher.softmax(-1), 1, generator=g)[:, 0]


def reference(s: Tensor, order: Tensor, alpha: Tensor) -> Tensor:
    """The formula, step by step."""
    chosen = s.gather(1, order)
    lse = chosen.flip(-1).logcumsumexp(-1).flip(-1)
    return (alpha * (lse - chosen)).sum(-1).mean()


def ranking(teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher-optimal ranking and its weights."""
    order = teacher_optimal_permutation(teacher, labels)
    return order, teacher.softmax(-1).gather(1, order)


def gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """Forward and backward."""
    s = student.detach().requires_grad_()
    return torch.autograd.grad(loss(s), s)[0]


def autograd(given: Problem) -> Tensor:
    """All of it through autograd."""
    student, teacher, labels = given
    return gradient(lambda s: reference(s, *ranking(teacher, labels)), student)


def ours(given: Problem, top_k: int | None = None) -> Tensor:
    """All of it in closed form."""
    student, teacher, labels = given
    return gradient(lambda s: plackett_luce_distillation_loss(s, teacher, labels, top_k=top_k), student)


def ours_ranked(student: Tensor, order: Tensor, alpha: Tensor) -> Tensor:
    """Value and gradient of rankings in hand."""
    rows = torch.arange(len(student))
    return gradient(
        lambda s: weighted_ranking_loss(s, rows, lambda part, _: (order[part], alpha[part])).mean(), student
    )


def case() -> Case:
    """256 tokens over 50 000 classes, and a tiny case to warm libraries up."""

    def contestants(rows: int, classes: int, top: int) -> dict[str, Callable[[], Any]]:
        whole, part = problem(rows, classes), problem(rows, classes // 4)
        ranked, ranked_part = ranking(*whole[1:]), ranking(*part[1:])
        return {
            OURS: lambda: ours(whole),
            AUTOGRAD: lambda: autograd(whole),
            TOP_K: lambda: ours(whole, top),
            RANKED: lambda: ours_ranked(whole[0], *ranked),
            QUARTER: lambda: ours_ranked(part[0], *ranked_part),
            AUTOGRAD_RANKED: lambda: gradient(lambda s: reference(s, *ranked), whole[0]),
        }

    full = contestants(N, C, TOP)

    def check() -> dict[str, float]:
        mine, exact = (
            full[OURS](),
            autograd(tuple(x.double() if x.is_floating_point() else x for x in problem(N, C))),
        )
        scale = exact.abs().max()
        found = {name: full[name]() for name in (AUTOGRAD, RANKED, AUTOGRAD_RANKED)} | {OURS: mine}
        differences = {name: float((x - exact).abs().max() / scale) for name, x in found.items()}
        if differences[OURS] > 1e-5:
            raise RuntimeError(f"the gradients differ by {differences[OURS]:.1e} of the largest")
        return differences

    return Case(
        size=f"{N} tokens, C={C}, float32; differences are of gradients, over the largest of the reference in float64",
        contestants=full,
        warm_up=contestants(4, 64, 5),
        check=check,
        goals=(
            Goal("time of autograd over ours", lambda r: r[AUTOGRAD]["time_over_ours"], 2, True),
            Goal(
                "time of autograd over ours, rankings in hand",
                lambda r: r[AUTOGRAD_RANKED]["time_over_ours"] / r[RANKED]["time_over_ours"],
                4,
                True,
            ),
            Goal(
                "peak memory of autograd over ours",
                lambda r: r[AUTOGRAD]["extra_peak_mb"] / r[OURS]["extra_peak_mb"],
                3,
                True,
            ),
            Goal(
                "time of ours over that at a quarter of the classes (4 is O(C)), rankings in hand",
                lambda r: r[RANKED]["time_over_ours"] / r[QUARTER]["time_over_ours"],
                5,
                False,
            ),
        ),
    )
