"""Neural collapse: how far features, their class means and a linear classifier are from folding into one frame.

Late in training the features of a class shrink to their mean (NC1), the means form a symmetric frame (NC2), the
classifier aligns with them (NC3) and decides like the nearest class mean (NC4). All metrics go to 0 at collapse.

Rows are samples, as everywhere in PyTorch: H is (sample, feature), W (class, feature) as in `torch.nn.Linear`. All is
computed in float64 whatever the input. `nc_metrics` does everything for arrays in memory; for a stream, accumulate
`ClassMoments` and hand them to `between_classes` and `nc_report`.

With mu_k the mean of class k, mu the global mean, N samples and K classes that were seen:
Sigma_W = (1/N) sum_i (h_i - mu_y(i)) (h_i - mu_y(i))^T and Sigma_B = sum_k p_k (mu_k - mu) (mu_k - mu)^T, where p_k = 1/K
(weights="uniform") or n_k/N ("sample"), and mu = mean of the class means (mean="class") or of the samples ("sample").
With "sample" for both, Sigma_W + Sigma_B is the covariance of all samples.

Source: Papyan, Han and Donoho (2020), arXiv 2008.08186, for NC1 to NC4; orthogonal frames with lengths (GOF) from Dang et
al. (2023), arXiv 2301.00437.

Differs from the usual scripts: NC1 inverts Sigma_B on the span of the centred means and never with a float32
pseudo-inverse, whose cut-off decides the result; total collapse is NaN with a reason, not 0; classes that were
never seen are left out instead of having mean 0.
"""

from uncollapse.measure.neural_collapse.frames import gof_frame, simplex_etf
from uncollapse.measure.neural_collapse.metrics import (
    nc1_pinv,
    nc1_quotient,
    nc2_equiangular,
    nc2_equinorm,
    nc2_etf,
    nc2_gof,
    nc2_of,
    nc3_dist,
    nc3_etf,
    nc3_gof,
    nc3_of,
    nc4,
)
from uncollapse.measure.neural_collapse.moments import (
    BetweenClasses,
    ClassMoments,
    between_classes,
    class_moments,
    variance_along,
)
from uncollapse.measure.neural_collapse.report import NCReport, nc_metrics, nc_report

__all__ = [
    "BetweenClasses",
    "ClassMoments",
    "NCReport",
    "between_classes",
    "class_moments",
    "gof_frame",
    "nc1_pinv",
    "nc1_quotient",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc2_etf",
    "nc2_gof",
    "nc2_of",
    "nc3_dist",
    "nc3_etf",
    "nc3_gof",
    "nc3_of",
    "nc4",
    "nc_metrics",
    "nc_report",
    "simplex_etf",
    "variance_along",
]
