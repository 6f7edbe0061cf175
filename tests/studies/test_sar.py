from __future__ import annotations

import copy
import math

import pytest
import torch

from uncollapse.measure.entropy import shannon_entropy_from_logits
from uncollapse.representation.sar import NoAdaptation, Tent, collect_norm_params
from uncollapse.studies.sar import DRAWN, STUDY, experiment
from uncollapse.studies.sar.experiment import (
    ARMS,
    LARGE,
    MAIN,
    RATES,
    SEVERITY,
    Size,
    adapt,
    follow,
    sample_gradients,
    source,
)
from uncollapse.studies.sar.toy import biases, samples
from uncollapse.studies.testbeds.shifted_digits import CORRUPTIONS, ShiftedDigits, classifier

SMALL = Size(
    kinds=("mlp",), seeds=2, test=40, epochs=1, passes=1, batch=20, single=2, gradients=30, toy_steps=11
)


def test_arms_that_are_drawn_or_have_a_rate_exist() -> None:
    assert set(DRAWN) <= {"none", *ARMS}
    assert set(MAIN) <= set(ARMS)
    assert set(LARGE) < set(RATES)


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_gradients_of_single_samples_are_those_of_a_loop(kind: str) -> None:
    net = classifier(kind, 0)
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    entropy, norm = sample_gradients(net, images)
    for image, e, expected in zip(images, entropy, norm, strict=True):
        value = shannon_entropy_from_logits(net(image[None]))[0]
        parts = torch.autograd.grad(value, list(collect_norm_params(net, skip_last=0.0).values()))
        found = math.sqrt(sum(float(part.square().sum()) for part in parts))
        assert float(e) == pytest.approx(float(value.detach()), rel=1e-5)
        assert float(expected) == pytest.approx(found, rel=1e-4)


def test_a_stream_is_followed_as_it_comes() -> None:
    data, net = source("mlp", 0, 40, 1)
    images, classes = data.stream({"noise": 0.2}, "mixed", 0)
    run = follow(NoAdaptation(copy.deepcopy(net)), images, classes, 7)
    with torch.no_grad():
        guessed = net(images).argmax(-1)
    assert run["accuracy"] == pytest.approx(float((guessed == classes).double().mean()))
    assert run["share"] == pytest.approx(float(guessed.bincount().max()) / len(guessed))
    first = follow(Tent(copy.deepcopy(net), lr=1e-9, skip_last=0.0), images, classes, 7)
    assert first["accuracy"] == run["accuracy"]
    assert first["kept"] == 1


def test_arms_share_their_start_and_runs_repeat() -> None:
    runs = [adapt("mlp", "blur", 0, SMALL) for _ in range(2)]
    assert runs[0] == runs[1]
    expected = {f"{order}/{arm}/{rate:g}" for order in ("mixed", "by class") for arm in ARMS
                for rate in (RATES if arm in MAIN else LARGE)}  # fmt: skip
    assert set(runs[0]) == expected | {"mixed/none/0", "by class/none/0"}
    mixture = adapt("mlp", "mixture", 0, SMALL)
    assert len(mixture) == 1 + len(MAIN) * len(RATES)


def test_streams() -> None:
    data = ShiftedDigits.make(1, test=60)
    assert data.test.shape == (60, 1, 16, 16)
    images, classes = data.stream({"noise": 0.1}, "by class", 0, passes=2)
    assert images.shape == (120, 1, 16, 16)
    for part in classes.split(60):
        assert (part.diff() != 0).sum() == part.unique().numel() - 1
    again = data.stream({"noise": 0.1}, "by class", 0, passes=2)
    assert torch.equal(again[0], images)
    mixed, labels = data.stream(SEVERITY["mlp"], "mixed", 0)
    assert torch.equal(labels.sort().values, data.test_class.sort().values)
    assert mixed.isfinite().all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_their_severity(name: str) -> None:
    images = ShiftedDigits.make(1, test=60).test
    changed = [
        (CORRUPTIONS[name](images, severity, torch.Generator().manual_seed(0)) - images).square().mean()
        for severity in (0.3, 1.0, 2.0)
    ]
    assert changed == sorted(changed)
    assert changed[0] > 0


def test_only_tent_with_outliers_is_carried_away() -> None:
    assert len(samples(outliers=True)) == len(samples(outliers=False)) == 200
    assert abs(float(samples(outliers=False).sum())) < 1e-12
    assert biases("tent", outliers=True)[-1] > 4
    assert abs(biases("tent", outliers=False)[-1]) < 0.05
    assert abs(biases("sar", outliers=True)[-1]) < 0.05


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", Size(**{**vars(SMALL), "kinds": ("conv", "mlp"), "seeds": 1}))
    outcome, _ = smoke(STUDY, lambda name: name.endswith("detector/collapsed"))  # where no run collapses
    assert outcome.path.stat().st_size < 60_000
