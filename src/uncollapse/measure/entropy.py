"""Entropies of distributions, counts, samples and matrices, in nats.

Families (Shannon, Renyi, Tsallis, collision) take the probabilities or the logits of their last axis; both are
differentiable by autograd wherever no probability is 0. Estimators take what was observed: counts or a sample.

Differs from the paper: none known. Conventions: 0 log 0 = 0; probabilities are checked, not renormalised.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Num
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.precision import at_least_float32


def shannon_entropy(probs: Float[Tensor, "*batch sample"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy H = -sum p log p over the last axis; 0 <= H <= log K nats.

    Raises:
        DataError: a row is no distribution (negative or NaN entry, sum off by more than rounding).
    """
    out: Tensor = torch.special.entr(_checked(probs)).sum(-1)
    return out


def shannon_entropy_from_logits(logits: Float[Tensor, "*batch sample"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of softmax(logits); -inf excludes an entry. Half precision is computed in float32.

    Holds a few tensors of the size of `logits`; for a vocabulary use `uncollapse.measure.token_stats`.
    """
    return _shannon(_log_softmax(logits))


def renyi_entropy(probs: Float[Tensor, "*batch sample"], *, order: float) -> Float[Tensor, "*batch"]:
    """Renyi entropy H_a = log(sum p^a) / (1 - a), in nats; 0 <= H_a <= log K and decreasing in the order a.

    Limits are exact: order 0 is the log of the number of non-zero entries (Hartley), 1 Shannon, inf
    -log max p (min-entropy); order 2 is the collision entropy.

    Raises:
        ConfigError: order negative or NaN.
        DataError: a row is no distribution.
    """
    return _renyi(_log(_checked(probs)), order)


def renyi_entropy_from_logits(
    logits: Float[Tensor, "*batch sample"], *, order: float
) -> Float[Tensor, "*batch"]:
    """Renyi entropy of softmax(logits), without underflow; see `renyi_entropy`."""
    return _renyi(_log_softmax(logits), order)


def tsallis_entropy(probs: Float[Tensor, "*batch sample"], *, order: float) -> Float[Tensor, "*batch"]:
    """Tsallis entropy S_q = (1 - sum p^q) / (q - 1); q = 1 is Shannon (nats), q = 2 the Gini impurity.

    0 <= S_q <= (1 - K^(1-q)) / (q - 1). Not additive, hence no unit of information.

    Raises:
        ConfigError: order negative, NaN or infinite.
        DataError: a row is no distribution.
    """
    return _tsallis(_log(_checked(probs)), order)


def tsallis_entropy_from_logits(
    logits: Float[Tensor, "*batch sample"], *, order: float
) -> Float[Tensor, "*batch"]:
    """Tsallis entropy of softmax(logits); see `tsallis_entropy`."""
    return _tsallis(_log_softmax(logits), order)


def collision_probability(probs: Float[Tensor, "*batch sample"]) -> Float[Tensor, "*batch"]:
    """Probability sum p^2 that two independent draws agree; exp(-Renyi entropy of order 2), 1/K to 1.

    Raises:
        DataError: a row is no distribution.
    """
    return _checked(probs).square().sum(-1)


def entropy_from_counts(counts: Num[Tensor, "*batch sample"], *, estimator: str = "miller-madow") -> Tensor:
    """Shannon entropy (nats, float64) of the distribution that produced these counts.

    `plug-in` is the entropy of the observed frequencies. It is biased low, to first order by (K - 1) / 2n for K
    occupied cells and n draws. `miller-madow` (default) adds that term with K the *observed* number of cells: better,
    still low while cells are unseen, and able to exceed log(number of cells). With n of the order of K or less
    neither can be trusted. All-zero rows give NaN: nothing was observed.

    Args:
        counts: non-negative whole numbers, shape (..., cells).
        estimator: "plug-in" or "miller-madow".

    Raises:
        ConfigError: unknown estimator.
        DataError: negative or non-finite counts.

    Source: Miller (1955), note on the bias of information estimates.
    """
    if estimator not in ("plug-in", "miller-madow"):
        raise ConfigError(
            f"entropy_from_counts: estimator is {estimator!r}; give 'plug-in' or 'miller-madow'"
        )
    table = counts.double()
    if not bool((table.isfinite() & (table >= 0)).all()):
        raise DataError("entropy_from_counts: counts must be finite and not negative")
    total = table.sum(-1)
    plug_in: Tensor = torch.special.entr(table / total.unsqueeze(-1)).sum(-1)
    if estimator == "plug-in":
        return plug_in
    return plug_in + ((table > 0).sum(-1) - 1) / (2 * total)


def gaussian_entropy(covariance: Float[Tensor, "*batch feature feature"]) -> Float[Tensor, "*batch"]:
    """Differential entropy (nats) of a Gaussian: (d log(2 pi e) + log det covariance) / 2; -inf if singular.

    Negative values are possible, and rescaling the data shifts it: compare only in the same units.

    Raises:
        DataError: a matrix is not symmetric positive semi-definite.
    """
    values = _spectrum(covariance, "gaussian_entropy: covariance")
    d = covariance.shape[-1]
    floor = values.amax(-1, keepdim=True) * d * torch.finfo(values.dtype).eps
    logdet = torch.where(values > floor, values, 0).log().sum(-1)
    return 0.5 * (d * math.log(2 * math.pi * math.e) + logdet)


def knn_entropy(samples: Float[np.ndarray, "sample feature"], *, neighbors: int = 3) -> float:
    """Kozachenko-Leonenko estimate of the differential entropy (nats) of the density behind a sample.

    H = psi(n) - psi(k) + log c_d + d mean(log r_k), with r_k the Euclidean distance to the k-th neighbour and c_d the
    volume of the unit ball. Consistent for smooth densities; the bias grows with d (useless beyond about 10
    dimensions at usual sample sizes), and columns of very different scale should be standardised first, adding
    back the logs of their scales. Repeated points (distance 0) give -inf: the sample is then not continuous.

    Args:
        samples: (sample, feature), finite.
        neighbors: k, default 3: Kraskov et al. (2004) recommend 2 to 4.

    Raises:
        ConfigError: neighbors not in 1..n-1.
        DataError: NaN or inf.

    Source: Kozachenko and Leonenko (1987); psi(n) - psi(k) as in Kraskov et al. (2004), eq. 20.
    """
    n, d = samples.shape
    if not 1 <= neighbors < n:
        raise ConfigError(
            f"knn_entropy: neighbors is {neighbors} with {n} samples; give 1 to {max(n - 1, 1)}"
        )
    if not np.isfinite(samples).all():
        raise DataError("knn_entropy: samples contain NaN or inf; drop those rows")
    radius = cKDTree(samples).query(samples, k=neighbors + 1)[0][:, -1]
    log_ball = 0.5 * d * math.log(math.pi) - gammaln(0.5 * d + 1)
    with np.errstate(divide="ignore"):
        return float(digamma(n) - digamma(neighbors) + log_ball + d * np.log(radius).mean())


def von_neumann_entropy(
    matrix: Float[Tensor, "*batch sample sample"], *, order: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Entropy of the eigenvalues of a density or kernel matrix, -tr(rho log rho) with rho = matrix / trace.

    0 (rank one) to log n nats (all eigenvalues equal). With the Gram matrix of n samples under a normalised kernel
    exp(H) is the Vendi score, an effective number of distinct samples. `order` other than 1 takes the Renyi entropy
    of the eigenvalues (matrix-based Renyi entropy, Sanchez Giraldo et al. 2015).

    Raises:
        DataError: not symmetric positive semi-definite, or zero trace.
    """
    values = _spectrum(matrix, "von_neumann_entropy: matrix")
    total = values.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise DataError("von_neumann_entropy: the trace is 0; there is nothing to normalise")
    return _renyi(_log(values / total), order)


def _log_softmax(logits: Tensor) -> Tensor:
    return at_least_float32(logits).log_softmax(-1)


def _log(probs: Tensor) -> Tensor:
    """log p with -inf at 0, whose gradient there is 0 instead of inf."""
    positive = probs > 0
    return torch.where(positive, torch.where(positive, probs, 1).log(), -math.inf)


def _checked(probs: Tensor) -> Tensor:
    probs = at_least_float32(probs)
    total = probs.detach().sum(-1)
    if not bool((probs.detach() >= 0).all()) or not bool(((total - 1).abs() < 1e-3).all()):
        raise DataError(
            "entropy: probabilities must be non-negative and sum to 1 along the last axis; "
            "divide counts by their sum, or use the function that takes logits or counts"
        )
    return probs


def _spectrum(matrix: Tensor, what: str) -> Tensor:
    """Eigenvalues of a symmetric positive semi-definite matrix, rounding below 0 removed."""
    matrix = at_least_float32(matrix)
    scale = matrix.detach().abs().amax((-2, -1), keepdim=True)
    slack = scale * math.sqrt(torch.finfo(matrix.dtype).eps)
    if not bool(((matrix - matrix.mT).detach().abs() <= slack).all()):  # NaN fails as well
        raise DataError(f"{what} must be symmetric and finite")
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    if not bool((values.detach() >= -slack.squeeze(-1)).all()):
        raise DataError(f"{what} must be positive semi-definite; its least eigenvalue is {values.min():.3g}")
    out: Tensor = values.clamp(min=0)
    return out


def _check_order(order: float, *, finite: bool) -> None:
    if not order >= 0 or (finite and math.isinf(order)):
        raise ConfigError(f"entropy: order is {order}; give a number >= 0{', finite' if finite else ''}")


def _renyi(logp: Tensor, order: float) -> Tensor:
    _check_order(order, finite=False)
    if order == 1:
        return _shannon(logp)
    if order == 0:
        return (logp > -math.inf).sum(-1).to(logp.dtype).log()
    if math.isinf(order):
        return -logp.amax(-1)
    if abs(order - 1) < 0.5:  # sum p^a = 1 + (1 - a) S_a; the logarithm of the sum itself cancels near a = 1
        return torch.log1p((1 - order) * _tsallis(logp, order)) / (1 - order)
    return (order * logp).logsumexp(-1) / (1 - order)


def _tsallis(logp: Tensor, order: float) -> Tensor:
    _check_order(order, finite=True)
    if order == 1:
        return _shannon(logp)
    if order == 0:
        return (logp > -math.inf).sum(-1).to(logp.dtype) - 1
    # p (1 - p^(q-1)) / (q-1), with the factor taken out that keeps the rest within [0, 1]; exact near q = 1
    gap = abs(order - 1)
    return -((min(order, 1.0) * logp).exp() * torch.expm1(gap * logp)).sum(-1) / gap


def _shannon(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)  # exp(-1e4) is 0: no 0 * -inf, values unchanged
