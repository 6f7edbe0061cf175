from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from uncollapse.representation.dhkd import binary_kl_norm_loss
from uncollapse.studies.calibration import climb
from uncollapse.studies.dhkd import STUDY
from uncollapse.studies.dhkd.calibration import (
    LADDER,
    RATES,
    SAME_AS,
    SCORES,
    SEEDS,
    START,
    calibrate,
)
from uncollapse.studies.dhkd.experiment import FIRST_SEED
from uncollapse.studies.dhkd.students import (
    ARMS,
    NAMES,
    QUICK,
    SINGLE,
    WATCHED,
    Size,
    make_student,
    squared_error,
    train,
)
from uncollapse.studies.testbeds.distillation import Rows, Task, make_teacher


@pytest.fixture(scope="module")
def task() -> Task:
    task = Task.make(QUICK.setting, 0)
    teacher = make_teacher(QUICK.setting, task.classes, 0)
    for parameter in teacher.parameters():
        parameter.data *= 2
    return task.taught_by(teacher)


def test_features_are_wide_enough_for_a_simplex_and_not_negative() -> None:
    setting = Size().setting
    student = make_student(setting, 100, 0)
    assert student.head.in_features >= 99
    found = student.backbone(torch.randn(50, setting.features, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (50, setting.neck)
    assert (found >= 0).all()


def test_a_head_behind_a_stop_gradient_is_cross_entropy(task: Task) -> None:
    one, two = (train(name, task, QUICK.setting, 1) for name in ("ce", "detached"))
    assert one == two


def test_training_is_repeatable_and_every_arm_differs(task: Task) -> None:
    runs = {name: train(name, task, QUICK.setting, 1) for name in NAMES}
    assert runs["dual-mlp"] == train("dual-mlp", task, QUICK.setting, 1)
    looks = QUICK.setting.steps // 10
    for name, run in runs.items():
        groups = ("backbone", "head") if name in SINGLE else ("backbone",)
        assert set(run["cosines"]) == (set(groups) if name in WATCHED else set())
        assert all(len(values) == looks for values in run["cosines"].values())
    ends = {name: tuple(run["collapse"].values()) for name, run in runs.items() if name != "detached"}
    assert (
        len(set(ends.values())) >= len(ends) - 2
    )  # aligned arms differ from dual-norm only where there was a conflict


def test_a_diverged_student_is_a_result(task: Task) -> None:
    broken = Rows(task.train.features, task.train.labels, task.train.teacher * float("nan"))
    run = train("norm", replace(task, train=broken), QUICK.setting, 0)
    assert all(math.isnan(value) for value in run["collapse"].values())


def test_squared_error_is_half_the_limit_of_the_logit_level_losses() -> None:
    a, t = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = binary_kl_norm_loss(a, t, 1e4) / 2
    torch.testing.assert_close(
        squared_error(a, t, 2.0, reduction="batch_mean", mask=None), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("start", [LADDER[0], 0.01, LADDER[-1]])
@pytest.mark.parametrize("peak", LADDER)
def test_the_best_rate_is_found_from_the_start(peak: float, start: float) -> None:
    scores = climb(
        LADDER, (start,), lambda rate: -float(abs(LADDER.index(rate) - LADDER.index(peak))), reach=2
    )
    assert max(scores, key=lambda rate: scores[rate]) == peak
    assert start in scores
    assert list(scores) == sorted(scores)


def test_every_arm_has_the_best_of_its_rates() -> None:
    assert set(RATES) == set(NAMES)
    assert RATES["detached"] == RATES["ce"]
    assert set(SCORES) == set(START) == set(NAMES) - set(SAME_AS)
    for name, scores in SCORES.items():
        means = {rate: score.mean for rate, score in scores.items()}
        assert climb(LADDER, (START[name],), means.__getitem__, reach=2) == means
        assert means[RATES[name]] == max(means.values())
        assert [rate for rate, score in scores.items() if not score.error] == [RATES[name]]


def test_the_calibration_looks_at_validation_rows_of_its_own_seeds() -> None:
    ((name, scores),) = calibrate(("ce",), QUICK)
    assert name == "ce"
    assert all(0 <= score.mean <= 1 and score.error >= 0 for score in scores.values())
    assert set(SEEDS).isdisjoint(range(FIRST_SEED, FIRST_SEED + Size().seeds))


def test_the_study_runs_end_to_end(smoke) -> None:
    outcome, _ = smoke(STUDY)
    control = outcome.measurements.estimates["detached-minus-ce/accuracy"]
    assert (control.low, control.value, control.high) == (0, 0, 0)
    assert set(ARMS) <= set(NAMES)
