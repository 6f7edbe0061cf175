from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from uncollapse.report.series import Arm, Estimate, Log, is_number, pass_keys, recipe_name


def log(values: list[Any], key: str = "x", start: int = 0) -> Log:
    return Log({}, [{"step": start + i, key: value} for i, value in enumerate(values)], [])


def test_a_single_seed_has_no_interval() -> None:
    curve = Arm("a", (log([1.0, 2.0]),)).curve("x")
    assert curve is not None
    assert curve.low is None
    assert Estimate((3.0,)).half is None


def test_interval_over_seeds_is_student() -> None:
    assert Estimate((1.0, 2.0, 3.0)).half == pytest.approx(4.302652729911275 / math.sqrt(3))
    curve = Arm("a", (log([1.0, 5.0]), log([2.0, 5.0]), log([3.0, 5.0]))).curve("x")
    assert curve is not None
    assert curve.low is not None
    np.testing.assert_allclose(curve.values, [2.0, 5.0])
    np.testing.assert_allclose(curve.low, [2 - 4.302652729911275 / math.sqrt(3), 5.0])


def test_curves_over_seeds_show_the_steps_that_all_reached() -> None:
    curve = Arm("a", (log([1.0, 2.0, 3.0]), log([3.0, 4.0], start=1))).curve("x")
    assert curve is not None
    assert curve.steps.tolist() == [1.0, 2.0]
    assert curve.values.tolist() == [2.5, 3.5]


def test_seeds_without_a_common_step_are_not_mixed() -> None:
    curve = Arm("a", (log([1.0]), log([9.0], start=5))).curve("x")
    assert curve is not None
    assert curve.values.tolist() == [1.0]
    assert curve.low is None


def test_quantile_band_of_one_seed() -> None:
    rows = [{"step": i, "m": 2.0, "lo": 1.0, "hi": 3.0} for i in range(3)]
    curve = Arm("a", (Log({}, rows, []),)).curve("m", low="lo", high="hi", band="quantiles")
    assert curve is not None
    assert curve.low is not None
    assert (curve.low[0], curve.band) == (1.0, "quantiles")
    del rows[1]["lo"]
    bare = Arm("a", (Log({}, rows, []),)).curve("m", low="lo", high="hi")
    assert bare is not None
    assert bare.low is None


def test_missing_and_unplottable_values() -> None:
    arm = Arm("a", (log([math.nan, "x", True, None, math.inf, 10**400, 1e300]),))
    assert arm.curve("x") is None
    assert arm.last("x") is None
    assert arm.metrics() == []
    assert is_number(3)
    assert not is_number(False)


def test_levels_average_a_twentieth_of_the_steps() -> None:
    arm = Arm("a", (log([float(i) for i in range(40)]),))
    first, last, mean = arm.first("x"), arm.last("x"), arm.mean("x")
    assert first is not None
    assert last is not None
    assert mean is not None
    assert (first.mean, last.mean, mean.mean) == (0.5, 38.5, 19.5)


def test_pass_keys_sort_by_k() -> None:
    arm = Arm("a", (Log({}, [{"step": 0, "eval/pass@16": 1.0, "eval/pass@2": 1.0, "eval/pass@k": 1.0}], []),))
    assert pass_keys([arm]) == ["eval/pass@2", "eval/pass@16"]


@pytest.mark.parametrize(
    ("recipe", "name"), [("grpo", "grpo"), ({"name": "kl-cov"}, "kl-cov"), ({}, ""), (None, "")]
)
def test_recipe_name(recipe: object, name: str) -> None:
    assert recipe_name({"recipe": recipe}) == name
