"""Checkpoints with sigmaReparam into models without, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from uncollapse.attention.sigma_reparam.estimate import as_blocks, power_step
from uncollapse.attention.sigma_reparam.parametrization import SigmaReparam, SigmaTracker, checked_start
from uncollapse.errors import DataError

_FOLDER = "parametrizations."
"""Where `torch.nn.utils.parametrize` keeps what it computes a parameter from."""


def parametrised(module: nn.Module) -> Iterator[tuple[str, SigmaTracker, ParametrizationList]]:
    """Parameters of this very module (not of its children) that a `SigmaTracker` computes, by name."""
    if parametrize.is_parametrized(module):
        for name, found in cast(nn.ModuleDict, module.parametrizations).items():
            assert isinstance(found, ParametrizationList)
            if isinstance(found[0], SigmaTracker):
                yield name, found[0], found


def plain_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a converted model as that of the model without it: W_hat under the old name of the weight.

    W_hat is that of an evaluation pass, what `fuse` bakes in. Everything else is passed on; the input is not changed.
    """
    plain = {}
    for key, value in state.items():
        folder, _, leaf = key.rpartition(".")
        stem, _, last = folder.rpartition(".")
        if leaf in ("u", "gamma") and last == "0" and f"{stem}.original" in state and f"{stem}.0.u" in state:
            continue
        if leaf != "original" or f"{folder}.0.u" not in state:
            plain[key] = value
            continue
        owner, _, name = folder.rpartition(_FOLDER)
        plain[owner + name] = _baked(value, state[f"{folder}.0.u"], state.get(f"{folder}.0.gamma"))
    return plain


@torch.no_grad()
def _baked(weight: Tensor, u: Tensor, gamma: Tensor | None) -> Tensor:
    if gamma is None:
        return weight
    matrix = as_blocks(weight, len(u))
    _, _, sigma = power_step(matrix, u.to(matrix.dtype))
    hat = matrix * (gamma.to(matrix.dtype).view(-1, 1, 1) / sigma)
    return hat.reshape(weight.shape).to(weight.dtype)


def accept_plain_weights(layer: nn.Module) -> None:
    """Let a converted layer load a state dict without sigmaReparam: gamma becomes the norm of the weight that comes."""
    layer.register_load_state_dict_pre_hook(_from_plain)


@torch.no_grad()
def _from_plain(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, tracker, found in parametrised(module):
        weight = state.get(prefix + name)
        folder = f"{prefix}{_FOLDER}{name}."
        if weight is None or f"{folder}original" in state:
            continue
        state[f"{folder}original"] = state.pop(prefix + name)
        if weight.shape != found.original.shape:
            continue  # load_state_dict says so itself
        matrix = as_blocks(weight, tracker.blocks)
        try:
            _, u, sigma = power_step(matrix, checked_start(matrix, "svd"))
        except DataError as error:
            raise DataError(f"{prefix}{name} of the checkpoint: {error}") from error
        state[f"{folder}0.u"] = u.to(tracker.u.dtype)
        if isinstance(tracker, SigmaReparam):
            state[f"{folder}0.gamma"] = sigma.flatten().to(tracker.gamma.dtype)
