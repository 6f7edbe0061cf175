"""Closed forms for squared error: general orthogonal frames without a bias, simplex ETF with one; any depth.

Derivation. Without a bias eliminate H: h_k = (W^T W + N lam_h I)^-1 W^T e_k. What remains,
(lam_h/2) sum_k n_k [(A + N lam_h I)^-1]_kk + M (lam_w/2) tr A^(1/M) with A = W W^T, is by Schur-Horn least at a diagonal A
ordered like n_k. With a_k = N lam_h x_k^M every class is alone: minimise 1/(x^M + 1) + c_k x over x >= 0, where
c_k = M N (N lam_w^M lam_h)^(1/M) / n_k, and lam_w is the geometric mean over the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.neural_collapse import simplex_etf
from uncollapse.representation.nc_deep_linear.problem import UFM, Factors, balanced_factors

_HALVINGS = 100


# ---- the scalar problem ----------------------------------------------------------------------------------------------


def scalar_cost_limit(depth: int) -> float:
    """Cost c below which x > 0 is better than 0: (M-1)^((M-1)/M) / M, that is 1, 1/2, 0.5291 for M = 1, 2, 3."""
    return float((depth - 1) ** ((depth - 1) / depth) / depth)


def scalar_minimum(
    c: Float[Tensor, "*batch"], depth: int
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Minimiser x >= 0 and minimum v of 1/(x^M + 1) + c x, for costs c > 0.

    x = 0 and v = 1 from c = `scalar_cost_limit` on; there x jumps to 0 from (M-1)^(1/M), without a jump for M = 1,
    where x = 1/sqrt(c) - 1.
    """
    c = c.double()
    x = _stationary(c, depth)
    x = torch.where(c < scalar_cost_limit(depth), x, 0.0)
    return x, 1 / (x**depth + 1) + c * x


def released_root(c: Float[Tensor, "*batch"], depth: int) -> Float[Tensor, "*batch"]:
    """What the released code takes for x: the largest root of c (x^M + 1)^2 = M x^(M-1), never compared with x = 0.

    For M >= 2 and c from `scalar_cost_limit` to max_x M x^(M-1)/(x^M + 1)^2 (0.5 to 0.6495 for M = 2) it is a
    stationary point with an objective above that of collapse.

    Source: Fsoft-AIC/Neural-Collapse-in-Deep-Linear-Networks, synthetic_experiment_imbalanced.py.

    Raises:
        DataError: no root, where the released code fails with `max([])`.
    """
    x = _stationary(c.double(), depth)
    if bool(x.isnan().any()):
        raise DataError(
            f"released_root: no stationary point for {int(x.isnan().sum())} of the costs; they collapse"
        )
    return x


def _stationary(c: Tensor, depth: int) -> Tensor:
    """Largest x with M x^(M-1)/(x^M + 1)^2 = c by bisection, NaN if there is none.

    The left side falls from its maximum at ((M-1)/(M+1))^(1/M) on, and is below M x^-(M+1).
    """

    def slope(x: Tensor) -> Tensor:
        return depth * x ** (depth - 1) / (x**depth + 1) ** 2

    low = torch.full_like(c, ((depth - 1) / (depth + 1)) ** (1 / depth))
    high = torch.maximum((depth / c) ** (1 / (depth + 1)), low)
    exists = slope(low) >= c
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = slope(middle) > c
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(exists, (low + high) / 2, torch.nan)


# ---- minimisers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UFMSolution:
    """A global minimum of squared error, up to rotations of features and hidden layers; float64.

    Attributes:
        x: solution of the scalar problem, by class (with a bias: by direction), 0 where collapsed.
        sv2: squared singular values of W_1 to W_M, same columns as x.
        gram_w: W W^T of the whole head W = W_M ... W_1.
        gram_h: inner products of the class means; all samples of a class are at its mean.
        logits: row k is what class k gets, without bias.
        bias: 1/K with a bias, else None.
        objective: minimum of f.
        collapsed: classes whose features and weights are 0 (with a bias: all or none).
        unique: whether the Gram matrices are the same at all minima. Not if the rank cuts through equal classes.
    """

    problem: UFM
    x: Float[Tensor, " class"]
    sv2: Float[Tensor, "layer class"]
    gram_w: Float[Tensor, "class class"]
    gram_h: Float[Tensor, "class class"]
    logits: Float[Tensor, "class class"]
    bias: Float[Tensor, " class"] | None
    objective: float
    collapsed: Bool[Tensor, " class"]
    unique: bool

    @property
    def h_norm2(self) -> Float[Tensor, " class"]:
        """Squared lengths of the class means."""
        return self.gram_h.diagonal()

    @property
    def w_norm2(self) -> Float[Tensor, " class"]:
        """Squared lengths of the rows of the head."""
        return self.gram_w.diagonal()

    @property
    def z_diag(self) -> Float[Tensor, " class"]:
        """What every class gets for itself, without bias; x^M/(x^M + 1) without a bias."""
        return self.logits.diagonal()

    def factors(self, widths: Sequence[int], generator: torch.Generator | None = None) -> Factors:
        """A minimiser with these widths, see `balanced_factors`."""
        return balanced_factors(self.problem, self.logits, widths, bias=self.bias, generator=generator)


