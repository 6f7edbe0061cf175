from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from uncollapse import models
from uncollapse.errors import ConfigError
from uncollapse.studies.linguistic_collapse import STUDY, experiment
from uncollapse.studies.linguistic_collapse.balanced import collapse_of_digits
from uncollapse.studies.linguistic_collapse.experiment import QUICK, rank_correlation, stronger
from uncollapse.studies.linguistic_collapse.ladder import (
    COMPARED,
    CONTROLLED,
    Ladder,
    held_out_loss,
    rung,
    train,
    windows,
)
from uncollapse.studies.linguistic_collapse.real_model import real_model

pytest.importorskip("tokenizers")
SMALL = Ladder(
    (16,),
    (1,),
    (2, 3),
    rows=2,
    time=32,
    train_bytes=20_000,
    held_out_bytes=4_000,
    held_out_windows=4,
    siblings=2,
)


def test_rungs_have_every_size_and_seeds_of_their_own() -> None:
    ladder = Ladder()
    assert len(ladder.rungs) == 27
    assert len({place[:3] for place in ladder.rungs}) == 27
    assert {place[:3] for place in ladder.equals} == {(64, 2, 100)}
    seeds = [place[3] for place in ladder.rungs + ladder.equals]
    assert len(set(seeds)) == len(seeds)


def test_the_text_has_more_classes_than_the_models_have_features() -> None:
    text = windows(SMALL)
    assert text.train.shape[1] == 32
    assert text.held_out.shape == (4, 32)
    assert len(text.train.unique()) > 100
    assert int(text.train.max()) < 512


def test_training_is_repeatable_and_lowers_the_loss() -> None:
    held_out = windows(SMALL).held_out
    losses = [held_out_loss(train(SMALL, 16, 1, length, 0), held_out) for length in (1, 20, 20)]
    assert losses[1] == losses[2] < losses[0]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)


def test_a_rung_reports_all_that_is_compared() -> None:
    found = rung(SMALL, 16, 1, 2, 0)
    assert {*COMPARED, "loss", "classes", *(f"shuffled/{name}" for name in CONTROLLED)} <= set(found)
    assert 0 <= found["nc4"] <= 1
    assert found["shuffled/ln_cdnv"] > found["ln_cdnv"]


def test_rank_correlations_and_their_intervals() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y, z = x + generator.normal(size=30), generator.normal(size=30)
    found = rank_correlation(list(x), list(y))
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert 0 < found.low < found.value < found.high <= 1
    group = [i % 3 for i in range(30)]
    shifted = [float(v + 100 * g) for v, g in zip(z, group, strict=True)]
    apart = [float(v + 100 * g) for v, g in zip(x, group, strict=True)]
    assert rank_correlation(apart, shifted).value > 0.8
    assert rank_correlation(apart, shifted, within=group).low < 0
    more = stronger(list(x), list(y), list(z))
    assert more.value == pytest.approx(
        abs(stats.spearmanr(x, y).statistic) - abs(stats.spearmanr(x, z).statistic)
    )
    assert more.low < more.value < more.high
    assert math.isnan(rank_correlation([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]).value)


def test_digits_collapse_with_training() -> None:
    early, late = (collapse_of_digits(1, normalized=True, epochs=n, per_class=40) for n in (1, 30))
    assert late["nc1/cdnv/mean"] < early["nc1/cdnv/mean"]
    assert late["nc3/cosine/mean"] > early["nc3/cosine/mean"]


def test_a_model_of_the_zoo_is_described() -> None:
    found = real_model(2, 1, 1, model="tiny")
    assert found["note"] == ""
    assert len(found["parts"]) == 2
    assert found["all"]["samples"] == sum(part["samples"] for part in found["parts"]) == 2 * 255
    assert set(experiment.REAL) <= set(found["all"])


def test_without_weights_the_study_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ConfigError("no weights")

    monkeypatch.setattr(models, "load", missing)
    assert real_model(1, 1, 1) == {"note": "not measured: no weights"}


@pytest.mark.parametrize("note", ["", "not measured: no weights"])
def test_the_study_runs_end_to_end(note: str, smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(parts: int, windows: int, held_out: int) -> dict[str, object]:
        values = torch.rand(parts, generator=torch.Generator().manual_seed(0)).tolist()
        pieces = [dict.fromkeys(experiment.REAL, value) for value in values]
        return {"note": note, "parts": pieces, "all": pieces[0]}

    monkeypatch.setattr(experiment, "QUICK", replace(QUICK, ladder=SMALL, epochs=1))
    monkeypatch.setattr(experiment, "real_model", seen)
    _, missing = smoke(STUDY, lambda name: name.startswith("smollm2"))
    assert bool(missing) == bool(note)
