"""The policy-cliff study in small: its measurements are what they say, and it runs end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from uncollapse.policy.registry import recipe
from uncollapse.studies.policy_cliff import STUDY, experiment
from uncollapse.studies.policy_cliff.experiment import (
    EPS,
    Size,
    arms,
    lipschitz_trial,
    radius_trial,
    spread_ratio,
    train_two_formats,
    tree_profile,
)
from uncollapse.studies.testbeds.engine import LogitsEngine, Trainer
from uncollapse.studies.testbeds.two_formats import (
    FormatPolicy,
    TwoFormats,
    TwoFormatsLab,
    exact_accuracy,
    exact_share,
)


def test_the_tree_has_a_cliff_and_a_slope() -> None:
    found = tree_profile(0)
    np.testing.assert_allclose(found["answers"], 0.9, atol=1e-12)
    np.testing.assert_allclose(np.divide(found["soft"], EPS)[:4], 0.43, atol=0.01)
    assert 0.7 < found["tokens"][0] <= 1


def test_radii_are_two_sided() -> None:
    found = radius_trial(5, 6, 20)
    assert (found["inside"], found["outside"], found["random"]) == (0, 1, 0)
    assert min(found["gains"]) >= 1


def test_constants_agree_with_finite_differences() -> None:
    found = lipschitz_trial(5, 2, 3)
    for row in found["rows"].values():
        assert row["error"] < 1e-4
        assert row["excess"] < 1e-4
        assert row["bound-ratio"] <= 1
    losses = [row["loss"] for row in found["rows"].values()]
    assert losses == sorted(losses)


def test_the_spread_ratio_and_its_permutations() -> None:
    wide, narrow = [0.0, 1.0, 0.1, 0.9, 0.0, 1.0, 0.05, 0.95], [0.5, 0.52] * 4
    ratio, p = spread_ratio(wide, narrow, range(8))
    assert ratio.value == pytest.approx(np.std(wide) / np.std(narrow))
    assert ratio.low < ratio.value < ratio.high
    assert p.value == 1 / 256
    same, p = spread_ratio(wide, wide, range(8))
    assert same.value == 1
    assert p.value == 1


def test_arms_differ_as_they_say() -> None:
    found = arms()
    assert set(found) == {
        *(f"{name}/{bonus}" for name in ("grpo", "centred") for bonus in ("0", "0.01")),
        *(f"{n}-entropy/{b}" for n in ("grpo", "centred") for b in ("0", "0.01", "0.03", "0.1")),
    }
    assert found["grpo/0"][0] == recipe("grpo")
    assert found["grpo-entropy/0"][0].regularizers[0].coef == 0.1
    assert not found["centred/0"][0].advantage[0].std


@torch.no_grad()
def test_two_formats_are_scored_and_measured_exactly() -> None:
    task = TwoFormats(prompts=3, vocab=4, bonus=0.25)
    lab, policy = TwoFormatsLab(task), FormatPolicy(task, seed=1, spread=1.0)
    ids = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    right = share = 0.0
    for prompt in range(3):
        prompts = [prompt] * 16
        reward = lab.reward(prompts, ids, torch.ones_like(ids, dtype=torch.bool))
        expected = [
            (1.25 if f == 0 else 1.0) if f < 2 and d == (prompt + f) % 4 else 0.0 for f, d in ids.tolist()
        ]
        assert reward.tolist() == expected
        logp = lab.logits(policy, prompts, ids).double().log_softmax(-1)
        p = logp.gather(2, ids[..., None])[..., 0].sum(1).exp()
        assert float(p.sum()) == pytest.approx(1)
        right += float(p[reward > 0].sum())
        share += float(p[reward > 1].sum())
    assert exact_accuracy(task, policy) == pytest.approx(right / 3)
    assert exact_share(task, policy) == pytest.approx(share / right)
    many, _ = lab.sample(policy, [1] * 4000, temperature=1.0, seed=0)
    counts = torch.bincount(4 * many[:, 0] + many[:, 1], minlength=16) / 4000
    p = lab.logits(policy, [1] * 16, ids).log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1).exp()
    assert (counts - p).abs().max() < 0.03


def test_given_tokens_stand() -> None:
    task = TwoFormats()
    engine = LogitsEngine(TwoFormatsLab(task), FormatPolicy(task, 0))
    trainer = Trainer(recipe("grpo"), engine, torch.optim.SGD(engine.policy.parameters(), lr=0.1))
    given = torch.tensor([[1], [0]]), torch.tensor([[True], [False]])
    ids, mask = engine.lab.sample(engine.policy, [0, 1], temperature=1.0, seed=0, given=given)
    assert ids[0, 0] == 1
    assert mask.all()
    assert engine.lab.fresh_prompts(3, seed=0) == engine.lab.fresh_prompts(3, seed=0)
    batch, _ = trainer.step(list(range(8)))
    assert len(batch) == 64


def test_training_is_repeatable_and_learns() -> None:
    made, bonus = arms()["grpo/0"]
    one, two = (train_two_formats(made, bonus, 50, 40) for _ in range(2))
    assert one == two
    assert one["accuracy"] > 0.5
    assert 0 <= one["share"] <= 1


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", Size(2, 2, 3, 1, 1, 2, 2))
    smoke(STUDY)
