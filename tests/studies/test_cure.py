from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from uncollapse.models import MissingWeights
from uncollapse.policy.batch import Clock
from uncollapse.policy.cure import CureSampler
from uncollapse.policy.stages.samplers import PlainSampler
from uncollapse.policy.stats import Entropy
from uncollapse.studies.cure import STUDY, experiment, language
from uncollapse.studies.cure.experiment import (
    MaskedPrefixSampler,
    Size,
    arms,
    distinct_right,
    selection_bias,
    train,
    two_stages,
)
from uncollapse.studies.testbeds.engine import LogitsEngine
from uncollapse.studies.testbeds.modsum import ModSum, ModSumLab, TablePolicy, exact_reward
from uncollapse.studies.testbeds.opening import OpeningLab, opening_reward, state_values

TASK = ModSum(prompts=3, length=3, vocab=4)
TINY = Size(seeds=1, first=2, second=1, prompts=2, tokens=4, task=TASK, model="tiny", shortest=1)


def a_table(task: ModSum = TASK, seed: int = 0) -> torch.Tensor:
    return task.initial_logits(torch.Generator().manual_seed(seed), torch.float64)


def test_values_and_the_reward_of_both_worlds_are_those_of_all_answers() -> None:
    table = a_table()
    ids = torch.tensor([*itertools.product(range(4), repeat=3)])
    state = (ids.cumsum(1) - ids) % 4
    for prompt in range(3):
        logp = table[prompt].log_softmax(-1)[torch.arange(3), state].gather(2, ids[..., None])[..., 0]
        probability = logp.sum(1).exp()
        prompts = [prompt] * len(ids)
        mask = torch.ones_like(ids, dtype=torch.bool)
        right = ModSumLab(TASK).reward(prompts, ids, mask)
        both = OpeningLab(TASK).reward(prompts, ids, mask)
        assert (both <= right).all()
        assert both.sum() == 0.5 * right.sum()
        value = state_values(TASK, table)[prompt]
        torch.testing.assert_close(value[0, 0], (probability * right).sum())
        torch.testing.assert_close(opening_reward(TASK, table)[prompt], (probability * both).sum())
    torch.testing.assert_close(state_values(TASK, table)[:, 0, 0], exact_reward(TASK, table))


def test_masked_prefixes_have_the_size_of_cure_s_and_no_branch() -> None:
    options = {"samples": 16, "branches": 3, "k": 2}
    task = ModSum(prompts=40, length=6, vocab=4)
    engine = LogitsEngine(ModSumLab(task), TablePolicy(a_table(task)))
    prompts, clock = list(range(40)), Clock(seed=1)
    method = CureSampler(**options)(engine, prompts, clock)
    control = MaskedPrefixSampler(**options)(engine, prompts, clock)
    plain = PlainSampler(16)(engine, prompts, clock)
    assert torch.equal(control.ids, plain.ids)
    assert torch.equal(control.columns["length"], plain.columns["length"])
    masked = (~control.mask).sum(1)
    assert torch.equal(masked, control.columns["cut"])
    member = control.uid % 16
    assert not masked[member < 4].any()
    assert (masked[member >= 4] > 0).all()
    assert not control.columns["branch"].any()
    mean = method.columns["cut"][method.columns["branch"] > 0].double().mean()
    assert masked[member >= 4].double().mean() == pytest.approx(float(mean), rel=0.1)
    measured = engine.measure(plain, frozenset({Entropy("old")}))
    expected = torch.where(member >= 4, CureSampler(**options).cuts(measured), 0)
    assert torch.equal(masked, expected)


def test_arms_differ_from_dapo_in_the_sampler_alone() -> None:
    recipes = arms()
    for name, arm in recipes.items():
        if name != "family-baseline":
            rest = replace(arm, name="", sampler=recipes["dapo"].sampler)
            assert rest == replace(recipes["dapo"], name="")
    family = replace(recipes["family-baseline"], name="cure", advantage=recipes["cure"].advantage)
    assert family == recipes["cure"]


def test_the_first_stage_of_two_is_cure() -> None:
    runs = [train(method, "modsum", 0, (0, 4), TASK) for method in (arms()["cure"], two_stages(4))]
    assert runs[0] == runs[1]
    longer = train(two_stages(4), "modsum", 0, (0, 4, 6), TASK)
    assert longer["ends"]["4"] == runs[0]["ends"]["4"]
    assert longer["ends"]["6"] != train(arms()["cure"], "modsum", 0, (0, 4, 6), TASK)["ends"]["6"]


def test_distinct_right_answers_and_the_bias_of_a_fixed_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TablePolicy(a_table())
    counted = distinct_right(ModSumLab(TASK), policy, TASK, seed=0)
    assert 1 < counted <= 16  # 4^2 right answers
    bias = selection_bias(TASK, policy.table.detach(), 0, samples=4000)
    assert abs(bias) < 0.1
    monkeypatch.setattr(CureSampler, "cuts", lambda self, batch: torch.ones(len(batch), dtype=torch.long))
    assert abs(selection_bias(TASK, policy.table.detach(), 0, samples=4000)) < 0.01


def test_entropy_at_a_reward_is_interpolated_where_the_reward_first_gets_there() -> None:
    run = {"reward": [0.1, 0.5, 0.7, 0.6, 0.9], "entropy": [2.0, 1.5, 1.0, 0.9, 0.5]}
    assert experiment.entropy_at(run, 0.6) == pytest.approx(1.25)
    assert experiment.entropy_at(run, 0.9) == pytest.approx(0.5)
    assert math.isnan(experiment.entropy_at(run, 0.95))


def test_a_model_s_branches_continue_its_answers() -> None:
    found = language.branch_a_model("tiny", prompts=3, tokens=12, shortest=1)
    assert (found["broken"], found["short"]) == (0, 0)
    assert found["rows"] == 2 * 3 * 8
    for row in found["prompts"]:
        assert row["critical-cut"] > 0
        assert row["random-cut"] > 0
        assert 1 <= row["critical-distinct"] <= 3
        assert 1 <= row["random-expected-distinct"] <= 3


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", TINY)
    smoke(STUDY, lambda name: name.startswith("modsum/cure/bias/"))


def test_without_the_model_the_rest_of_the_study_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise MissingWeights

    monkeypatch.setattr(language, "load", absent)
    found = language.branch_a_model("smollm2-135m", prompts=2, tokens=4)
    assert found["prompts"] == []
    assert experiment._language(found) == {}
