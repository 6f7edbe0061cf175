"""Statistics per position that stages may ask for, at the policy temperature. All in nats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.policy.batch import Stat


@dataclass(frozen=True)
class Logp(Stat):
    """log pi of the sampled token."""

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The log-probability."""
        return torch.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]


@dataclass(frozen=True)
class Entropy(Stat):
    """Shannon entropy of the next-token distribution."""

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The entropy."""
        logp = torch.log_softmax(logits, dim=-1)
        return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1)


@dataclass(frozen=True)
class KL(Stat):
    """KL(pi || other) over the whole vocabulary; `against` names the other policy."""

    def of(
        self,
        logits: Float[Tensor, "n vocab"],
        token: Int[Tensor, " n"],
        other: Float[Tensor, "n vocab"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The divergence; needs `other`."""
        if other is None:
            raise ValueError("an exact divergence needs the other policy's logits")
        logp, logq = torch.log_softmax(logits, dim=-1), torch.log_softmax(other, dim=-1)
        return (logp.exp() * (logp - logq)).sum(dim=-1)
