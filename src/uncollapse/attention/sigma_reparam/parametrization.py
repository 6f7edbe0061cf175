"""sigmaReparam as a parametrisation of one weight, and the same without touching the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uncollapse.attention.sigma_reparam.batch import Handed, PowerBatch, version_of
from uncollapse.attention.sigma_reparam.estimate import (
    Start,
    as_blocks,
    full_precision,
    power_step,
    rescaled,
    sigma_of,
    start_vector,
)
from uncollapse.errors import ConfigError, DataError
from uncollapse.inspection.recomputation import recomputing

GammaInit: TypeAlias = Literal["spectral", "one"] | float | int


class SigmaTracker(nn.Module):
    """Tracks the spectral norm of a weight by power iteration and leaves the weight alone.

    Buffers (of each block): `u`, the right vector, kept in checkpoints; `v`, the left one, and `sigma`, the estimate of the
    last step, which are not.

    A training pass takes `n_power_iterations` steps and keeps them; with `update_every` = k only each k-th pass does, and those
    between see the same vectors, as micro-steps of one gradient ought to. A pass is an access to the weight, unless the
    layer tells when one begins (`begin_pass`): then all accesses until the next see the same vectors. An evaluation pass
    takes one step that it does not keep. What activation checkpointing computes again during the backward pass takes none, so that it sees the
    weight of the forward pass.

    Args:
        weight: the first axis is the output; all others are flattened into the input.
        blocks: cut the output into so many equal parts with a norm of their own.
        u_init: "svd", exact from the first pass on, or "random", as in the paper's pseudo-code.

    Raises:
        ConfigError: an option out of range, or blocks that do not divide the output.
        DataError: a zero or non-finite block: no norm to divide by.
    """

    u: Float[Tensor, "block column 1"]
    v: Float[Tensor, "block row 1"]
    sigma: Float[Tensor, "block 1 1"]

    def __init__(
        self,
        weight: Tensor,
        *,
        blocks: int = 1,
        u_init: Start = "svd",
        n_power_iterations: int = 1,
        update_every: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if n_power_iterations < 1 or update_every < 1:
            raise ConfigError(
                f"sigma_reparam: n_power_iterations is {n_power_iterations}, update_every {update_every}; give at least 1"
            )
        if weight.ndim < 2 or blocks < 1 or weight.shape[0] % blocks:
            raise ConfigError(
                f"sigma_reparam: a weight of shape {tuple(weight.shape)} has no {blocks} blocks of rows"
            )
        self.blocks, self.n_power_iterations, self.update_every = blocks, n_power_iterations, update_every
        self.batch: PowerBatch | None = None
        self.handed: Handed | None = None  # a step that the batch took for this layer
        self._pass = 0  # training passes since the last step
        self._fresh: bool | None = (
            None  # whether nobody has read the weight in this pass; None: no pass was told of
        )
        matrix = as_blocks(weight.detach(), blocks)
        v, u, sigma = power_step(matrix, checked_start(matrix, u_init, generator))
        self.register_buffer("u", u)
        self.register_buffer("v", v, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        with full_precision(weight.device.type):
            self.estimate(weight)
        return weight

    def estimate(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors v, u and sigma = v^T W u of this pass, without gradient; no later pass writes into them."""
        matrix = as_blocks(weight.detach(), self.blocks)
        # On a small weight a buffer read as an attribute costs a quarter of a product with that weight.
        held = cast("dict[str, Tensor]", self._buffers)
        start = held["u"] if held["u"].dtype == matrix.dtype else held["u"].to(matrix.dtype)
        if not self.training:
            return power_step(matrix, start)
        if not self._due():
            v, u = (vector.to(matrix.dtype, copy=True) for vector in (self.v, self.u))
            return v, u, sigma_of(matrix, v, u)
        if self.batch is not None:
            v, u, sigma, version = self.batch.take(self)
            return v, u, sigma if version == version_of(weight) else sigma_of(matrix, v, u)
        found = power_step(matrix, start, self.n_power_iterations)
        # in place, since data-parallel wrappers hold on to the buffers
        torch._foreach_copy_([held["v"], held["u"], held["sigma"]], found)
        return found

    def begin_pass(self) -> None:
        """Tell that a forward pass begins; what activation checkpointing computes again is none."""
        if self.training and not recomputing():
            self._fresh = True

    def _due(self) -> bool:
        if self._fresh is False or recomputing():
            return False
        if self._fresh:
            self._fresh = False
        due = self._pass == 0
        if self.update_every > 1:
            self._pass = (self._pass + 1) % self.update_every
        return due

    @torch.no_grad()
    def norms(self, weight: Tensor) -> tuple[Float[Tensor, " block"], Float[Tensor, " block"]]:
        """What an evaluation pass takes for the norm of each block, and the norm itself."""
        matrix = as_blocks(weight, self.blocks)
        _, _, sigma = power_step(matrix, self.u.to(matrix.dtype))
        return sigma.flatten(), torch.linalg.matrix_norm(matrix, 2)

    def _apply(self, *change: Any) -> SigmaTracker:
        self.handed = None  # on another device, or of another dtype, from here on
        return super()._apply(*change)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._pass, self.handed = 0, None  # v and sigma belong to another weight now

    def extra_repr(self) -> str:
        """Shape and schedule."""
        return (
            f"{self.v.shape[1]} x {self.u.shape[1]}, blocks={self.blocks}, "
            f"n_power_iterations={self.n_power_iterations}, update_every={self.update_every}"
        )


