"""The model whose minima are known: features as free variables, below a head of M linear layers.

f = L(H W_1^T ... W_M^T + b, y) + sum_m (lam_w[m]/2) |W_m|_F^2 + (lam_h/2) |H|_F^2, rows of H being samples, L a mean over
the N samples: (1/2N) sum |z - onehot(y)|^2 or cross-entropy in nats. The bias, if any, is not penalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from uncollapse.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of logits (sample, class) and labels: `squared_error` or `cross_entropy`."""


def squared_error(logits: Float[Tensor, "sample class"], y: Int[Tensor, " sample"]) -> Float[Tensor, ""]:
    """(1/2N) sum_i |z_i - onehot(y_i)|^2: the sum over classes, not their mean."""
    target = functional.one_hot(y, logits.shape[1]).to(logits.dtype)
    return (logits - target).square().sum() / (2 * len(y))


def cross_entropy(logits: Float[Tensor, "sample class"], y: Int[Tensor, " sample"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, nats."""
    return functional.cross_entropy(logits, y)


@dataclass(frozen=True)
class Factors:
    """A point of the model: `layers` W_1 to W_M as (out, in), `features` H, and a bias or None."""

    layers: tuple[Float[Tensor, "_ _"], ...]
    features: Float[Tensor, "sample feature"]
    bias: Float[Tensor, " class"] | None = None

    def at(self, layer: int) -> tuple[Float[Tensor, "sample width"], Float[Tensor, "class width"]]:
        """What enters layer m = 1 to M, and the map W_M ... W_m from there to the logits: what NC metrics are taken of."""
        features, head = self.features, self.layers[-1]
        for weight in self.layers[: layer - 1]:
            features = features @ weight.T
        for weight in reversed(self.layers[layer - 1 : -1]):
            head = head @ weight
        return features, head

    def logits(self) -> Float[Tensor, "sample class"]:
        """H W_1^T ... W_M^T + b; the head is multiplied out first, since classes are few."""
        out = self.features @ self.at(1)[1].T
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class UFM:
    """Unconstrained features model: samples per class, penalty of each layer W_1 to W_M, penalty of the features."""

    counts: tuple[int, ...]
    lam_w: tuple[float, ...]
    lam_h: float

    @classmethod
    def make(
        cls,
        n_per_class: Sequence[int],
        depth: int,
        lam_w: SupportsFloat | Sequence[SupportsFloat],
        lam_h: SupportsFloat,
    ) -> UFM:
        """`lam_w`: one penalty for all layers, or one for each.

        Raises:
            ConfigError: fewer than two classes, an empty class, no layer, or a penalty that is not above 0.
        """
        if len(n_per_class) < 2 or min(n_per_class) < 1:
            raise ConfigError(
                f"nc-deep-linear: counts {list(n_per_class)}; give at least two classes of at least one sample"
            )
        if depth < 1:
            raise ConfigError(f"nc-deep-linear: depth is {depth}; the head needs at least one layer")
        weights = tuple(map(float, lam_w)) if isinstance(lam_w, Iterable) else (float(lam_w),) * depth
        features = float(lam_h)
        if len(weights) != depth or not all(0 < lam < math.inf for lam in (*weights, features)):
            raise ConfigError(
                f"nc-deep-linear: penalties {weights} and {lam_h} for depth {depth}; give one per layer, all above 0"
            )
        return cls(tuple(int(n) for n in n_per_class), weights, features)

    @property
    def classes(self) -> int:
        """K."""
        return len(self.counts)

    @property
    def samples(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def depth(self) -> int:
        """M."""
        return len(self.lam_w)

    @property
    def lam(self) -> float:
        """Geometric mean of the penalties of the layers: all that the minimum knows of them."""
        return math.prod(self.lam_w) ** (1 / self.depth)

    @property
    def labels(self) -> Int[Tensor, " sample"]:
        """Labels of the samples, class by class."""
        return torch.arange(self.classes).repeat_interleave(torch.tensor(self.counts))

    def penalty(self, factors: Factors) -> Float[Tensor, ""]:
        """What the regularisers add."""
        pairs = zip((*self.lam_w, self.lam_h), (*factors.layers, factors.features), strict=True)
        return torch.stack([lam / 2 * part.square().sum() for lam, part in pairs]).sum()

    def objective(self, factors: Factors, loss: Loss) -> Float[Tensor, ""]:
        """f at this point; samples class by class."""
        return loss(factors.logits(), self.labels.to(factors.features.device)) + self.penalty(factors)


def balanced_factors(
    problem: UFM,
    logits: Float[Tensor, "class class"],
    widths: Sequence[int],
    *,
    bias: Float[Tensor, " class"] | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """The cheapest factors that give these logits: every sample of class k gets row k, less the bias.

    At any critical point all factors share their singular vectors where they meet, and lam_m s_m^2 is the same for all
    of them (spec: Garrod and Keating). So with s the singular values of diag(sqrt n) Z, factor m has
    s_m^2 = (prod lam)^(1/(M+1)) s^(2/(M+1)) / lam_m. Without `generator` the bases are the first coordinates.

    Args:
        widths: features, then the width of every hidden layer: M numbers, each at least the rank of the logits.

    Raises:
        ConfigError: another number of widths, or one below the rank.
    """
    scale = torch.tensor(problem.counts, dtype=torch.float64).sqrt()
    left, values, right = torch.linalg.svd(scale[:, None] * logits.double(), full_matrices=False)
    rank = max(1, int((values > 1e-13 * values[0]).sum()))
    if len(widths) != problem.depth or min(widths) < rank:
        raise ConfigError(
            f"balanced_factors: widths {list(widths)} for depth {problem.depth} and rank {rank}; "
            "give the features and every hidden width, none below the rank"
        )
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    lams = (problem.lam_h, *problem.lam_w)
    power = math.prod(lams) ** (1 / len(lams)) * values ** (2 / len(lams))
    sizes = [(power / lam).sqrt() for lam in lams]
    bases = [_basis(width, rank, generator) for width in widths]
    means = (left / scale[:, None] * sizes[0]) @ bases[0].T
    outs = [*bases[1:], right.T]
    layers = tuple((out * size) @ inner.T for out, size, inner in zip(outs, sizes[1:], bases, strict=True))
    return Factors(layers, means[problem.labels], bias)


def _basis(width: int, rank: int, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.eye(width, rank, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=generator))[0]
    return basis
