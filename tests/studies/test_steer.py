from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from uncollapse.policy.batch import Batch, Clock
from uncollapse.policy.stats import Entropy, Logp
from uncollapse.policy.steer import Steer
from uncollapse.studies.steer import STUDY, bandits, experiment, training
from uncollapse.studies.steer.training import Shuffled, arms, extreme_arms
from uncollapse.studies.testbeds.modsum import ModSum

TINY = ModSum(prompts=3, length=3, vocab=4)


def a_batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(20, 9, generator=g)
    mask = torch.rand(20, 9, generator=g) < 0.8
    columns = {"advantage": torch.randn(20, 1, generator=g) * mask, "old_logp": logp}
    stats = {Logp("now"): logp, Entropy("old"): 2 * torch.rand(20, 9, generator=g)}
    return Batch(torch.arange(20), mask, columns, stats, Clock(seed=seed))


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_weights_are_those_of_steer_at_other_tokens_in_any_order(seed: int) -> None:
    batch = a_batch(seed)
    method, control = Steer(w_min=0.1)(batch), Shuffled(w_min=0.1)(batch)
    mine, theirs = method["weight"], control["weight"]
    torch.testing.assert_close(theirs[batch.mask].sort().values, mine[batch.mask].sort().values)
    assert (theirs[~batch.mask] == 0).all()
    assert (mine != theirs)[batch.mask].float().mean() > 0.8


def test_arms_differ_in_the_weights_alone() -> None:
    for several, base in ((arms(), "ppo"), (extreme_arms(), "extreme-ppo")):
        for arm in several.values():
            rest = replace(arm, name="", weights=())
            assert rest == replace(several[base], name="", weights=())
    assert arms()["steer"].surrogate != extreme_arms()["extreme-steer"].surrogate


@pytest.mark.parametrize("setting", bandits.SETTINGS)
def test_estimators_on_bandits_have_their_known_order(setting: str) -> None:
    found = bandits.track(100, 8, setting, 2000)
    assert found == bandits.track(100, 8, setting, 2000)
    assert found["exact/pearson"] > 0.999
    assert found["exact/pearson"] > found["theorem/pearson"] > found["released/pearson"]
    assert found["exact/mse"] < found["theorem/mse"] < found["released/mse"]
    assert found["theorem/top-probability"] > 5 * found["released/top-probability"]
    # with centred advantages the plain covariance does better than the released estimator
    assert (found["cov/spearman"] > found["released/spearman"]) == (setting == "group")


def test_training_is_repeatable_and_watches_every_step() -> None:
    runs = [training.train(arms()["steer"], 0, 6, task=TINY) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]["entropy"]) == 2
    assert len(runs[0]["weight"]) == 6
    assert 0.7 <= runs[0]["weight"][0] <= 1
    assert runs[0]["change/p50"][0] <= runs[0]["change/p95"][0] <= runs[0]["change/p99"][0]
    plain = training.train(arms()["ppo"], 0, 6, task=TINY)
    assert plain["entropy"][0] == runs[0]["entropy"][0]
    assert plain["weight"] == []


def test_the_twins_leave_the_run_without_weights_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other arms would do is only looked at: the run is that of the arm without weights."""
    found = training.twins(0, 7, task=TINY)
    assert found["steer-strong/p95"] < found["ppo/p95"]
    monkeypatch.setattr(training, "TWINS", ("ppo",))
    alone = training.twins(0, 7, task=TINY)
    assert alone == {key: value for key, value in found.items() if key.startswith("ppo/")}


def test_first_order_change_is_that_of_a_small_step() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64))
    table.grad = torch.randn(table.shape, generator=g, dtype=torch.float64)
    table.grad[0, 0, 0] = 0
    predicted = training._first_order(table)
    assert len(predicted) == 2 * 3 * 4 - 1

    def entropy(z: torch.Tensor) -> torch.Tensor:
        return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)

    visited = (table.grad != 0).any(-1)
    moved = entropy(table.detach() - 1e-6 * table.grad) - entropy(table.detach())
    torch.testing.assert_close(predicted, moved[visited].abs() / 1e-6, rtol=1e-3, atol=1e-5)


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", experiment.Size(1, 60, 1, 6, 1, 6))
    train, twins = training.train, training.twins
    monkeypatch.setattr(training, "train", lambda *a, **k: train(*a, **k, task=TINY))
    monkeypatch.setattr(training, "twins", lambda *a, **k: twins(*a, **k, task=TINY))
    smoke(STUDY)
