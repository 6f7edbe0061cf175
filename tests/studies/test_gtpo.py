from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from uncollapse.policy.batch import Batch
from uncollapse.policy.gtpo import LN2, EntropyFilter
from uncollapse.policy.recipe import Recipe
from uncollapse.studies.gtpo import STUDY, experiment
from uncollapse.studies.gtpo.experiment import Size, _disfavoured_tags, arms, high_start, one_step, train
from uncollapse.studies.testbeds import tags
from uncollapse.studies.testbeds.charlm import decode, encode, pad_right

TINY = Size(seeds=1, steps=2, every=1, warm_up_steps=15, looks_at=16, step_prompts=3, high_steps=1)


def test_arms_differ_by_the_stages_that_they_are_named_after() -> None:
    made = arms()
    gtpo = made["gtpo"]
    names = {f.name for f in fields(gtpo)} - {"name", "paper", "summary"}
    changed = {arm: {n for n in names if getattr(r, n) != getattr(gtpo, n)} for arm, r in made.items()}
    assert changed["no-lambda"] == changed["no-delta"] == {"weights"}
    assert changed["no-gamma"] == {"advantage"}
    assert changed["grpo"] == {"advantage", "weights", "surrogate"}
    assert made["grpo"].advantage == made["no-gamma"].advantage


def test_no_two_arms_share_what_they_remember() -> None:
    filters = [
        stage for made in arms().values() for stage in made.weights if isinstance(stage, EntropyFilter)
    ]
    assert len({id(stage) for stage in filters}) == len(filters) == 3


def test_tags_that_are_looked_at() -> None:
    """`?` opens all; `+` at the third place is shared by one good and two bad answers, but not at the end of a run."""
    rows = [encode("?1;+1!$"), encode("?1;+2!$"), encode("?12;+2!$"), encode("?2;+2$")]
    ids = pad_right(rows)
    mask = ids != tags.PAD
    advantage = torch.tensor([3.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    batch = Batch(
        torch.arange(4), mask,
        {"ids": ids, "group": torch.zeros(4, dtype=torch.long), "advantage": advantage[:, None] * mask},
    )  # fmt: skip
    found = _disfavoured_tags(batch)
    told = ["".join(decode([i]) for i, f in zip(r, w, strict=True) if f) for r, w in zip(ids.tolist(), found.tolist(), strict=True)]  # fmt: skip
    # `?`: 3 - 1 - 1 - 1 = 0. `;+` at the start: 3 - 1 > 0. `!`: 3 - 1 - 1 > 0.
    assert told == ["?", "?", "?", "?"]
    worse = batch.with_columns(advantage=torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]]) * mask)
    assert _disfavoured_tags(worse).sum(1).tolist() == [4, 4, 2, 1]


def test_the_step_is_repeatable_and_gtpo_lifts_tags() -> None:
    found = one_step(0, TINY)
    assert found == one_step(0, TINY)
    assert set(found) == {"grpo", "gtpo", "lambda"}
    assert len({len(changes) for changes in found.values()}) == 1


def test_training_is_repeatable_and_arms_share_their_start() -> None:
    gtpo = train(arms()["gtpo"], 0, TINY, lr=1e-3)
    assert gtpo == train(arms()["gtpo"], 0, TINY, lr=1e-3)
    grpo = train(arms()["grpo"], 0, TINY, lr=1e-3)
    for name in experiment.SEEN:
        assert len(gtpo[name]) == 3
        assert gtpo[name][0] == grpo[name][0]
    assert "entropy_filter/kept/frac" not in grpo


def test_calibration_takes_the_smallest_rate_that_grpo_cannot_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at GRPO on tuning seeds alone."""
    asked = []

    def told(made: Recipe, seed: int, size: Size, *, lr: float) -> dict[str, list[float]]:
        asked.append((made.name, seed, lr))
        return {"format": [0.8, 0.8 - (0.1 if lr > 2e-3 else 0.01)], "reward": [0.5, 0.6]}

    monkeypatch.setattr(experiment, "train", told)
    assert experiment.calibrate(TINY, "format") == 3e-3
    assert {(name, seed) for name, seed, _ in asked} == {("grpo-centred", s) for s in experiment.TUNING_SEEDS}
    assert set(range(Size().seeds)).isdisjoint(experiment.TUNING_SEEDS)
    assert experiment.calibrate(TINY, "reward") is None


def test_a_flattened_model_is_above_ln_2_and_spared() -> None:
    found = high_start(0, replace(TINY, warm_up_steps=60))
    assert found["entropy/initial/mean"][0] > LN2
    assert set(found["entropy_filter/kept/frac"]) == {1.0}


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", TINY)
    monkeypatch.setattr(experiment, "PROMPTS", 2)
    smoke(STUDY)
