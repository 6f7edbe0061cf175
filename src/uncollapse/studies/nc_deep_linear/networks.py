"""Training for the study: gradient descent on free features, and a ReLU network on digits of unequal classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.measure.neural_collapse import nc2_etf, nc2_gof, nc2_of, nc3_gof, nc_metrics
from uncollapse.representation.nc_deep_linear import (
    UFM,
    Factors,
    UFMSolution,
    initial_factors,
    squared_error,
    ufm_mse_minimizer,
)
from uncollapse.studies.testbeds.digits import digits


def gradient_descent(
    problem: UFM, widths: Sequence[int], seed: int, *, iterations: int, lr: float = 0.1, momentum: float = 0.9
) -> Factors:
    """SGD with momentum on all factors, from normal ones of deviation 0.1, as the official synthetic experiment."""
    start = initial_factors(problem, widths, seed=seed, std=0.1)
    layers = tuple(w.requires_grad_() for w in start.layers)
    features = start.features.requires_grad_()
    optimizer = torch.optim.SGD([*layers, features], lr=lr, momentum=momentum)
    y = problem.labels
    for _ in range(iterations):
        optimizer.zero_grad()
        factors = Factors(layers, features)
        (squared_error(factors.logits(), y) + problem.penalty(factors)).backward()
        optimizer.step()
    return Factors(tuple(w.detach() for w in layers), features.detach())


def geometry(features: Tensor, y: Tensor, head: Tensor, solution: UFMSolution) -> dict[str, float]:
    """Distances of a head and its features from the frame of `solution`, and from the frames of equal classes."""
    report = nc_metrics(features, y, head)
    means = torch.stack([features[y == k].mean(0) for k in range(len(head))]).double()
    gram = head.double() @ head.double().T
    return {
        "gram-error": float((gram - solution.gram_w).norm() / solution.gram_w.norm()),
        "gof-weights": float(nc2_gof(head, solution.w_norm2)),
        "gof-means": float(nc2_gof(means, solution.h_norm2)),
        "of-weights": float(nc2_of(head)),
        "etf-weights": float(nc2_etf(head)),
        "gof-alignment": float(nc3_gof(head, means, solution.z_diag)),
        "nc1": report.nc1_quotient,
        "nc4": report.metrics()["nc4"],
    }


class Network(nn.Module):
    """Three ReLU layers of `width`, and a linear head without bias."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        sizes = (64, width, width, width)
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.features = nn.Sequential(*hidden)
        self.head = nn.Linear(width, classes, bias=False)


def train_digits(
    counts: tuple[int, ...],
    seed: int,
    *,
    lam: float,
    width: int = 256,
    steps: int = 2000,
    polish: int = 500,
    lr: float = 1e-3,
) -> dict[str, Any]:
    """Full-batch Adam, then L-BFGS, on squared error with penalty `lam` on the head and on the last features.

    The layers below are not penalised: they stand for the freedom that the free features have. Their last features are
    not negative, as in a real network, where free features are.
    """
    data = digits(seed, test=90).of_counts(counts, seed)
    x, y = data.train.flatten(1), data.train_class
    problem = UFM.make(counts, 1, lam, lam)
    solution = ufm_mse_minimizer(counts, 1, lam, lam)
    torch.manual_seed(seed)
    network = Network(width)

    def objective() -> Tensor:
        features = network.features(x)
        factors = Factors((network.head.weight,), features)
        return squared_error(factors.logits(), y) + problem.penalty(factors)

    adam = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        adam.zero_grad()
        objective().backward()
        adam.step()
        schedule.step()
    after_adam = float(objective().detach())
    lbfgs = torch.optim.LBFGS(
        network.parameters(), max_iter=polish, history_size=20, tolerance_grad=0, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = objective()
        value.backward()
        return value

    lbfgs.step(closure)
    with torch.no_grad():
        features, head = network.features(x), network.head.weight.detach()
        held_out = network.head(network.features(data.test.flatten(1))).argmax(1)
    return {
        **geometry(features, y, head, solution),
        "objective": float(objective().detach()),
        "after-adam": after_adam,
        "minimum": solution.objective,
        "accuracy": float((held_out == data.test_class).double().mean()),
        "lengths": head.double().norm(dim=1).tolist(),
        "gram": (head.double() @ head.double().T).tolist(),
    }
