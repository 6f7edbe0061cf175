"""Power iteration on a weight, and the weight rescaled by what it finds: the arithmetic of sigmaReparam.

A weight is a stack of matrices (block, row, column): one for a linear layer, one per group for a convolution, three for
queries, keys and values that share a matrix. Each has a norm of its own. Vectors are columns, numbers of a
block have shape (block, 1, 1), so that everything broadcasts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from uncollapse.errors import ConfigError

Start = Literal["svd", "random"]

_LARGE = 1 << 15
"""Elements of a weight from which the gradient is written out: below, a call into Python costs more than it saves."""

_EPS = 1e-12
"""Least norm that a vector is divided by, as in `torch.nn.functional.normalize`."""

_UNCHANGED = nullcontext()


def as_blocks(weight: Tensor, blocks: int) -> Float[Tensor, "block row column"]:
    """The weight as a stack of matrices, in float32 or better: its first axis cut into blocks, all others flattened."""
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    return weight.reshape(blocks, weight.shape[0] // blocks, -1)


def start_vector(
    matrix: Float[Tensor, "block row column"], how: Start, generator: torch.Generator | None = None
) -> Float[Tensor, "block column 1"]:
    """Unit vectors that power iteration starts from.

    "svd": the first right singular vectors, from the eigenvectors of the smaller Gram matrix in float64, which gives
    them as exactly as a singular value decomposition does and several times faster. "random": uniform on the sphere.

    Raises:
        ConfigError: another `how`.
    """
    if how == "random":
        u = torch.randn(len(matrix), matrix.shape[2], 1, generator=generator, dtype=torch.float64)
    elif how == "svd":
        a = matrix.detach().double()
        if a.shape[1] < a.shape[2]:
            u = a.mT @ torch.linalg.eigh(a @ a.mT).eigenvectors[..., -1:]
        else:
            u = torch.linalg.eigh(a.mT @ a).eigenvectors[..., -1:]
    else:
        raise ConfigError(f"sigma_reparam: u_init is {how!r}; give 'svd' or 'random'")
    return F.normalize(u, dim=1).to(matrix)


def power_step(
    matrix: Float[Tensor, "block row column"], u: Float[Tensor, "block column 1"], steps: int = 1
) -> tuple[Float[Tensor, "block row 1"], Float[Tensor, "block column 1"], Float[Tensor, "block 1 1"]]:
    """New left and right vectors and sigma: v = W u / |W u|, u = W^T v / |W^T v|, sigma = v^T W u, of a detached matrix.

    With u along W^T v that sigma is |W^T v|: two products with W for everything. It never exceeds the norm of W.
    """
    for _ in range(steps):
        v = torch.bmm(matrix, u)
        v.div_(torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(_EPS))
        u = torch.bmm(matrix.mT, v)
        sigma = torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min_(_EPS)
        u.div_(sigma)
    return v, u, sigma


def sigma_of(
    matrix: Float[Tensor, "block row column"],
    v: Float[Tensor, "block row 1"],
    u: Float[Tensor, "block column 1"],
) -> Float[Tensor, "block 1 1"]:
    """v^T W u of each block."""
    return torch.bmm(v.mT, torch.bmm(matrix, u))


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off, if it is on: entering the context costs more than some of these products."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _UNCHANGED


class _Rescaled(torch.autograd.Function):
    """(gamma / sigma) W with the gradient of sigma = v^T W u for constant u and v.

    dL/dgamma = <G, W> / sigma and dL/dW = (gamma / sigma) (G - <G, W> / sigma v u^T), in three passes over the weight
    where autograd takes seven. Reshaping and casting are inside, since each would be a node of its own in the graph.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gamma: Tensor, sigma: Tensor, v: Tensor, u: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight, gamma, sigma, v, u)
        return _scaled(weight, gamma, sigma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        weight, gamma, sigma, v, u = ctx.saved_tensors
        with full_precision(weight.device.type):
            matrix, g = as_blocks(weight, len(u)), as_blocks(grad, len(u))
            if torch.is_grad_enabled():  # to be differentiated once more: sigma is a function of the weight
                sigma = sigma_of(matrix, v, u)
            share = torch.bmm(g.reshape(len(u), 1, -1), matrix.view(len(u), -1, 1)) / sigma
            for_weight = None
            if ctx.needs_input_grad[0]:
                scale = gamma.to(sigma.dtype).view(-1, 1, 1) / sigma
                hat = (g * scale).addcmul_(v * (share * scale), u.mT, value=-1)
                for_weight = hat.view(weight.shape).to(weight.dtype)
            for_gamma = share.view(-1).to(gamma.dtype) if ctx.needs_input_grad[1] else None
        return for_weight, for_gamma, None, None, None


def _scaled(weight: Tensor, gamma: Tensor, sigma: Tensor) -> Tensor:
    matrix = as_blocks(weight, len(sigma))
    return (matrix * (gamma.to(sigma.dtype).view(-1, 1, 1) / sigma)).view(weight.shape).to(weight.dtype)


def _defined(weight: Tensor, gamma: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """The definition itself, for autograd to differentiate."""
    if len(u) == 1 and weight.dtype == gamma.dtype == u.dtype:  # vectors take fewer calls than stacks of them
        sigma = torch.dot(v.view(-1), torch.mv(weight.flatten(1), u.view(-1)))
        return weight * (gamma / sigma)
    return _scaled(weight, gamma, sigma_of(as_blocks(weight, len(u)), v, u))


def rescaled(
    weight: Tensor,
    gamma: Float[Tensor, " block"],
    sigma: Float[Tensor, "block 1 1"],
    v: Float[Tensor, "block row 1"],
    u: Float[Tensor, "block column 1"],
) -> Tensor:
    """(gamma / sigma) W by blocks, where `sigma` is v^T W u; of the shape and dtype of the weight.

    Differentiable in `weight` and `gamma`, any number of times, by hand where the weight is large enough for that to pay.
    """
    if weight.numel() < _LARGE or torch._C._are_functorch_transforms_active():
        return _defined(weight, gamma, v, u)
    return _Rescaled.apply(weight, gamma, sigma, v, u)
