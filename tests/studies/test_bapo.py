from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from uncollapse.studies.bapo import STUDY, experiment
from uncollapse.studies.bapo.experiment import (
    UPDATES,
    Size,
    arms,
    clip_rule,
    entropy_at,
    entropy_gap,
    equal,
    largest_difference,
    search,
    train,
    unequal,
)
from uncollapse.studies.claims import Verdict
from uncollapse.studies.statistics import exact
from uncollapse.studies.testbeds.modsum import ModSum
from uncollapse.studies.testbeds.walk import Walk

SMALL = Walk(prompts=3, places=4, limit=8)


def test_arms_differ_in_the_clip_alone() -> None:
    made = arms()
    rest = [
        replace(arm, name="", paper="", summary="", surrogate=made["clip"].surrogate) for arm in made.values()
    ]
    assert all(arm == rest[0] for arm in rest)


def test_every_update_sees_the_whole_batch_and_only_the_first_is_on_policy() -> None:
    run = train(arms()["bapo"], unequal(0, SMALL), 0, 2)
    norms, kl = run["updates"]["norm"], np.asarray(run["updates"]["kl/old/k3"])
    assert len(norms) == 2 * UPDATES
    first = np.arange(2 * UPDATES) % UPDATES == 0
    assert (kl[first] == 0).all()
    assert (kl[~first] > 0).all()
    assert len(run["looks"]["reward"]) == 3


def test_runs_are_repeatable_and_start_alike() -> None:
    one, two = (train(arms()["bapo"], unequal(1, SMALL), 1, 2) for _ in range(2))
    assert one == two
    other = train(arms()["clip"], unequal(1, SMALL), 1, 2)
    assert other["looks"]["entropy"][0] == one["looks"]["entropy"][0]
    assert other["final"] != one["final"]


def test_equal_lengths_leave_nothing_to_balance() -> None:
    task = ModSum(prompts=2, length=3, vocab=4)
    bapo, fixed = (train(arms()[arm], equal(0, task), 0, 2) for arm in ("bapo", "start"))
    if not any(bapo["updates"]["bapo/steps/mean"]):
        assert largest_difference(bapo, fixed) == 0.0
    assert bapo["updates"]["bapo/share_before/mean"][0] in (1.0, pytest.approx(0.5, abs=1e-6))


def curve(reward: list[float], entropy: list[float]) -> dict:
    return {"looks": {"reward": reward, "entropy": entropy}}


def test_entropy_at_equal_success() -> None:
    run = curve([0.4, 0.6, 0.5, 0.8], [2.0, 1.0, 0.9, 0.3])
    assert entropy_at(run, 0.3) == 2.0
    assert entropy_at(run, 0.5) == pytest.approx(1.5)
    assert entropy_at(run, 0.7) == pytest.approx(0.5)
    assert np.isnan(entropy_at(run, 0.9))
    other = curve([0.4, 0.9], [2.0, 1.0])
    levels = [q for q in experiment.LEVELS if q < 0.8 + 1e-9]
    by_hand = np.mean([entropy_at(run, q) - entropy_at(other, q) for q in levels])
    assert entropy_gap(run, other) == pytest.approx(by_hand)
    assert np.isnan(entropy_gap(run, curve([0.1, 0.2], [2.0, 1.9])))


def test_what_is_read_off_a_search() -> None:
    updates = {
        "norm": [1.0] * 6,
        "bapo/share_before/mean": [0.3, 0.35, 0.35, 0.3, 0.5, 0.35],
        "bapo/share_after/mean": [0.3, 0.41, 0.34, 0.3, 0.5, 0.40],
        "bapo/steps/mean": [51, 4, 51, 51, 0, 2],
        "bapo/low/mean": [0.9, 0.6, 0.9, 0.9, 0.6, 0.6],
        "bapo/high/mean": [3.0, 1.4, 3.0, 3.0, 1.2, 1.3],
        "bapo/satisfied/frac": [0, 1, 0, 0, 1, 1],
    }
    seen = search({"updates": updates}, updates=3)
    assert seen["shortfall"] == pytest.approx(0.0, abs=1e-12)
    assert seen["rises"] == pytest.approx(2 / 3)
    assert seen["falls"] == pytest.approx(1 / 3)
    assert seen["rescued"] == pytest.approx(2 / 3)
    assert seen["high-moves"] == 0.75
    assert seen["low-moves"] == 0.25
    assert seen["first-steps"] == 51
    assert seen["satisfied"] == 0.75


def test_the_rule_holds_where_only_improbable_actions_are_set_free() -> None:
    found = clip_rule(7, 300)
    assert found["high/improbable"] == found["low/improbable"] == 1.0
    assert 0 < found["high/states"] < 1


def test_the_entropy_of_grpo_is_compared_by_its_interval() -> None:
    claim = next(one for one in STUDY.claims if one.id == "C-entropy-grpo")
    name = "unequal/bapo-minus-on-policy/entropy-at-reward"
    for low, value, high, verdict in (
        (-0.160, -0.117, -0.073, Verdict.not_reproduced),
        (-0.005, 0.025, 0.055, Verdict.inconclusive),
        (0.0, 0.025, 0.05, Verdict.reproduced),
    ):
        assert claim.judge({name: replace(exact(value), low=low, high=high)}) is verdict


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", Size(2, 3, 1, 1, 2, 50))
    monkeypatch.setattr(experiment, "Walk", lambda: SMALL)
    monkeypatch.setattr(experiment, "ModSum", lambda: ModSum(prompts=2, length=2, vocab=3))
    monkeypatch.setattr(experiment, "LEVELS", (0.0,))
    smoke(STUDY)
