"""Layers that are born with sigmaReparam, initialised as in the official code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from uncollapse.attention.sigma_reparam.checkpoints import accept_plain_weights, parametrised
from uncollapse.attention.sigma_reparam.parametrization import SigmaReparam, SigmaTracker

INIT_STD = 0.02


def attach(layer: nn.Module, name: str, tracker: SigmaTracker) -> None:
    """Compute the parameter `name` of a layer through `tracker`, and let the layer load checkpoints without it."""
    parametrize.register_parametrization(
        layer, name, tracker, unsafe=True
    )  # its checks would take a power step
    accept_plain_weights(layer)
    if isinstance(layer, nn.MultiheadAttention):
        _tell_of_passes(type(layer))


def _tell_of_passes(kind: type[nn.Module]) -> None:
    """Let a parametrised layer tell its trackers when a pass begins, since it reads its weight several times in one.

    torch's attention reads it three times. Not by a hook: the fused kernel that evaluation of an encoder takes refuses
    layers with hooks. A parametrised layer has a class of its own, which `fuse` takes away.
    """
    if "forward" in vars(kind):
        return  # another weight of this layer has seen to it
    plain = kind.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for _, tracker, _ in parametrised(self):
            tracker.begin_pass()
        return plain(self, *args, **kwargs)

    kind.forward = forward  # type: ignore[method-assign]


def initialise(layer: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Weights normal with `std` (cut at +-2, so hardly ever), zero bias."""
    for name, parameter in layer.named_parameters(recurse=False):
        if name.endswith("weight"):
            nn.init.trunc_normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class SigmaReparamLinear(nn.Linear):
    """`nn.Linear` with sigmaReparam; weights drawn with standard deviation 0.02 `init_multiplier`, zero bias.

    `sigma` takes the options of `SigmaReparam`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init_multiplier: float = 1.0,
        sigma: dict[str, Any] | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        initialise(self, INIT_STD * init_multiplier)
        attach(self, "weight", SigmaReparam(self.weight, **(sigma or {})))


class SigmaReparamConv2d(nn.Conv2d):
    """`nn.Conv2d` with sigmaReparam on the matrix (output, input * height * width) of each group; see `SigmaReparamLinear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        init_multiplier: float = 1.0,
        sigma: dict[str, Any] | None = None,
        **convolution: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **convolution)
        initialise(self, INIT_STD * init_multiplier)
        attach(self, "weight", SigmaReparam(self.weight, **({"blocks": self.groups} | (sigma or {}))))
