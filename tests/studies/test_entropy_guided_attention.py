"""The entropy-guided-attention study in small: it measures what it says, and runs end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from uncollapse.attention.entropy_guided_attention import ARCHITECTURES, ReducedDecoder
from uncollapse.studies.calibration import climb
from uncollapse.studies.claims import Verdict
from uncollapse.studies.entropy_guided_attention import DRAWN, STUDY, experiment
from uncollapse.studies.entropy_guided_attention.arms import (
    ARMS,
    LOOK_ROWS,
    QUICK,
    Arm,
    Run,
    Size,
    held_out_rows,
    look,
    next_byte_loss,
    train,
    windows,
)
from uncollapse.studies.entropy_guided_attention.calibration import (
    CALIBRATED,
    LADDER,
    RATES,
    SAME_AS,
    SCORES,
    SEEDS,
    START,
    calibrate,
)
from uncollapse.studies.entropy_guided_attention.experiment import (
    FIRST_SEED,
    PAIRS,
    details,
    ends,
    summarize,
)
from uncollapse.studies.study import run_study, study

SMALL = replace(QUICK, steps=2, seeds=2)
ROWS = held_out_rows(SMALL, 0)


def test_arms_are_of_the_papers_architectures_and_compared_ones_exist() -> None:
    assert {arm.architecture for arm in ARMS.values()} <= set(ARCHITECTURES)
    assert {name for pair in PAIRS for name in pair} | set(DRAWN) <= set(ARMS)


def test_windows_are_pieces_of_the_text() -> None:
    data = torch.arange(100)
    rows = windows(data, 5, 7, torch.Generator().manual_seed(0))
    assert torch.equal(rows, rows[:, :1] + torch.arange(7))


def test_the_study_and_its_calibration_are_judged_by_different_text() -> None:
    size = replace(Size(), held_out_rows=500)
    ours, theirs = (held_out_rows(size, stretch) for stretch in (0, 1))
    assert ours.shape == theirs.shape == (500, size.context + 1)
    assert not {tuple(row) for row in ours.tolist()} & {tuple(row) for row in theirs.tolist()}


def test_an_untrained_decoder_guesses_and_attends_uniformly() -> None:
    model = ReducedDecoder("SM", vocab=256, width=16, layers=2, heads=2, context=16)
    rows = torch.randint(0, 256, (LOOK_ROWS + 4, 17))
    loss, seen = look(model, rows)
    assert loss == pytest.approx(math.log(256), abs=0.05)
    assert loss == pytest.approx(next_byte_loss(model, rows).item())
    assert seen is not None
    assert seen.entropy.shape == (2, 2)
    torch.testing.assert_close(seen.entropy.mean().item(), math.lgamma(17) / 16, atol=1e-3, rtol=0)
    assert model.training
    with torch.no_grad():
        model.token.weight.fill_(math.nan)
    broken, nothing = look(model, rows)
    assert math.isnan(broken)
    assert nothing is None


@pytest.mark.parametrize("name", ["SM+LN+G", "EReg", "EReg-frozen"])
def test_a_run_is_told_and_repeats(name: str) -> None:
    run = train(ARMS[name], 0, 0.003, SMALL, ROWS)
    assert run == train(ARMS[name], 0, 0.003, SMALL, ROWS)
    assert run["step"] == [0, 1, 2]
    assert run["loss"][-1] < run["loss"][0]
    assert run["diverged"] == 0.0
    assert all(sum(bins) == pytest.approx(1) for bins in run["bins"].values())
    assert len(run["layers"]) == SMALL.layers
    assert min(run["layers"]) == pytest.approx(run["lowest_layer"][-1])
    if name == "SM+LN+G":
        assert run["theta"] is run["temperature"] is None
    elif name == "EReg-frozen":
        assert run["theta"] == pytest.approx([0.4] * 3)
    else:
        assert run["theta"] != pytest.approx([0.5] * 3, abs=1e-9)
        assert run["temperature"] == pytest.approx([1.0] * 3, abs=0.02)


def test_a_run_that_diverges_is_counted_and_keeps_its_last_look() -> None:
    run = train(Arm("SM"), 0, 1e30, SMALL, ROWS)
    assert run["diverged"] == 1.0
    assert run["step"] == [0]
    assert ends(run)["loss"] == math.inf


def faked(loss: float, lowest: float, overload: float, *, diverged: bool = False) -> Run:
    bins = [0.0, 0.0, 1 - overload, overload]
    return {
        "step": [0], "loss": [loss], "lowest_layer": [lowest], "diverged": float(diverged), "sink": 0.0, "layers": [lowest],
        "bins": {"max_observed": bins, "log_T": bins, "causal": bins}, "theta": None, "temperature": None,
    }  # fmt: skip


def test_verdicts_follow_the_numbers() -> None:
    claims = {claim.id: claim for claim in STUDY.claims}

    def verdicts(**changed: Run) -> dict[str, Verdict]:
        runs = {arm: [faked(2.0, 2.0, 0.5)] * 3 for arm in ARMS}
        runs |= {arm.replace("SM_t", "SM(t)+ScFuFFN"): [run] * 3 for arm, run in changed.items()}
        found = summarize(runs, (0, 1, 2))
        return {name: claim.judge(found) for name, claim in claims.items()}

    same = verdicts()
    assert same["a-collapse"] is Verdict.not_reproduced
    assert same["b-scaled-ffn"] is Verdict.reproduced
    assert same["c-overload"] is Verdict.not_reproduced
    assert same["d-loss"] is Verdict.reproduced
    assert verdicts(SM=faked(2.3, 1.0, 0.5))["a-collapse"] is Verdict.reproduced
    assert verdicts(SM=faked(9.9, 1.0, 0.5, diverged=True))["a-collapse"] is Verdict.reproduced
    assert verdicts(SM=faked(2.3, 2.1, 0.5))["a-collapse"] is Verdict.not_reproduced
    assert verdicts(EReg=faked(2.0, 2.0, 0.3))["c-overload"] is Verdict.reproduced
    assert verdicts(EReg=faked(2.02, 2.0, 0.3))["d-loss"] is Verdict.not_reproduced


def test_details_are_means_over_the_seeds_that_trained_to_the_end() -> None:
    one = faked(3.0, 2.0, 0.5) | {"step": [0, 1], "loss": [5.0, 3.0], "lowest_layer": [2.0, 1.0]}
    one |= {"theta": [0.4, 0.5, 0.6]}
    other = one | {"loss": [5.0, 4.0], "theta": [0.2, 0.3, 0.4]}
    broken = faked(9.0, 0.0, 1.0, diverged=True)
    found = details({"EReg": [broken, one, other]})["EReg"]
    assert found["losses"] == [None, 3.0, 4.0]
    assert found["step"] == [0, 1]
    assert found["loss"] == [5.0, 3.5]
    assert found["lowest_layer"] == [2.0, 1.0]
    assert found["bins"]["causal"] == [0, 0, 0.5, 0.5]
    assert found["theta"] == [0.3, 0.4, 0.5]
    assert "temperature" not in found
    assert details({"SM": [broken]})["SM"]["loss"] == [9.0]


def _losses(loss: Callable[[float], float]) -> dict[float, float]:
    return {rate: -score for rate, score in climb(LADDER, START, lambda r: -loss(r), reach=1).items()}


@pytest.mark.parametrize("peak", LADDER)
def test_the_ladder_is_climbed_until_both_neighbours_are_worse(peak: float) -> None:
    scores = _losses(lambda rate: float(abs(LADDER.index(rate) - LADDER.index(peak))))
    assert min(scores, key=lambda rate: scores[rate]) == peak
    assert set(START) <= set(scores)
    assert list(scores) == sorted(scores)


def test_every_arm_has_the_best_of_its_rates() -> None:
    assert set(RATES) == set(ARMS) == set(CALIBRATED) | set(SAME_AS)
    assert RATES["L2"] == RATES["EReg"]
    assert set(SCORES) == set(CALIBRATED)
    for name, scores in SCORES.items():
        assert _losses(scores.__getitem__).items() <= scores.items()
        assert scores[RATES[name]] == min(scores.values())


def test_the_calibration_has_seeds_of_its_own() -> None:
    ((name, scores),) = calibrate(("SM",), replace(SMALL, steps=1))
    assert name == "SM"
    assert all(0 < score < 6 for score in scores.values())
    assert set(SEEDS).isdisjoint(range(FIRST_SEED, FIRST_SEED + Size().seeds))


def test_the_study_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", SMALL)
    outcome = run_study(
        study("entropy-guided-attention"), quick=True, output=tmp_path, work=tmp_path / "work"
    )
    assert [r.verdict for r in outcome.results] == [None] * len(STUDY.claims)
    assert outcome.figure is not None
    assert outcome.figure.read_text().startswith("<?xml")
    known = set(outcome.measurements.estimates)
    for claim in STUDY.claims:
        assert {bound.statistic for bound in claim.criterion.bounds} | {claim.effect} <= known
    assert {s for o in STUDY.observations for s in o.statistics} <= known
