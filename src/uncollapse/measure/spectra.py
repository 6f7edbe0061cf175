"""How many dimensions a matrix, a set of features or a covariance really uses.

All take singular values s (or the matrices themselves, batched over leading axes), s >= 0; none depends on the scale
of the matrix except `spectral_norm`. Zero matrices have rank 0, and NaN where a ratio is asked for.

Differs from the paper: Roy and Vetterli normalise singular values; a covariance has their squares as eigenvalues,
so `effective_rank` of a feature matrix differs from that of its covariance. `SecondMoment` returns singular
values, on the same footing as the feature matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.measure.precision import at_least_float32


def singular_values(matrix: Float[Tensor, "*batch row feature"]) -> Float[Tensor, "*batch value"]:
    """Singular values, largest first; float32 or better.

    Raises:
        DataError: NaN or inf.
    """
    x = at_least_float32(matrix)
    if not bool(x.detach().isfinite().all()):
        raise DataError("singular_values: the matrix contains NaN or inf")
    out: Tensor = torch.linalg.svdvals(x)
    return out


def effective_rank(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    """Effective rank exp(-sum q log q), q = s / sum s: 1 to the number of values; 0 for a zero matrix.

    Source: Roy and Vetterli (2007), definition 1.
    """
    values = _checked(values)
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total > 0, total, 1)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(share).sum(-1).exp(), 0)


def stable_rank(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    """Stable rank ||A||_F^2 / ||A||_2^2 = sum s^2 / max s^2: 1 to the rank; 0 for a zero matrix.

    Source: Rudelson and Vershynin (2007).
    """
    share = _relative(values)
    return share.square().sum(-1)


def participation_ratio(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    """Participation ratio (sum l)^2 / sum l^2 of the covariance eigenvalues l = s^2; 0 for a zero matrix.

    1 to the number of values: the dimension of a Gaussian cloud with equal variances that is as concentrated.

    Source: Gao et al. (2017), bioRxiv 214262.
    """
    power = _relative(values).square()
    total = power.sum(-1)
    return torch.where(total > 0, total.square() / power.square().sum(-1).clamp(min=1), 0)


def numerical_rank(
    values: Float[Tensor, "*batch value"], *, tolerance: float | None = None
) -> Int[Tensor, "*batch"]:
    """Count singular values above `tolerance` times the largest.

    Default tolerance: number of values times the rounding unit of the dtype. That of `numpy.linalg.matrix_rank`
    takes the longer side of the matrix instead: pass `max(shape) * eps` to agree with it.

    Raises:
        ConfigError: tolerance outside [0, 1).
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"numerical_rank: tolerance is {tolerance}; give a number from 0 to below 1")
    limit = values.shape[-1] * torch.finfo(values.dtype).eps if tolerance is None else tolerance
    return (_relative(values) > limit).sum(-1)


def condition_number(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    """Largest over smallest singular value, >= 1; inf if singular, NaN for a zero matrix."""
    values = _checked(values)
    return values.amax(-1) / values.amin(-1)


def spectral_norm(
    matrix: Float[Tensor, "*batch row feature"], *, start: Float[Tensor, "*batch feature"], steps: int = 30
) -> Float[Tensor, "*batch"]:
    """Largest singular value by power iteration on A^T A from the vector `start`; for the exact one, `singular_values`.

    A lower bound that grows with every step, with relative error about (s2/s1)^(4 steps): slow if the two largest
    are close, and wrong if `start` is orthogonal to the first right singular vector. Differentiable: the
    iteration is outside the graph, the value u^T A v is in it.

    Raises:
        ConfigError: steps below 1.
        DataError: a zero start vector.
    """
    if steps < 1:
        raise ConfigError(f"spectral_norm: steps is {steps}; give at least 1")
    if not bool((start != 0).any(-1).all()):
        raise DataError("spectral_norm: the start vector is zero; give a random one")
    with torch.no_grad():
        v = torch.nn.functional.normalize(start, dim=-1)
        for _ in range(steps):
            u = torch.nn.functional.normalize((matrix @ v.unsqueeze(-1)).squeeze(-1), dim=-1)
            v = torch.nn.functional.normalize((matrix.mT @ u.unsqueeze(-1)).squeeze(-1), dim=-1)
        u = torch.nn.functional.normalize((matrix @ v.unsqueeze(-1)).squeeze(-1), dim=-1)
    return (u.unsqueeze(-2) @ matrix @ v.unsqueeze(-1)).squeeze((-2, -1))


@dataclass(frozen=True)
class SecondMoment:
    """Running mean and scatter of feature vectors, for spectra of more rows than fit in memory.

    `SecondMoment.empty(d).add(x).add(y)` equals one pass over both; moments of two processes merge with `+`.
    Accumulated in float64 about the running mean (Chan et al. 1979), so that a large mean does not drown the spread.
    """

    count: int
    mean: Float[Tensor, " feature"]
    scatter: Float[Tensor, "feature feature"]

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> SecondMoment:
        """Nothing seen yet."""
        mean = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(0, mean, mean.new_zeros(features, features))

    def add(
        self, rows: Float[Tensor, "*batch feature"], *, mask: Bool[Tensor, "*batch"] | None = None
    ) -> SecondMoment:
        """Take more rows; those outside the mask do not exist."""
        x = (rows.detach().reshape(-1, rows.shape[-1]) if mask is None else rows.detach()[mask]).double()
        if not len(x):
            return self
        mean = x.mean(0)
        return self + SecondMoment(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """Merge two disjoint sets of rows."""
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.count * other.count / count)
        return SecondMoment(count, self.mean + gap * (other.count / count), scatter)

    def covariance(self) -> Float[Tensor, "feature feature"]:
        """Unbiased covariance.

        Raises:
            DataError: fewer than two rows.
        """
        if self.count < 2:
            raise DataError(f"SecondMoment: {self.count} rows seen; a covariance needs two")
        return self.scatter / (self.count - 1)

    def singular_values(self, *, about: str = "mean") -> Float[Tensor, " feature"]:
        """Singular values of the matrix of all rows seen, largest first, about their "mean" or the "origin".

        From the eigenvalues of its Gram matrix: values below about 1e-8 of the largest are rounding.

        Raises:
            ConfigError: another `about`.
        """
        if about not in ("mean", "origin"):
            raise ConfigError(f"SecondMoment: about is {about!r}; give 'mean' or 'origin'")
        gram = self.scatter
        if about == "origin":
            gram = gram + torch.outer(self.mean, self.mean) * self.count
        out: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)
        return out


def _checked(values: Tensor) -> Tensor:
    if not bool((values.detach() >= 0).all()):
        raise DataError("spectra: singular values must not be negative or NaN; pass singular_values(matrix)")
    return values


def _relative(values: Tensor) -> Tensor:
    """Values over the largest; zeros stay zeros. Squares then neither overflow nor vanish."""
    values = _checked(values)
    top = values.amax(-1, keepdim=True)
    return values / torch.where(top > 0, top, 1)
