"""What one optimiser does to one weight: growth of spectral norms under the same gradient at every step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from uncollapse.attention.sigma_reparam import SigmaReparam
from uncollapse.attention.sigma_reparam.estimate import as_blocks, start_vector

LR = 1e-3


def growth(width: int, seed: int, steps: int) -> dict[str, float]:
    """Changes of spectral norms per step, over the learning rate, when the gradient is one random matrix of signs.

    Adam; the weight starts normal with standard deviation 0.02; the signs are the gradient of the weight that a layer
    computes with. `plain` is the mean change of |W|_2 in a net without anything. `exact` is the largest change in size of |W_hat|_2
    when u is found exactly at every step, `gamma` that of gamma with one power iteration, and `one` that of the true
    |W_hat|_2 then: the signs turn W faster than power iteration follows.
    """
    generator = torch.Generator().manual_seed(seed)
    start = 0.02 * torch.randn(width, width, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (width, width), generator=generator).double() * 2 - 1
    plain = _norms(start, signs, steps, reparam=False, exact=False)[0]
    exact = _norms(start, signs, steps, reparam=True, exact=True)[0]
    one, gamma = _norms(start, signs, steps, reparam=True, exact=False)
    return {
        "plain": float(plain.diff().mean()) / LR,
        "exact": float(exact.diff().abs().max()) / LR,
        "one": float(one.diff().abs().max()) / LR,
        "gamma": float(gamma.diff().abs().max()) / LR,
    }


def _norms(
    start: torch.Tensor, signs: torch.Tensor, steps: int, *, reparam: bool, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectral norm of the computed weight, and gamma, before every step and after the last."""
    layer = nn.Linear(len(start), len(start), bias=False, dtype=start.dtype)
    layer.weight.data.copy_(start)
    tracker = None
    if reparam:
        tracker = SigmaReparam(layer.weight)
        parametrize.register_parametrization(layer, "weight", tracker, unsafe=True)
    original = next(p for p in layer.parameters() if p.ndim == 2)
    optimiser = torch.optim.Adam(layer.parameters(), lr=LR)
    norms, gammas = [], []
    for _ in range(steps + 1):
        if tracker is not None and exact:
            tracker.u.copy_(start_vector(as_blocks(original.detach(), 1), "svd"))
        weight = layer.weight
        norms.append(torch.linalg.matrix_norm(weight.detach(), 2))
        gammas.append(norms[-1] if tracker is None else tracker.gamma.detach().clone().squeeze())
        optimiser.zero_grad()
        weight.backward(signs)
        optimiser.step()
    return torch.stack(norms), torch.stack(gammas)
