"""Minimise the model over its factors, from random starts: what the closed forms are checked against, and all else.

Any depth, loss, width and class sizes, with or without bias. A run finds a local minimum; several runs are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.representation.nc_deep_linear.problem import UFM, Factors, Loss, squared_error


@dataclass(frozen=True)
class Minimum:
    """Where a run ended: its `factors`, `objective`, largest entry of the `gradient`, and iterations."""

    factors: Factors
    objective: float
    gradient: float
    iterations: int


def initial_factors(
    problem: UFM, widths: Sequence[int], *, seed: int, std: float = 0.3, bias: bool = False
) -> Factors:
    """Normal factors of standard deviation `std` in float64, and a zero bias if there is one.

    Args:
        widths: features, then the width of every hidden layer.

    Raises:
        ConfigError: another number of widths than layers.
    """
    if len(widths) != problem.depth:
        raise ConfigError(
            f"nc-deep-linear: {len(widths)} widths for depth {problem.depth}; give features and hidden widths"
        )
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return std * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    outs = [*widths[1:], problem.classes]
    layers = tuple(normal(out, width) for out, width in zip(outs, widths, strict=True))
    return Factors(
        layers,
        normal(problem.samples, widths[0]),
        torch.zeros(problem.classes, dtype=torch.float64) if bias else None,
    )


def descend(
    problem: UFM,
    start: Factors,
    loss: Loss = squared_error,
    *,
    max_iterations: int = 20_000,
    tol: float = 1e-11,
) -> Minimum:
    """L-BFGS in float64 from `start` until no entry of the gradient is above `tol`, or no step helps."""
    parts = [*start.layers, start.features, *([] if start.bias is None else [start.bias])]
    sizes, shapes = [part.numel() for part in parts], [part.shape for part in parts]
    depth, y = problem.depth, problem.labels

    def unpack(flat: Tensor) -> Factors:
        pieces = [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        return Factors(
            tuple(pieces[:depth]), pieces[depth], pieces[depth + 1] if len(pieces) > depth + 1 else None
        )

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(x).requires_grad_()
        factors = unpack(flat)
        objective = loss(factors.logits(), y) + problem.penalty(factors)
        (gradient,) = torch.autograd.grad(objective, flat)
        return float(objective.detach()), gradient.numpy()

    found = minimize(
        evaluate,
        torch.cat([part.detach().double().flatten() for part in parts]).numpy(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "maxcor": 20,
            "ftol": 0.0,
            "gtol": tol,
        },
    )
    return Minimum(
        unpack(torch.from_numpy(found.x.copy())),
        float(found.fun),
        float(np.abs(found.jac).max()),
        int(found.nit),
    )


def minimize_ufm(
    n_per_class: Sequence[int],
    depth: int,
    lam_w: float | Sequence[float],
    lam_h: float,
    *,
    widths: Sequence[int],
    loss: Loss = squared_error,
    bias: bool = False,
    restarts: int = 5,
    std: float = 0.3,
    seed: int = 0,
    max_iterations: int = 20_000,
) -> list[Minimum]:
    """`restarts` runs of `descend` from starts seed, seed + 1, ..., best first.

    Deep heads have a minimum at 0 that small starts do not leave: begin with `std` of about 0.3 and compare runs.

    Raises:
        ConfigError: as `UFM.make`, or another number of widths than layers.
    """
    problem = UFM.make(n_per_class, depth, lam_w, lam_h)
    starts = (
        initial_factors(problem, widths, seed=seed + run, std=std, bias=bias) for run in range(restarts)
    )
    runs = [descend(problem, start, loss, max_iterations=max_iterations) for start in starts]
    return sorted(runs, key=lambda run: run.objective)
