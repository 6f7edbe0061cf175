"""The theorems on random problems: flow (A), tied features (B), linear response and its spectrum (C)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.measure.neural_collapse import nc1_quotient
from uncollapse.representation.nc_perturbation import (
    LinearResponse,
    central_path_flow,
    collapsed_minimizer,
    linear_response,
    near_collapse_spectrum,
    proximal_features,
)

BETAS = (1.0, 10.0, 100.0, 1e3, 1e4)
TIME = 5.0
TOLERANCE = 1e-10
"""A rise between two accepted steps of the solver counts from here on."""
EPS = (1e-2, 1e-3, 1e-4)
"""Sizes of the change of H0 in part C, relative to the noise around the collapsed features."""
LAM_W = math.sqrt(2)
PENALTIES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Values of lam_h at which the paper's figure (K = 4, n = 10, d = 10, beta = 100, lam_w = sqrt 2) is drawn here."""


@dataclass(frozen=True)
class Problem:
    """Features to be tied to, their classes, and penalties."""

    H0: Float[Tensor, "sample feature"]
    y: Int[Tensor, " sample"]
    lam_w: float
    lam_h: float


def random_problem(seed: int) -> Problem:
    """K from 2 to 6, n from 2 to 12, d from K to 3 K; Gaussian features around Gaussian means.

    Means have 0.1 to 3 times the spread of the features around them, features a scale of 0.3 to 3, penalties lie between
    0.01 and 2, all log-uniform; every fifth problem has no feature penalty.
    """
    rng = np.random.default_rng(seed)
    K, n = int(rng.integers(2, 7)), int(rng.integers(2, 13))
    d = int(rng.integers(K, 3 * K + 1))
    y = np.repeat(np.arange(K), n)
    apart, scale, lam_w, lam_h = np.exp(rng.uniform(np.log([0.1, 0.3, 0.01, 0.01]), np.log([3, 3, 2, 2])))
    H0 = scale * (apart * rng.normal(size=(K, d))[y] + rng.normal(size=(K * n, d)))
    return Problem(
        torch.from_numpy(H0), torch.from_numpy(y), float(lam_w), 0.0 if seed % 5 == 0 else float(lam_h)
    )


def shuffled(y: Int[Tensor, " sample"], seed: int) -> Int[Tensor, " sample"]:
    """The same classes, dealt out anew."""
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]


def flow_trial(seed: int) -> dict[str, Any]:
    """Part A: largest rises of NC1~ and of the scaled traces along the central path, and the same for foreign labels.

    `control` follows the flow of shuffled labels and measures NC1~ with the right ones.
    """
    at = random_problem(seed)
    path = central_path_flow(at.H0, at.y, at.lam_w, at.lam_h, (0.0, TIME))
    growth = (2 * at.lam_h * path.t).exp()
    foreign = central_path_flow(at.H0, shuffled(at.y, seed), at.lam_w, at.lam_h, (0.0, TIME))
    control = torch.stack([nc1_quotient(H, at.y) for H in foreign.H_t])
    return {
        "steps": len(path.t) - 1,
        "rise": float(path.nc1.diff().max()),
        "within-rise": float((growth * path.trace_w).diff().max()),
        "between-fall": float(-(growth * path.trace_b).diff().min()),
        "ratio": float(path.nc1[-1] / path.nc1[0]),
        "t": path.t.tolist(),
        "nc1": (path.nc1 / path.nc1[0]).tolist(),
        "control-rise": float(control.diff().max()),
        "control-ratio": float(control[-1] / control[0]),
    }


