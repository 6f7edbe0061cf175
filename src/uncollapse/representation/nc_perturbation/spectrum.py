"""The spectrum of the linear response around exact collapse, in closed form (theorem 4.2, completed).

At H0 = H* the minimiser is H* for every beta, so F = beta (S0 + beta I)^-1 with S0, the Hessian of L at H*, free of beta:
every eigenvalue is beta / (beta + mu), 1 - mu / beta for large beta. S0 has four eigenvalues mu, c = sqrt(lam_w lam_h):

    deviations from the class mean inside the span of the means      sqrt(lam_h / lam_w)      K^2 (n - 1) of them
    deviations from the class mean orthogonal to that span           lam_h                    K (d - K) (n - 1)
    the K means stretched, inside their span, by a symmetric map     4 lam_h (1 - c)          K (K + 1) / 2
    the K means rotated, in the span or out of it                    0                        K (K - 1) / 2 + K (d - K)

So lam_h damps deviations inside classes, lam_w only those that the head can see; and means only respond to being
stretched. A diagonal block F_kk sees "class k moves towards mean j" as half a stretch, half a rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uncollapse.errors import ConfigError
from uncollapse.representation.nc_perturbation.moments import check_penalties


@dataclass(frozen=True)
class Mode:
    """One eigenvalue: exactly, to first order in 1/beta, and how often it occurs."""

    name: str
    exact: float
    large_beta: float
    multiplicity: int


@dataclass(frozen=True)
class NearCollapseSpectrum:
    """Eigenvalues of all of F (`full`, N d of them) and of its diagonal blocks F_kk (`block`, n d each).

    F is symmetric and positive, so these are its singular values. Off-diagonal blocks F_kj have rank one, with the
    singular value of `off_block` (whose multiplicity is 1).
    """

    full: tuple[Mode, ...]
    block: tuple[Mode, ...]
    off_block: Mode


def near_collapse_spectrum(
    K: int, n: int, d: int, lam_w: float, lam_h: float, beta: float
) -> NearCollapseSpectrum:
    """Spectrum of F at H0 = H* for K balanced classes of n samples in d >= K dimensions.

    Source: arXiv 2210.16658, theorem 4.2 (largest, smallest and off-diagonal singular values for large beta); all else is
    derived. Raises `ConfigError` outside lam_h > 0, lam_w lam_h < 1, d >= K.
    """
    check_penalties(lam_w, lam_h, beta)
    c = math.sqrt(lam_w * lam_h)
    if not 0 < c < 1:
        raise ConfigError(
            f"sqrt(lam_w lam_h) is {c:g}; near-collapse needs it above 0 (a minimum) and below 1 (not all zero)"
        )
    if min(K, n) < 1 or d < K:
        raise ConfigError(
            f"K = {K} classes of n = {n} in d = {d} dimensions; theorem 4.2 needs n >= 1 and d >= K >= 1"
        )
    stretch = 4 * lam_h * (1 - c)

    def mode(name: str, mu: float, multiplicity: int, share: float = 1.0) -> Mode:
        # `share` of the way from the eigenvalue 1 of a rotation to that of the deformation
        return Mode(name, 1 - share * mu / (beta + mu), 1 - share * mu / beta, multiplicity)

    seen, hidden = math.sqrt(lam_h / lam_w), lam_h
    return NearCollapseSpectrum(
        full=(
            mode("within class, in span", seen, K * K * (n - 1)),
            mode("within class, out of span", hidden, K * (d - K) * (n - 1)),
            mode("means stretched", stretch, K * (K + 1) // 2),
            mode("means rotated", 0.0, K * (K - 1) // 2 + K * (d - K)),
        ),
        block=(
            mode("within class, in span", seen, K * (n - 1)),
            mode("within class, out of span", hidden, (d - K) * (n - 1)),
            mode("mean along itself", stretch, 1),
            mode("mean towards another", stretch, K - 1, share=0.5),
            mode("mean out of span", 0.0, d - K),
        ),
        off_block=Mode("mean to mean", 0.5 * stretch / (beta + stretch), 0.5 * stretch / beta, 1),
    )
