from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.entropy_mechanism import ClipCov, KLCov
from uncollapse.policy.stats import Logp
from uncollapse.studies.entropy_mechanism import STUDY, experiment
from uncollapse.studies.entropy_mechanism.experiment import RandomDrop, RandomPenalty, Size, arms, bandit_fit
from uncollapse.studies.testbeds.modsum import ModSum
from uncollapse.studies.testbeds.training import train_charlm, train_modsum


def a_batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    logp, advantage = -3 * torch.rand(20, 9, generator=g), torch.randn(20, 9, generator=g)
    mask = torch.rand(20, 9, generator=g) < 0.8
    clipped = mask & (torch.rand(20, 9, generator=g) < 0.1)
    columns = {"advantage": advantage * mask, "clipped": clipped, "old_logp": logp}
    return Batch(torch.arange(20), mask, columns, {Logp("now"): logp}, Clock(seed=seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low", [0.2, 1.0, 50.0])
def test_random_drop_has_the_size_of_clip_cov(seed: int, low: float) -> None:
    batch = a_batch(seed)
    options = {"fraction": 0.3, "low": low, "high": 60.0}
    method, control = ClipCov(**options)(batch)["weight"], RandomDrop(**options)(batch)["weight"]
    assert (method == 0).sum() == (control == 0).sum()
    assert not ((control == 0) & (~batch.mask | batch.columns["clipped"])).any()


@pytest.mark.parametrize("seed", range(5))
def test_random_penalty_has_the_size_of_kl_cov_and_other_tokens(seed: int) -> None:
    batch = a_batch(seed)
    method = KLCov(fraction=0.2).decide(batch)["penalised"]
    control = RandomPenalty(fraction=0.2).decide(batch)["penalised"]
    assert method.sum() == control.sum() == int(0.2 * int(batch.mask.sum()))
    assert not (control & ~batch.mask).any()
    assert not torch.equal(method, control)


def test_arms_differ_from_grpo_in_the_policy_loss_alone() -> None:
    recipes = arms()
    for arm in recipes.values():
        rest = replace(
            arm,
            name="",
            paper="",
            summary="",
            surrogate=recipes["grpo"].surrogate,
            weights=(),
            regularizers=(),
        )
        assert rest == replace(recipes["grpo"], name="", paper="", summary="")


def test_bandits_lose_entropy_as_the_theory_says() -> None:
    natural, plain = bandit_fit(0, 40, natural=True, lr=0.02), bandit_fit(0, 40, natural=False, lr=0.1)
    for fit in (natural, plain):
        assert 0.98 < fit["slope"] < 1.02
        assert fit["r2"] > 0.999
    assert bandit_fit(0, 40, natural=False, lr=5.0)["r2"] < 0.99


def test_training_curves_are_repeatable() -> None:
    task = ModSum(prompts=3, length=3, vocab=4)
    runs = [train_modsum(arms()["kl-cov"], 0, 3, task=task) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]["entropy"]) == 4
    other = train_modsum(arms()["grpo"], 0, 3, task=task)
    assert other["entropy"][0] == runs[0]["entropy"][0]
    characters = train_charlm(arms()["grpo"], 0, 2, prompts=2, every=1, warm_up_steps=2, looks_at=4)
    assert len(characters["accuracy"]) == 3


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Size(1, 5, 1, 18, 20, 1, 3)
    monkeypatch.setattr(experiment, "QUICK", tiny)
    monkeypatch.setattr(experiment, "arms", lambda: {k: v for k, v in arms().items() if "default" not in k})
    monkeypatch.setattr(experiment, "train_modsum", _small_modsum)
    monkeypatch.setattr(experiment, "train_charlm", _small_charlm)
    smoke(STUDY, lambda name: "default" in name)


def _small_modsum(recipe: object, seed: int, steps: int) -> dict[str, list[float]]:
    return train_modsum(recipe, seed, steps, task=ModSum(prompts=2, length=2, vocab=3))


def _small_charlm(recipe: object, seed: int, steps: int, **options: int) -> dict[str, list[float]]:
    entropy = [0.5 - 0.02 * step for step in range(steps + 1)]
    accuracy = [0.9 - 0.2 * h + 0.01 * ((seed + k) % 3) for k, h in enumerate(entropy)]
    return {"step": [], "accuracy": accuracy, "length": [9.0] * (steps + 1), "entropy": entropy}
