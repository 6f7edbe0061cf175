"""How the minimiser answers to a change of the features it is tied to (theorem 4.1), without any matrix of size dN.

Notation, for a minimiser (W, H) of the tied objective, everything multiplied by N: error R = H W^T - Y,
A = (W^T W + (lam_h + beta) I)^-1, P = H^T H + n lam_w I. A change V of H changes the gradient in W by C^T V, a change Z of W
that in H by C Z:

    C Z = H Z^T W + R Z        C^T V = W V^T H + R^T V
    curvature(V) = V (W^T W + lam_h I) - C[(C^T V) P^-1]         Hessian of L(H), the head minimised out
    F V = beta (curvature + beta I)^-1 V = beta [V + C Z] A      with (Z P - C^T[(C Z) A]) = C^T[V A]

The last line is the Woodbury identity: the unknown Z has only K d entries, and in its equation samples enter through
H^T H, R^T H and R^T R alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from uncollapse.errors import DataError
from uncollapse.representation.nc_perturbation.moments import check_penalties, one_hot


@dataclass(frozen=True)
class HeadHessian:
    """The Hessian in W once the features are minimised out: Z -> Z P - C^T[(C Z) A], K d by K d, never formed.

    `gram` = H^T H, `cross` = R^T H, `error` = R^T R, `shrink` = A, `penalty` = n lam_w.
    """

    W: Float[Tensor, "class feature"]
    gram: Float[Tensor, "feature feature"]
    cross: Float[Tensor, "class feature"]
    error: Float[Tensor, "class class"]
    shrink: Float[Tensor, "feature feature"]
    penalty: float | Float[Tensor, ""]

    def apply(self, Z: Float[Tensor, "*batch class feature"]) -> Float[Tensor, "*batch class feature"]:
        """Hessian times Z."""
        narrow = self.W @ self.shrink
        seen = (narrow @ self.W.T) @ Z @ self.gram + self.error @ Z @ self.shrink
        crossed = narrow @ Z.mT @ self.cross + self.cross @ Z.mT @ narrow
        return self.majorant(Z) - seen - crossed

    def majorant(self, Z: Float[Tensor, "*batch class feature"]) -> Float[Tensor, "*batch class feature"]:
        """Z P: the Hessian with the features held, never below the other; its Newton step is exact alternation."""
        return Z @ self.gram + self.penalty * Z

    def solve(
        self, right: Float[Tensor, "*batch class feature"], damping: float = 0.0
    ) -> tuple[Float[Tensor, "*batch class feature"], Float[Tensor, "*batch class feature"] | None]:
        """Solution for each right side by conjugate gradients, preconditioned with P; and where it met no curvature.

        `damping` times `majorant` is added to the Hessian. The second value is None if all was convex, else directions along which the Hessian is zero or negative (zeros for
        right sides that met none); the solution is then the one before that step.
        """
        identity = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        factor = torch.linalg.cholesky(self.gram + self.penalty * identity)
        inverse = torch.cholesky_inverse(factor)
        solution, residual = torch.zeros_like(right), right
        smooth = residual @ inverse
        direction, strength = smooth, _dot(residual, smooth)
        limit = strength * (1e3 * torch.finfo(right.dtype).eps) ** 2
        bad = torch.zeros_like(right)
        running = strength > 0
        for _ in range(2 * right.shape[-1] * right.shape[-2] + 20):
            if not bool(running.any()):
                break
            above = self.majorant(direction)
            image = self.apply(direction) + damping * above
            curvature, size = _dot(direction, image), _dot(direction, above)
            flat = running & (curvature <= 1e-12 * size)
            bad = torch.where(flat, direction, bad)
            running = running & ~flat
            step = torch.where(running, strength / torch.where(running, curvature, 1.0), 0.0)
            solution = solution + step * direction
            residual = residual - step * image
            smooth = residual @ inverse
            ahead = _dot(residual, smooth)
            direction = (
                smooth + torch.where(running, ahead / torch.where(running, strength, 1.0), 0.0) * direction
            )
            strength = torch.where(running, ahead, strength)
            running = running & (strength > limit)
        return solution, bad if bool((bad != 0).any()) else None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)


class LinearResponse(LinearOperator):  # type: ignore[misc]
    """dH0 -> dH as a SciPy operator on flattened features (sample by sample), and as a function of tensors.

    Symmetric, eigenvalues in (0, 1]. `apply` takes features of the shape of H, batched over leading axes, on the
    device and in the dtype of H; `@`, `scipy.sparse.linalg.eigsh` and the like take NumPy vectors of length N d.
    """

    def __init__(
        self,
        W: Float[Tensor, "class feature"],
        H: Float[Tensor, "sample feature"],
        y: Integer[Tensor, " sample"],
        lam_w: float,
        lam_h: float,
        beta: float,
        exact: bool = True,
    ) -> None:
        check_penalties(lam_w, lam_h, beta)
        self.head, self.features, self.beta, self.exact = W.detach(), H.detach(), beta, exact
        self._error = self.features @ self.head.T - one_hot(y, len(W), H.dtype)
        penalty = lam_w * len(H) / len(W)
        identity = torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
        gram = self.features.T @ self.features
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + penalty * identity))
        self._pull = self.head.T @ self.head + lam_h * identity
        self._shrink = torch.cholesky_inverse(torch.linalg.cholesky(self._pull + beta * identity))
        self._hessian = HeadHessian(
            self.head, gram, self._error.T @ self.features, self._error.T @ self._error, self._shrink, penalty
        )
        super().__init__(np.dtype(str(H.dtype).removeprefix("torch.")), (H.numel(), H.numel()))

    def apply(self, change: Float[Tensor, "*batch sample feature"]) -> Float[Tensor, "*batch sample feature"]:
        """dH for a change dH0.

        Raises:
            DataError: (W, H) is no strict minimum, so there is no response.
        """
        if not self.exact:
            return change - self.curvature(change) / self.beta
        smooth = change @ self._shrink
        Z, bad = self._hessian.solve(self._to_head(smooth))
        if bad is not None:
            raise DataError(
                "linear_response: the Hessian has a direction of no curvature; give a strict minimum of the tied objective "
                "(proximal_features finds one) and the beta it belongs to"
            )
        return self.beta * (smooth + self._to_features(Z) @ self._shrink)

    def head_change(
        self, change: Float[Tensor, "*batch sample feature"]
    ) -> Float[Tensor, "*batch class feature"]:
        """dW for a change dH of the *output* features: -(C^T dH) P^-1."""
        return -self._to_head(change) @ self._inverse

    def curvature(
        self, change: Float[Tensor, "*batch sample feature"]
    ) -> Float[Tensor, "*batch sample feature"]:
        """N times the Hessian of L at H, applied: zero along rotations of a collapsed minimiser."""
        return change @ self._pull - self._to_features(self._to_head(change) @ self._inverse)

    def _to_head(self, V: Tensor) -> Tensor:
        """C^T V."""
        return self.head @ V.mT @ self.features + self._error.T @ V

    def _to_features(self, Z: Tensor) -> Tensor:
        """C Z."""
        return self.features @ Z.mT @ self.head + self._error @ Z

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        change = torch.as_tensor(
            np.ascontiguousarray(x.T), dtype=self.features.dtype, device=self.features.device
        )
        answer: np.ndarray = self.apply(change.reshape(-1, *self.features.shape)).flatten(1).T.cpu().numpy()
        return answer

    def _adjoint(self) -> LinearResponse:
        return self

    _transpose = _adjoint


def linear_response(
    W: Float[Tensor, "class feature"],
    H: Float[Tensor, "sample feature"],
    y: Integer[Tensor, " sample"],
    lam_w: float,
    lam_h: float,
    beta: float,
    exact: bool = True,
) -> LinearResponse:
    """F at the minimiser (W, H) of the objective tied with `beta`; `exact=False` for its first order in 1/beta.

    One application costs O(N d (d + K)) and, if exact, conjugate gradients on a K x d unknown.

    Source: arXiv 2210.16658, theorem 4.1 and its large-beta form. Raises `ConfigError` for penalties that the theorem
    excludes.
    """
    return LinearResponse(W, H, y, lam_w, lam_h, beta, exact)
