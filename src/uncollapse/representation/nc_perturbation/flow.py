"""The central path: features that follow minus the gradient while the head stays optimal (theorem 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Integer
from scipy.integrate import solve_ivp
from torch import Tensor

from uncollapse.errors import ConfigError, DataError
from uncollapse.representation.nc_perturbation.moments import PooledMoments, check_penalties, pooled_moments
from uncollapse.representation.nc_perturbation.objective import ridge


@dataclass(frozen=True)
class CentralPath:
    """The path at times `t` (1/beta to first order): traces of within- and between-class covariance, and NC1~.

    Every sample is at `means[class] + (h0 - start[class]) @ maps`, `start` the class means of H0, so `H_t` is made only when it is asked for.
    """

    t: Float[Tensor, " time"]
    trace_w: Float[Tensor, " time"]
    trace_b: Float[Tensor, " time"]
    nc1: Float[Tensor, " time"]
    maps: Float[Tensor, "time feature feature"] = field(repr=False)
    means: Float[Tensor, "time class feature"] = field(repr=False)
    start: Float[Tensor, "class feature"] = field(repr=False)
    H0: Float[Tensor, "sample feature"] = field(repr=False)
    y: Integer[Tensor, " sample"] = field(repr=False)

    def features(self, at: int = -1) -> Float[Tensor, "sample feature"]:
        """The features at time `t[at]`."""
        within = self.H0.to(self.means.dtype) - self.start[self.y]
        return (self.means[at][self.y] + within @ self.maps[at]).to(self.H0.dtype)

    @property
    def H_t(self) -> Float[Tensor, "time sample feature"]:
        """The features at all times: time x sample x feature numbers."""
        return torch.stack([self.features(at) for at in range(len(self.t))])


def central_path_flow(
    H0: Float[Tensor, "sample feature"],
    y: Integer[Tensor, " sample"],
    lam_w: float,
    lam_h: float,
    t_span: tuple[float, float],
    *,
    t_eval: Sequence[float] | None = None,
    num_classes: int | None = None,
    method: str = "DOP853",
    rtol: float = 1e-10,
    atol: float = 1e-12,
) -> CentralPath:
    """Solve dH/dt = -[(H W*^T - Y) W* + lam_h H], W* = W*(H), from H0; at every accepted step, or at `t_eval`.

    Theorem 3.1, balanced classes: NC1~ strictly falls, exp(2 lam_h t) trace_w falls, exp(2 lam_h t) trace_b strictly
    grows. Solved by `scipy.integrate.solve_ivp` in float64 on the moments of the classes, O(d^3) per evaluation
    whatever N; results come back in the device of H0. Rates reach 1 / (4 lam_w): for a tiny lam_w take a stiff `method`
    ("LSODA", "Radau").

    Source: arXiv 2210.16658, section 3. Raises `ConfigError` for penalties that the theorem excludes and times that do
    not increase from `t_span[0]`, `DataError` for unusable features or a solver that gives up.
    """
    check_penalties(lam_w, lam_h)
    if not t_span[0] < t_span[1]:
        raise ConfigError(f"central_path_flow: t_span is {t_span}; give an earlier and a later time")
    start = pooled_moments(H0, y, num_classes)
    local = PooledMoments(start.counts.cpu(), start.means.cpu(), start.scatter.cpu())
    K, d = local.means.shape
    penalty = lam_w * local.samples / K
    identity = torch.eye(d, dtype=torch.float64)

    def shrinkage(t: float | Tensor) -> Tensor:
        """What lam_h alone does to deviations; exact, so that the solver's error is not all that is left of them."""
        return torch.exp(-lam_h * (torch.as_tensor(t, dtype=torch.float64) - t_span[0]))

    def velocity(t: float, state: np.ndarray) -> np.ndarray:
        linear, means = torch.from_numpy(state).split([d, K])
        now = local.moved(shrinkage(t) * linear, means)
        W = ridge(now.sums, now.gram, penalty)
        seen = W.T @ W
        return torch.cat([-linear @ seen, W - means @ seen - lam_h * means]).numpy()

    solution = solve_ivp(
        lambda t, flat: velocity(t, flat.reshape(d + K, d)).ravel(),
        t_span,
        torch.cat([identity, local.means]).numpy().ravel(),
        method=method,
        t_eval=None if t_eval is None else np.asarray(t_eval, dtype=np.float64),
        rtol=rtol,
        atol=atol,
    )
    if not solution.success:
        raise DataError(
            f"central_path_flow: the solver gave up at t = {solution.t[-1]:g}: {solution.message}"
        )
    maps, means = torch.from_numpy(solution.y.T.reshape(-1, d + K, d).copy()).split([d, K], dim=1)
    maps = shrinkage(torch.from_numpy(solution.t))[:, None, None] * maps
    course = [local.moved(*pair) for pair in zip(maps, means, strict=True)]
    place = H0.device
    return CentralPath(
        torch.from_numpy(solution.t).to(place),
        torch.stack([now.trace_w for now in course]).to(place),
        torch.stack([now.trace_b for now in course]).to(place),
        torch.stack([now.nc1 for now in course]).to(place),
        maps.to(place),
        means.to(place),
        start.means,
        H0.detach(),
        y.long(),
    )