class SigmaReparam(SigmaTracker):
    """sigmaReparam: W_hat = (gamma / sigma) W with one learned gamma per block; for `torch.nn.utils.parametrize`.

    The norm of W_hat is gamma up to the error of power iteration, which makes it larger, never smaller. The gradient flows
    through W in sigma = v^T W u and not through u and v, so it is orthogonal to W. Power iteration and division run in
    float32 or better, under autocast too.

    Args:
        gamma_init: "spectral", the sigma of the weight, which changes nothing at first (official PyTorch code); "one" (paper,
            official JAX code); or a number above 0.

    Other arguments, buffers and errors as in `SigmaTracker`. `gamma` has shape (blocks,).
    """

    def __init__(self, weight: Tensor, *, gamma_init: GammaInit = "spectral", **options: Any) -> None:
        super().__init__(weight, **options)
        if gamma_init == "spectral":
            gamma = self.sigma.flatten().clone()
        elif gamma_init == "one" or (isinstance(gamma_init, float | int) and gamma_init > 0):
            gamma = self.sigma.new_full((self.blocks,), 1.0 if gamma_init == "one" else float(gamma_init))
        else:
            raise ConfigError(
                f"sigma_reparam: gamma_init is {gamma_init!r}; give 'spectral', 'one' or a number above 0"
            )
        self.gamma = nn.Parameter(gamma.to(weight.dtype), requires_grad=weight.requires_grad)

    def forward(self, weight: Tensor) -> Tensor:
        """W_hat, of the shape and dtype of the weight."""
        with full_precision(weight.device.type):
            v, u, sigma = self.estimate(weight)
            return rescaled(weight, self.gamma, sigma, v, u)


def checked_start(
    matrix: Float[Tensor, "block row column"], how: Start, generator: torch.Generator | None = None
) -> Float[Tensor, "block column 1"]:
    """`start_vector` of a weight that has a norm to divide by.

    Raises:
        DataError: a zero or non-finite block.
    """
    size = torch.linalg.vector_norm(matrix.detach(), dim=(1, 2))
    if not bool((size.isfinite() & (size > 0)).all()):
        what = "zero" if bool(size.isfinite().all()) else "not finite"
        raise DataError(
            f"the weight is {what}, so it has no norm to divide by; initialise it or leave the layer out"
        )
    return start_vector(matrix, how, generator)
