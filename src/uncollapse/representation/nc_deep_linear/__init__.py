"""Neural collapse with free features and a linear head of any depth: global minima in closed form, and solvers.

An oracle for metrics of neural collapse and for training code: it says which frame, of which lengths, regularised
training ends in, and which classes are too small to survive. `mse`: any class sizes and depth without bias (general
orthogonal frames), equal classes with bias (simplex ETF). `ce`: one layer, equal classes in closed form, any by a
convex program with a proof of optimality. `schatten`: deep heads, where the ETF is *not* optimal. `solver`: L-BFGS over factors.

Paper: Dang, Tran, Osher, Tran-The, Ho and Nguyen, "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced
Data", ICML 2023, arXiv 2301.00437. Official code: Fsoft-AIC/Neural-Collapse-in-Deep-Linear-Networks.

Of the paper's: the model, the scalar equation, orthogonal frames with class-dependent lengths. Derived here, since the
theorems were not at hand: minimum values, thresholds, spectra, the convex program and its dual bound.

Differs from the paper / the official code:
- The official solver takes the largest root of the stationarity equation and never compares it with collapse, so for
  M >= 2 it returns a point that is not the minimum in a window of penalties, and fails beyond; `released_root` is that.
- The paper names the simplex ETF for cross-entropy at any depth; for K >= 4 and M >= 3, and K >= 6 and M = 2, other
  logits are better. `ufm_ce_minimizer_balanced` is for one layer only, `schatten_objective` compares for more.
- Rows are samples, as in PyTorch; the paper's matrices are the transposes.
- Metrics are in `uncollapse.measure.neural_collapse`: means are centred by the mean of class means by default, where the
  official ones for unequal classes take the mean of samples (`mean="sample"`) and a float32 pseudo-inverse.
"""

from uncollapse.representation.nc_deep_linear.ce import (
    CESolution,
    ce_margin,
    ufm_ce_convex,
    ufm_ce_minimizer_balanced,
)
from uncollapse.representation.nc_deep_linear.mse import (
    UFMSolution,
    class_costs,
    minority_collapse_threshold,
    released_root,
    scalar_cost_limit,
    scalar_minimum,
    ufm_mse_minimizer,
)
from uncollapse.representation.nc_deep_linear.problem import (
    UFM,
    Factors,
    balanced_factors,
    cross_entropy,
    squared_error,
)
from uncollapse.representation.nc_deep_linear.schatten import (
    ScaledLogits,
    best_scale,
    circulant_logits,
    etf_logits,
    paired_logits,
    schatten_objective,
    schatten_penalty,
)
from uncollapse.representation.nc_deep_linear.solver import (
    Minimum,
    descend,
    initial_factors,
    minimize_ufm,
)

__all__ = [
    "UFM",
    "CESolution",
    "Factors",
    "Minimum",
    "ScaledLogits",
    "UFMSolution",
    "balanced_factors",
    "best_scale",
    "ce_margin",
    "circulant_logits",
    "class_costs",
    "cross_entropy",
    "descend",
    "etf_logits",
    "initial_factors",
    "minimize_ufm",
    "minority_collapse_threshold",
    "paired_logits",
    "released_root",
    "scalar_cost_limit",
    "scalar_minimum",
    "schatten_objective",
    "schatten_penalty",
    "squared_error",
    "ufm_ce_convex",
    "ufm_ce_minimizer_balanced",
    "ufm_mse_minimizer",
]
