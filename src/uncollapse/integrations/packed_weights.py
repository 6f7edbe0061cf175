"""Generation on a CPU: weights in the layout of oneDNN, which multiplies few rows at the speed of memory.

A decoding step multiplies one row per completion with every weight of the model, so that reading the weights bounds it.
PyTorch's own product of few rows by a row-major weight reads them at a third of the bandwidth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROWS = 64
"""Rows above which a product is bound by arithmetic, where the layout no longer matters."""


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """While open, the float32 linear layers of a model on a CPU multiply up to `MOST_ROWS` rows with packed weights.

    For inference with about `rows` rows: results differ by rounding, no gradient reaches the weights, and the packed
    copy is made when the context opens, so that the weights must not change within. Costs one copy of the weights.
    """
    layers: list[Any] = [m for m in model.modules() if _fits(m)] if _available() else []
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = functools.partial(_linear, layer, packed)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _linear(layer: Any, packed: Tensor, x: Tensor) -> Any:
    if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype != torch.float32 or torch.is_grad_enabled():
        return nn.functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")


def _fits(layer: nn.Module) -> bool:
    # A layer with a forward of its own was patched by somebody else, who may rely on it.
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
