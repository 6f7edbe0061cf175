from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from uncollapse.studies.lp_reg import STUDY, experiment
from uncollapse.studies.lp_reg.experiment import Size, arms, fixed_point, mechanism, outcome, sign_test
from uncollapse.studies.testbeds import sparks
from uncollapse.studies.testbeds.charlm import EOS, RECHECK, decode, encode, pad_right

TINY = Size(mechanism_seeds=2, outcome_seeds=2, steps=1, every=1, teaching=320, fixed_point_steps=20)


def test_arms_differ_from_grpo_in_the_policy_loss_alone() -> None:
    recipes = arms()
    blank = {"name": "", "paper": "", "summary": ""}
    for arm in recipes.values():
        rest = replace(arm, surrogate=recipes["grpo"].surrogate, regularizers=(), **blank)
        assert rest == replace(recipes["grpo"], **blank)


def test_supervised_rows_check_rarely_and_then_mostly_fail() -> None:
    rows = sparks.make_rows(0, 4000)
    ids = pad_right([response for _, response in rows])
    right = sparks.score([prompt for prompt, _ in rows], ids)
    checked = (ids == RECHECK).any(1)
    assert 0.04 < checked.double().mean() < 0.06
    assert right[~checked].double().mean() > 0.9
    assert right[checked].double().mean() < 0.3
    assert all(response[-1] == EOS for _, response in rows)


def test_an_unchecked_right_answer_needs_luck_and_a_checked_one_does_not() -> None:
    lab, prompt = sparks.SparkLab(), encode("1+5+3=")
    direct, checked, wrong = (encode(t) for t in ("5;5;!5$", "5;5;?5;5;!5$", "5;5;?5;3;!3$"))
    prompts = [prompt] * 600
    ids = pad_right([direct, checked, wrong] * 200)
    reward = lab.reward(prompts, ids, ids >= 0).view(200, 3)
    assert (reward[:, 1] == 1).all()
    assert (reward[:, 2] == 0).all()
    assert 0.5 < reward[:, 0].mean() < 0.7
    assert torch.equal(reward, lab.reward(prompts, ids, ids >= 0).view(200, 3))
    assert decode(direct) == "5;5;!5$"


def test_fixed_point_approaches_the_prediction() -> None:
    found = fixed_point(1.0, 1.0, 1500)
    assert found["reached"] == pytest.approx(found["predicted"], abs=1e-3)


def test_sign_test_is_the_binomial_tail() -> None:
    assert sign_test([1.0] * 20) == 2**-20
    assert sign_test([1.0, -1.0, 0.0, float("nan")]) == 15 / 16
    assert sign_test([1.0] * 16 + [-1.0] * 4) == pytest.approx(0.005909, abs=1e-6)


def test_a_scene_is_repeatable_and_measures_what_it_says() -> None:
    first, second = mechanism(1000, TINY), mechanism(1000, TINY)
    assert first == second
    assert first["identity-error"] < 1e-12
    assert 0 < first["kept-mass/0.02"] <= 1
    assert first["kept-mass/0.1"] <= first["kept-mass/0.01"]


def test_arms_of_a_seed_start_from_one_policy() -> None:
    runs = [outcome(arm, 1000, TINY) for arm in ("grpo", "lp-reg-full")]
    assert runs[0]["success"][0] == runs[1]["success"][0]
    assert runs[0]["spark"][0] == runs[1]["spark"][0]
    assert len(runs[0]["step"]) == 2


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", TINY)
    smoke(STUDY)
