"""Nets without norm layers, which sigmaReparam makes trainable."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from uncollapse.attention.sigma_reparam.selection import matches
from uncollapse.errors import ConfigError

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class NoNorm(nn.Identity):
    """What is left of a norm layer: nothing.

    `eps` differs from itself, so that `nn.TransformerEncoderLayer` does not take its fused path, which reads norm weights.
    """

    eps = math.nan


def remove_norms(model: nn.Module, *, exclude: Sequence[str] = ()) -> nn.Module:
    """Replace layer, RMS, group, batch and instance norms by nothing, in place; for nets that train without them.

    Norm classes of other libraries are known by their names (`LlamaRMSNorm`). Returns the model.

    Raises:
        ConfigError: a model without any.
    """
    found = [
        name
        for name, layer in model.named_modules()
        if name
        and not matches(name, exclude)
        and (isinstance(layer, _NORMS) or type(layer).__name__.endswith(("RMSNorm", "LayerNorm")))
    ]
    if not found:
        raise ConfigError("remove_norms: found no layer, RMS, group, batch or instance norm in this model")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, NoNorm())
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False  # that path reads norm weights as well
    return model
