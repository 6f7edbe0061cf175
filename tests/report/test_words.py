from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.report import words
from uncollapse.report.series import Arm, Estimate, Log


def arm(name: str = "grpo", **columns: list[float]) -> Arm:
    length = max(len(values) for values in columns.values())
    keys = {
        "entropy": "entropy/token/mean",
        "reward": "reward/mean",
        "pass8": "eval/pass@8",
        "distinct": "eval/distinct",
    }
    rows = [
        {"step": i, **{keys[key]: values[i] for key, values in columns.items() if i < len(values)}}
        for i in range(length)
    ]
    return Arm(name, (Log({}, rows, []),))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1, "1.00"), (0.31, "0.310"), (-2.5, "\u22122.50"), (12345.6, "12346"), (0.00401, "0.00401"),
        (1e-7, "1.00·10⁻⁷"), (3.2e9, "3.20·10⁹"), (math.nan, "not finite"), (999.9996, "1000"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert words.number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back(value: float) -> None:
    text = (
        words.number(value, 6)
        .replace("\u2212", "-")
        .replace("·10", "e")
        .translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    )
    assert float(text) == pytest.approx(value, rel=1e-5, abs=0)


def test_small_pieces() -> None:
    assert words.percent(0.853) == "85\u202f%"
    assert words.percent(0.0042) == "0.42\u202f%"
    assert words.level(0.0123) == "0.012"
    assert words.seconds(0.25) == "250\u202fms"
    assert words.seconds(2.5) == "2.50\u202fs"
    assert words.seconds(300) == "5.00\u202fmin"
    assert words.moved(1, 1.001) == "stayed at 1.00"
    assert words.moved(2.1, 0.31) == "fell from 2.10 to 0.31"
    assert words.estimate(None) == "\u2013"
    assert words.estimate(Estimate((1.0,)), "nats") == "1.00\u202fnats"
    assert words.estimate(Estimate((1.0, 1.0))) == "1.00\u202f±\u202f0.00"
    assert words.estimate(Estimate((1.0, 1.00001))) == "1.00\u202f±\u202f<\u202f0.01"


def test_run_in_words() -> None:
    made = arm(entropy=[2.1, 0.31], reward=[0.34, 0.97], pass8=[0.8, 0.8], distinct=[3, 2])
    assert words.run_title(made) == "85\u202f% of the entropy lost, reward up to 0.97"
    assert words.run_lead(made) == [
        "Entropy fell from 2.10 to 0.31 nats per token (85\u202f% lost) while reward rose from 0.34 to 0.97.",
        "Pass@8 stayed at 0.80, and the number of distinct correct answers per prompt fell from 3.00 to 2.00.",
    ]


def test_other_outcomes() -> None:
    assert words.run_title(arm(entropy=[1.0, 2.0])) == "100\u202f% of the entropy gained"
    assert (
        words.run_title(arm(entropy=[1.0, 1.0], reward=[0.5, 0.2]))
        == "Entropy hardly moved, reward down to 0.20"
    )
    assert words.run_title(arm(entropy=[0.0, 1.0], reward=[0.5, 0.5])) == "Reward unchanged at 0.50"
    assert words.run_lead(arm(reward=[0.1, 0.2])) == [
        "Reward rose from 0.10 to 0.20; entropy was not logged."
    ]


def test_a_run_without_any_signal_is_called_that() -> None:
    rows = [{"step": i, "reward/mean": 0.0, "reward/zero_variance_groups": 1.0} for i in range(3)]
    assert words.run_lead(Arm("grpo", (Log({}, rows, []),)))[-1].startswith("No step could teach anything")


def test_comparison_in_words() -> None:
    collapsed, kept = (
        arm("grpo", entropy=[2.0, 0.2], reward=[0.3, 0.9]),
        arm("kl-cov", entropy=[2.0, 1.5], reward=[0.3, 0.9]),
    )
    assert (
        words.comparison_title([collapsed, kept])
        == "grpo kept 10\u202f% of its entropy, kl\u2011cov 75\u202f%"
    )
    assert (
        words.comparison_title([kept, collapsed])
        == "kl\u2011cov kept the most entropy: 75\u202f% of what it started with"
    )
    assert words.comparison_lead([collapsed, kept])[-1].startswith("There is one seed per recipe")