def geometry(times: tuple[float, ...] = (0.0, 1.0, TIME)) -> list[list[list[float]]]:
    """Three classes on their way: features in the plane of the collapsed means, per time, class by class, for the figure."""
    K, n, d, lam_w, lam_h = 3, 15, 3, 0.3, 0.05
    ideal = collapsed_minimizer(K, n, d, lam_w, lam_h)
    noise = torch.randn(ideal.H.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = central_path_flow(
        0.5 * ideal.H + 0.4 * noise, ideal.y, lam_w, lam_h, (0.0, max(times)), t_eval=times
    )
    centred = ideal.H[::n] - ideal.H.mean(0)
    plane = torch.linalg.svd(centred).Vh[:2]
    return ((path.H_t - path.H_t.mean(1, keepdim=True)) @ plane.T).tolist()


def tied_trial(seed: int) -> dict[str, list[float]]:
    """Part B: NC1~ of the tied minimiser over NC1~ of H0 for each beta, with the right and with shuffled labels."""
    at = random_problem(seed)
    before = float(nc1_quotient(at.H0, at.y))

    def ratios(y: Tensor) -> list[float]:
        tied = [proximal_features(at.H0, y, at.lam_w, at.lam_h, beta)[1] for beta in BETAS]
        return [float(nc1_quotient(H, at.y)) / before for H in tied]

    return {"ratio": ratios(at.y), "control": ratios(shuffled(at.y, seed))}


def response_trial(seed: int) -> dict[str, list[float]]:
    """Part C: relative error of F dH0 against the minimiser found anew, per size of the change, around noisy collapse.

    `identity` is the error of the guess dH = dH0, `first` that of the first order in 1/beta.
    """
    rng = np.random.default_rng(seed)
    K, n = int(rng.integers(2, 6)), int(rng.integers(2, 8))
    d = int(rng.integers(K, 3 * K + 1))
    lam_w, lam_h, beta = np.exp(rng.uniform(np.log([0.1, 0.02, 2]), np.log([1, 0.5, 50]))).tolist()
    ideal = collapsed_minimizer(K, n, d, lam_w, lam_h, seed=seed)
    noise, change = torch.from_numpy(rng.normal(size=(2, K * n, d)))
    H0 = ideal.H + 0.1 * noise
    W, H = proximal_features(H0, ideal.y, lam_w, lam_h, beta, tolerance=1e-14)
    guesses = {
        "exact": linear_response(W, H, ideal.y, lam_w, lam_h, beta).apply(change),
        "first": linear_response(W, H, ideal.y, lam_w, lam_h, beta, exact=False).apply(change),
        "identity": change,
    }
    errors: dict[str, list[float]] = {name: [] for name in guesses}
    for eps in EPS:
        moved = proximal_features(H0 + eps * change, ideal.y, lam_w, lam_h, beta, tolerance=1e-14)[1]
        found = (moved - H) / eps
        for name, guess in guesses.items():
            errors[name].append(float((guess - found).norm() / (found - change).norm()))
    return errors


def spectrum_trial(lam_h: float, beta: float) -> dict[str, Any]:
    """Part C: singular values of F_kk and of F_kj by dense algebra against the closed form, at the paper's setting."""
    K, n, d = 4, 10, 10
    ideal = collapsed_minimizer(K, n, d, LAM_W, lam_h)
    closed = near_collapse_spectrum(K, n, d, LAM_W, lam_h, beta)

    def dense(exact: bool) -> np.ndarray:
        F = LinearResponse(ideal.W, ideal.H, ideal.y, LAM_W, lam_h, beta, exact)
        return F @ np.eye(F.shape[0])

    F, first = dense(True), dense(False)
    size = n * d
    block = np.sort(np.linalg.svd(F[:size, :size], compute_uv=False))
    first_block = np.sort(np.linalg.svd(first[:size, :size], compute_uv=False))
    off = np.linalg.svd(F[:size, size : 2 * size], compute_uv=False)

    def listed(name: str) -> np.ndarray:
        return np.sort(np.concatenate([np.full(m.multiplicity, getattr(m, name)) for m in closed.block]))

    whole = np.sort(np.concatenate([np.full(m.multiplicity, m.exact) for m in closed.full]))
    return {
        "error": float(
            max(
                np.abs(block - listed("exact")).max(),
                np.abs(np.linalg.eigvalsh(F) - whole).max(),
                abs(off[0] - closed.off_block.exact),
                off[1],
            )
        ),
        "first-error": float(np.abs(first_block - listed("large_beta")).max()),
        "beyond-first": float(np.abs(F - first).max()),
        "values": {m.name: m.exact for m in closed.block},
        "off": float(off[0]),
        "largest": float(block[-1]),
        "smallest": float(block[0]),
        "paper-smallest": 1 - math.sqrt(lam_h / LAM_W) / beta,
        "paper-off": 2 * lam_h * (1 - math.sqrt(lam_h * LAM_W)) / beta,
    }