def ufm_mse_minimizer(
    n_per_class: Sequence[int],
    depth: int,
    lam_w: float | Sequence[float],
    lam_h: float,
    width: int | None = None,
    bias: bool = False,
) -> UFMSolution:
    """Global minimum of squared error.

    Without a bias, any class sizes: a general orthogonal frame. Of the R = min(K, width) largest classes those with
    c_k < `scalar_cost_limit` survive: W W^T = diag(a), |h_k|^2 = a_k/(a_k + N lam_h)^2, W h_k = a_k/(a_k + N lam_h) e_k with
    a_k = N lam_h x_k^M; f* = (1/2N) sum_k n_k min(1, v(c_k)). Large classes have longer w and shorter h.

    With a bias, equal class sizes only: b = 1/K and the simplex ETF W W^T = a (I - 11^T/K) with the same a,
    f* = ((K-1)/2K) v(c); of lower rank if width < K - 1.

    Args:
        lam_w: one penalty for all layers, or one for each.
        width: the smallest of features and hidden widths; None: wide enough.
        bias: whether there is a bias, without penalty.

    Raises:
        ConfigError: as `UFM.make`; a width below 1; a bias with unequal classes, for which no closed form is known
            (`minimize_ufm` finds it).

    Source: Dang et al. (2023), arXiv 2301.00437, for M layers; derived anew in the head of this module.
    """
    problem = UFM.make(n_per_class, depth, lam_w, lam_h)
    if width is not None and width < 1:
        raise ConfigError(f"ufm_mse_minimizer: width is {width}; give at least 1")
    rank = min(problem.classes, width or problem.classes)
    return _etf_solution(problem, rank) if bias else _gof_solution(problem, rank)


def class_costs(problem: UFM) -> Float[Tensor, " class"]:
    """c_k = M N (N lam_w^M lam_h)^(1/M) / n_k: what a class pays per unit of x; it survives below `scalar_cost_limit`."""
    depth, samples = problem.depth, problem.samples
    scale = depth * samples * (samples * problem.lam**depth * problem.lam_h) ** (1 / depth)
    return scale / torch.tensor(problem.counts, dtype=torch.float64)


def minority_collapse_threshold(samples: int, lam_w: float, lam_h: float, depth: int = 1) -> float:
    """Class size at and below which a class vanishes: N^2 lam_w lam_h for depth 1, and for squared error
    M^2 N (N lam_w^M lam_h)^(1/M) / (M-1)^((M-1)/M) in general. `samples` is N, all classes together.

    For cross-entropy and depth 1 the same number is where groups of equal small classes become one, not zero.
    """
    scale = depth * samples * (samples * lam_w**depth * lam_h) ** (1 / depth)
    return scale / scalar_cost_limit(depth)


def _gof_solution(problem: UFM, rank: int) -> UFMSolution:
    costs = class_costs(problem)
    x, v = scalar_minimum(costs, problem.depth)
    order = costs.argsort(stable=True)
    in_rank = torch.zeros(problem.classes, dtype=torch.bool)
    in_rank[order[:rank]] = True
    cut = rank < problem.classes and bool(
        (costs[order[rank - 1]] == costs[order[rank]]) & (x[order[rank]] > 0)
    )
    x, v = torch.where(in_rank, x, 0.0), torch.where(in_rank, v, 1.0)
    counts = torch.tensor(problem.counts, dtype=torch.float64)
    return _solution(
        problem, x, torch.eye(problem.classes, dtype=torch.float64), (counts * v).sum() / (2 * problem.samples),
        bias=None, collapsed=x == 0, unique=not cut,
    )  # fmt: skip


def _etf_solution(problem: UFM, rank: int) -> UFMSolution:
    if len(set(problem.counts)) > 1:
        raise ConfigError(
            "ufm_mse_minimizer: with a bias the classes must be equally large; for others use minimize_ufm"
        )
    classes = problem.classes
    found = min(rank, classes - 1)
    x, v = scalar_minimum(class_costs(problem), problem.depth)
    frame = (
        simplex_etf(classes, classes - 1) * ((classes - 1) / classes) ** 0.5
    )  # orthonormal basis of 1-perp
    minimum = (found * v[0] + (classes - 1 - found)) / (2 * classes)
    alive = torch.arange(classes) < found
    basis = torch.cat([frame, frame.new_zeros(classes, 1)], 1)
    return _solution(
        problem, torch.where(alive, x, 0.0), basis, minimum,
        bias=frame.new_full((classes,), 1 / classes), collapsed=x == 0,
        unique=found == classes - 1 or bool(x[0] == 0),
    )  # fmt: skip


def _solution(
    problem: UFM,
    x: Tensor,
    basis: Tensor,
    minimum: Tensor,
    *,
    bias: Tensor | None,
    collapsed: Tensor,
    unique: bool,
) -> UFMSolution:
    """Grams and logits from x along an orthonormal basis (columns) of the class space."""
    ridge = problem.samples * problem.lam_h
    a = ridge * x**problem.depth
    share = torch.tensor([problem.lam / lam for lam in problem.lam_w], dtype=torch.float64)

    def along(values: Tensor) -> Tensor:
        return (basis * values) @ basis.T

    return UFMSolution(
        problem=problem,
        x=x,
        sv2=share[:, None] * ridge ** (1 / problem.depth) * x,
        gram_w=along(a),
        gram_h=along(a / (a + ridge) ** 2),
        logits=along(a / (a + ridge)),
        bias=bias,
        objective=float(minimum),
        collapsed=collapsed,
        unique=unique,
    )
