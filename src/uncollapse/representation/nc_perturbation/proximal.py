"""Features tied to others: the minimiser of the tied objective, one implicit step of the central path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from uncollapse.errors import DataError
from uncollapse.representation.nc_perturbation.moments import PooledMoments, check_penalties, pooled_moments
from uncollapse.representation.nc_perturbation.objective import optimal_features, ridge
from uncollapse.representation.nc_perturbation.response import HeadHessian


@dataclass(frozen=True)
class TiedPoint:
    """A head, the features that are optimal given it, and what the tied objective looks like there.

    `value` is N times the objective, `gradient` N times its gradient in W once the features are minimised out.
    """

    W: Float[Tensor, "class feature"]
    moments: PooledMoments
    value: Float[Tensor, ""]
    gradient: Float[Tensor, "class feature"]
    hessian: HeadHessian

    @classmethod
    def at(
        cls,
        W: Float[Tensor, "class feature"],
        tied_to: PooledMoments,
        lam_w: float,
        lam_h: float,
        beta: float,
    ) -> TiedPoint:
        """H = (Y W + beta H0) A, on moments."""
        d = W.shape[1]
        identity = torch.eye(d, dtype=W.dtype, device=W.device)
        shrink = torch.cholesky_inverse(torch.linalg.cholesky(W.T @ W + (lam_h + beta) * identity))
        linear = beta * shrink
        now = tied_to.moved(linear, (W + beta * tied_to.means) @ shrink)
        penalty = lam_w * now.samples / len(W)
        miss = now.means @ W.T - torch.eye(len(W), dtype=W.dtype, device=W.device)
        cross = W @ now.scatter + miss.T @ now.sums
        error = W @ now.scatter @ W.T + miss.T @ (now.counts[:, None] * miss)
        away = linear - identity
        moved = (now.means - tied_to.means).square().sum(1) @ now.counts
        distance = (away.T @ tied_to.scatter @ away).trace() + moved
        value = error.trace() + penalty * W.square().sum() + lam_h * now.gram.trace() + beta * distance
        hessian = HeadHessian(W, now.gram, cross, error, shrink, penalty)
        return cls(W, now, value / 2, cross + penalty * W, hessian)


def proximal_moments(
    tied_to: PooledMoments,
    lam_w: float,
    lam_h: float,
    beta: float,
    *,
    tolerance: float = 1e-12,
    max_steps: int = 10_000,
    seed: int = 0,
) -> TiedPoint:
    """`proximal_features` on moments: the same minimiser at a cost that the number of samples does not enter."""
    check_penalties(lam_w, lam_h, beta)
    penalty = lam_w * tied_to.samples / len(tied_to.counts)
    generator = torch.Generator().manual_seed(seed)
    at = TiedPoint.at(ridge(tied_to.sums, tied_to.gram, penalty), tied_to, lam_w, lam_h, beta)
    damping = 0.0
    for _ in range(max_steps):
        if at.gradient.norm() <= tolerance * at.moments.sums.norm():
            lower = _past_a_saddle(at, tied_to, lam_w, lam_h, beta, generator)
            if lower is None:
                return at
            at = lower
            continue
        step, bad = at.hessian.solve(-at.gradient, damping)
        trial = None if bad is not None else TiedPoint.at(at.W + step, tied_to, lam_w, lam_h, beta)
        if trial is not None and trial.value <= at.value * (1 + 1e-14):
            at, damping = trial, damping / 8 if damping > 1e-4 else 0.0
        elif damping < 1:
            damping = max(4 * damping, 1e-3)
        else:  # the exact alternation, which cannot fail
            head = ridge(at.moments.sums, at.moments.gram, at.hessian.penalty)
            at = TiedPoint.at(head, tied_to, lam_w, lam_h, beta)
    raise DataError(
        f"proximal_features: gradient {float(at.gradient.norm()):.1e} after {max_steps} steps; raise beta"
    )


def _past_a_saddle(
    at: TiedPoint, tied_to: PooledMoments, lam_w: float, lam_h: float, beta: float, generator: torch.Generator
) -> TiedPoint | None:
    """From a stationary point downhill along a direction of negative curvature; None if there is none."""
    probe = torch.randn(at.W.shape, generator=generator, dtype=at.W.dtype).to(at.W.device)
    direction = at.hessian.solve(probe)[1]
    if direction is None:
        return None
    curvature = (direction * at.hessian.apply(direction)).sum()
    if curvature > -1e-9 * (direction * at.hessian.majorant(direction)).sum():
        return None  # flat, such as a rotation of features that are tied to nothing
    step = direction / direction.norm() * len(at.W) ** 0.5
    trials = [TiedPoint.at(at.W + step / 2**k, tied_to, lam_w, lam_h, beta) for k in range(40)]
    best = min(trials, key=lambda point: float(point.value))
    return best if best.value < at.value * (1 - 1e-12) else None


def proximal_features(
    H0: Float[Tensor, "sample feature"],
    y: Integer[Tensor, " sample"],
    lam_w: float,
    lam_h: float,
    beta: float,
    *,
    num_classes: int | None = None,
    tolerance: float = 1e-12,
    max_steps: int = 10_000,
    seed: int = 0,
) -> tuple[Float[Tensor, "class feature"], Float[Tensor, "sample feature"]]:
    """(W, H_{1/beta}): the minimiser of the objective whose features are tied to H0 by beta / 2N |H - H0|^2.

    Starts at W*(H0). Newton steps for the head, features minimised out, damped where they would not lower the objective
    (Levenberg-Marquardt) down to an exact alternating minimisation, which always does. Ends when the gradient is `tolerance` times |Y^T H|; a stationary point that is a saddle
    (H0 = 0) is left along a direction that `seed` decides. For small beta there may be other minima.

    Source: arXiv 2210.16658, equation 3 and section 3; the solver is ours. Raises `ConfigError` for penalties that the
    theorems exclude, `DataError` for unusable features or if `max_steps` do not suffice.
    """
    at = proximal_moments(
        pooled_moments(H0, y, num_classes),
        lam_w,
        lam_h,
        beta,
        tolerance=tolerance,
        max_steps=max_steps,
        seed=seed,
    )
    return at.W.to(H0.dtype), optimal_features(at.W, y, lam_h, beta, H0.detach().double()).to(H0.dtype)
