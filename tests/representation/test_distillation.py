"""Baseline losses of distillation against their formulas written out."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.distillation import (
    DistillationLoss,
    DISTLoss,
    KDLoss,
    LabelSmoothingLoss,
    LogitMSELoss,
    cross_entropy_loss,
    dist_loss,
    kd_loss,
    label_smoothing_loss,
    logit_mse_loss,
    pearson_correlation,
)

LOSSES = (cross_entropy_loss, label_smoothing_loss, kd_loss, dist_loss, logit_mse_loss)


def problem(seed: int = 0, rows: int = 6, classes: int = 5):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(2, rows, classes, generator=generator)).double()
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def test_kd_is_its_formula():
    student, teacher, labels = problem()
    for alpha, tau in ((0.1, 2.0), (0.5, 4.0), (1.0, 1.0)):
        expected = 0.0
        for s, t, y in zip(student, teacher, labels, strict=True):
            p, q = torch.softmax(s / tau, 0), torch.softmax(t / tau, 0)
            kl = sum(float(q[c] * (q[c] / p[c]).log()) for c in range(5))
            expected += (alpha * -float(torch.softmax(s, 0)[y].log()) + (1 - alpha) * tau**2 * kl) / 6
        assert float(kd_loss(student, teacher, labels, alpha=alpha, temperature=tau)) == pytest.approx(
            expected, abs=1e-12
        )


def test_kd_gradient_at_high_temperature_is_that_of_centred_logits():
    student, teacher, labels = problem()
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, labels, alpha=0.0, temperature=1e5), student)
    gap = (student - teacher).detach()
    expected = (gap - gap.mean(-1, keepdim=True)) / gap.numel()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


def test_dist_is_its_formula():
    student, teacher, labels = problem()
    p, q = (torch.softmax(x / 3, -1).numpy() for x in (student, teacher))
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    expected = float(F.cross_entropy(student, labels)) + 9 * (2 * (1 - rows) + 0.5 * (1 - columns))
    found = dist_loss(student, teacher, labels, beta=2.0, gamma=0.5, temperature=3.0)
    assert float(found) == pytest.approx(expected, abs=1e-10)


def test_correlation_where_there_is_none():
    constant, other = torch.ones(3).double().requires_grad_(), torch.tensor([1.0, 2.0, 5.0]).double()
    found = pearson_correlation(constant, other)
    assert float(found.detach()) == 0
    assert not torch.autograd.grad(found, constant)[0].any()
    student, teacher, labels = problem(rows=1)
    student.requires_grad_()
    loss = dist_loss(student, teacher, labels)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_label_smoothing_and_squared_error_are_their_formulas():
    student, teacher, labels = problem()
    target = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    expected = -(target * student.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(label_smoothing_loss(student, teacher, labels, smoothing=0.2), expected)
    expected = F.cross_entropy(student, labels) + 0.3 * ((student - teacher) ** 2).mean()
    torch.testing.assert_close(logit_mse_loss(student, teacher, labels, weight=0.3), expected)


@given(seed=st.integers(0, 1000), which=st.sampled_from(LOSSES))
def test_order_of_rows_and_names_of_classes_do_not_matter(seed, which):
    student, teacher, labels = problem(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    expected = which(student, teacher, labels)
    torch.testing.assert_close(which(student[rows], teacher[rows], labels[rows]), expected)
    renamed = classes.argsort()[labels]
    torch.testing.assert_close(which(student[:, classes], teacher[:, classes], renamed), expected)


@given(seed=st.integers(0, 1000), which=st.sampled_from(LOSSES[:4]))
def test_a_constant_added_to_a_row_does_not_matter(seed, which):
    student, teacher, labels = problem(seed)
    shift = torch.arange(6.0).double()[:, None] - 2
    torch.testing.assert_close(
        which(student + shift, teacher - shift, labels), which(student, teacher, labels)
    )


@pytest.mark.parametrize("which", LOSSES)
def test_gradients(which):
    student, teacher, labels = problem()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: which(s, teacher.detach(), labels), student.requires_grad_())
    which(student, teacher, labels).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("which", LOSSES[2:])
def test_a_student_that_equals_its_teacher_has_its_cross_entropy_left(which):
    _, teacher, labels = problem()
    weight = {"alpha": 0.0} if which is kd_loss else {}
    left = 0 if which is kd_loss else F.cross_entropy(teacher, labels)
    torch.testing.assert_close(which(teacher, teacher, labels, **weight), torch.as_tensor(left).double())


def test_modules_fix_options():
    given = problem()
    pairs = (
        (LabelSmoothingLoss(smoothing=0.3), label_smoothing_loss(*given, smoothing=0.3)),
        (KDLoss(alpha=0.4, temperature=3.0), kd_loss(*given, alpha=0.4, temperature=3.0)),
        (DISTLoss(beta=2.0), dist_loss(*given, beta=2.0)),
        (LogitMSELoss(weight=0.2), logit_mse_loss(*given, weight=0.2)),
        (DistillationLoss(kd_loss, alpha=0.2), kd_loss(*given, alpha=0.2)),
    )
    for module, expected in pairs:
        assert torch.equal(module(*given), expected)
    assert repr(pairs[1][0]) == "KDLoss(kd_loss, alpha=0.4, temperature=3.0)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t, y: kd_loss(s, t, y, alpha=1.5), ConfigError, "alpha is 1.5"),
        (lambda s, t, y: kd_loss(s, t, y, temperature=0.0), ConfigError, "temperature is 0"),
        (lambda s, t, y: dist_loss(s, t, y, beta=-1.0), ConfigError, "beta is -1"),
        (lambda s, t, y: label_smoothing_loss(s, t, y, smoothing=2.0), ConfigError, "smoothing is 2"),
        (lambda s, t, y: logit_mse_loss(s, t, y, weight=-1.0), ConfigError, "weight is -1"),
        (lambda s, t, y: DistillationLoss(kd_loss, tau=1.0), ConfigError, "kd_loss has no option 'tau'"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(*problem())


def test_other_classes_are_refused():
    student, teacher, labels = problem()
    with pytest.raises(DataError, match=r"kd: .*\(6, 5\) and \(6, 4\)"):
        inspect.unwrap(kd_loss)(student, teacher[:, :4], labels)


@pytest.mark.parametrize("which", LOSSES[2:])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_values_that_are_no_logits_are_refused(which, value, whose):
    student, teacher, labels = problem()
    (student if whose == "student" else teacher)[2, 1] = value
    with pytest.raises(DataError, match=f"logits of the {whose} with NaN.*label -100"):
        which(student, teacher, labels)
    labels[2] = -100
    assert which(student, teacher, labels).isfinite()


def test_a_correlation_with_nan_is_nan():
    assert pearson_correlation(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", LOSSES)
def test_half_precision_is_worked_on_in_float32(which, dtype):
    student, teacher = (5 * torch.randn(2, 40, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(40)
    found = which(student.requires_grad_(), teacher, labels)
    torch.testing.assert_close(found, which(student.float(), teacher.float(), labels))
    found.backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("which", [kd_loss, logit_mse_loss])
def test_classes_that_both_exclude_are_as_if_they_were_not_there(which):
    student, teacher, labels = problem()
    wider = [torch.cat([x, torch.full((6, 2), -torch.inf)], 1) for x in (student, teacher)]
    wider[0].requires_grad_()
    found = which(*wider, labels)
    torch.testing.assert_close(found, which(student, teacher, labels))
    found.backward()
    (gradient,) = torch.autograd.grad(which(student.requires_grad_(), teacher, labels), student)
    torch.testing.assert_close(wider[0].grad, F.pad(gradient, (0, 2)))
    teacher[:, 0] = -10.0
    student = student.detach().index_fill(1, torch.tensor([0]), -torch.inf)
    with pytest.raises(DataError, match="exclude it from both"):
        which(student, teacher, labels.clamp(min=1))


def test_a_class_that_the_teacher_alone_excludes_has_no_weight_in_kd():
    student, teacher, labels = problem()
    teacher[:, 0] = -torch.inf
    far = teacher.masked_fill(teacher == -torch.inf, -1e4)
    torch.testing.assert_close(kd_loss(student, teacher, labels), kd_loss(student, far, labels))


@pytest.mark.parametrize("which", LOSSES)
def test_rows_without_a_label_count_in_no_part(which):
    student, teacher, labels = problem()
    keep = torch.arange(6) % 3 > 0
    given = labels.masked_fill(~keep, -100)
    found = which(student.requires_grad_(), teacher, given)
    torch.testing.assert_close(found, which(student[keep], teacher[keep], labels[keep]))
    nothing = which(student, teacher, torch.full_like(labels, -100))
    assert nothing == 0
    nothing.backward()
    assert not student.grad.any()
