"""The frames that collapse ends in: simplex ETF and general orthogonal frame."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.errors import ConfigError


def simplex_etf(
    classes: int,
    features: int,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "class feature"]:
    """Simplex equiangular tight frame: unit rows that sum to 0, any two with cosine -1/(K-1).

    It lies in the first K - 1 coordinates; with a `generator` it is turned at random.

    Raises:
        ConfigError: fewer than two classes, or fewer than K - 1 features.
    """
    if classes < 2 or features < classes - 1:
        raise ConfigError(
            f"simplex_etf: {classes} classes in {features} features; give at least 2 and 1 less than classes"
        )
    j = torch.arange(1, classes, dtype=torch.float64)
    length = (j * (j + 1)).sqrt()
    basis = (
        torch.ones(classes, classes - 1, dtype=torch.float64).triu() / length
    )  # Helmert: 1-perp, column by column
    basis[1:].diagonal().copy_(-j / length)
    return _turned(basis * math.sqrt(classes / (classes - 1)), features, generator).to(dtype)


def gof_frame(
    lengths: Float[Tensor, " class"], features: int, generator: torch.Generator | None = None
) -> Float[Tensor, "class feature"]:
    """General orthogonal frame: orthogonal rows with these lengths (0 allowed), in float64 or the dtype of `lengths`.

    Along the first coordinates; with a `generator` turned at random.

    Raises:
        ConfigError: more non-zero lengths than features, or a negative length.
    """
    alive = lengths != 0
    count = int(alive.sum())
    if count > features or not bool((lengths >= 0).all()):
        raise ConfigError(
            f"gof_frame: {count} lengths in {features} features; lengths must be >= 0, and no more than features"
        )
    basis = torch.zeros(len(lengths), max(1, count), dtype=torch.float64)
    basis[alive, torch.arange(count)] = lengths[alive].double().cpu()
    return _turned(basis, features, generator).to(lengths)


def _turned(rows: Tensor, features: int, generator: torch.Generator | None) -> Tensor:
    """Rows in more dimensions: padded with zeros, or mapped by a random isometry."""
    width = rows.shape[1]
    if generator is None:
        return torch.nn.functional.pad(rows, (0, features - width))
    turn = torch.linalg.qr(torch.randn(features, width, dtype=torch.float64, generator=generator))[0]
    return rows @ turn.T
