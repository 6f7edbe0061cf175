from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from uncollapse import models
from uncollapse.errors import ConfigError
from uncollapse.policy.siren import nucleus_entropy, peak_entropy_mask, peak_entropy_mean
from uncollapse.studies.siren import DRAWN, STUDY, experiment
from uncollapse.studies.siren.experiment import Size, arms, peak_entropy, real_model, train, upward_push
from uncollapse.studies.testbeds.long_tail import LongTail, make

SMALL = LongTail(prompts=2, length=6, vocab=20, rank=3, keys=1, accepted=3, candidates=6)


def test_arms_differ_in_the_entropy_term_alone() -> None:
    made = arms()
    assert set(DRAWN) <= set(made)
    for arm in made.values():
        assert replace(arm, name="none", regularizers=()) == made["none"]


def test_training_is_repeatable_and_arms_share_their_start_and_no_memory() -> None:
    chosen = arms()["siren-0.5"]
    runs = [train(chosen, 0, 3, SMALL, every=2) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0]["step"] == [0, 2, 3]
    assert runs[0]["gap"][0] == 0
    assert chosen.regularizers[0].term.memory.value is None
    other = train(arms()["naive-0.1"], 0, 1, SMALL)
    for name in ("accuracy", "entropy", "right_entropy", "tail"):
        assert other[name][0] == runs[0][name][0]


def test_the_mean_that_is_watched_is_the_one_that_siren_holds() -> None:
    _, policy = make(SMALL, torch.Generator().manual_seed(1))
    logits = policy().double().repeat_interleave(16, dim=0)
    h = nucleus_entropy(logits)
    every = torch.ones_like(h, dtype=torch.bool)
    expected = peak_entropy_mean(h, peak_entropy_mask(h, every), every)
    assert peak_entropy(policy) == pytest.approx(float(expected.detach()), abs=1e-12)


def test_upward_push_is_the_positive_part_of_the_gradient() -> None:
    logits = (2 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    found = upward_push(logits.detach())
    p = logits.softmax(-1)
    naive = torch.autograd.grad(torch.special.entr(p).sum(), logits)[0].clamp(min=0)
    siren = torch.autograd.grad(nucleus_entropy(logits).sum(), logits)[0]
    outside = siren == 0
    assert found["siren"] == 0
    assert found["naive"] == pytest.approx(float(naive[outside].sum() / naive.sum()))
    assert found["tail_mass"] == pytest.approx(float((p * outside).sum().detach() / 5))
    assert found["nucleus_size"] == pytest.approx(float((~outside).sum() / 5))


def test_without_weights_the_study_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ConfigError("no weights")

    monkeypatch.setattr(models, "load", missing)
    assert real_model(1, 1) == {"note": "not measured: no weights"}


@pytest.mark.parametrize("note", ["", "not measured: no weights"])
def test_the_study_runs_end_to_end(note: str, smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = {"naive": 0.5, "siren": 0.0, "tail_mass": 0.2, "nucleus_size": 9.0}
    monkeypatch.setattr(experiment, "QUICK", Size(SMALL, seeds=2, steps=2))
    monkeypatch.setattr(experiment, "real_model", lambda rows, tokens: {"note": note, **pushed})
    _, missing = smoke(STUDY, lambda name: name.startswith("smollm2"))
    assert bool(missing) == bool(note)
