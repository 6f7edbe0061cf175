"""Near-collapse: features tied to a predefined feature matrix, and how far from collapse that leaves them.

Unconstrained features collapse exactly; those of a real network stop short. Here the features H are pulled to given ones H0,
those of a shallower layer, by beta / 2N |H - H0|^2, where 1/beta stands for what the layers in between can do:

    f(W, H; H0) = |H W^T - Y|^2 / 2N + lam_w |W|^2 / 2K + lam_h |H|^2 / 2N + beta |H - H0|^2 / 2N,    N = K n

For large beta the minimiser is one implicit step of a gradient flow from H0, along which within-class variability
strictly falls: collapse grows through depth. Near exact collapse the map dH0 -> dH is linear, with a spectrum in closed form.

Paper: Tirer, Huang and Niles-Weed, "Perturbation Analysis of Neural Collapse", ICML 2023, arXiv 2210.16658. There is no official code.

Rows of H are samples and rows of W classes, as in PyTorch; the paper has columns. All penalties are those of the formula
above: `unconstrained_penalties` converts them to the ones of `nc-deep-linear`, which stand undivided.

Differs from the paper:
- The theorems want K balanced classes; everything here also runs on unbalanced ones, n = N / K, without their guarantees.
- Flow and implicit steps act on counts, means and pooled scatter of the classes, which is exact and free of N.
- The linear response is applied, never formed; its spectrum at H0 = H* is complete and exact in beta, where the paper gives
  the extreme singular values for large beta.
- The minimiser is found by Newton steps with exact alternation as the fallback; a saddle (H0 = 0) is noticed and left.
- `effective_step` and `predict_layerwise_nc1`, which read a real network's layers as implicit steps, are ours and experimental.
"""

from uncollapse.representation.nc_perturbation.flow import CentralPath, central_path_flow
from uncollapse.representation.nc_perturbation.layers import (
    LayerwiseNC1,
    effective_step,
    predict_layerwise_nc1,
)
from uncollapse.representation.nc_perturbation.moments import PooledMoments, one_hot, pooled_moments
from uncollapse.representation.nc_perturbation.objective import (
    CollapsedMinimizer,
    central_path_gradient,
    central_path_loss,
    collapsed_minimizer,
    near_collapse_objective,
    optimal_features,
    optimal_head,
    unconstrained_penalties,
)
from uncollapse.representation.nc_perturbation.proximal import proximal_features, proximal_moments
from uncollapse.representation.nc_perturbation.response import LinearResponse, linear_response
from uncollapse.representation.nc_perturbation.spectrum import (
    Mode,
    NearCollapseSpectrum,
    near_collapse_spectrum,
)

__all__ = [
    "CentralPath",
    "CollapsedMinimizer",
    "LayerwiseNC1",
    "LinearResponse",
    "Mode",
    "NearCollapseSpectrum",
    "PooledMoments",
    "central_path_flow",
    "central_path_gradient",
    "central_path_loss",
    "collapsed_minimizer",
    "effective_step",
    "linear_response",
    "near_collapse_objective",
    "near_collapse_spectrum",
    "one_hot",
    "optimal_features",
    "optimal_head",
    "pooled_moments",
    "predict_layerwise_nc1",
    "proximal_features",
    "proximal_moments",
    "unconstrained_penalties",
]
