"""The tied objective, its partial minimisers in closed form, and its global minimiser without a tie (theorem 2.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from uncollapse.errors import ConfigError
from uncollapse.representation.nc_perturbation.moments import check_penalties, one_hot


def near_collapse_objective(
    W: Float[Tensor, "class feature"],
    H: Float[Tensor, "sample feature"],
    y: Integer[Tensor, " sample"],
    lam_w: float,
    lam_h: float,
    *,
    beta: float = 0.0,
    H0: Float[Tensor, "sample feature"] | None = None,
) -> Float[Tensor, ""]:
    """f = (|H W^T - Y|^2 + lam_h |H|^2 + beta |H - H0|^2) / 2N + lam_w |W|^2 / 2K; differentiable in W and H.

    Source: arXiv 2210.16658, equations 1 and 3. Raises `ConfigError` for a beta without H0.
    """
    if beta and H0 is None:
        raise ConfigError(f"beta is {beta:g} but there is no H0 to tie the features to")
    error = H @ W.T - one_hot(y, len(W), W.dtype)
    total = error.square().sum() + lam_h * H.square().sum()
    if H0 is not None:
        total = total + beta * (H - H0).square().sum()
    return total / (2 * len(H)) + lam_w / (2 * len(W)) * W.square().sum()


def optimal_head(
    H: Float[Tensor, "sample feature"], Y: Float[Tensor, "sample class"], lam_w: float
) -> Float[Tensor, "class feature"]:
    """W*(H) = Y^T H (H^T H + n lam_w I)^-1, n = N / K: ridge regression on targets Y, which need not be one-hot.

    `lam_w` = 0 gives the least-squares head of smallest norm (pseudo-inverse); differentiable otherwise.

    Source: arXiv 2210.16658, section 3. Raises `ConfigError` for a negative lam_w.
    """
    if not lam_w >= 0:
        raise ConfigError(f"optimal_head: lam_w is {lam_w:g}; give 0 or more")
    return ridge(Y.T @ H, H.T @ H, lam_w * Y.shape[0] / Y.shape[1])


def ridge(
    cross: Float[Tensor, "class feature"], gram: Float[Tensor, "feature feature"], penalty: float | Tensor
) -> Float[Tensor, "class feature"]:
    """cross (gram + penalty I)^-1."""
    if not isinstance(penalty, Tensor) and penalty == 0:
        return cross @ torch.linalg.pinv(gram, hermitian=True)
    factor = torch.linalg.cholesky(
        gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    return torch.cholesky_solve(cross.T, factor).T


def optimal_features(
    W: Float[Tensor, "class feature"],
    y: Integer[Tensor, " sample"],
    lam_h: float,
    beta: float,
    H0: Float[Tensor, "sample feature"],
) -> Float[Tensor, "sample feature"]:
    """H*(W) = (Y W + beta H0) (W^T W + (lam_h + beta) I)^-1: the other half of alternating minimisation."""
    check_penalties(1.0, lam_h, beta)
    return ridge(W[y.long()] + beta * H0, W.T @ W, lam_h + beta)


def central_path_loss(
    H: Float[Tensor, "sample feature"], y: Integer[Tensor, " sample"], lam_w: float, lam_h: float
) -> Float[Tensor, ""]:
    """L(H): the objective without a tie, its head minimised out."""
    W = optimal_head(H, one_hot(y, dtype=H.dtype), lam_w)
    return near_collapse_objective(W, H, y, lam_w, lam_h)


def central_path_gradient(
    H: Float[Tensor, "sample feature"], y: Integer[Tensor, " sample"], lam_w: float, lam_h: float
) -> Float[Tensor, "sample feature"]:
    """N times the gradient of L: (H W*^T - Y) W* + lam_h H. The flow is minus this.

    The head moves too, but at its optimum that changes nothing to first order (envelope theorem).
    """
    check_penalties(lam_w, lam_h)
    Y = one_hot(y, dtype=H.dtype)
    W = optimal_head(H, Y, lam_w)
    return (H @ W.T - Y) @ W + lam_h * H


class CollapsedMinimizer(NamedTuple):
    """A global minimiser of the objective without a tie; every rotation of the feature space gives another.

    `rho` is the squared length of each class mean, `c` = sqrt(lam_w lam_h); at c >= 1 everything is zero.
    """

    W: Float[Tensor, "class feature"]
    H: Float[Tensor, "sample feature"]
    y: Integer[Tensor, " sample"]
    rho: float
    c: float
    objective: float


def collapsed_minimizer(
    K: int,
    n: int,
    d: int,
    lam_w: float,
    lam_h: float,
    *,
    frame: Float[Tensor, "class feature"] | None = None,
    seed: int = 0,
) -> CollapsedMinimizer:
    """Theorem 2.1 for K classes of n samples in d >= K dimensions, in float64.

    h_{k,i} = sqrt(rho) r_k and w_k = sqrt(lam_h / lam_w) h_k with orthonormal r_k and
    rho = (1 - c) sqrt(lam_w / lam_h), so H W^T = (1 - c) Y and f = c - c^2 / 2. The r_k are the rows of `frame`, or
    uniformly random by `seed`. Centred means form a simplex equiangular tight frame.

    Source: arXiv 2210.16658, theorem 2.1; the value of f is derived. Raises `ConfigError` for d < K or lam_h = 0, where
    no minimum is attained.
    """
    check_penalties(lam_w, lam_h)
    if lam_h == 0:
        raise ConfigError(
            "lam_h is 0: features grow without end and no minimum is attained; give a positive one"
        )
    if min(K, n) < 1 or d < K:
        raise ConfigError(
            f"K = {K} classes of n = {n} in d = {d} dimensions; theorem 2.1 needs n >= 1 and d >= K >= 1"
        )
    if frame is None:
        gaussian = torch.randn(d, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        frame = torch.linalg.qr(gaussian).Q.T
    elif frame.shape != (K, d) or not torch.allclose(
        frame @ frame.T, torch.eye(K, dtype=frame.dtype, device=frame.device), atol=1e-6
    ):
        raise ConfigError(f"frame must have {K} orthonormal rows of length {d}")
    c = min(1.0, math.sqrt(lam_w * lam_h))
    rho = (1 - c) * math.sqrt(lam_w / lam_h)
    means = math.sqrt(rho) * frame
    y = torch.arange(K, device=frame.device).repeat_interleave(n)
    return CollapsedMinimizer(math.sqrt(lam_h / lam_w) * means, means[y], y, rho, c, c - c**2 / 2)


def unconstrained_penalties(K: int, n: int, lam_w: float, lam_h: float) -> tuple[float, float]:
    """The same penalties where both terms stand undivided, (l_W |W|^2 + l_H |H|^2) / 2, as in `nc-deep-linear`."""
    return lam_w / K, lam_h / (K * n)
