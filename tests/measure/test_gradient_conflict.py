"""The conflict of two gradients, by hand and against flattened vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from uncollapse.errors import DataError
from uncollapse.measure import gradient_conflict_report

F64 = torch.float64


def test_by_hand() -> None:
    a, b = (torch.zeros(2, dtype=F64, requires_grad=True) for _ in range(2))
    slope = torch.tensor([3.0, 4.0], dtype=F64)
    report = gradient_conflict_report(slope @ a + b.sum(), -a[0] + b[0], {"a": [a], "b": [b], "both": [a, b]})
    assert float(report["a"].dot) == -3
    assert (float(report["a"].norm_a), float(report["a"].norm_b)) == (5, 1)
    assert float(report["a"].cosine) == pytest.approx(-0.6)
    assert bool(report["a"].conflicting)
    assert float(report["b"].cosine) == pytest.approx(2**-0.5)
    assert float(report["both"].dot) == -2


def test_the_graph_and_the_gradients_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4, dtype=F64)
    one, two = model(x).square().mean(), model(x).sin().mean()
    report = gradient_conflict_report(
        one, two, {"body": model[0].parameters(), "head": model[2].parameters()}
    )
    assert all(p.grad is None for p in model.parameters())
    body = list(model[0].parameters())
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, body, retain_graph=True)])
        for loss in (one, two)
    ]
    torch.testing.assert_close(report["body"].cosine, torch.cosine_similarity(flat[0], flat[1], dim=0))
    (one + two).backward()


def test_a_loss_that_does_not_reach_a_group_has_no_cosine() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    frozen = torch.ones(2)
    report = gradient_conflict_report(a.sum(), (a * b).sum(), {"b": [b, frozen]})
    assert report["b"].cosine.isnan()
    assert not report["b"].conflicting
    assert float(report["b"].norm_a) == 0


def test_features_may_be_a_group() -> None:
    head = nn.Linear(3, 2)
    h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    report = gradient_conflict_report(head(h).sum(), -head(h).sum(), {"features": [h]})
    assert float(report["features"].cosine) == pytest.approx(-1)


def test_nothing_to_look_at_is_said() -> None:
    a = torch.ones(2, requires_grad=True)
    with pytest.raises(DataError, match="'empty'"):
        gradient_conflict_report(a.sum(), a.sum(), {"empty": []})
    with pytest.raises(DataError, match="no graph"):
        gradient_conflict_report(a.sum(), a.detach().sum(), {"a": [a]})
