"""Cross-entropy with one linear layer: closed form for equal classes, a convex program for any.

For M = 1 and d >= K the problem over factors equals min_Z CE(Z) + sqrt(lam_w lam_h) |Z|_* over logits, nuclear norm of the
(sample, class) matrix. By convexity all samples of a class share a row, so K x K unknowns are left. For heads with M >= 2
layers no such equivalence holds and the simplex ETF need not be optimal: see `schatten`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.nc_deep_linear.problem import UFM, Factors, balanced_factors


@dataclass(frozen=True)
class CESolution:
    """A global minimum of cross-entropy with one layer, up to rotations of the features; float64.

    Attributes:
        logits: row k is what class k gets, up to a constant per row.
        gram_w: W W^T.
        gram_h: inner products of the class means; all samples of a class are at its mean.
        objective: f, nats.
        gap: objective minus a proven lower bound of the minimum; 0 for closed forms.
    """

    problem: UFM
    logits: Float[Tensor, "class class"]
    gram_w: Float[Tensor, "class class"]
    gram_h: Float[Tensor, "class class"]
    objective: float
    gap: float = 0.0

    def factors(self, width: int, generator: torch.Generator | None = None) -> Factors:
        """A minimiser with this many features, see `balanced_factors`."""
        return balanced_factors(self.problem, self.logits, [width], generator=generator)


def ce_margin(classes: int, n: int, lam_w: float, lam_h: float) -> float:
    """g = ln(1/q - K + 1), q = sqrt(n lam_w lam_h): logit of a class less that of any other; 0 from q >= 1/K on."""
    q = math.sqrt(n * lam_w * lam_h)
    return math.log(1 / q - classes + 1) if q * classes < 1 else 0.0


def ufm_ce_minimizer_balanced(
    n: int, classes: int, lam_w: float, lam_h: float, width: int | None = None
) -> CESolution:
    """Global minimum for K classes of n samples and one layer: the simplex ETF Z = g (I - 11^T/K), or 0 if q >= 1/K.

    W W^T = sqrt(lam_h n / lam_w) g (I - 11^T/K), class means sqrt(lam_w / (lam_h n)) g (I - 11^T/K),
    f* = ln(1 + (K-1) e^-g) + q (K-1) g. With or without a bias, which is constant.

    Raises:
        ConfigError: as `UFM.make`; fewer than K - 1 features (`width`), where no simplex fits.
    """
    problem = UFM.make([n] * classes, 1, lam_w, lam_h)
    if width is not None and width < classes - 1:
        raise ConfigError(
            f"ufm_ce_minimizer_balanced: {classes} classes need {classes - 1} features, not {width}"
        )
    g, q = ce_margin(classes, n, lam_w, lam_h), math.sqrt(n * lam_w * lam_h)
    frame = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return CESolution(
        problem=problem,
        logits=g * frame,
        gram_w=math.sqrt(lam_h * n / lam_w) * g * frame,
        gram_h=math.sqrt(lam_w / (lam_h * n)) * g * frame,
        objective=math.log1p((classes - 1) * math.exp(-g)) + q * (classes - 1) * g,
    )


def ufm_ce_convex(
    n_per_class: Sequence[int],
    lam_w: float,
    lam_h: float,
    *,
    tolerance: float = 1e-12,
    max_iterations: int = 200_000,
) -> CESolution:
    """Global minimum for any class sizes and one layer of at least K features, with a proof of how close it is.

    Accelerated proximal gradient (restarted where it stops descending) on X = diag(sqrt n) Z, whose singular values are
    shrunk. For q_k = theta p_k + (1 - theta) e_k, theta the largest factor <= 1 at which the scaled gradient has
    spectral norm at most sqrt(lam_w lam_h), sum_k (n_k/N) H(q_k) is a lower bound of the minimum (Fenchel).

    Groups of equally small classes get one common row of W iff n <= N^2 lam_w lam_h (minority collapse), which is
    not zero, unlike that of squared error.

    Raises:
        ConfigError: as `UFM.make`.
        DataError: the gap is above `tolerance` (nats) after `max_iterations`.
    """
    problem = UFM.make(n_per_class, 1, lam_w, lam_h)
    counts = torch.tensor(problem.counts, dtype=torch.float64)
    share, root = counts / problem.samples, counts.sqrt()[:, None]
    tau, step = math.sqrt(lam_w * lam_h), 2.0 * problem.samples
    target = torch.eye(problem.classes, dtype=torch.float64)

    def value(point: Tensor, values: Tensor) -> Tensor:
        z = point / root
        return share @ (z.logsumexp(1) - z.diagonal()) + tau * values.sum()

    x = torch.zeros_like(target)
    ahead, momentum, best, gap = x, 1.0, math.inf, math.inf
    for iteration in range(max_iterations):
        residual = (ahead / root).softmax(1) - target
        left, values, right = torch.linalg.svd(ahead - step * root * residual / problem.samples)
        values = (values - step * tau).clamp(min=0)
        new = (left * values) @ right
        objective = float(value(new, values))
        if objective > best + 1e-16:
            ahead, momentum, best = x, 1.0, math.inf
            continue
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead, x, best = new + (momentum - 1) / following * (new - x), new, objective
        momentum = following
        if iteration % 10 == 0:
            gap = objective - _lower_bound(x, root, share, tau)
            if gap <= tolerance:
                return _from_logits(problem, x, root, objective, gap)
    raise DataError(
        f"ufm_ce_convex: gap {gap:.1e} after {max_iterations} iterations, wanted {tolerance:.1e}; allow more of either"
    )


def _lower_bound(x: Tensor, root: Tensor, share: Tensor, tau: float) -> float:
    """Entropy of the feasible dual point next to x."""
    eye = torch.eye(len(x), dtype=x.dtype)
    p = (x / root).softmax(1)
    norm = torch.linalg.matrix_norm(share[:, None] / root * (p - eye), 2)
    theta = (tau / norm.clamp(min=1e-300)).clamp(max=1)
    return float(share @ torch.special.entr(theta * p + (1 - theta) * eye).sum(1))


def _from_logits(problem: UFM, x: Tensor, root: Tensor, objective: float, gap: float) -> CESolution:
    left, values, right = torch.linalg.svd(x)
    ratio = math.sqrt(problem.lam_h / problem.lam_w[0])
    means = left / root
    return CESolution(
        problem=problem,
        logits=x / root,
        gram_w=ratio * (right.T * values) @ right,
        gram_h=(means * values) @ means.T / ratio,
        objective=objective,
        gap=gap,
    )
