"""The near-collapse study in small: its measurements are what they say, and it runs end to end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from uncollapse.measure.neural_collapse import nc_metrics
from uncollapse.studies.nc_perturbation import STUDY, experiment, networks, theory
from uncollapse.studies.nc_perturbation.experiment import Size, rank_correlation
from uncollapse.studies.nc_perturbation.networks import (
    ARMS,
    LOSSES,
    Loss,
    batches,
    decay_trial,
    layerwise_trial,
    linear,
    mse,
)
from uncollapse.studies.nc_perturbation.theory import (
    flow_trial,
    random_problem,
    response_trial,
    shuffled,
    spectrum_trial,
    tied_trial,
)
from uncollapse.studies.testbeds.digits import digits


def test_problems_differ_and_repeat() -> None:
    one, again, other = random_problem(6), random_problem(6), random_problem(7)
    assert torch.equal(one.H0, again.H0)
    assert one.lam_w != other.lam_w
    assert random_problem(5).lam_h == 0
    assert sorted(shuffled(one.y, 0).tolist()) == one.y.tolist()


def test_the_theory_holds_on_seeds_that_the_study_does_not_use() -> None:
    found = flow_trial(77)
    assert found["rise"] < 0
    assert found["within-rise"] < 0
    assert found["between-fall"] < 0
    assert found["nc1"][-1] == pytest.approx(found["ratio"])
    assert max(tied_trial(77)["ratio"]) < 1
    errors = response_trial(77)
    assert errors["exact"][1] / errors["exact"][2] == pytest.approx(10, rel=0.2)
    assert errors["identity"] == pytest.approx([1, 1, 1], abs=1e-9)
    assert spectrum_trial(0.25, 100.0)["error"] < 1e-10


def test_the_control_of_the_flow_can_rise() -> None:
    assert any(flow_trial(seed)["control-rise"] > 0 for seed in (77, 78, 79))


def test_batches_go_through_all_samples() -> None:
    seen = list(batches(300, 4, torch.Generator().manual_seed(0)))
    assert [len(rows) for rows in seen] == [networks.BATCH] * 4
    assert len(torch.cat(seen[:2]).unique()) == 256


def test_layers_are_trained_one_by_one() -> None:
    one, two = (layerwise_trial(1000, 2, 30) for _ in range(2))
    assert one == two
    assert {len(one[name]) for name in ("nc1", "nc1-quotient", "test", "random", "predicted")} == {3}
    assert len(one["steps"]) == 2
    data = digits(1000)
    assert one["nc1-quotient"][0] == nc_metrics(data.train.flatten(1), data.train_class).nc1_quotient
    longer = layerwise_trial(1000, 1, 300)
    assert longer["nc1-quotient"][1] < longer["random"][1]


def alone(loss: Loss, arm: str, seed: int, steps: int) -> dict[str, float]:
    """One arm of `decay_trial` with PyTorch's layers and weight decay."""
    data = digits(seed)
    x, y = data.train.flatten(1), data.train_class
    generator = torch.Generator().manual_seed(seed)
    layers = [linear(64, 64, generator) for _ in range(3)] + [linear(64, 10, generator)]
    if loss == "mse":
        layers[3].bias = None
    body = nn.Sequential(*(piece for layer in layers[:3] for piece in (layer, nn.ReLU())))
    earlier, last, head = (networks.DECAY * factor for factor in ARMS[arm])
    optimizer = torch.optim.SGD(
        [
            {"params": [*layer.parameters()], "weight_decay": decay}
            for layer, decay in zip(layers, (earlier, earlier, last, head), strict=True)
        ],
        lr=0.05,
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 3, 2 * steps // 3])
    for rows in batches(len(x), steps, generator):
        optimizer.zero_grad()
        LOSSES[loss](layers[3](body(x[rows])), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        report = nc_metrics(body(x), y)
    assert report.nc1_pinv is not None
    return {"nc1": report.nc1_pinv, "nc1-quotient": report.nc1_quotient, "nc2": report.nc2_etf_means}


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_arms_side_by_side_are_arms_alone(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "DECAY", 0.05)
    found = decay_trial(loss, 1000, 12)
    assert set(found) == set(ARMS)
    for arm in ("baseline", "feature-zero", "head-double", "last-double"):
        expected = alone(loss, arm, 1000, 12)
        assert {name: found[arm][name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert found["feature-zero"]["nc1"] != pytest.approx(found["baseline"]["nc1"], rel=1e-3)


def test_mse_is_that_of_the_theory() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    assert float(mse(logits, torch.tensor([0, 1]))) == pytest.approx(0.5 * (4 + 0.25 + 1) / 2)


def test_rank_correlation_leaves_the_input_out() -> None:
    assert rank_correlation([0.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_the_study_runs_end_to_end(smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "QUICK", Size(2, 2, (0.1,), 2, 3, 4, 4))
    smoke(STUDY)
    assert set(theory.BETAS) >= {100.0}
