from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from uncollapse.errors import MissingExtra
from uncollapse.policy.aepo_arbitrary import expected_aux_gradient, group_advantage_gain
from uncollapse.policy.batch import Clock
from uncollapse.policy.recipe import Recipe
from uncollapse.studies.aepo_arbitrary import STUDY, bandits, experiment, language_model
from uncollapse.studies.aepo_arbitrary.bandits import Setting, run, run_divided_after_control, worst_offset
from uncollapse.studies.aepo_arbitrary.experiment import ALPHAS, Size, token_arms, train_tokens, trial_count
from uncollapse.studies.study import Trials
from uncollapse.studies.testbeds.engine import LogitsEngine
from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, TablePolicy


@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("divide", [False, True])
def test_sampled_updates_have_the_expectation_that_the_exact_ones_are(group: int, divide: bool) -> None:
    generator, right = torch.Generator().manual_seed(0), bandits.right_answers()
    logits = bandits.initial_logits()[None]
    law = logits.softmax(-1)
    setting = Setting(((0.5, 0.2),), divide=divide, group=group, samples=160_000)
    sampled = bandits._sampled_grpo(law, right, 160_000, setting, generator)
    gain = group_advantage_gain(float((law * right).sum()), group, std=divide)
    policy = gain * expected_aux_gradient(logits, right, 1.0)
    torch.testing.assert_close(sampled, policy, rtol=0, atol=2e-3)
    if divide:
        exact = bandits._exact_gain((law * right).sum(-1, keepdim=True), replace(setting, samples=None))
        assert exact.item() == pytest.approx(gain)
    t = torch.tensor([[1.2]], dtype=torch.float64)
    positives = bandits._sampled_positives(logits, t, right, 160_000, generator)
    torch.testing.assert_close(positives, expected_aux_gradient(logits, right, t), rtol=0, atol=2e-3)


def test_bandits_are_repeatable_and_move_towards_their_targets() -> None:
    setting = Setting(((0.5, 0.0), (1.0, 0.2), (2.9, 0.2)), steps=700, samples=32)
    found = run(setting, 3)
    assert found == run(setting, 3)
    assert found != run(setting, 4)
    assert found["entropy"][2] > found["entropy"][1] > found["entropy"][0]
    assert worst_offset({"entropy": [0.4, 1.3, 0.0]}, setting, 2) == pytest.approx(0.3)
    assert worst_offset({"entropy": [0.4, 1.3, 0.0]}, setting) == pytest.approx(2.9)


def test_problems_are_trained_apart() -> None:
    setting = Setting(((0.5, 0.2), (1.0, 0.4)), steps=20)
    found = bandits.run_problems(setting, range(3))
    assert found["0"] == pytest.approx(run(setting, 0)["entropy"], abs=1e-12)
    assert list(found) == ["0", "1", "2"]
    assert found["1"] != found["0"]


def test_division_after_control_starts_from_the_held_law() -> None:
    setting = Setting(((1.0, 0.2),), steps=5)
    found = run_divided_after_control(setting, 0)
    assert found["before"] == run(setting, 0)["entropy"]
    assert found["entropy"] != found["before"]


def test_arms_on_tokens_share_everything_but_the_method() -> None:
    arms = token_arms()
    assert len(arms) == 20
    for name, arm in arms.items():
        assert arm.sampler.samples == (16 if name in ("raw-16", "std-16") else 8)
        assert arm.surrogate == arms["raw"].surrogate
        assert replace(arm.mean, joint=False) == arms["raw"].mean


def test_the_control_of_equal_generation_draws_as_many_answers_as_aepo() -> None:
    task, arms = ModSum(prompts=3, length=2, vocab=4), token_arms()
    policy = TablePolicy(task.initial_logits(torch.Generator().manual_seed(0)))
    engine = LogitsEngine(ModSumLab(task), policy)
    drawn = {name: len(arms[name].sampler(engine, [0, 1, 2], Clock())) for name in ("raw-16", "aepo-raw/0.7")}
    assert drawn == {"raw-16": 48, "aepo-raw/0.7": 48}
    assert replace(arms["std-16"], sampler=arms["std"].sampler) == arms["std"]


