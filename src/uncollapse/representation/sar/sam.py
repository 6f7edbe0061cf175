"""Sharpness-aware minimisation (SAM) around any optimiser: the gradient is taken where the loss is worst nearby.

    eps = rho g / (||g|| + 1e-12),   theta <- optimiser step from theta with the gradient at theta + eps

Source: Foret et al. (2021), arXiv 2010.01412. Differs from davda54/sam, which SAR's code uses: state belongs to the wrapped
optimiser alone and is saved and loaded with it; parameters come back even if the second pass raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from uncollapse.errors import ConfigError


def grad_norm(params: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm of the gradients of all parameters jointly, float32 or better; 0 without any."""
    work = torch.promote_types(params[0].dtype, torch.float32)
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.grad.dtype, torch.float32))
        for p in params
        if p.grad is not None
    ]
    if not norms:
        return params[0].new_zeros((), dtype=work)
    return torch.linalg.vector_norm(torch.stack([norm.to(params[0].device, work) for norm in norms]))


class SAM:
    """Wraps an optimiser; learning-rate schedules and parameter groups stay those of `optimizer`.

    Keep parameters in float32: in half precision most of a small eps is rounded away (`Tent` and `SAR` see to it themselves).

    Args:
        optimizer: any `torch.optim.Optimizer`.
        rho: radius of the neighbourhood, Euclidean norm over all its parameters jointly, >= 0.

    Raises:
        ConfigError: rho negative or not finite.
    """

    def __init__(self, optimizer: Optimizer, *, rho: float = 0.05) -> None:
        if not 0 <= rho < math.inf:
            raise ConfigError(f"SAM: rho is {rho}; give a finite radius of at least 0")
        self.optimizer, self.rho = optimizer, rho

    @property
    def params(self) -> list[Tensor]:
        """Every parameter of the optimiser."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextmanager
    def perturbed(self) -> Iterator[Float[Tensor, ""]]:
        """Inside, parameters stand at theta + eps and have no gradient yet; yields ||g|| at theta.

        Afterwards they are exactly what they were, copied back rather than subtracted, and keep the gradients that the
        pass inside gave them.
        """
        with torch.no_grad():
            norm = grad_norm(self.params)
            scale = self.rho / (norm + 1e-12)
            moved = [(p, p.detach().clone(), p.grad) for p in self.params if p.grad is not None]
            for p, _, grad in moved:
                p.add_(grad * scale.to(p.device))
        self.optimizer.zero_grad(set_to_none=True)
        try:
            yield norm
        finally:
            with torch.no_grad():
                for p, before, _ in moved:
                    p.copy_(before)

    def step(self, closure: Callable[[], Any]) -> Any:
        """One step: `closure` computes the loss and calls `backward`; it runs twice. Returns the loss at theta."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = closure()
            with self.perturbed():
                closure()
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped optimiser."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back a state of the wrapped optimiser."""
        self.optimizer.load_state_dict(state)