def test_training_on_tokens_is_repeatable() -> None:
    task = ModSum(prompts=3, length=2, vocab=4)
    for arm in ("aepo-raw/0.7", "replace/0.7", "reweight/0.7"):
        runs = [train_tokens(token_arms()[arm], 0, 10, task=task) for _ in range(2)]
        assert runs[0] == runs[1]
        assert len(runs[0]["entropy"]) == 1


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Size(
        control_steps=4, steps=3, problems=2, seeds=2, batches=(16, 64), token_seeds=1, token_steps=10,
        language=language_model.Size(seeds=2),
    )  # fmt: skip
    monkeypatch.setattr(experiment, "QUICK", tiny)
    monkeypatch.setattr(experiment, "train_tokens", _small_tokens)
    monkeypatch.setattr(language_model, "train_language_model", _learnt)
    seen: list[tuple[int, int]] = []
    outcome, missing = smoke(
        STUDY,
        lambda name: name.endswith("largest-entropy"),
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert seen[-1] == (trial_count(tiny), trial_count(tiny))
    assert missing == {"boundary/std/512/largest-entropy", "boundary/std/4096/largest-entropy"}
    assert f"groups/std-4/alpha-{ALPHAS[0]:g}/entropy" in outcome.measurements.estimates


def _small_tokens(made: object, seed: int, steps: int) -> dict[str, list[float]]:
    return train_tokens(made, seed, steps, task=ModSum(prompts=2, length=2, vocab=3))


def _learnt(
    made: Recipe, setting: language_model.Setting, seed: int, size: language_model.Size
) -> dict[str, list[float]]:
    """A run that reaches what it is asked, and is the better the nearer that is to the middle target."""
    target = getattr(made.sampler, "target", 0.0)
    right = [0.5 - (target - setting.middle) ** 2]
    return {
        "entropy": [target] * 12,
        "reward": [0.5] * 12,
        "pass@1": right,
        "pass@8": right,
        "distinct": [3.0 + seed],
    }


def test_the_language_model_follows_its_targets_and_a_middle_one_is_best() -> None:
    setting = language_model.SETTINGS["modsum"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "train_language_model", _learnt)
        found, _ = language_model.measure_task(setting, language_model.Size(seeds=3), _Trials())
    at = "language/modsum"
    assert found[f"{at}/follows"].value == pytest.approx(1)
    assert found[f"{at}/worst-offset"].value == pytest.approx(0)
    assert found[f"{at}/pass@1/curvature"].value == pytest.approx(-2)
    assert found[f"{at}/pass@1/rise"].value == pytest.approx(0.8)
    assert found[f"{at}/pass@1/fall"].value == pytest.approx(-0.8)
    assert set(language_model.statistics(setting)) <= set(found)


class _Trials(Trials):
    def __init__(self) -> None:
        pass

    def trial(self, name: str, run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        return dict(run())


def test_parabolas_are_fitted_seed_by_seed() -> None:
    x = np.array([0.1, 0.3, 0.5, 0.7])
    reached = np.stack([1 + 2 * x - 3 * x**2, 4 * x**2], 1)
    found = language_model.parabola(x.tolist(), reached)
    assert found["curvature"] == pytest.approx([-6, 8])
    assert found["rise"] == pytest.approx([1.4, 0.8])
    assert found["fall"] == pytest.approx([-2.2, 5.6])


def test_arms_of_the_language_model_differ_in_one_thing() -> None:
    setting = language_model.SETTINGS["countdown"]
    made = language_model.arms(setting)
    assert len(made) == 12
    assert {made[name].sampler.target for name in made if name.startswith("aepo/")} == set(setting.targets)
    assert replace(made["bonus"], regularizers=(), name="grpo") == made["grpo"]
    assert replace(made["grpo-10"], sampler=made["grpo"].sampler, name="grpo") == made["grpo"]
    generated = language_model.GROUP * (1 + language_model.SHARE)
    assert generated == made["grpo-10"].sampler.samples == language_model.EQUAL_GENERATION


def test_a_language_model_is_trained_and_held_to_account() -> None:
    setting = language_model.SETTINGS["modsum"]
    found = language_model.train_language_model(
        language_model.arms(setting)["aepo/0.5"], setting, 0, language_model.QUICK
    )
    assert {name: len(values) for name, values in found.items()} == {
        "entropy": 2, "reward": 2, "pass@1": 1, "pass@8": 1, "distinct": 1,
    }  # fmt: skip


def test_without_the_training_libraries_the_rest_of_the_study_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> dict[str, list[float]]:
        raise MissingExtra("trl", "rl")

    monkeypatch.setattr(language_model, "train_language_model", absent)
    estimates, details = language_model.measure_language_model(language_model.QUICK, _Trials())
    assert not estimates
    assert "uncollapse[rl]" in details["missing"]
